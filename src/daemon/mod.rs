//! One device, one daemon: puts the parts together, keeps them running, takes them apart in order.
//!
//! ```text
//!   claim the name ─► open the source ─► open the cache ─► threads ─► frontend ─► control ─► ready
//!   stop:  frontend ─► fetch thread ─► last commit ─► "clean" in the superblock ─► sockets and name go
//! ```
//! Invariant: whatever fails on the way up leaves the cache as it was; whatever ends the daemon in order
//! leaves everything acknowledged on disk, and says so in the superblock.

mod handler;
mod rate;
mod signals;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};

use crate::cache::{
    Cache, CacheOptions, CacheState, MetadataError, OpenError, SourceFacts, default_metadata_path, peek,
};
use crate::control::{Claim, ControlServer, Detached, Entry, NameError, RunDir, RunDirError, Status};
use crate::device::{CommitThread, Core, FetchThread, FetchThreadError, Hydration, MAX_FETCH_BYTES, Mode, SourceHello};
use crate::engine::{Engine, EngineConfig};
use crate::frontend::{FrontendError, NbdFrontend};
use crate::nbd::{Address, Uri};
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
    /// Block size of a new cache, in bytes.
    pub block_bytes: Option<u64>,
    /// Go on although the live map of a killed daemon is gone.
    pub forget_unflushed: bool,
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
    /// No control socket.
    #[error("control socket: {0}")]
    Control(#[from] BindError),
    /// The source's own block size is larger than a block.
    #[error("source {uri} takes requests in units of {unit} bytes only; attach with --block-size {unit}")]
    Unit {
        /// The source.
        uri: Uri,
        /// Its unit in bytes.
        unit: u64,
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
    let (wishes, wished) = crossbeam::channel::unbounded();
    let stop = wishes.clone();
    // Before any thread is started: they inherit the mask.
    wait_for_stop_signal(move || drop(stop.send(Wish::Stop)))?;
    let run_dir = RunDir::open()?;
    let claim = run_dir.claim(&options.name)?;
    let daemon = match Daemon::start(options, &run_dir, claim, wishes) {
        Ok(daemon) => daemon,
        Err((claim, error)) => {
            claim.release();
            return Err(error);
        }
    };
    observer
        .ready(&daemon.handler.snapshot())
        .map_err(|e| DaemonError::Io("cannot say that the device is ready", e))?;
    daemon.main_loop(&wished, observer)
}

struct Daemon {
    core: Arc<Core>,
    handler: Arc<DaemonHandler>,
    frontend: NbdFrontend,
    fetch: FetchThread,
    commit: CommitThread,
    claim: Claim,
    control_socket: PathBuf,
}

impl Daemon {
    fn start(
        options: &DaemonOptions,
        run_dir: &RunDir,
        mut claim: Claim,
        wishes: Sender<Wish>,
    ) -> Result<Self, (Claim, DaemonError)> {
        match Self::assemble(options, run_dir, &mut claim, wishes) {
            Ok((core, handler, frontend, fetch, commit)) => {
                let control_socket = run_dir.control_socket(&options.name);
                Ok(Self { core, handler, frontend, fetch, commit, claim, control_socket })
            }
            Err(error) => Err((claim, error)),
        }
    }

    #[allow(clippy::type_complexity)]
    fn assemble(
        options: &DaemonOptions,
        run_dir: &RunDir,
        claim: &mut Claim,
        wishes: Sender<Wish>,
    ) -> Result<(Arc<Core>, Arc<DaemonHandler>, NbdFrontend, FetchThread, CommitThread), DaemonError> {
        let io = |what| move |e| DaemonError::Io(what, e);
        let data = std::path::absolute(&options.cache).map_err(io("the cache's path"))?;
        let metadata = options.metadata.clone().unwrap_or_else(|| default_metadata_path(&data));
        let metadata = std::path::absolute(metadata).map_err(io("the metadata's path"))?;
        let (fetch, hello) = open_source(options, &metadata)?;
        let facts = facts_of(options, &metadata, hello.as_ref())?;
        let cache_options = CacheOptions {
            data: data.clone(),
            metadata: metadata.clone(),
            live_dir: run_dir.live_dir(),
            block_bytes: options.block_bytes,
            forget_unflushed: options.forget_unflushed,
        };
        let cache = Cache::open(&cache_options, &facts)?;
        cache.notes.iter().for_each(|note| log::warn!("{}: {note}", metadata.display()));
        let geometry = cache.maps.geometry();
        if let Some(unit) = hello.as_ref().map(|h| h.min_read_bytes).filter(|&unit| unit > geometry.block_bytes()) {
            return Err(DaemonError::Unit { uri: options.source.clone(), unit });
        }
        let max_fetch_bytes = hello.as_ref().map_or(MAX_FETCH_BYTES, |h| h.max_read_bytes.min(MAX_FETCH_BYTES));
        let extents = hello.as_ref().is_some_and(|h| h.tells_extents);
        let engine = Engine::new(cache.maps.clone(), EngineConfig { max_fetch_bytes, extents });
        let (commits, commit_requests) = crossbeam::channel::unbounded();
        let core = Arc::new(Core::new(engine, 1, fetch.mailbox(), commits, Hydration::new(options.hydrate)));
        let commit = CommitThread::start(core.clone(), cache.store, commit_requests).map_err(io("commit thread"))?;
        let socket = options.socket.clone().unwrap_or_else(|| run_dir.nbd_socket(&options.name));
        let socket = std::path::absolute(socket).map_err(io("the socket's path"))?;
        let fast_zero = cache.data.punches_holes(geometry.size_bytes());
        let (name, file) = (options.name.clone(), cache.data.io().clone());
        let uri = Address::Unix(socket.clone()).uri("").to_string();
        let frontend = NbdFrontend::start(core.clone(), file.clone(), socket, name.clone(), fast_zero)?;
        fetch.begin(core.clone(), file);
        let control = run_dir.control_socket(&name);
        let handler = Arc::new(DaemonHandler::new(
            core.clone(),
            name.clone(),
            uri.clone(),
            facts,
            (data.clone(), metadata),
            hello.map(|h| h.stats),
            frontend.stats().clone(),
            fetch.verifier(),
            wishes,
        ));
        ControlServer::start(&control, handler.clone())?;
        let entry = Entry { name, pid: std::process::id(), cache: data, control, uri };
        claim.publish(&entry).map_err(io("the run directory's entry"))?;
        Ok((core, handler, frontend, fetch, commit))
    }

    fn main_loop(self, wished: &Receiver<Wish>, observer: &mut dyn Observer) -> Result<(), DaemonError> {
        loop {
            match wished.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) => observer.tick(&self.handler.sample()),
                Err(RecvTimeoutError::Disconnected) | Ok(Wish::Stop) => return self.stop().map(drop),
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
        let _ = std::fs::remove_file(&self.control_socket);
        self.claim.release();
        result
    }
}

/// Connects to the source; a complete cache goes on without one.
fn open_source(options: &DaemonOptions, metadata: &Path) -> Result<(FetchThread, Option<SourceHello>), DaemonError> {
    let complete = peek(metadata)?.is_some_and(|superblock| superblock.state == CacheState::Complete);
    match FetchThread::start(Some(options.source.clone())) {
        Ok(opened) => Ok(opened),
        Err(FetchThreadError::Dial(e)) if complete => {
            log::info!("the cache is complete, going on without its source ({e})");
            Ok(FetchThread::start(None)?)
        }
        Err(e) => Err(e.into()),
    }
}

fn facts_of(options: &DaemonOptions, metadata: &Path, hello: Option<&SourceHello>) -> Result<SourceFacts, DaemonError> {
    let uri = options.source.to_string();
    if let Some(hello) = hello {
        return Ok(SourceFacts { uri, size_bytes: hello.size_bytes, identity: hello.identity.clone() });
    }
    let superblock = peek(metadata)?.expect("only a cache that is complete goes without a source");
    Ok(SourceFacts { uri, size_bytes: superblock.size_bytes, identity: superblock.source_identity })
}
