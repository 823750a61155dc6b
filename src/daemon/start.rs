//! The way up. What can fail for reasons of the user's comes first, the cache last: a device that does not
//! come up leaves nothing behind.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crossbeam::channel::Sender;

use super::handler::{DaemonHandler, DeviceFacts, Meters};
use super::{Daemon, DaemonError, DaemonOptions, Wish};
use crate::cache::{
    Cache, CacheOptions, CacheState, DEFAULT_BLOCK_BYTES, OpenError, SourceFacts, Superblock, default_metadata_path,
    peek,
};
use crate::control::{ControlServer, Entry, RunDir};
use crate::device::{CommitThread, Core, FetchThread, FetchThreadError, Hydration, MAX_FETCH_BYTES, SourceHello};
use crate::engine::{Engine, EngineConfig, Geometry};
use crate::frontend::{NbdFrontend, Presentation};
use crate::nbd::Address;
use crate::remote::LossPolicy;
use crate::uring::{Listener, bind_private};

/// Where everything of a device is, as absolute paths.
struct Places {
    data: PathBuf,
    metadata: PathBuf,
    socket: PathBuf,
    control: PathBuf,
}

impl Places {
    fn of(options: &DaemonOptions, run_dir: &RunDir) -> io::Result<Self> {
        let data = std::path::absolute(&options.cache)?;
        let metadata = options.metadata.clone().unwrap_or_else(|| default_metadata_path(&data));
        let socket = options.socket.clone().unwrap_or_else(|| run_dir.nbd_socket(&options.name));
        Ok(Self {
            metadata: std::path::absolute(metadata)?,
            socket: std::path::absolute(socket)?,
            control: run_dir.control_socket(&options.name),
            data,
        })
    }
}

pub(super) fn start(options: &DaemonOptions, run_dir: &RunDir, wishes: Sender<Wish>) -> Result<Daemon, DaemonError> {
    let places = Places::of(options, run_dir).map_err(|e| DaemonError::Io("the paths cannot be made absolute", e))?;
    let listener = Listener::unix(&places.socket)?;
    let control = bind_private(&places.control)?;
    let policy = LossPolicy::new(options.on_source_loss);
    let up = start_on(options, run_dir, &places, &policy, listener);
    let (core, frontend, fetch, commit, facts, source_stats) = match up {
        Ok(up) => up,
        Err(error) => {
            // Gone already is as good.
            let _ = std::fs::remove_file(&places.control);
            return Err(error);
        }
    };
    let uri = Address::Unix(places.socket).uri("").to_string();
    let entry = Entry {
        name: options.name.clone(),
        pid: std::process::id(),
        cache: places.data.clone(),
        control: places.control,
        uri: uri.clone(),
    };
    let device = DeviceFacts {
        name: options.name.clone(),
        uri,
        policy,
        source: facts,
        cache: places.data,
        metadata: places.metadata,
    };
    let meters = Meters { source: source_stats, serve: frontend.stats().clone() };
    let handler = Arc::new(DaemonHandler::new(core.clone(), device, meters, fetch.verifier(), wishes));
    ControlServer::start(control, handler.clone())
        .map_err(|e| DaemonError::Io("cannot start the control thread", e))?;
    Ok(Daemon { core, handler, frontend, fetch, commit, entry })
}

type Up = (Arc<Core>, NbdFrontend, FetchThread, CommitThread, SourceFacts, crate::remote::SourceStats);

fn start_on(
    options: &DaemonOptions,
    run_dir: &RunDir,
    places: &Places,
    policy: &LossPolicy,
    listener: Listener,
) -> Result<Up, DaemonError> {
    let known = peek(&places.metadata)?;
    let (fetch, hello) = open_source(options, known.as_ref(), policy)?;
    let facts = facts_of(options, known.as_ref(), hello.as_ref());
    let block_bytes = block_bytes(options, known.as_ref(), hello.as_ref())?;
    let cache = Cache::open(
        &CacheOptions {
            data: places.data.clone(),
            metadata: places.metadata.clone(),
            live_dir: run_dir.live_dir(),
            block_bytes,
            forget_unflushed: options.forget_unflushed,
            overwrite: options.overwrite,
        },
        &facts,
    )?;
    cache.notes.iter().for_each(|note| log::warn!("{}: {note}", places.metadata.display()));
    let config = EngineConfig {
        max_fetch_bytes: hello.as_ref().map_or(MAX_FETCH_BYTES, |h| h.max_read_bytes.min(MAX_FETCH_BYTES)),
        extents: hello.as_ref().is_some_and(|h| h.tells_extents),
    };
    let engine = Engine::new(cache.maps.clone(), config);
    let (commits, requests) = crossbeam::channel::unbounded();
    let core = Arc::new(Core::new(engine, 1, fetch.mailbox(), commits, Hydration::new(options.hydrate)));
    let commit = CommitThread::start(core.clone(), cache.store, requests);
    let commit = commit.map_err(|e| DaemonError::Io("cannot start the commit thread", e))?;
    let fast_zero = cache.data.punches_holes(core.geometry().size_bytes());
    let presentation = Presentation { name: options.name.clone(), fast_zero };
    let file = cache.data.io().clone();
    let frontend = NbdFrontend::start(core.clone(), file.clone(), listener, presentation)?;
    fetch.begin(core.clone(), file);
    let stats = hello.map(|h| h.stats).unwrap_or_default();
    Ok((core, frontend, fetch, commit, facts, stats))
}

/// Connects to the source; a complete cache goes on without one.
fn open_source(
    options: &DaemonOptions,
    known: Option<&Superblock>,
    policy: &LossPolicy,
) -> Result<(FetchThread, Option<SourceHello>), DaemonError> {
    let complete = known.is_some_and(|superblock| superblock.state == CacheState::Complete);
    match FetchThread::start(Some(options.source.clone()), policy.clone()) {
        Ok(opened) => Ok(opened),
        Err(FetchThreadError::Dial(e)) if complete => {
            log::info!("the cache is complete, going on without its source ({e})");
            Ok(FetchThread::start(None, policy.clone())?)
        }
        Err(e) => Err(e.into()),
    }
}

fn facts_of(options: &DaemonOptions, known: Option<&Superblock>, hello: Option<&SourceHello>) -> SourceFacts {
    let (size_bytes, identity) = match (hello, known) {
        (Some(hello), _) => (hello.size_bytes, hello.identity.clone()),
        (None, Some(known)) => (known.size_bytes, known.source_identity.clone()),
        (None, None) => unreachable!("only a cache that is complete goes without a source"),
    };
    SourceFacts { uri: options.source.to_string(), size_bytes, identity }
}

/// The block size to open with: as asked for; for a new cache at least the source's own unit.
fn block_bytes(
    options: &DaemonOptions,
    known: Option<&Superblock>,
    hello: Option<&SourceHello>,
) -> Result<Option<u64>, DaemonError> {
    if let (None, Some(asked), Some(hello)) = (known, options.block_bytes, hello) {
        Geometry::new(hello.size_bytes, asked).map_err(OpenError::from)?;
    }
    let unit = hello.map_or(1, |h| h.min_read_bytes);
    let used = known.map(|s| s.block_bytes).or(options.block_bytes).unwrap_or(DEFAULT_BLOCK_BYTES.max(unit));
    if used < unit {
        return Err(DaemonError::Unit { uri: options.source.clone(), unit, used });
    }
    Ok(options.block_bytes.or_else(|| known.is_none().then_some(used)))
}
