//! One device, one daemon: puts the parts together, keeps them running, takes them apart in order.
//!
//! ```text
//!   claim the name ─► bind the sockets ─► open the source ─► open the cache ─► threads ─► ready
//!   stop:  frontend ─► fetch thread ─► last commit ─► "clean" in the superblock ─► sockets and name go
//! ```
//! Invariant: whatever fails on the way up leaves the cache as it was; whatever ends the daemon in order
//! leaves everything acknowledged on disk, and says so in the superblock.

mod export_side;
mod handler;
mod hands;
mod rate;
mod signals;
mod start;
mod ublk;
mod ublksrv;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};

use crate::cache::{CacheState, MetadataError, OpenError, default_metadata_path, discard, peek};
use crate::control::{Claim, Detached, Entry, NameError, RunDir, RunDirError, Status, UblkEntry};
use crate::device::{CommitThread, Core, FetchThread, FetchThreadError, Mode};
use crate::export::{HomeError, Record};
use crate::frontend::{Frontend, FrontendError, ShapeError};
use crate::nbd::{Address, Uri};
use crate::remote::DialError;
pub use crate::remote::OnLoss;
use crate::ublk::{UblkError, prepare_process};
use crate::uring::{BindError, UringError, require_io_uring};

use handler::DaemonHandler;
use hands::Hands;
pub use signals::{SignalError, wait_for_stop_signal};
pub use ublk::{UblkOptions, forget, recovery_of, waits_for_daemon};

/// How long a plain attach waits for those who still write to the source.
const TAKE_PATIENCE: Duration = Duration::from_secs(2);
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

/// How a device leaves standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standby {
    /// When it is told to.
    Manual,
    /// With the guest's first write.
    OnWrite,
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
    /// No block device.
    #[error(transparent)]
    Ublk(#[from] UblkError),
    /// Not the shape of a block device.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// There is a device that waits for its daemon.
    #[error(
        "{name} is /dev/ublkb{id}, whose daemon was killed and which waits for another: take it over (`blkferry \
         recover {name}`), or give it up (`blkferry detach --force {name}`)"
    )]
    Orphan {
        /// Its name.
        name: String,
        /// The N of /dev/ublkbN.
        id: u32,
    },
    /// An orphan cannot be removed.
    #[error("/dev/ublkb{id} cannot be removed: {source}; is it still mounted or open? It goes away when it is not")]
    Orphaned {
        /// The N of /dev/ublkbN.
        id: u32,
        /// What the driver said.
        source: UblkError,
    },
    /// Only ublk devices survive their daemon.
    #[error("there is no dead ublk device named {0}; see `blkferry list`, or attach the cache again")]
    NothingToRecover(String),
    /// Its daemon is there.
    #[error("the daemon of {0} is alive: there is nothing to recover")]
    Alive(String),
    /// The run directory's entry makes no sense.
    #[error("what is written down about {name} cannot be used: {what}")]
    Entry {
        /// Name of the device.
        name: String,
        /// What is wrong.
        what: String,
    },
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
    /// A blkferry export that gives nothing away.
    #[error(
        "source {0} is a blkferry export that does not let its disk change hosts, so that there is nothing to stand by \
         for; start it with `export --handoff`, or leave --standby out"
    )]
    NoHandoff(Uri),
    /// Not an image that this disk can come home to.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The source did not give its disk.
    #[error("{0}")]
    Kept(String),
    /// Taken back at the source.
    #[error(
        "the source's disk was given to this cache in epoch {then}, and was taken back there since (its epoch is {now}): \
         what this cache and the source hold is not one disk any more"
    )]
    TakenBack {
        /// The epoch in which it was given.
        then: u64,
        /// The source's epoch, if it tells one.
        now: String,
    },
    /// It may not come back.
    #[error(
        "{0}. This cache was given away: if its disk has come home to that source, attach it with --no-source, so that \
         what was written here can be fetched"
    )]
    SourceGone(#[source] DialError),
    /// Absent blocks are there.
    #[error("cache {0} was not given away: what is not in it is at its source only. Leave --no-source out")]
    NeedsSource(PathBuf),
    /// A cache, and not an image.
    #[error(
        "{0} is the cache of a device that is not complete, or was given away: what is in it is not the disk. Attach it,          and offer the device (`blkferry attach … --export`)"
    )]
    NoImage(PathBuf),
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
    Detach {
        incomplete: bool,
        answer: Sender<Result<Detached, String>>,
        answered: Receiver<()>,
    },
    /// It was aborted: nothing is to stay.
    Vanish {
        answer: Sender<Result<(), String>>,
        answered: Receiver<()>,
    },
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
    let recovering = options.ublk.is_some_and(|ublk| ublk.recover.is_some());
    if !recovering {
        ublk::refuse_orphans(&run_dir, &claim, options)?;
    }
    let up = start::start(options, &run_dir, &mut claim, wishes, &interrupted)
        .and_then(|daemon| daemon.take_over(options))
        .and_then(Daemon::go_live);
    let daemon = match up {
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
    claim.publish(&daemon.entry).map_err(|e| DaemonError::Io("the run directory's entry", e))?;
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

/// Was it somebody's image before it was to be a cache?
fn is_image(cache: &std::path::Path) -> bool {
    Record::path_of(cache).exists()
}

/// Is it somebody's image, whose disk is elsewhere?
fn is_given_away(cache: &std::path::Path) -> bool {
    // A record that cannot be read is told of when it matters.
    Record::read(&Record::path_of(cache)).is_ok_and(|record| record.is_some_and(|record| !record.deed.is_here()))
}

/// A file that a device was made of and never completed holds zeros where its blocks should be, and one that was given
/// away is somebody else's: neither is an image that can be served. One that has a record of who has it says so itself.
pub fn refuse_cache(image: &std::path::Path) -> Result<(), DaemonError> {
    match peek(&default_metadata_path(image))? {
        Some(superblock) if superblock.state != CacheState::Complete && !is_image(image) => {
            Err(DaemonError::NoImage(image.into()))
        }
        _ => Ok(()),
    }
}

/// How a daemon came to its end.
enum End {
    /// Nothing is left of the device but its cache.
    Gone,
    /// The block device is in use and waits for another daemon.
    Left,
}

/// A device that is up.
struct Daemon {
    core: Arc<Core>,
    handler: Arc<DaemonHandler>,
    frontend: Frontend,
    fetch: FetchThread,
    commit: CommitThread,
    entry: Entry,
    hands: Arc<Hands>,
    /// Nothing was there before.
    is_fresh: bool,
    metadata: PathBuf,
}

impl Daemon {
    /// Without standby the disk is taken over at once; on failure all is as it was.
    fn take_over(self, options: &DaemonOptions) -> Result<Self, DaemonError> {
        if self.hands.is_ours() {
            return match self.hands.finish_homecoming() {
                Ok(()) => Ok(self),
                Err(why) => {
                    self.stop().unwrap_or_else(|e| log::warn!("{e}"));
                    Err(DaemonError::Kept(why))
                }
            };
        }
        if options.standby.is_some() {
            return Ok(self);
        }
        match self.hands.activate(TAKE_PATIENCE) {
            Ok(_) => Ok(self),
            Err(why) => {
                let undo = self.is_fresh.then(|| self.hands.abort());
                let (is_fresh, cache, metadata) = (self.is_fresh, self.entry.cache.clone(), self.metadata.clone());
                self.stop().unwrap_or_else(|e| log::warn!("{e}"));
                if is_fresh && undo == Some(Ok(())) {
                    discard(&cache, &metadata, is_image(&cache))
                        .unwrap_or_else(|e| log::warn!("{}: {e}", metadata.display()));
                }
                Err(DaemonError::Kept(why))
            }
        }
    }

    /// Lets the guest in; on failure nothing stays but a device that was to be taken over.
    fn go_live(mut self) -> Result<Self, DaemonError> {
        match self.frontend.go_live() {
            Ok(()) => Ok(self),
            Err(error) => {
                if !self.frontend.is_taken_over() {
                    self.stop().unwrap_or_else(|e| log::warn!("{e}"));
                }
                Err(error.into())
            }
        }
    }

    fn main_loop(
        mut self,
        wished: &Receiver<Wish>,
        observer: &mut dyn Observer,
        claim: &mut Option<Claim>,
    ) -> Result<End, DaemonError> {
        loop {
            match wished.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) if self.frontend.notice_end() => {
                    log::info!("the block device was stopped by somebody else");
                    return self.stop().map(|()| End::Gone);
                }
                Err(RecvTimeoutError::Timeout) => observer.tick(&self.handler.sample()),
                Err(RecvTimeoutError::Disconnected) | Ok(Wish::Stop) => match self.frontend.close() {
                    Ok(()) => return self.stop().map(|()| End::Gone),
                    Err(e) if self.frontend.survives_daemon() => {
                        log::warn!("{e}; requests wait until `blkferry recover {}`", self.entry.name);
                        return Ok(End::Left);
                    }
                    Err(e) => log::warn!("{e}"),
                },
                Ok(Wish::Vanish { answer, answered }) => {
                    if let Err(e) = self.frontend.close() {
                        // Whoever asked waits for this.
                        let _ = answer.send(Err(e.to_string()));
                        continue;
                    }
                    let (cache, metadata) = (self.entry.cache.clone(), self.metadata.clone());
                    let result = self.stop();
                    let gone = result.as_ref().map_err(ToString::to_string).and_then(|()| {
                        let gone = discard(&cache, &metadata, is_image(&cache));
                        gone.map_err(|e| format!("{}: {e}", metadata.display()))
                    });
                    if let Some(claim) = claim.take() {
                        claim.release();
                    }
                    let _ = answer.send(gone);
                    let _ = answered.recv_timeout(Duration::from_secs(5));
                    return result.map(|()| End::Gone);
                }
                Ok(Wish::Detach { incomplete, answer, answered }) => {
                    if !incomplete && self.handler.is_needed() {
                        // Whoever asked waits for this.
                        let _ = answer.send(Err(self.handler.why_not_detached()));
                        continue;
                    }
                    if let Err(e) = self.frontend.close() {
                        // Whoever asked waits for this.
                        let _ = answer.send(Err(e.to_string()));
                        continue;
                    }
                    let cache = self.handler.cache_path();
                    let core = self.core.clone();
                    let result = self.stop();
                    let absent_bytes = handler::absent_bytes(&core);
                    let complete = core.health.is_complete();
                    // Whoever has the answer may take the name at once.
                    if !matches!(result, Err(DaemonError::Frontend(_)))
                        && let Some(claim) = claim.take()
                    {
                        claim.release();
                    }
                    let said = match &result {
                        Ok(()) => Ok(Detached { complete, cache, absent_bytes }),
                        Err(e) => Err(e.to_string()),
                    };
                    let _ = answer.send(said);
                    // The process ends when this returns; the client should have its answer before.
                    let _ = answered.recv_timeout(Duration::from_secs(5));
                    return result.map(|()| End::Gone);
                }
            }
        }
    }

    fn tell_ublksrv(&self) -> io::Result<()> {
        match (&self.frontend, &self.entry.ublk) {
            (Frontend::Ublk(ublk), Some(UblkEntry { ublksrv: true, .. })) => {
                ublksrv::write(ublk.device().info(), self.core.geometry().size_bytes())
            }
            _ => Ok(()),
        }
    }

    fn stop(self) -> Result<(), DaemonError> {
        self.handler.stop_export();
        // Queues that cannot be stopped may still write: then the cache is not called clean.
        self.frontend.stop()?;
        self.fetch.stop();
        let result = self.commit.stop(&self.core).map_err(DaemonError::Unclean);
        if let Some(ublk) = &self.entry.ublk {
            ublk::withdraw(ublk);
        }
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.entry.control);
        result
    }
}
