//! SIGINT, SIGTERM and SIGHUP end a process in order.

use std::io;

use nix::sys::signal::{SigSet, Signal};

/// Signals cannot be waited for.
#[derive(Debug, thiserror::Error)]
#[error("cannot wait for signals: {0}")]
pub struct SignalError(#[from] io::Error);

/// Calls `stop` when the first of the signals arrives; a second one ends the process at once.
/// Must be called before other threads are started, so that they inherit the mask.
pub fn wait_for_stop_signal(stop: impl FnOnce() + Send + 'static) -> Result<(), SignalError> {
    let mut signals = SigSet::empty();
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().for_each(|signal| signals.add(signal));
    signals.thread_block().map_err(io::Error::from)?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if signals.wait().is_ok() {
            log::info!("stopping");
            stop();
            // Whoever insists does not want to wait for a slow disk.
            if signals.wait().is_ok() {
                log::warn!("stopped by a second signal, without a last commit");
                log::logger().flush();
                std::process::exit(1);
            }
        }
    })?;
    Ok(())
}
