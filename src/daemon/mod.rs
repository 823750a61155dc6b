//! One device, one daemon: puts the parts together, keeps them running, takes them apart in order.
//!
//! ```text
//!   claim the name ─► bind the sockets ─► open the source ─► open the cache ─► threads ─► ready
//!   stop:  frontend ─► fetch thread ─► last commit ─► "clean" in the superblock ─► sockets and name go
//! ```
//! Invariant: whatever fails on the way up leaves the cache as it was; whatever ends the daemon in order
//! leaves everything acknowledged on disk, and says so in the superblock.

mod handler;
mod rate;
mod signals;
mod start;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};

use crate::cache::{MetadataError, OpenError};
use crate::control::{Detached, Entry, NameError, RunDir, RunDirError, Status};
use crate::device::{CommitThread, Core, FetchThread, FetchThreadError, Mode};
use crate::frontend::{FrontendError, NbdFrontend};
use crate::nbd::Uri;
pub use crate::remote::OnLoss;
use crate::uring::{BindError, UringError, require_io_uring};

use handler::DaemonHandler;
pub use signals::{SignalError, wait_for_stop_signal};

/// Pace of the daemon's own housekeeping, and of progress displays.
const TICK: Duration = Duration::from_millis(500);

/// What to attach, and how.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    /// Where absent blocks come from.
    pub source: Uri,
    /// The cache: a file (made if it is not there) or a block device.
    pub cache: PathBuf,
    /// Where its metadata is, if not in the default place.
    pub metadata: Option<PathBuf>,
    /// Name of the device.
    pub name: String,
    /// The NBD socket, if not in the default place.
    pub socket: Option<PathBuf>,
    /// How to hydrate.
    pub hydrate: Mode,
    /// What becomes of requests while the source is lost.
    pub on_source_loss: OnLoss,
    /// Block size of a new cache, in bytes.
    pub block_bytes: Option<u64>,
    /// Go on although the live map of a killed daemon is gone.
    pub forget_unflushed: bool,
    /// Make a new cache of a block device although something is on it.
    pub overwrite: bool,
}

/// Why a device did not come up, or did not go down in order.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// No ring.
    #[error(transparent)]
    Uring(#[from] UringError),
    /// No run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// No name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// No source.
    #[error(transparent)]
    Fetch(#[from] FetchThreadError),
    /// No cache.
    #[error(transparent)]
    Cache(#[from] OpenError),
    /// Metadata that cannot be read.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// No frontend.
    #[error(transparent)]
    Frontend(#[from] FrontendError),
    /// No socket, for the guest or for control.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The source's own block size is larger than a block.
    #[error(
        "source {uri} takes requests in units of {unit} bytes only, which is more than a block ({used}); \
         make a new cache with --block-size {unit}"
    )]
    Unit {
        /// The source.
        uri: Uri,
        /// Its unit in bytes.
        unit: u64,
        /// The block size in bytes.
        used: u64,
    },
    /// A thread or a file of the daemon's own.
    #[error("{0}: {1}")]
    Io(&'static str, #[source] io::Error),
    /// The last commit failed.
    #[error("the cache was not left in order: {0}; what was not flushed before may be lost")]
    Unclean(#[source] io::Error),
    /// Signals cannot be waited for.
    #[error(transparent)]
    Signal(#[from] SignalError),
}

/// How the caller follows a daemon.
pub trait Observer {
    /// The device can be used.
    fn ready(&mut self, status: &Status) -> io::Result<()>;
    /// Half a second has gone by.
    fn tick(&mut self, status: &Status);
}

/// What ends the main loop.
enum Wish {
    Stop,
    Detach { incomplete: bool, answer: Sender<Result<Detached, String>>, answered: Receiver<()> },
}

/// Runs a device until it is detached or told to stop by a signal.
pub fn run(options: &DaemonOptions, observer: &mut dyn Observer) -> Result<(), DaemonError> {
    require_io_uring()?;
    abort_on_panic();
    let (wishes, wished) = crossbeam::channel::unbounded();
    let stop = wishes.clone();
    // Before any thread is started: they inherit the mask.
    wait_for_stop_signal(move || drop(stop.send(Wish::Stop)))?;
    let run_dir = RunDir::open()?;
    let mut claim = run_dir.claim(&options.name)?;
    let started = start::start(options, &run_dir, wishes);
    let daemon = match started {
        Ok(daemon) => daemon,
        Err(error) => {
            claim.give_back();
            return Err(error);
        }
    };
    claim.publish(&daemon.entry).map_err(|e| DaemonError::Io("the run directory's entry", e))?;
    if let Err(e) = observer.ready(&daemon.handler.snapshot()) {
        // Whoever asked for it is gone, and nobody knows of it.
        let stopped = daemon.stop();
        claim.release();
        return stopped.and(Err(DaemonError::Io("cannot say that the device is ready", e)));
    }
    let result = daemon.main_loop(&wished, observer);
    claim.release();
    result
}

/// A thread that panics must not leave a device that answers half of its requests: the process ends, as
/// if it had been killed, and the live map carries what was acknowledged into the next attach.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
}

/// A device that is up.
struct Daemon {
    core: Arc<Core>,
    handler: Arc<DaemonHandler>,
    frontend: NbdFrontend,
    fetch: FetchThread,
    commit: CommitThread,
    entry: Entry,
}

impl Daemon {
    fn main_loop(self, wished: &Receiver<Wish>, observer: &mut dyn Observer) -> Result<(), DaemonError> {
        loop {
            match wished.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) => observer.tick(&self.handler.sample()),
                Err(RecvTimeoutError::Disconnected) | Ok(Wish::Stop) => return self.stop(),
                Ok(Wish::Detach { incomplete, answer, answered }) => {
                    if !incomplete && !self.core.health.is_complete() && self.core.maps().absent_count() > 0 {
                        // Whoever asked waits for this.
                        let _ = answer.send(Err(self.handler.why_not_detached()));
                        continue;
                    }
                    let cache = self.handler.cache_path();
                    let core = self.core.clone();
                    let result = self.stop();
                    let absent_bytes = handler::absent_bytes(&core);
                    let complete = core.health.is_complete();
                    let said = match &result {
                        Ok(()) => Ok(Detached { complete, cache, absent_bytes }),
                        Err(e) => Err(e.to_string()),
                    };
                    let _ = answer.send(said);
                    // The process ends when this returns; the client should have its answer before.
                    let _ = answered.recv_timeout(Duration::from_secs(5));
                    return result;
                }
            }
        }
    }

    fn stop(self) -> Result<(), DaemonError> {
        self.frontend.stop();
        self.fetch.stop();
        let result = self.commit.stop(&self.core).map_err(DaemonError::Unclean);
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.entry.control);
        result
    }
}
