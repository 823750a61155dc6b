//! The source as a whole: what is asked of it, whatever becomes of its links.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use event_listener::Event;
use futures_util::FutureExt;
use futures_util::future::{Either, join, select, try_join_all};

use super::BULK_LINKS;
use super::dial::{DialError, Spares, dial_first};
use super::doubt::doubt;
use super::keep::{identify_in_time, keep_link, watch};
use super::link::{Asked, Link, LinkError};
#[cfg(feature = "planted-faults")]
use super::planted::{PlantedFault, is_planted};
use super::policy::LossPolicy;
use super::read::FetchedData;
use super::shared::{Expect, Patience, Shared, SourceEvents, alive};
use super::silence::Silence;
use super::stats::SourceStats;
use crate::engine::{ByteRange, Errno, Extent, FetchError, Lane};
use crate::nbd::{Ask, Base, Standing, Told, TransmissionFlags, Uri};
use crate::uring::{Task, now, sleep, spawn};

/// How long the source may take to hear that it is not needed any more.
const DONE_PATIENCE: Duration = Duration::from_secs(2);
/// How long a fetch of hydration that has been asked for waits for a connection that is not demand's.
const OWN_LINK_PATIENCE: Duration = Duration::from_millis(500);
/// A range that no server should find too long to be asked about.
const MODEST_BYTES: u64 = 1 << 30;
/// Longest range that is asked about at once: what was written there.
const CHANGED_BYTES: u64 = 2 << 30;
/// So many of these questions are under way.
const CHANGED_AT_ONCE: usize = 64;

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

impl From<LinkError> for HandOffError {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Lost => Self::Lost,
            LinkError::Refused(errno) => Self::Refused(errno),
        }
    }
}

/// An open source. Lives on one thread.
pub struct Source {
    shared: Rc<Shared>,
    tasks: RefCell<Vec<Task<()>>>,
    /// Connections for [`Source::keep_up`] that are being made already.
    spares: RefCell<Spares>,
    round_trip: Duration,
}

/// What was written at a source.
#[derive(Clone, Debug)]
pub struct Changed {
    /// Since it was made from this; `None`: it does not know.
    pub base: Option<Base>,
    /// Lengths from the start of the disk on, with "written".
    pub stretches: Vec<(u64, bool)>,
}

/// What is known before the first word with a source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beforehand {
    /// [`Source::keep_up`] will follow.
    pub keeps_up: bool,
    /// It can only be a blkferry export: one word less is waited for.
    pub known_ferry: bool,
}

impl Source {
    /// Connects for the first time and learns what the source is.
    pub async fn open(uri: Uri, policy: LossPolicy, beforehand: Beforehand) -> Result<Self, DialError> {
        let stats = SourceStats::default();
        let spares = if beforehand.keeps_up { BULK_LINKS } else { 0 };
        let (dialed, spares) = dial_first(&uri, &stats, beforehand.known_ferry, spares).await?;
        let round_trip = dialed.round_trip;
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
            proven: Cell::default(),
            asked_again: RefCell::default(),
            // Until somebody keeps links up, the first one is all there is.
            bulk_refused: Cell::new(true),
            events: RefCell::new(None),
            lost_since: Cell::new(None),
            policy,
            silence: Silence::new(now()),
            hung_up: Cell::new(false),
        });
        shared.set(0, Some(link));
        let watching = spawn(watch(shared.clone()));
        Ok(Self { shared, tasks: RefCell::new(vec![watching]), spares: RefCell::new(spares), round_trip })
    }

    /// Waits until no link is left. For those who do not have links kept up.
    pub async fn gone(&self) {
        loop {
            let alive = alive(&self.shared.slots.borrow()).next().cloned();
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
        tasks.push(spawn(doubt(self.shared.clone())));
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
        if let Some(link) = self.shared.proven.take() {
            link.close();
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

    /// How long it took to answer when it was first spoken to.
    pub fn round_trip(&self) -> Duration {
        self.round_trip
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

    /// Waits until hydration can ask without standing in anybody's way, or has to stand there. False: the source has been
    /// lost for too long.
    pub async fn takes_bulk(&self) -> bool {
        self.shared.link(Lane::Bulk, Patience::Policy).await.is_some()
    }

    async fn read_once(&self, range: ByteRange, lane: Lane) -> Result<FetchedData, FetchError> {
        let mut asking = None;
        loop {
            let link = match lane {
                Lane::Demand | Lane::Ahead => self.shared.link(lane, Patience::Policy).await,
                // Somebody may have come to wait for these blocks: they take another way before they wait for long.
                Lane::Bulk => {
                    let own = self.shared.link(Lane::Bulk, Patience::Policy).boxed_local();
                    match select(own, sleep(OWN_LINK_PATIENCE).boxed_local()).await {
                        Either::Left((link, _)) => link,
                        Either::Right(_) => self.shared.link(Lane::Demand, Patience::Policy).await,
                    }
                }
            };
            let link = link.ok_or(FetchError::Unreachable)?;
            asking.get_or_insert_with(|| self.shared.silence.ask(now()));
            match link.read(range).await {
                Ok(data) => return Ok(data),
                Err(LinkError::Refused(errno)) => return Err(FetchError::Refused(errno)),
                #[cfg(feature = "planted-faults")]
                Err(LinkError::Lost) if is_planted(PlantedFault::WaiterDropped) => std::future::pending().await,
                Err(LinkError::Lost) => {}
            }
        }
    }

    /// Holes and zeros of a range, or of its beginning. Empty: the source cannot say. Hydration waits for the answer as
    /// long as it takes.
    pub async fn extents(&self, mut range: ByteRange, lane: Lane) -> Vec<Extent> {
        let patience = if lane == Lane::Bulk { Patience::Endless } else { Patience::Policy };
        loop {
            let Some(link) = self.shared.link(lane, patience).await else { return Vec::new() };
            match link.extents(range).await {
                Ok(extents) => return extents,
                // A server may have a limit of its own, though the protocol has none.
                Err(LinkError::Refused(_)) if range.len() > MODEST_BYTES => range.end = range.start + MODEST_BYTES,
                Err(LinkError::Refused(_)) => return Vec::new(),
                Err(LinkError::Lost) => {}
            }
        }
    }

    /// A step of a handoff. Not asked again if the connection breaks: whoever asks has to know.
    pub async fn hand_off(&self, ask: &Ask) -> Result<Told, HandOffError> {
        Ok(self.link_for_hand_off()?.hand_off(ask).1.await?)
    }

    /// A step of a handoff, and in the same round trip what was written: as it is after that step. `None`: that has to be
    /// asked for itself.
    pub async fn hand_off_and_tell(&self, ask: &Ask) -> Result<(Told, Option<Changed>), HandOffError> {
        let link = self.link_for_hand_off()?;
        let (asked, told) = link.hand_off(ask);
        let (told, changed) = join(told, self.changed_on(&link, Some(asked))).await;
        Ok((told?, changed.ok()))
    }

    fn link_for_hand_off(&self) -> Result<Link, HandOffError> {
        self.shared.pick(Lane::Demand).ok_or(HandOffError::Lost)
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

    /// What was written since the source's disk was made from its base. The guest waits for this, and a large disk is many
    /// questions: they are asked together.
    pub async fn changed(&self) -> Result<Changed, HandOffError> {
        self.changed_on(&self.link_for_hand_off()?, None).await
    }

    async fn changed_on(&self, link: &Link, after: Option<Asked>) -> Result<Changed, HandOffError> {
        let starts: Vec<u64> = (0..self.size_bytes()).step_by(CHANGED_BYTES as usize).collect();
        let mut stretches = Vec::new();
        for together in starts.chunks(CHANGED_AT_ONCE) {
            let piece = |&start: &u64| ByteRange { start, end: self.size_bytes().min(start + CHANGED_BYTES) };
            let told = try_join_all(together.iter().map(|start| link.changed(piece(start), after))).await?;
            stretches.extend(told.into_iter().flatten());
        }
        // As the connection said that was made last: the source may have died since we first heard of it, and know less.
        Ok(Changed { base: self.standing().and_then(|standing| standing.base), stretches })
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
