//! One device, one daemon: puts the parts together, keeps them running, takes them apart in order.
//!
//! ```text
//!   claim the name ─► bind the sockets ─► open the source ─► open the cache ─► threads ─► ready
//!   stop:  frontend ─► fetch thread ─► last commit ─► "clean" in the superblock ─► sockets and name go
//! ```
//! Invariant: whatever fails on the way up leaves the cache as it was; whatever ends the daemon in order
//! leaves everything acknowledged on disk, and says so in the superblock.

mod error;
mod export_side;
mod handler;
mod hands;
mod rate;
mod reclaim;
mod running;
mod signals;
mod start;
mod ublk;
mod ublksrv;

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::control::{RunDir, Status};
use crate::device::Mode;
use crate::nbd::{Address, Uri};
pub use crate::remote::OnLoss;
use crate::ublk::prepare_process;
use crate::uring::require_io_uring;

pub use error::DaemonError;
pub use reclaim::{Back, reclaim, refuse_cache};
use reclaim::{is_given_away, is_image};
use running::{Daemon, End, Wish};
pub use signals::{SignalError, wait_for_stop_signal};
pub use ublk::{UblkOptions, forget, recovery_of, waits_for_daemon};

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
    /// The user who may open it, if not this one.
    pub socket_owner: Option<u32>,
    /// How to hydrate.
    pub hydrate: Mode,
    /// What becomes of requests while the source is lost.
    pub on_source_loss: OnLoss,
    /// Block size of a new cache, in bytes.
    pub block_bytes: Option<u64>,
    /// Go on although the live map of a killed daemon is gone.
    pub forget_unflushed: bool,
    /// It was given away, and its source has the disk again.
    pub no_source: bool,
    /// A block device instead of an NBD export.
    pub ublk: Option<UblkOptions>,
    /// Make a new cache of a block device although something is on it.
    pub overwrite: bool,
    /// Leave the disk with the source until it is taken over.
    pub standby: Option<Standby>,
    /// Offer the device to other hosts there.
    pub export: Option<Address>,
}

impl DaemonOptions {
    /// Is it to take over the block device of a daemon that died?
    fn is_recovery(&self) -> bool {
        self.ublk.is_some_and(|ublk| ublk.recover.is_some())
    }
}

/// How a device leaves standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standby {
    /// When it is told to.
    Manual,
    /// With the guest's first write.
    OnWrite,
}

/// How the caller follows a daemon.
pub trait Observer {
    /// The device can be used.
    fn ready(&mut self, status: &Status) -> io::Result<()>;
    /// Half a second has gone by.
    fn tick(&mut self, status: &Status);
}

/// Runs a device until it is detached or told to stop by a signal.
pub fn run(options: &DaemonOptions, observer: &mut dyn Observer) -> Result<(), DaemonError> {
    require_io_uring()?;
    abort_on_panic();
    if options.ublk.is_some() {
        // While this is the only thread.
        let needed = [Some(options.cache.clone()), options.metadata.clone()];
        let needed: Vec<_> = needed.into_iter().flatten().collect();
        prepare_process(&needed).iter().for_each(|warning| log::warn!("{warning}"));
    }
    let (wishes, wished) = crossbeam::channel::unbounded();
    let stop = wishes.clone();
    let (interrupt, interrupted) = crossbeam::channel::bounded(1);
    // Before any thread is started: they inherit the mask.
    wait_for_stop_signal(move || {
        let _ = (stop.send(Wish::Stop), interrupt.send(()));
    })?;
    let run_dir = RunDir::open()?;
    let mut claim = run_dir.claim(&options.name)?;
    let recovering = options.is_recovery();
    if !recovering {
        ublk::refuse_orphans(&run_dir, &claim, options)?;
    }
    let up = start::start(options, &run_dir, &mut claim, wishes, &interrupted)
        .and_then(|daemon| daemon.take_over(options))
        .and_then(Daemon::go_live);
    let mut daemon = match up {
        Ok(daemon) => daemon,
        Err(error) => {
            // One that could not be taken over goes on waiting under its name.
            if let Some(ublk) = claim.previous().and_then(|entry| entry.ublk).filter(|_| !recovering) {
                ublk::withdraw(&ublk);
            }
            claim.give_back();
            return Err(error);
        }
    };
    daemon.publish(&mut claim).map_err(|e| DaemonError::Io("the run directory's entry", e))?;
    if let Err(e) = daemon.tell_ublksrv().and_then(|()| observer.ready(&daemon.handler.snapshot())) {
        let error = DaemonError::Io("cannot say that the device is ready", e);
        if daemon.frontend.is_taken_over() {
            // It has users, who wait for the next attempt.
            return Err(error);
        }
        // Whoever asked for it is gone, and nobody knows of it.
        let stopped = daemon.stop();
        claim.release();
        return stopped.and(Err(error));
    }
    let mut claim = Some(claim);
    let end = daemon.main_loop(&wished, observer, &mut claim);
    match end {
        Ok(End::Left) => Ok(()),
        // The device may still be there, and its name with it.
        Err(DaemonError::Frontend(e)) => Err(e.into()),
        other => {
            if let Some(claim) = claim {
                claim.release();
            }
            other.map(drop)
        }
    }
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

/// A thread that panicked with it held has ended the process.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
