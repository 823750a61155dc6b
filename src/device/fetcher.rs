//! Everything that waits for the source, and the stores that follow.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use crossbeam::channel::Sender;

use super::core::Core;
use super::fetch_bytes::{BULK_WINDOW_BYTES, BULK_WINDOW_SHARED_BYTES, DEMAND_WINDOW_BYTES, SCARCE_BYTES};
use super::messages::FetchRequest;
use super::verify::verify;
use super::window::Window;
use crate::engine::{BlockRun, ByteRange, Errno, Event, Extent, FetchError, FetchId, Lane};
use crate::remote::{FetchedData, HandOffError, Lost, Source, SourceEvents};
use crate::uring::{Budget, FileIo, Lent, Mailbox, Part, Task, ZeroMode, now, spawn};

/// Fetches for hydration that may fail one after the other before it pauses: more than one bad block makes of them.
const MAX_FAILURES: u32 = 64;

/// What the shell keeps of a fetch until the engine releases it.
struct Held {
    data: Option<FetchedData>,
    /// Its part of the buffers; goes back with the entry.
    _share: Lent,
}

/// The fetch thread's own state.
pub(super) struct Fetcher {
    pub(super) core: Arc<Core>,
    cache: FileIo,
    pub(super) source: RefCell<Option<Rc<Source>>>,
    held: RefCell<HashMap<FetchId, Held>>,
    demand: Budget,
    pub(super) bulk: Budget,
    /// Of the fetches that are at the source.
    pub(super) window: Window,
    /// Rung when a fetch ended or extents came: hydration may have something to do again.
    pub(super) progress: event_listener::Event,
    /// Why hydration should pause at once, if it should.
    pub(super) trouble: RefCell<Option<String>>,
    /// What the source could not read last, for hydration.
    pub(super) unreadable: RefCell<Option<String>>,
    /// Fetches for hydration that failed since the last one that did not.
    failures: Cell<u32>,
    /// Read ahead since hydration last counted it.
    pub(super) ahead_bytes: Cell<u64>,
}

struct Reporter {
    core: Arc<Core>,
}

impl SourceEvents for Reporter {
    fn lost(&self, lost: Lost) {
        if self.core.health.lost().is_none_or(|(_, reason)| reason != lost.reason) {
            log::warn!("source lost: {}; waiting for it", lost.reason);
        }
        self.core.health.set_lost(lost.reason);
    }

    fn found(&self) {
        log::info!("source is back");
        self.core.health.set_found();
    }
}

impl Fetcher {
    pub(super) fn new(core: Arc<Core>, cache: FileIo, source: Option<Source>) -> Rc<Self> {
        if let Some(source) = &source {
            source.keep_up(Rc::new(Reporter { core: core.clone() }));
        }
        let own_links = source.as_ref().is_none_or(Source::takes_several);
        let bulk_bytes = if own_links { BULK_WINDOW_BYTES } else { BULK_WINDOW_SHARED_BYTES };
        Rc::new(Self {
            core,
            cache,
            source: RefCell::new(source.map(Rc::new)),
            held: RefCell::default(),
            demand: Budget::new(DEMAND_WINDOW_BYTES),
            bulk: Budget::new(bulk_bytes),
            window: Window::new(bulk_bytes as u64),
            progress: event_listener::Event::new(),
            trouble: RefCell::default(),
            unreadable: RefCell::default(),
            failures: Cell::new(0),
            ahead_bytes: Cell::new(0),
        })
    }

    pub(super) async fn run(self: Rc<Self>, requests: Mailbox<FetchRequest>) {
        let _hydration = spawn(self.clone().hydrate());
        loop {
            match requests.recv().await {
                FetchRequest::Stop => return,
                FetchRequest::Begin { .. } => unreachable!("a device begins once"),
                FetchRequest::Fetch { fetch, run, lane } => {
                    if lane == Lane::Ahead {
                        self.ahead_bytes.update(|bytes| bytes + self.core.geometry().bytes_of(run).len());
                    }
                    self.start_fetch(fetch, run, lane, None);
                }
                FetchRequest::Store { fetch, run } => self.start_store(fetch, run),
                FetchRequest::Release { fetch } => self.release(fetch),
                FetchRequest::Extents { range, answer } => {
                    let this = self.clone();
                    spawn(async move {
                        // Whoever asked may have gone away.
                        let _ = answer.send(this.extents(range, Lane::Demand).await);
                    })
                    .detach();
                }
                FetchRequest::ReadThrough { range, answer } => {
                    let this = self.clone();
                    spawn(async move { drop(answer.send(this.read_through(range).await)) }).detach();
                }
                FetchRequest::HandOff { ask, answer } => {
                    self.ask_source(answer, async move |source| source.hand_off(&ask).await);
                }
                FetchRequest::HandOffAndTell { ask, answer } => {
                    self.ask_source(answer, async move |source| source.hand_off_and_tell(&ask).await);
                }
                FetchRequest::Identify { answer } => self.ask_source(answer, async |source| source.identify().await),
                FetchRequest::Changed { answer } => self.ask_source(answer, async |source| source.changed().await),
                FetchRequest::Expect { expect, identity } => {
                    self.source().iter().for_each(|source| source.expect(expect, identity.clone()));
                }
                FetchRequest::Verify(request) => {
                    spawn(verify(self.core.clone(), self.cache.clone(), request)).detach();
                }
            }
        }
    }

    /// Asks the source something that is no business of the engine's.
    fn ask_source<T: 'static>(
        &self,
        answer: Sender<Result<T, HandOffError>>,
        question: impl AsyncFnOnce(Rc<Source>) -> Result<T, HandOffError> + 'static,
    ) {
        let source = self.source();
        spawn(async move {
            let told = match source {
                Some(source) => question(source).await,
                None => Err(HandOffError::Lost),
            };
            // Whoever asked may have given up.
            let _ = answer.send(told);
        })
        .detach();
    }

    async fn read_through(&self, range: ByteRange) -> Result<Vec<Part>, Errno> {
        let _share = self.demand.take(range.len() as usize).await;
        let source = self.source().ok_or(Errno::EIO)?;
        let read = source.read(range, Lane::Demand).await;
        read.map(|data| data.pieces(range)).map_err(|error| match error {
            FetchError::Refused(errno) => errno,
            FetchError::Unreachable | FetchError::NoRoom => Errno::EIO,
        })
    }

    pub(super) fn source(&self) -> Option<Rc<Source>> {
        self.source.borrow().clone()
    }

    pub(super) async fn extents(&self, range: ByteRange, lane: Lane) -> Vec<Extent> {
        match self.source() {
            Some(source) => source.extents(range, lane).await,
            None => Vec::new(),
        }
    }

    /// Asks what is to be fetched first, beside what hydration does meanwhile.
    pub(super) fn ask_what_is_hot(self: &Rc<Self>) -> Task<()> {
        let this = self.clone();
        spawn(async move {
            if let Some(source) = this.source() {
                source.hot(|ranges| this.core.apply(Event::Hot { ranges })).await;
            }
        })
    }

    /// Asks about holes for hydration, beside what it does meanwhile.
    pub(super) fn start_query(self: &Rc<Self>, run: BlockRun) {
        let this = self.clone();
        spawn(async move {
            let extents = this.extents(this.core.geometry().bytes_of(run), Lane::Bulk).await;
            this.core.apply(Event::Extents { run, extents });
            this.progress.notify(usize::MAX);
        })
        .detach();
    }

    // ---- fetch, store, release ---------------------------------------------------------------------

    pub(super) fn start_fetch(self: &Rc<Self>, fetch: FetchId, run: BlockRun, lane: Lane, share: Option<Lent>) {
        let this = self.clone();
        let range = self.core.geometry().bytes_of(run);
        // Now, and not when the task runs: more may be started before that.
        let flight = self.window.depart(lane, range.len(), now());
        let arrive = move |this: &Self, well| {
            this.window.arrive(&flight, now(), well);
            this.progress.notify(usize::MAX);
        };
        spawn(async move {
            let share = match share {
                Some(share) => share,
                None => this.demand.take(range.len() as usize).await,
            };
            this.held.borrow_mut().insert(fetch, Held { data: None, _share: share });
            // What somebody waits for is of use without a place, too.
            if lane != Lane::Demand
                && let Err(e) = this.make_room(range).await
            {
                if lane == Lane::Bulk {
                    *this.trouble.borrow_mut() = Some(format!("cache: no room for what is to be fetched: {e}"));
                }
                arrive(&this, false);
                return this.core.apply(Event::Fetched { fetch, result: Err(FetchError::NoRoom) });
            }
            let result = match this.source() {
                Some(source) => source.read(range, lane).await,
                None => Err(FetchError::Unreachable),
            };
            arrive(&this, result.is_ok());
            let mut actions = Vec::new();
            match result {
                Ok(data) => {
                    this.failures.set(0);
                    if let Some(held) = this.held.borrow_mut().get_mut(&fetch) {
                        held.data = Some(data.clone());
                    }
                    this.core.apply_into(Event::Fetched { fetch, result: Ok(()) }, &mut actions);
                    this.core.route(actions, Some(&data));
                }
                Err(error) => {
                    match error {
                        FetchError::Refused(errno) => this.could_not_read(run, lane, errno),
                        FetchError::Unreachable | FetchError::NoRoom if lane == Lane::Bulk => {
                            *this.trouble.borrow_mut() = Some("the source is lost".into());
                        }
                        FetchError::Unreachable | FetchError::NoRoom => {}
                    }
                    this.core.apply_into(Event::Fetched { fetch, result: Err(error) }, &mut actions);
                    this.core.route(actions, None);
                }
            }
        })
        .detach();
    }

    /// Sees to it that a range of the cache can be written, where that is in doubt.
    async fn make_room(&self, range: ByteRange) -> io::Result<()> {
        // A file system that cannot tell is asked to make room, too.
        if self.cache.free_bytes().is_ok_and(|free| free > SCARCE_BYTES) {
            return Ok(());
        }
        self.cache.reserve(range.start, range.len()).await
    }

    fn could_not_read(&self, run: BlockRun, lane: Lane, errno: Errno) {
        let range = self.core.geometry().bytes_of(run);
        let reason = format!("the source cannot read {} bytes at {}: {errno}", range.len(), range.start);
        if run.len() > 1 {
            log::debug!("{reason}; asking for each half");
        } else {
            log::warn!("{reason}");
            *self.unreadable.borrow_mut() = Some(reason.clone());
        }
        if lane == Lane::Bulk {
            self.failures.set(self.failures.get() + 1);
            if self.failures.get() >= MAX_FAILURES {
                self.failures.set(0);
                *self.trouble.borrow_mut() = Some(reason);
            }
        }
    }

    fn start_store(self: &Rc<Self>, fetch: FetchId, run: BlockRun) {
        let range = self.core.geometry().bytes_of(run);
        let held = self.held.borrow();
        let data = held.get(&fetch).and_then(|held| held.data.as_ref());
        let pieces = data.expect("data is held until its fetch is released").pieces(range);
        drop(held);
        let this = self.clone();
        spawn(async move {
            let mut at = range.start;
            let mut result = Ok(());
            for piece in pieces {
                let len = piece.len() as u64;
                result = match piece {
                    Part::Zeros(_) => this.cache.zero_at(at, len, ZeroMode::Punch, false).await,
                    data => this.cache.write_all_at(data, at, false).await,
                };
                if result.is_err() {
                    break;
                }
                at += len;
            }
            this.stored(fetch, run, result);
        })
        .detach();
    }

    pub(super) fn start_store_zero(self: &Rc<Self>, fetch: FetchId, run: BlockRun, share: Lent) {
        let range = self.core.geometry().bytes_of(run);
        self.held.borrow_mut().insert(fetch, Held { data: None, _share: share });
        let this = self.clone();
        spawn(async move {
            // Also where nothing was ever written: a store that a crash cut off may have left something.
            let result = this.cache.zero_at(range.start, range.len(), ZeroMode::Punch, false).await;
            this.stored(fetch, run, result);
        })
        .detach();
    }

    fn stored(&self, fetch: FetchId, run: BlockRun, result: io::Result<()>) {
        if let Err(e) = &result {
            let reason = format!("cache: cannot store what was fetched: {e}");
            log::warn!("{reason}");
            *self.trouble.borrow_mut() = Some(reason);
        }
        let result = result.map_err(|e| Errno::from(&e));
        self.core.apply(Event::Stored { fetch, run, result });
    }

    /// Fetches whose data or whose share of the buffers is still held, and the bytes of those shares.
    #[cfg(feature = "simulation")]
    pub(super) fn held(&self) -> (usize, usize) {
        (self.held.borrow().len(), self.demand.lent() + self.bulk.lent())
    }

    fn release(&self, fetch: FetchId) {
        #[cfg(feature = "planted-faults")]
        if crate::remote::is_planted(crate::remote::PlantedFault::BufferKept)
            && self.held.borrow().get(&fetch).is_some_and(|held| held.data.is_none())
        {
            return;
        }
        self.held.borrow_mut().remove(&fetch);
        self.progress.notify(usize::MAX);
    }
}
