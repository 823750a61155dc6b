//! The way up. What can fail for reasons of the user's comes first, the cache last: a device that does not
//! come up leaves nothing behind.

use std::io;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender};

use super::export_side::ExportSide;
use super::handler::{DaemonHandler, DeviceFacts, Meters, Sides};
use super::hands::{Hands, Landing, phase_of, right_of};
use super::{Daemon, DaemonError, DaemonOptions, Standby, UblkOptions, Wish, is_given_away, ublk};
use crate::cache::{
    Cache, CacheOptions, CacheState, DEFAULT_BLOCK_BYTES, Gift, OpenError, SourceFacts, Superblock, Whole,
    default_metadata_path, peek,
};
use crate::control::{Claim, ControlServer, Entry, RunDir};
use crate::device::{
    CommitThread, Core, FetchThread, FetchThreadError, Gate, Hydration, Mode, Phase, SourceHello, SourceSide,
    engine_config,
};
use crate::engine::{Engine, Geometry};
use crate::export::{Home, HomeError, Record, become_image, bell_of, check_home};
use crate::frontend::{Frontend, NbdFrontend, Presentation, UblkFrontend, UblkShape, logical_bytes};
use crate::handoff::{Deed, Right};
use crate::nbd::{Address, Standing};
use crate::remote::{Expect, LossPolicy};
use crate::server::{ServeStats, listen};
use crate::ublk::Device;
use crate::uring::{BindError, FileIo, Listener, bind_private};

/// How long a guest's first write makes the source wait for those who still write there, at a time.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);
/// Pause before it is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// How long a port may be taken that a dead daemon had.
const PORT_PATIENCE: Duration = Duration::from_secs(1);

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

/// The way in for the guest, taken before anything else.
enum Door {
    Nbd(Listener),
    Ublk(Device),
}

impl Door {
    fn take(options: &DaemonOptions, places: &Places) -> Result<Self, DaemonError> {
        match &options.ublk {
            Some(ublk) => Ok(Self::Ublk(ublk.device()?)),
            None => {
                let listener = Listener::unix(&places.socket)?;
                if options.socket_owner.is_some() {
                    chown(&places.socket, options.socket_owner, None)
                        .map_err(|e| DaemonError::Io("cannot give the socket to its owner", e))?;
                }
                Ok(Self::Nbd(listener))
            }
        }
    }

    /// What the guest is told.
    fn uri(&self, places: &Places) -> String {
        match self {
            Self::Nbd(_) => Address::Unix(places.socket.clone()).uri("").to_string(),
            Self::Ublk(device) => device.path().display().to_string(),
        }
    }
}

pub(super) fn start(
    options: &DaemonOptions,
    run_dir: &RunDir,
    claim: &mut Claim,
    wishes: Sender<Wish>,
    interrupted: &Receiver<()>,
) -> Result<Daemon, DaemonError> {
    let places = Places::of(options, run_dir).map_err(|e| DaemonError::Io("the paths cannot be made absolute", e))?;
    let door = Door::take(options, &places)?;
    let offer = match &options.export {
        None => None,
        Some(asked) => match listen_there(asked, options.is_recovery()) {
            // While nothing is made that would stay.
            Err(e) if !options.is_recovery() => return Err(e.into()),
            found => Some((asked, found)),
        },
    };
    let control = bind_private(&places.control)?;
    let uri = door.uri(&places);
    let mut entry = Entry {
        name: options.name.clone(),
        pid: std::process::id(),
        cache: places.data.clone(),
        control: places.control.clone(),
        uri: uri.clone(),
        ublk: None,
    };
    let mut info = None;
    if let (Door::Ublk(device), Some(ublk)) = (&door, &options.ublk) {
        info = Some(*device.info());
        entry.ublk = Some(ublk.entry(options, device, &places.metadata));
        if let Some(told) = &entry.ublk {
            ublk::announce(told, &options.name)
                .unwrap_or_else(|e| log::warn!("no link in /dev/blkferry: its name cannot be written down: {e}"));
        }
        // From here on a kill leaves something behind that only the entry tells of.
        claim.publish(&entry).map_err(|e| DaemonError::Io("the run directory's entry", e))?;
    }
    let policy = LossPolicy::new(options.on_source_loss);
    let up = start_on(options, run_dir, &places, &policy, door, interrupted);
    let Up { core, frontend, fetch, commit, source_uri, meters, hands, is_fresh, file, rung } = match up {
        Ok(up) => up,
        Err(error) => {
            // Gone already is as good.
            let _ = std::fs::remove_file(&places.control);
            return Err(error);
        }
    };
    let device = DeviceFacts {
        name: options.name.clone(),
        uri,
        policy,
        ublk: info,
        source_uri,
        cache: places.data,
        metadata: places.metadata.clone(),
    };
    let export = ExportSide::new(core.clone(), file, options.name.clone(), hands.clone());
    let sides = Sides { verifier: fetch.verifier(), hands: hands.clone(), export };
    let handler = Arc::new(DaemonHandler::new(core.clone(), device, meters, sides, wishes));
    ControlServer::start(control, handler.clone())
        .map_err(|e| DaemonError::Io("cannot start the control thread", e))?;
    if let Some(rung) = rung {
        activate_on_write(hands.clone(), rung).map_err(|e| DaemonError::Io("cannot start the handoff thread", e))?;
    }
    if let Some((asked, found)) = offer
        && let Err(why) = handler.export_on(asked, found)
    {
        // Who uses the device must not wait for that.
        log::warn!("{}: it is not offered to other hosts: {why}", options.name);
    }
    Ok(Daemon { core, handler, frontend, fetch, commit, entry, hands, is_fresh, metadata: places.metadata })
}

struct Up {
    core: Arc<Core>,
    frontend: Frontend,
    fetch: FetchThread,
    commit: CommitThread,
    source_uri: String,
    meters: Meters,
    hands: Arc<Hands>,
    is_fresh: bool,
    file: FileIo,
    /// Rings when a guest writes in standby.
    rung: Option<Receiver<()>>,
}

/// The dead daemon of a device may hold its port for a moment.
fn listen_there(asked: &Address, is_recovery: bool) -> Result<(Listener, Address), BindError> {
    let deadline = Instant::now() + if is_recovery { PORT_PATIENCE } else { Duration::ZERO };
    loop {
        match listen(asked) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(RETRY_PAUSE),
            found => return found,
        }
    }
}

/// Waits for the guest's first write.
fn activate_on_write(hands: Arc<Hands>, rung: Receiver<()>) -> io::Result<()> {
    let wait_for_write = move || {
        while rung.recv().is_ok() && hands.waits() && !hands.has_failed() {
            if let Err(why) = hands.activate(WRITE_PATIENCE) {
                log::warn!("a write waits for the handoff: {why}");
                std::thread::sleep(RETRY_PAUSE);
                hands.ring();
            }
        }
    };
    std::thread::Builder::new().name("handoff".into()).spawn(wait_for_write).map(drop)
}

fn start_on(
    options: &DaemonOptions,
    run_dir: &RunDir,
    places: &Places,
    policy: &LossPolicy,
    door: Door,
    interrupted: &Receiver<()>,
) -> Result<Up, DaemonError> {
    let mut known = peek(&places.metadata)?;
    let (fetch, hello) = open_source(options, known.as_ref(), policy, interrupted)?;
    let standing = hello.as_ref().and_then(|hello| hello.standing.as_ref());
    if let (Some(cache), Some(standing)) = (&known, standing)
        && becomes_image(places, run_dir, cache, standing)?
    {
        known = None;
    }
    // Its contents are not those any more, either, but this says why.
    if let (Some(cache), Some(standing)) = (&known, standing)
        && right_of(cache) == Right::Active
        && let Some(gift) = cache.gift.filter(|gift| gift.disk == standing.disk)
    {
        check_gift(cache, gift, Some(standing))?;
    }
    let facts = facts_of(options, known.as_ref(), hello.as_ref());
    let block_bytes = block_bytes(options, known.as_ref(), hello.as_ref())?;
    let logical = logical_of(options, &door, hello.as_ref(), facts.size_bytes)?;
    let is_ours = known.as_ref().map(right_of) == Some(Right::Active);
    let gives_nothing = standing.is_none() && hello.as_ref().is_some_and(|hello| hello.sends_holes);
    if options.standby.is_some() && !is_ours && gives_nothing {
        return Err(DaemonError::NoHandoff(options.source.clone()));
    }
    let home = home_of(&places.data, run_dir, known.as_ref(), standing)?;
    if known.is_none() && home.is_none() && Record::forget_gone(&places.data).map_err(HomeError::from)? {
        log::info!(
            "{}: the record of an image that was there once, and is there no more, was removed",
            places.data.display()
        );
    }
    let cache = Cache::open(
        &CacheOptions {
            data: places.data.clone(),
            metadata: places.metadata.clone(),
            live_dir: run_dir.live_dir()?,
            block_bytes,
            forget_unflushed: options.forget_unflushed,
            overwrite: options.overwrite,
            standby: options.standby.is_some(),
            home: home.is_some() && !is_ours,
        },
        &facts,
    )?;
    cache.notes.iter().for_each(|note| log::warn!("{}: {note}", places.metadata.display()));
    let punches_holes = cache.data.punches_holes(facts.size_bytes);
    let engine = Engine::new(cache.maps.clone(), engine_config(hello.as_ref(), punches_holes));
    let (commits, requests) = crossbeam::channel::unbounded();
    let superblock = cache.store.superblock().clone();
    expect(&fetch.source_side(), &superblock, hello.as_ref())?;
    // One more, for those who get the device from here.
    let queues = 1 + if let Door::Ublk(device) = &door { usize::from(device.info().queues) } else { 1 };
    let on_write = options.standby == Some(Standby::OnWrite) && right_of(&superblock) == Right::Standby;
    let (bell, rung) = crossbeam::channel::bounded(1);
    let rung = on_write.then_some(rung);
    // Nobody reads or writes here before the disk is all home.
    let phase = if home.is_some() { Phase::Standby } else { phase_of(&superblock) };
    // Where it becomes active without being told to, the guest need not notice that it was not.
    let bell = (on_write || is_ours || options.standby.is_none()).then_some(bell);
    let gate = Gate::new(phase, queues, bell);
    // What nobody wants any more is not fetched.
    let hydration = Hydration::new(if superblock.released { Mode::Off } else { options.hydrate });
    let core = Arc::new(Core::new(engine, queues, fetch.mailbox(), commits, hydration, gate));
    let (name, side) = (options.name.clone(), fetch.source_side());
    let hands = Arc::new(Hands::new(name, core.clone(), side, &superblock, standing, facts.identity.clone()));
    if let Some(home) = home {
        hands.set_landing(Landing { home, data: cache.data.clone(), path: places.data.clone() });
    }
    let commit = CommitThread::start(core.clone(), cache.store, requests);
    let commit = commit.map_err(|e| DaemonError::Io("cannot start the commit thread", e))?;
    let fast_zero = punches_holes;
    let file = cache.data.io().clone();
    let mut serve = ServeStats::default();
    let frontend = match door {
        Door::Nbd(listener) => {
            let presentation = Presentation { name: options.name.clone(), fast_zero };
            let nbd = NbdFrontend::start(core.clone(), file.clone(), listener, presentation)?;
            serve = nbd.stats().clone();
            Frontend::Nbd(nbd)
        }
        Door::Ublk(device) => {
            let shape = UblkShape { logical_bytes: logical, fast_zero };
            match UblkFrontend::start(&core, &file, device, shape) {
                Ok(ublk) => Frontend::Ublk(ublk),
                Err(error) => {
                    fetch.stop();
                    commit.stop(&core).map_err(DaemonError::Unclean)?;
                    return Err(error.into());
                }
            }
        }
    };
    fetch.begin(core.clone(), file.clone());
    let source = hello.map(|h| h.stats).unwrap_or_default();
    let meters = Meters { source, serve };
    Ok(Up {
        core,
        frontend,
        fetch,
        commit,
        source_uri: facts.uri,
        meters,
        hands,
        is_fresh: known.is_none(),
        file,
        rung,
    })
}

/// A cache that was given to the one who is the source now: if it is whole it becomes an image again, to which the disk
/// can come home as to any other. False: it was not given to this source.
fn becomes_image(
    places: &Places,
    run_dir: &RunDir,
    cache: &Superblock,
    source: &Standing,
) -> Result<bool, DaemonError> {
    let deed = Deed { disk: cache.uuid, epoch: cache.epoch, given_to: cache.given_to };
    if cache.state != CacheState::Away || deed.given_to != Some(source.disk) {
        return Ok(false);
    }
    check_home(&places.data, &deed, Some(source))?;
    if !source.complete {
        return Err(HomeError::Needed(places.data.clone()).into());
    }
    let whole = Whole::of(&places.data, &places.metadata, &run_dir.live_dir()?)?;
    let whole = whole.ok_or_else(|| HomeError::Partial(places.data.clone()))?;
    become_image(&places.data, deed)?;
    whole.forget().map_err(|e| DaemonError::Io("the metadata of a cache that is an image again", e))?;
    Ok(true)
}

/// The cache, if it is an image that was given away and whose disk is to come home, or has and is not all there.
fn home_of(
    data: &Path,
    run_dir: &RunDir,
    known: Option<&Superblock>,
    standing: Option<&Standing>,
) -> Result<Option<Home>, DaemonError> {
    let Ok(bell) = bell_of(run_dir.path(), data) else { return Ok(None) };
    match known.map(right_of) {
        None | Some(Right::Standby | Right::Declined) => Ok(Home::of(data, standing, bell)?),
        Some(Right::Active) => {
            let home = Home::left_behind(data, known.and_then(|known| known.gift).map(|gift| gift.disk), bell)?;
            home.map(|mut home| home.lower().map(|()| home)).transpose().map_err(Into::into)
        }
    }
}

/// What was given is still given.
fn check_gift(superblock: &Superblock, gift: Gift, standing: Option<&Standing>) -> Result<(), DaemonError> {
    match standing {
        Some(standing) if standing.given_to == Some(superblock.uuid) && standing.epoch == gift.epoch => Ok(()),
        _ => {
            let now = standing.map_or("unknown".into(), |standing| standing.epoch.to_string());
            Err(DaemonError::TakenBack { then: gift.epoch, now })
        }
    }
}

/// What the source has to be, now and whenever it comes back.
fn expect(source: &SourceSide, superblock: &Superblock, hello: Option<&SourceHello>) -> Result<(), DaemonError> {
    let Some(hello) = hello else { return Ok(()) };
    let expected = match (right_of(superblock), superblock.gift) {
        (Right::Standby | Right::Declined, Some(gift)) => Expect::Disk(gift.disk),
        (Right::Standby | Right::Declined, None) => Expect::Size,
        (Right::Active, None) => return Ok(()),
        (Right::Active, Some(gift)) => {
            check_gift(superblock, gift, hello.standing.as_ref())?;
            Expect::Gift { to: superblock.uuid, epoch: gift.epoch }
        }
    };
    source.expect(expected, hello.identity.clone());
    Ok(())
}

/// Connects to the source; a complete cache goes on without one, and one that was given back to it, if so wished.
fn open_source(
    options: &DaemonOptions,
    known: Option<&Superblock>,
    policy: &LossPolicy,
    interrupted: &Receiver<()>,
) -> Result<(FetchThread, Option<SourceHello>), DaemonError> {
    let state = known.map(|superblock| superblock.state);
    let complete = state == Some(CacheState::Complete);
    if options.no_source {
        if state == Some(CacheState::Away) {
            return Ok(FetchThread::start(None, false, policy.clone(), interrupted)?);
        }
        // One that is taken over may have got its disk back since it was attached without.
        if !options.is_recovery() {
            return Err(DaemonError::NeedsSource(options.cache.clone()));
        }
    }
    // Nobody else could give this disk back, or would be taken for whoever gave it.
    let known_ferry = is_given_away(&options.cache) || known.is_some_and(|superblock| superblock.gift.is_some());
    match FetchThread::start(Some(options.source.clone()), known_ferry, policy.clone(), interrupted) {
        // It needs no source, and whoever answers at that address now need not be the one it came from.
        Ok((fetch, Some(hello))) if complete && known.is_some_and(|known| is_another(known, &hello)) => {
            log::info!(
                "the cache is complete, going on without {}: it is another disk, or was changed",
                options.source
            );
            fetch.stop();
            Ok(FetchThread::start(None, false, policy.clone(), interrupted)?)
        }
        Ok(opened) => Ok(opened),
        Err(FetchThreadError::Dial(e)) if complete => {
            log::info!("the cache is complete, going on without its source ({e})");
            Ok(FetchThread::start(None, false, policy.clone(), interrupted)?)
        }
        Err(FetchThreadError::Dial(e)) if state == Some(CacheState::Away) => Err(DaemonError::SourceGone(e)),
        Err(e) => Err(e.into()),
    }
}

/// Is a source not what a cache was made of? One that gave its disk and took it back is.
fn is_another(cache: &Superblock, hello: &SourceHello) -> bool {
    let disk = hello.standing.as_ref().map(|standing| standing.disk);
    let gave = cache.gift.is_some_and(|gift| disk == Some(gift.disk));
    !gave && (hello.size_bytes, &hello.identity) != (cache.size_bytes, &cache.source_identity)
}

fn facts_of(options: &DaemonOptions, known: Option<&Superblock>, hello: Option<&SourceHello>) -> SourceFacts {
    let (size_bytes, identity) = match (hello, known) {
        (Some(hello), _) => (hello.size_bytes, hello.identity.clone()),
        (None, Some(known)) => (known.size_bytes, known.source_identity.clone()),
        (None, None) => unreachable!("only a cache that is known goes without a source"),
    };
    let disk = hello.and_then(|hello| hello.standing.as_ref()).map(|standing| standing.disk);
    SourceFacts { uri: options.source.to_string(), size_bytes, identity, disk }
}

/// The logical block size of a block device; of one that is taken over, the one that it has.
fn logical_of(
    options: &DaemonOptions,
    door: &Door,
    hello: Option<&SourceHello>,
    size_bytes: u64,
) -> Result<u64, DaemonError> {
    match (door, &options.ublk) {
        (Door::Ublk(device), Some(UblkOptions { recover: Some(_), .. })) => Ok(device.sizes()?.1),
        (Door::Ublk(_), Some(ublk)) => {
            let unit = ublk.logical_bytes.unwrap_or_else(|| hello.map_or(1, |hello| hello.min_read_bytes));
            Ok(logical_bytes(size_bytes, unit)?)
        }
        _ => Ok(0),
    }
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
