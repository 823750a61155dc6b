//! The shell around the engine, simulated: one thread, no clock, no bytes.
//!
//! ```text
//!   driver ─► submit, hit, flush (this file) ─► Engine::apply ─► take (orders.rs) ─► tasks
//!      └────► progress, finish (carry.rs) ◄─────────────────────────────────────────┘
//! ```
//!
//! Nothing here decides anything by chance: the drivers do ([`crate::random`], [`crate::pairs`]).

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use blkferry::cache::Committer;
use blkferry::engine::{
    Action, BlockRun, ByteRange, Engine, Errno, Event, FetchId, Geometry, Lane, Maps, OpId, OpKind, PageImage, Words,
};

use crate::check::{Checked, ensure};
use crate::commit::Running;
use crate::disk::Disk;
use crate::guest::{Guest, Wish};
use crate::history::History;
use crate::metadata::Bytes;
use crate::setup::{Initial, Setup, sectors_of};
use crate::stamp::Stamp;
use crate::stats::Stats;
use crate::task::{Act, Task, What};

/// Map words that outlive the engine, as the shared mapping on tmpfs does.
#[derive(Clone)]
pub struct LiveWords(pub Arc<[AtomicU64]>);

impl LiveWords {
    /// Words as recovered from pages.
    pub fn of(geometry: Geometry, pages: &[PageImage]) -> Self {
        let words: Arc<[AtomicU64]> = (0..Maps::words_needed(geometry)).map(|_| AtomicU64::new(0)).collect();
        let words = Self(words);
        words.load(pages);
        words
    }

    /// Adds the bits of pages.
    pub fn load(&self, pages: &[PageImage]) {
        pages.iter().for_each(|page| blkferry::engine::load_page(&self.0, page));
    }
}

impl Words for LiveWords {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

/// What a run looks for and how, apart from its seed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Leave everything to the history: no rule about single actions is asked after.
    pub oracle_only: bool,
    /// Write down what happens.
    pub trace: bool,
    /// The fault to plant.
    #[cfg(feature = "planted-faults")]
    pub fault: Option<crate::planted::Fault>,
}

/// A fetch that was not released yet.
pub struct Fetch {
    pub id: FetchId,
    pub run: BlockRun,
    pub lane: Lane,
    /// Its data is here.
    pub arrived: bool,
}

/// The shell.
pub struct World {
    pub setup: Setup,
    pub options: Options,
    pub engine: Engine,
    pub words: LiveWords,
    /// The cache's data, and the metadata beside it.
    pub disk: Disk<Stamp>,
    pub metadata: Disk<Bytes>,
    pub committer: Committer,
    /// The commit that runs, if it has taken its pages.
    pub commit: Option<Running>,
    pub history: History,
    pub tasks: Vec<Task>,
    pub open: Vec<Guest>,
    pub fetches: Vec<Fetch>,
    /// How often each block was fetched since the engine began.
    pub crossed: Vec<u32>,
    /// Blocks of which the source has said that they are zeros.
    pub told_zero: Vec<bool>,
    /// Blocks that hydration was asked to prefer.
    pub hot: Vec<bool>,
    /// Blocks that the guest ever asked to change.
    pub touched: Vec<bool>,
    /// When the commit that runs was ordered.
    pub commit_began: u64,
    /// Something was made to fail since the engine began.
    pub injected: bool,
    /// The engine handles a step of hydration.
    pub hydrating: bool,
    /// The range that the request being submitted changes.
    pub changing: Option<ByteRange>,
    /// The source says nothing of its extents; the cache has no room for fetched data.
    pub source_is_mute: bool,
    pub cache_is_full: bool,
    /// The last answer of hydration was that all is present.
    pub hydrated: bool,
    pub now: u64,
    pub next_op: u64,
    pub stats: Stats,
    pub trace: Vec<String>,
    actions: Vec<Action>,
}

impl World {
    /// A device in its first state, and an engine on it.
    pub fn new(setup: Setup, options: Options) -> Self {
        let geometry = setup.geometry;
        let initial = |sector| setup.blocks[geometry.block_of(sector * crate::stamp::SECTOR) as usize];
        let truth = |sector| match initial(sector) {
            Initial::Dirty => Stamp::old(sector),
            _ => Stamp::source(sector),
        };
        let cached = |sector| if initial(sector) == Initial::Absent { Stamp::JUNK } else { truth(sector) };
        let birth = setup.birth.clone();
        let words = LiveWords::of(geometry, &birth.pages);
        let blocks = setup.blocks.len();
        Self {
            disk: Disk::new((0..setup.sectors()).map(cached).collect()),
            metadata: Disk::new(birth.sectors.clone()),
            committer: birth.committer(options),
            commit: None,
            history: History::new((0..setup.sectors()).map(truth)),
            engine: new_engine(&setup, &words, options),
            touched: setup.blocks.iter().map(|&b| b == Initial::Dirty).collect(),
            crossed: vec![0; blocks],
            told_zero: vec![false; blocks],
            hot: vec![false; blocks],
            setup,
            options,
            words,
            tasks: Vec::new(),
            open: Vec::new(),
            fetches: Vec::new(),
            commit_began: 0,
            injected: false,
            hydrating: false,
            changing: None,
            source_is_mute: false,
            cache_is_full: false,
            hydrated: false,
            now: 0,
            next_op: 0,
            stats: Stats::default(),
            trace: Vec::new(),
            actions: Vec::new(),
        }
    }

    pub fn maps(&self) -> &Maps {
        self.engine.maps()
    }

    /// Time passes: no two beginnings or ends are at the same moment.
    pub fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        if self.options.trace {
            self.trace.push(text());
        }
    }

    /// Does a rule about single actions hold, or is it not asked after?
    pub fn lenient(&self, holds: bool) -> bool {
        holds || self.options.oracle_only
    }

    // ---- the guest ---------------------------------------------------------------------------------

    fn open(&mut self, wish: Wish) -> OpId {
        self.next_op += 1;
        self.stats.requests += 1;
        let op = OpId(self.next_op);
        let begin = self.tick();
        let guest = Guest::new(op, wish, begin, &self.setup, self.maps());
        if let Some(stamp) = guest.stamp() {
            self.history.begin_write(guest.sectors(), stamp, begin);
            let geometry = self.setup.geometry;
            guest.sectors().for_each(|s| self.touched[geometry.block_of(s * crate::stamp::SECTOR) as usize] = true);
        }
        self.open.push(guest);
        op
    }

    /// A request goes to the engine.
    pub fn submit(&mut self, kind: OpKind, range: ByteRange) -> Checked {
        let op = self.open(Wish::Op(kind, range));
        let is_hit = kind == OpKind::Read && self.guest(op)?.is_local;
        self.changing = self.guest(op)?.stamp().map(|_| range);
        let actions = self.feed(Event::Submit { op, kind, range })?;
        self.changing = None;
        let covering = self.setup.touched(range).count();
        ensure!(actions <= 2 * covering + 2, "I10", "{actions} actions for a request on {covering} blocks");
        ensure!(self.lenient(!is_hit || actions == 1), "I8", "a hit was not read at once, and whole");
        Ok(())
    }

    pub fn flush(&mut self) -> Checked {
        let op = self.open(Wish::Flush);
        self.feed(Event::Flush { op }).map(drop)
    }

    /// A read or write of present blocks, by the frontend itself, as it does it: dirty bit, data, answer.
    pub fn hit(&mut self, kind: OpKind, range: ByteRange) -> Checked {
        let op = self.open(Wish::Op(kind, range));
        self.guest(op)?.claim(range)?;
        let covering = self.setup.geometry.covering(range);
        let act = match kind {
            OpKind::Write { fua } => {
                self.maps().mark_dirty(covering);
                Act::Write { dsync: fua && self.maps().is_committed(covering) }
            }
            _ => Act::Read,
        };
        self.stats.hits += 1;
        self.note(|| format!("-> hit {op:?} {kind:?} {range:?} {act:?}"));
        self.tasks.push(Task::on(sectors_of(range), What::Hit(op, act)));
        Ok(())
    }

    /// The open request of that name.
    pub fn guest(&mut self, op: OpId) -> Checked<&mut Guest> {
        let found = self.open.iter_mut().find(|guest| guest.op == op);
        found.ok_or_else(|| crate::check::Violation { rule: "I10", what: format!("{op:?} is not open") })
    }

    /// Tells the guest.
    pub fn complete(&mut self, op: OpId, result: Result<(), Errno>) -> Checked {
        let now = self.tick();
        let injected = self.injected;
        self.guest(op)?.check_answer(result, injected)?;
        let at = self.open.iter().position(|guest| guest.op == op).expect("found above");
        let guest = self.open.swap_remove(at);
        self.stats.answers += 1;
        self.stats.errors += u64::from(result.is_err());
        if let Some(stamp) = guest.stamp() {
            let durable = guest.is_fua() && result.is_ok();
            self.history.end_write(guest.sectors(), stamp, now, result.is_ok(), durable)?;
        } else if result.is_ok() && guest.wish == Wish::Flush {
            self.history.flushed(guest.begin);
        } else if result.is_ok() && guest.is_read() {
            for (sector, found) in guest.found() {
                self.history.read(sector, found, guest.begin, now)?;
            }
        }
        Ok(())
    }

    // ---- the engine --------------------------------------------------------------------------------

    /// Gives the engine an event and takes its actions; returns how many they were.
    pub fn feed(&mut self, event: Event) -> Checked<usize> {
        self.note(|| format!("-> {event:?}"));
        // Who fetches beside demand, or what becomes of such a fetch that failed.
        let beside = match &event {
            Event::Hydrate => Some(Lane::Bulk),
            Event::Ahead { .. } => Some(Lane::Ahead),
            Event::Fetched { fetch, result: Err(_) } => {
                self.fetches.iter().find(|f| f.id == *fetch && f.lane != Lane::Demand).map(|f| f.lane)
            }
            _ => None,
        };
        self.hydrating = event == Event::Hydrate;
        let most = (self.setup.blocks.len() + 2) * (self.open.len() + 2);
        let mut actions = std::mem::take(&mut self.actions);
        self.engine.apply(event, &mut actions);
        let count = actions.len();
        for action in actions.drain(..) {
            self.note(|| format!("     <- {action:?}"));
            self.take(action, beside)?;
        }
        self.actions = actions;
        ensure!(count <= most, "I10", "{count} actions for one event, {most} are the most");
        Ok(count)
    }
}

/// An engine that attaches to these words.
pub fn new_engine(setup: &Setup, words: &LiveWords, options: Options) -> Engine {
    let maps = Maps::new(setup.geometry, Box::new(words.clone()));
    #[allow(unused_mut)]
    let mut engine = Engine::new(maps, setup.config);
    #[cfg(feature = "planted-faults")]
    if let Some(crate::planted::Fault::Engine(fault)) = options.fault {
        engine.plant(fault);
    }
    #[cfg(not(feature = "planted-faults"))]
    let _ = options;
    engine
}
