//! SIGINT, SIGTERM and SIGHUP end a process in order.

use std::io;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};

/// A signal that comes so soon after the first is the same: timeout(1) sends one to its child and one to the group of
/// both.
const ECHO: Duration = Duration::from_millis(100);

/// Signals cannot be waited for.
#[derive(Debug, thiserror::Error)]
#[error("cannot wait for signals: {0}")]
pub struct SignalError(#[from] io::Error);

/// Calls `stop` when the first of the signals arrives; a second one that is no echo of it ends the process at once.
/// Must be called before other threads are started, so that they inherit the mask.
pub fn wait_for_stop_signal(stop: impl FnOnce() + Send + 'static) -> Result<(), SignalError> {
    let mut signals = SigSet::empty();
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().for_each(|signal| signals.add(signal));
    signals.thread_block().map_err(io::Error::from)?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if signals.wait().is_ok() {
            let first = Instant::now();
            log::info!("stopping");
            stop();
            // Whoever insists does not want to wait for a slow disk.
            while signals.wait().is_ok() {
                if first.elapsed() > ECHO {
                    log::warn!("stopped by a second signal: what was under way was not waited for");
                    log::logger().flush();
                    std::process::exit(1);
                }
            }
        }
    })?;
    Ok(())
}
