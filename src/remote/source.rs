//! The source as a whole: its links, its identity, and what happens when it is lost.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use event_listener::Event;
use futures_util::FutureExt;
use futures_util::future::{Either, select, try_join_all};
use uuid::Uuid;

use super::dial::{DialError, Spare, Spares, dial, dial_first};
use super::link::{Link, LinkError};
use super::policy::{LossPolicy, OnLoss};
use super::read::FetchedData;
use super::stats::SourceStats;
use super::{BACKOFF, BULK_LINKS, CONNECT_TIMEOUT, MIN_SILENCE, SHORT_LIFE, SILENCE, WATCH_PERIOD};
use crate::engine::{ByteRange, Errno, Extent, FetchError, Lane};
use crate::identity::{IdentityHasher, sample_ranges};
use crate::nbd::{Ask, Standing, Told, TransmissionFlags, Uri};
use crate::uring::{Task, sleep, spawn};

/// How long the source may take to hear that it is not needed any more.
const DONE_PATIENCE: Duration = Duration::from_secs(2);
/// Longest range that is asked about at once: what was written there.
const CHANGED_BYTES: u64 = 2 << 30;

/// Why a step of a handoff was not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandOffError {
    /// The connection is gone: it may have been done or not.
    #[error("the connection to the source broke, so that it is not known whether it has given the disk; ask again")]
    Lost,
    /// It could not.
    #[error("the source could not do it: {0}")]
    Refused(Errno),
}

/// Why the source does not answer at the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// In words.
    pub reason: String,
}

/// Who wants to know when the source is lost and found.
pub trait SourceEvents {
    /// No link is left; reconnecting goes on.
    fn lost(&self, lost: Lost);
    /// A link is up again.
    fn found(&self);
}

/// An open source. Lives on one thread.
pub struct Source {
    shared: Rc<Shared>,
    tasks: RefCell<Vec<Task<()>>>,
    /// Connections for [`Source::keep_up`] that are being made already.
    spares: RefCell<Spares>,
}

struct Shared {
    uri: Uri,
    stats: SourceStats,
    identity: RefCell<String>,
    /// What its disk must be when it comes back.
    expect: Cell<Expect>,
    /// How its disk stood when it was asked last.
    standing: RefCell<Option<Standing>>,
    /// It is a blkferry export.
    is_ferry: bool,
    size_bytes: u64,
    max_read_bytes: u64,
    /// Slot 0 serves demand; the others hydration, if there are any.
    slots: RefCell<Vec<Option<Link>>>,
    link_up: Event,
    /// The source was asked for a connection for hydration and did not give one: it shares the demand link then.
    bulk_refused: Cell<bool>,
    events: RefCell<Option<Rc<dyn SourceEvents>>>,
    /// Since when no link has been left.
    lost_since: Cell<Option<Instant>>,
    policy: LossPolicy,
    /// Nobody wants links any more.
    hung_up: Cell<bool>,
}

/// What a source must be when it comes back after a loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// A disk of the same size: it may still be written there, and has no name.
    Size,
    /// The same contents.
    Contents,
    /// The same disk: it may still be written there.
    Disk(Uuid),
    /// The same contents, of a disk that still is given to us.
    Gift {
        /// Our own disk.
        to: Uuid,
        /// The epoch in which it was given.
        epoch: u64,
    },
}

/// How long to wait for a link.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Patience {
    /// As long as the user's policy says.
    Policy,
    /// As long as links are kept up.
    Endless,
}

impl Source {
    /// Connects for the first time and learns what the source is. With `keeps_up`, [`Source::keep_up`] will follow.
    pub async fn open(uri: Uri, policy: LossPolicy, keeps_up: bool) -> Result<Self, DialError> {
        let stats = SourceStats::default();
        let (dialed, spares) = dial_first(&uri, &stats, if keeps_up { BULK_LINKS } else { 0 }).await?;
        let link = Link::start(dialed, stats.clone());
        let Some(identified) = identify_in_time(&link).await else {
            link.close();
            return Err(DialError::Silent { uri: uri.to_string() });
        };
        let identity = identified.map_err(|error| DialError::Broken {
            uri: uri.to_string(),
            source: match error {
                LinkError::Lost => std::io::ErrorKind::ConnectionReset.into(),
                LinkError::Refused(errno) => std::io::Error::from_raw_os_error(errno.0),
            },
        })?;
        let size_bytes = link.session().size_bytes;
        let max_read_bytes = u64::from(link.session().max_payload_bytes());
        let is_ferry = link.session().ferry_identity.is_some();
        let standing = link.session().standing.clone();
        let several = link.session().flags.contains(TransmissionFlags::CAN_MULTI_CONN);
        let slots = if several { 1 + BULK_LINKS } else { 1 };
        let shared = Rc::new(Shared {
            uri,
            stats,
            identity: RefCell::new(identity),
            expect: Cell::new(Expect::Contents),
            standing: RefCell::new(standing),
            is_ferry,
            size_bytes,
            max_read_bytes,
            slots: RefCell::new(vec![None; slots]),
            link_up: Event::new(),
            // Until somebody keeps links up, the first one is all there is.
            bulk_refused: Cell::new(true),
            events: RefCell::new(None),
            lost_since: Cell::new(None),
            policy,
            hung_up: Cell::new(false),
        });
        shared.set(0, Some(link));
        let silence = spawn(watch(shared.clone()));
        Ok(Self { shared, tasks: RefCell::new(vec![silence]), spares: RefCell::new(spares) })
    }

    /// Waits until no link is left. For those who do not have links kept up.
    pub async fn gone(&self) {
        loop {
            let alive = self.shared.slots.borrow().iter().flatten().find(|link| link.is_alive()).cloned();
            match alive {
                Some(link) => link.dead().await,
                None => return,
            }
        }
    }

    /// Keeps links up from now on, and reports.
    pub fn keep_up(&self, events: Rc<dyn SourceEvents>) {
        *self.shared.events.borrow_mut() = Some(events);
        self.shared.bulk_refused.set(false);
        let slots = self.shared.slots.borrow().len();
        let mut spares = self.spares.take();
        let mut tasks = self.tasks.borrow_mut();
        tasks.extend((0..slots).map(|slot| {
            let spare = if slot == 0 { None } else { spares.pop() };
            spawn(keep_link(self.shared.clone(), slot, spare))
        }));
    }

    /// Closes all links for good. Reads that are still under way end as [`FetchError::Unreachable`].
    pub fn hang_up(&self) {
        self.tasks.borrow_mut().clear();
        self.shared.hung_up.set(true);
        for slot in self.shared.slots.borrow_mut().iter_mut() {
            if let Some(link) = slot.take() {
                link.close();
            }
        }
        self.shared.stats.set_links(0);
        self.shared.link_up.notify(usize::MAX);
    }

    /// Where it is.
    pub fn uri(&self) -> &Uri {
        &self.shared.uri
    }

    /// Size of the disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.shared.size_bytes
    }

    /// What its contents are known by.
    pub fn identity(&self) -> String {
        self.shared.identity.borrow().clone()
    }

    /// Looks again what its contents are known by.
    pub async fn identify(&self) -> Result<String, HandOffError> {
        let Some(link) = self.shared.pick(Lane::Demand) else { return Err(HandOffError::Lost) };
        let looked = match link.session().ferry_identity {
            // It tells it once a connection.
            Some(_) => return Err(HandOffError::Refused(Errno::ENOTSUP)),
            None => identify_in_time(&link).await,
        };
        looked.and_then(Result::ok).ok_or(HandOffError::Lost)
    }

    /// How its disk stood when it was asked last, if it can change hands.
    pub fn standing(&self) -> Option<Standing> {
        self.shared.standing.borrow().clone()
    }

    /// Sets what the source must be from now on, and what its contents are known by.
    pub fn expect(&self, expect: Expect, identity: String) {
        self.shared.expect.set(expect);
        *self.shared.identity.borrow_mut() = identity;
    }

    /// Counters.
    pub fn stats(&self) -> &SourceStats {
        &self.shared.stats
    }

    /// Largest read that the source takes at once, in bytes.
    pub fn max_read_bytes(&self) -> u64 {
        self.shared.max_read_bytes
    }

    /// Smallest unit of a read, in bytes.
    pub fn min_read_bytes(&self) -> u64 {
        let slots = self.shared.slots.borrow();
        slots.iter().flatten().map(|link| u64::from(link.session().min_block)).max().unwrap_or(1)
    }

    /// Does it take several connections, so that demand and hydration have their own?
    pub fn takes_several(&self) -> bool {
        self.shared.slots.borrow().len() > 1
    }

    /// Does it tell holes?
    pub fn tells_extents(&self) -> bool {
        self.shared.slots.borrow().iter().flatten().any(|link| link.session().base_allocation.is_some())
    }

    /// Does it send zeros as holes, however they are stored? A blkferry export does.
    pub fn sends_holes(&self) -> bool {
        self.hashes_blocks()
    }

    /// Is it a blkferry export, which can hash?
    pub fn hashes_blocks(&self) -> bool {
        let can = |link: &Link| link.session().ferry_identity.is_some() && link.session().structured;
        self.shared.slots.borrow().iter().flatten().any(can)
    }

    /// Reads a range; waits for the source as long as the policy says. What is more than the source answers at once
    /// is asked for in pieces.
    pub async fn read(&self, range: ByteRange, lane: Lane) -> Result<FetchedData, FetchError> {
        let max_bytes = self.max_read_bytes();
        if range.len() <= max_bytes {
            return self.read_once(range, lane).await;
        }
        let starts = (range.start..range.end).step_by(max_bytes as usize);
        let pieces = starts.map(|start| ByteRange { start, end: range.end.min(start + max_bytes) });
        let pieces = try_join_all(pieces.map(|piece| self.read_once(piece, lane))).await?;
        Ok(FetchedData::join(range, &pieces))
    }

    async fn read_once(&self, range: ByteRange, lane: Lane) -> Result<FetchedData, FetchError> {
        loop {
            let link = self.shared.link(lane, Patience::Policy).await.ok_or(FetchError::Unreachable)?;
            match link.read(range).await {
                Ok(data) => return Ok(data),
                Err(LinkError::Refused(errno)) => return Err(FetchError::Refused(errno)),
                Err(LinkError::Lost) => {}
            }
        }
    }

    /// Holes and zeros of a range. Empty: the source cannot say. Hydration waits for the answer as long as it takes.
    pub async fn extents(&self, range: ByteRange, lane: Lane) -> Vec<Extent> {
        let patience = if lane == Lane::Bulk { Patience::Endless } else { Patience::Policy };
        loop {
            let Some(link) = self.shared.link(lane, patience).await else { return Vec::new() };
            match link.extents(range).await {
                Ok(extents) => return extents,
                Err(LinkError::Refused(_)) => return Vec::new(),
                Err(LinkError::Lost) => {}
            }
        }
    }

    /// A step of a handoff. Not asked again if the connection breaks: whoever asks has to know.
    pub async fn hand_off(&self, ask: &Ask) -> Result<Told, HandOffError> {
        let Some(link) = self.shared.pick(Lane::Demand) else { return Err(HandOffError::Lost) };
        link.hand_off(ask).await.map_err(|error| match error {
            LinkError::Lost => HandOffError::Lost,
            LinkError::Refused(errno) => HandOffError::Refused(errno),
        })
    }

    /// Tells a source that gave us its disk that we have everything. Politeness: it need not hear it.
    pub async fn say_done(&self) {
        let (Expect::Gift { to, epoch }, Some(standing)) = (self.shared.expect.get(), self.standing()) else { return };
        let ask = Ask::Done { disk: standing.disk, to, epoch };
        match select(self.hand_off(&ask).boxed_local(), sleep(DONE_PATIENCE).boxed_local()).await {
            Either::Left((Ok(Told::Noted), _)) => {}
            Either::Left((told, _)) => log::debug!("the source was told that we have everything, and said {told:?}"),
            Either::Right(_) => log::debug!("the source was told that we have everything, and did not answer"),
        }
    }

    /// What was written since the source's disk was made from its base: all of it, as lengths from the start on.
    pub async fn changed(&self) -> Result<Vec<(u64, bool)>, HandOffError> {
        let mut all: Vec<(u64, bool)> = Vec::new();
        let mut at = 0;
        while at < self.size_bytes() {
            let Some(link) = self.shared.pick(Lane::Demand) else { return Err(HandOffError::Lost) };
            let end = self.size_bytes().min(at + CHANGED_BYTES);
            let told = link.changed(ByteRange { start: at, end }).await.map_err(|error| match error {
                LinkError::Lost => HandOffError::Lost,
                LinkError::Refused(errno) => HandOffError::Refused(errno),
            })?;
            let told_bytes: u64 = told.iter().map(|(len, _)| len).sum();
            if told_bytes == 0 || told_bytes > end - at {
                return Err(HandOffError::Refused(Errno::EIO));
            }
            at += told_bytes;
            all.extend(told);
        }
        Ok(all)
    }

    /// Hashes of a range, a blkferry source's.
    pub async fn hashes(&self, range: ByteRange) -> Result<Vec<[u8; 32]>, Errno> {
        loop {
            let Some(link) = self.shared.link(Lane::Bulk, Patience::Endless).await else { return Err(Errno::EIO) };
            match link.hashes(range).await {
                Ok(hashes) => return Ok(hashes),
                Err(LinkError::Refused(errno)) => return Err(errno),
                Err(LinkError::Lost) => {}
            }
        }
    }
}

impl Shared {
    fn set(&self, slot: usize, link: Option<Link>) {
        self.slots.borrow_mut()[slot] = link;
        let up = self.slots.borrow().iter().flatten().filter(|link| link.is_alive()).count();
        self.stats.set_links(up);
        if up > 0 {
            self.link_up.notify(usize::MAX);
            if self.lost_since.take().is_some()
                && let Some(events) = &*self.events.borrow()
            {
                events.found();
            }
        }
    }

    /// `since`: when it was heard last, or when the loss was noticed.
    fn report_lost(&self, reason: String, since: Instant) {
        if self.stats.links() == 0 {
            if self.lost_since.get().is_none() {
                self.lost_since.set(Some(since));
            }
            if let Some(events) = &*self.events.borrow() {
                events.lost(Lost { reason });
            }
        }
    }

    /// Has it been lost for longer than requests are to wait?
    fn is_given_up(&self) -> bool {
        let too_long = |since: Instant| match self.policy.get() {
            OnLoss::Wait => false,
            OnLoss::FailAfter(patience) => since.elapsed() >= patience,
        };
        self.lost_since.get().is_some_and(too_long)
    }

    /// The least loaded link of a lane, or of the other lane if it has none; waits until there is one. `None`: that has
    /// taken too long, or will not happen any more.
    async fn link(&self, lane: Lane, patience: Patience) -> Option<Link> {
        loop {
            let up = self.link_up.listen();
            if let Some(link) = self.pick(lane) {
                return Some(link);
            }
            if self.hung_up.get() || (patience == Patience::Policy && self.is_given_up()) {
                return None;
            }
            up.await;
        }
    }

    fn pick(&self, lane: Lane) -> Option<Link> {
        let slots = self.slots.borrow();
        let (demand, bulk) = slots.split_at(1);
        let (first, second) = match lane {
            Lane::Demand => (demand, bulk),
            Lane::Bulk => (bulk, demand),
        };
        let own_link_may_come = demand.len() < slots.len() && !self.bulk_refused.get();
        let best = |slots: &[Option<Link>]| {
            slots.iter().flatten().filter(|link| link.is_alive()).min_by_key(|link| link.load()).cloned()
        };
        match best(first) {
            None if lane == Lane::Bulk && own_link_may_come => None,
            None => best(second),
            found => found,
        }
    }
}

/// What the disk behind a link is known by: the identity that it tells, or samples of its contents.
async fn identify(link: &Link) -> Result<String, LinkError> {
    if let Some(identity) = &link.session().ferry_identity {
        return Ok(identity.clone());
    }
    let size_bytes = link.session().size_bytes;
    let unit = u64::from(link.session().min_block);
    let mut hasher = IdentityHasher::new(size_bytes, None);
    for range in sample_ranges(size_bytes) {
        // Whole units of the source's block size around the sample.
        let start = range.start / unit * unit;
        let aligned = ByteRange { start, end: range.end.next_multiple_of(unit).min(size_bytes) };
        let data = link.read(aligned).await?;
        let mut bytes = Vec::new();
        data.pieces(range).iter().for_each(|part| part.append_to(&mut bytes));
        hasher.sample(&bytes);
    }
    Ok(hasher.finish("sampled"))
}

async fn identify_in_time(link: &Link) -> Option<Result<String, LinkError>> {
    match select(identify(link).boxed_local(), sleep(CONNECT_TIMEOUT).boxed_local()).await {
        Either::Left((identified, _)) => Some(identified),
        Either::Right(_) => None,
    }
}

/// Keeps one slot filled for ever, at first with a spare connection if there is one.
async fn keep_link(shared: Rc<Shared>, slot: usize, mut spare: Option<Spare>) {
    let mut pause = BACKOFF.0;
    let mut is_first = true;
    loop {
        let held = shared.slots.borrow()[slot].clone();
        if let Some(link) = held {
            let (since, answers) = (Instant::now(), link.answers());
            link.dead().await;
            shared.set(slot, None);
            log::warn!("source {}: connection {slot} lost", shared.uri);
            shared.report_lost("the connection was lost".into(), link.lost_since());
            is_first = false;
            if since.elapsed() < SHORT_LIFE && link.answers() == answers {
                sleep(pause + jitter(pause)).await;
                pause = (pause * 2).min(BACKOFF.1);
            } else {
                pause = BACKOFF.0;
            }
        }
        match reconnect(&shared, is_first, spare.take()).await {
            Ok(link) => {
                // Whichever comes first: hydration gives its own links a chance to come up.
                shared.bulk_refused.set(false);
                shared.set(slot, Some(link));
                continue;
            }
            Err(reason) => {
                log::debug!("{reason}");
                is_first = false;
                shared.bulk_refused.set(true);
                shared.link_up.notify(usize::MAX);
                shared.report_lost(reason, Instant::now());
            }
        }
        sleep(pause + jitter(pause)).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

/// A new link to the *same* disk; anything else is refused, in words. `is_first`: nothing was lost before it.
async fn reconnect(shared: &Shared, is_first: bool, spare: Option<Spare>) -> Result<Link, String> {
    let dialed = match spare {
        Some(spare) => spare.await,
        None => dial(&shared.uri, &shared.stats, shared.is_ferry).await,
    };
    let dialed = dialed.map_err(|e| e.to_string())?;
    let link = Link::start(dialed, shared.stats.clone());
    if link.session().size_bytes != shared.size_bytes {
        let now = link.session().size_bytes;
        link.close();
        return Err(format!("source {}: it has {now} bytes now, {} before: refused", shared.uri, shared.size_bytes));
    }
    match check_disk(shared, &link, is_first).await {
        Ok(()) => Ok(link),
        Err(reason) => {
            link.close();
            Err(format!("source {}: {reason}", shared.uri))
        }
    }
}

/// Is it still what it has to be?
async fn check_disk(shared: &Shared, link: &Link, is_first: bool) -> Result<(), String> {
    let standing = link.session().standing.clone();
    shared.standing.borrow_mut().clone_from(&standing);
    match (shared.expect.get(), standing) {
        (Expect::Size, _) => return Ok(()),
        (Expect::Disk(disk), Some(now)) if now.disk == disk => return Ok(()),
        (Expect::Disk(disk), _) => return Err(format!("it is not disk {disk} any more: refused")),
        (Expect::Gift { to, epoch }, Some(now)) if now.given_to == Some(to) && now.epoch == epoch => {}
        (Expect::Gift { epoch, .. }, now) => {
            let now = now.map_or("unknown".into(), |now| now.epoch.to_string());
            return Err(format!(
                "the disk was given to us in epoch {epoch}, and was taken back there since (its epoch is {now}): refused"
            ));
        }
        (Expect::Contents, _) => {}
    }
    // Samples cost bytes: when the links come up one after the other, those of a foreign server show them once.
    if is_first && shared.stats.links() > 0 && link.session().ferry_identity.is_none() {
        return Ok(());
    }
    let before = shared.identity.borrow().clone();
    match identify_in_time(link).await.unwrap_or(Err(LinkError::Lost)) {
        Ok(identity) if identity == before => Ok(()),
        Ok(identity) => {
            Err(format!("it is not the same disk any more, or was written to ({identity}, before {before}): refused"))
        }
        Err(_) => Err("the connection broke while the disk was identified".into()),
    }
}

/// Up to half of a pause, so that many clients of one source do not return in step.
fn jitter(pause: Duration) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = now.subsec_nanos() ^ std::process::id().wrapping_mul(0x9e37_79b9);
    pause.mul_f64(f64::from(seed % 1000) / 2000.0)
}

/// Closes links whose source has fallen silent with requests under way, and ends the patience of those who wait for
/// a source that is lost.
async fn watch(shared: Rc<Shared>) {
    let mut was_given_up = false;
    loop {
        sleep(WATCH_PERIOD).await;
        let patience = match shared.policy.get() {
            OnLoss::Wait => None,
            OnLoss::FailAfter(patience) => Some(patience),
        };
        // Who is to fail soon must not wait for long to find out.
        let silence = patience.map_or(SILENCE, |patience| SILENCE.min(patience.max(MIN_SILENCE)));
        let slots = shared.slots.borrow();
        let alive = || slots.iter().flatten().filter(|link| link.is_alive());
        let silent = alive().filter_map(Link::silent_since).filter(|since| since.elapsed() > silence).min();
        if let Some(since) = silent {
            log::warn!("source {}: no answer for {} s, connections given up", shared.uri, silence.as_secs_f32());
            // Those that nothing was asked of meanwhile are no better: who waits would wait as long again on them.
            let others = alive().filter(|link| !link.heard_after(since + WATCH_PERIOD));
            others.for_each(|link| link.close_silent(since));
        }
        drop(slots);
        let given_up = shared.is_given_up();
        if given_up && !was_given_up {
            log::warn!("source {}: lost for too long, requests for absent blocks fail until it is back", shared.uri);
            shared.link_up.notify(usize::MAX);
        }
        was_given_up = given_up;
    }
}
