//! The rules of the fetch layer, and what is remembered in order to check them.
//!
//! | rule | says |
//! |---|---|
//! | data | a read returns what was last written, or the source's bytes ([`History`]) |
//! | I6 | a block is asked for again only if the answer was lost with its connection, or was an error |
//! | doubt | a sector of it is asked for on a new connection, where another has been silent for a while |
//! | patience | an error of an absent block comes with `fail-after:T` only, and not before T of silence |
//! | I8/I9 | what needs nothing from the source waits for nothing of it, and does not fail |
//! | in time | with `fail-after:T`, nobody waits for longer than that and a bound |
//! | backoff | attempts to connect keep to their pauses: they grow, and begin anew after a good connection |
//! | liveness | with `wait`, all that is asked is answered, once the link is good for long enough |
//! | nothing sticky | then, absent blocks can be read at once |
//! | nothing left | when all is here, there is no request, no buffer, no connection and no task too many |

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use blkferry::remote::OnLoss;
use blkferry::uring::now;
use blkferry::uring::simulation::{Connecting, ConnectionId};

use crate::check::{Checked, Violation};
use crate::history::History;
use crate::search::Counts;
use crate::setup::Setup;
use crate::wire::Said;

/// The unit in which reads are looked at: a read of the fetch layer is of whole blocks.
pub const UNIT: u64 = 4096;
/// First and longest pause between two attempts to connect, as docs and `src/remote` have it.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Attempts within a minute of three connections that keep to their pauses: 6 until these are 5 s, then one each, and
/// two that are made beside the first one.
const MAX_DIALS_A_MINUTE: usize = 3 * (7 + 12) + 2;
/// A source is not taken for silent before that.
const MIN_SILENCE: Duration = Duration::from_secs(2);
/// A connection is not doubted before that.
const MIN_DOUBT: Duration = Duration::from_secs(1);
/// A connection on which less comes in that time may be taken for one that says nothing: a piece of an answer, on a link that
/// was fast a moment ago.
const SPEAKS_BYTES: usize = 256 << 10;
/// What is promised beyond T, and what disks and a commit may take.
const GRACE: Duration = Duration::from_millis(1000 + 1000);

/// What happened in cases, to prove that they are about something.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub cases: u64,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub errors: u64,
    /// Operations whose device was killed.
    pub unknown: u64,
    pub misses: u64,
    pub fetches: u64,
    /// Fetches whose answer was lost.
    pub lost: u64,
    /// Questions whether a connection is dead.
    pub probes: u64,
    pub dials: u64,
    pub refused_dials: u64,
    pub flipped_bits: u64,
    pub troubles: u64,
    pub device_kills: u64,
    pub source_kills: u64,
    pub replaced: u64,
    pub simulated_s: u64,
}

impl Counts for Stats {
    fn add(&mut self, other: &Self) {
        let Self { cases, reads, writes, flushes, errors, unknown, misses, fetches, lost, .. } = other;
        self.cases += cases;
        self.reads += reads;
        self.writes += writes;
        self.flushes += flushes;
        self.errors += errors;
        self.unknown += unknown;
        self.misses += misses;
        self.fetches += fetches;
        self.lost += lost;
        self.dials += other.dials;
        self.probes += other.probes;
        self.refused_dials += other.refused_dials;
        self.flipped_bits += other.flipped_bits;
        self.troubles += other.troubles;
        self.device_kills += other.device_kills;
        self.source_kills += other.source_kills;
        self.replaced += other.replaced;
        self.simulated_s += other.simulated_s;
    }
}

/// What became of a block, since the device was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fetched {
    Never,
    Asked(ConnectionId),
    /// Answered on a connection, then. If that dies at the same moment, the answer may not have been looked at.
    Here(ConnectionId, Duration),
}

/// The pauses of a source that takes one connection only, as far as they can be told.
#[derive(Clone, Copy)]
struct Pauses {
    /// The next one; not known before the first good connection.
    next: Option<Duration>,
    /// When the last attempt ended, if it was refused.
    refused_at: Option<Duration>,
    /// The connection that is up, and whether it has answered.
    up: Option<(ConnectionId, bool)>,
}

/// An operation that is under way.
#[derive(Clone, Copy)]
pub struct Open {
    pub began: Duration,
    /// The source has no part in it: its blocks are here, or are written as a whole.
    pub local: bool,
}

/// See the module's page.
pub struct Judge {
    start: Cell<Instant>,
    ticks: Cell<u64>,
    pub history: RefCell<History>,
    pub verdict: RefCell<Option<Violation>>,
    pub stats: Cell<Stats>,
    pub trace: Option<RefCell<Vec<String>>>,
    single: bool,
    blocks: RefCell<Vec<Fetched>>,
    asked: RefCell<BTreeMap<(ConnectionId, u64), (u64, u64)>>,
    /// Connections on which blocks were asked for: what is said on others, about what is hot, is not heard by those who
    /// wait for blocks.
    fetch_on: RefCell<BTreeSet<ConnectionId>>,
    /// Connections on which only a part of a block was asked for, so far.
    probed_on: RefCell<BTreeSet<ConnectionId>>,
    /// Most bytes that were asked for and not answered, so far.
    pub most_asked: Cell<u64>,
    dials: RefCell<VecDeque<Duration>>,
    pauses: Cell<Pauses>,
    /// Connections that were made while the only one was up, because it is doubted.
    beside: RefCell<BTreeSet<ConnectionId>>,
    /// Operations that are not answered.
    open: RefCell<BTreeMap<u64, Open>>,
    /// The last policies, and since when.
    policies: RefCell<Vec<(Duration, OnLoss)>>,
    /// When the device heard anything.
    heard: Cell<Duration>,
    /// What came on each connection within [`MIN_DOUBT`]: when, and bytes. (What is asked on one that is dead, nobody sees.)
    heard_on: RefCell<BTreeMap<ConnectionId, VecDeque<(Duration, usize)>>>,
    /// When it had an answer, and the times without one that were more than a moment: their ends and lengths.
    answered: Cell<Duration>,
    silences: RefCell<Vec<(Duration, Duration)>>,
    /// Until when errors have another reason than the loss of the source.
    excused_until: Cell<Duration>,
    /// From when on the rule "in time" can be judged: the device came up, or changed.
    timely_from: Cell<Duration>,
}

impl Judge {
    pub fn new(setup: &Setup, trace: bool) -> Self {
        let blocks = setup.size_bytes().div_ceil(UNIT);
        Self {
            start: Cell::new(now()),
            ticks: Cell::new(1),
            history: RefCell::new(setup.history()),
            verdict: RefCell::default(),
            stats: Cell::default(),
            trace: trace.then(RefCell::default),
            single: setup.single,
            blocks: RefCell::new(vec![Fetched::Never; blocks as usize]),
            asked: RefCell::default(),
            fetch_on: RefCell::default(),
            probed_on: RefCell::default(),
            most_asked: Cell::default(),
            dials: RefCell::default(),
            pauses: Cell::new(Pauses { next: None, refused_at: None, up: None }),
            beside: RefCell::default(),
            open: RefCell::default(),
            policies: RefCell::new(vec![(Duration::ZERO, setup.policy)]),
            heard: Cell::default(),
            heard_on: RefCell::default(),
            answered: Cell::default(),
            silences: RefCell::default(),
            excused_until: Cell::default(),
            timely_from: Cell::default(),
        }
    }

    /// The world's time began then.
    pub fn set_start(&self, start: Instant) {
        self.start.set(start);
    }

    /// Time since the beginning.
    pub fn now(&self) -> Duration {
        now().duration_since(self.start.get())
    }

    /// A moment that no other thing shares, for the history.
    pub fn tick(&self) -> u64 {
        self.ticks.set(self.ticks.get() + 1);
        self.ticks.get()
    }

    pub fn count(&self, what: impl FnOnce(&mut Stats)) {
        let mut stats = self.stats.get();
        what(&mut stats);
        self.stats.set(stats);
    }

    pub fn note(&self, what: impl FnOnce() -> String) {
        if let Some(trace) = &self.trace {
            trace.borrow_mut().push(format!("{:>10.3} s  {}", self.now().as_secs_f64(), what()));
        }
    }

    pub fn check(&self, checked: Checked) {
        if let Err(violation) = checked {
            self.note(|| violation.to_string());
            self.verdict.borrow_mut().get_or_insert(violation);
        }
    }

    pub fn broken(&self, rule: &'static str, what: String) {
        self.check(Err(Violation { rule, what }));
    }

    pub fn is_over(&self) -> bool {
        self.verdict.borrow().is_some()
    }

    // ---- connections -------------------------------------------------------------------------------

    pub fn dialled(&self, id: ConnectionId, connecting: Connecting) {
        let now = self.now();
        self.count(|stats| stats.dials += 1);
        self.note(|| format!("{id:?} is dialled: {connecting:?}"));
        self.heard_on.borrow_mut().insert(id, VecDeque::from([(now, SPEAKS_BYTES)]));
        let mut dials = self.dials.borrow_mut();
        dials.push_back(now);
        while dials.front().is_some_and(|first| now - *first > Duration::from_secs(60)) {
            dials.pop_front();
        }
        if dials.len() > MAX_DIALS_A_MINUTE {
            self.broken("backoff", format!("{} attempts to connect within a minute, and no answer", dials.len()));
        }
        drop(dials);
        let is_refused = matches!(connecting, Connecting::Refused(_));
        self.count(|stats| stats.refused_dials += u64::from(is_refused));
        if self.pauses.get().up.is_some() {
            self.beside.borrow_mut().insert(id);
        } else if let Connecting::Refused(delay) = connecting {
            self.refused(now, delay);
        } else {
            self.pauses.set(Pauses { next: None, refused_at: None, up: Some((id, false)) });
        }
    }

    /// The next attempt comes after a pause that is known.
    fn refused(&self, now: Duration, delay: Duration) {
        let mut pauses = self.pauses.get();
        if !self.single {
            return;
        }
        if let (Some(next), Some(before)) = (pauses.next, pauses.refused_at) {
            let pause = now - before;
            if pause < next || pause > next.mul_f64(1.5) + Duration::from_millis(2) {
                self.broken(
                    "backoff",
                    format!("a pause of {pause:?}, where {next:?} and at most half of it more are due"),
                );
            }
            pauses.next = Some((next * 2).min(BACKOFF.1));
        }
        pauses.refused_at = Some(now + delay);
        pauses.up = None;
        self.pauses.set(pauses);
    }

    pub fn left(&self, id: ConnectionId) {
        self.note(|| format!("{id:?} is given up"));
        self.fetch_on.borrow_mut().remove(&id);
        self.probed_on.borrow_mut().remove(&id);
        let mut lost = 0;
        let now = self.now();
        for block in self.blocks.borrow_mut().iter_mut() {
            if *block == Fetched::Asked(id) || *block == Fetched::Here(id, now) {
                *block = Fetched::Never;
                lost = 1;
            }
        }
        let mut asked = self.asked.borrow_mut();
        let before = asked.len();
        asked.retain(|(connection, _), _| *connection != id);
        self.count(|stats| stats.lost += lost * (before - asked.len()) as u64);
        let mut pauses = self.pauses.get();
        if let Some((_, answered)) = pauses.up.filter(|(up, _)| *up == id) {
            // One that was good: the pauses begin anew, with an attempt at once; unless another may take its place, or
            // its answer was one in which a bit was flipped.
            let is_replaced = !self.beside.borrow().is_empty();
            let is_in_doubt = self.excused_until.get() >= now;
            pauses.next = (answered && !is_replaced && !is_in_doubt).then_some(BACKOFF.0);
            pauses.up = None;
        }
        self.beside.borrow_mut().remove(&id);
        self.pauses.set(pauses);
    }

    pub fn heard_bytes(&self, id: ConnectionId, bytes: usize) {
        self.heard.set(self.now());
        let mut heard_on = self.heard_on.borrow_mut();
        let heard = heard_on.entry(id).or_default();
        heard.push_back((self.now(), bytes));
        while heard.front().is_some_and(|(when, _)| self.now() - *when >= MIN_DOUBT) {
            heard.pop_front();
        }
    }

    pub fn flipped(&self) {
        self.count(|stats| stats.flipped_bits += 1);
        self.excuse(Duration::ZERO);
    }

    // ---- fetches -----------------------------------------------------------------------------------

    /// The device is new: what it has not committed it may ask for again.
    pub fn device_starts(&self) {
        self.blocks.borrow_mut().fill(Fetched::Never);
        self.asked.borrow_mut().clear();
        self.pauses.set(Pauses { next: None, refused_at: None, ..self.pauses.get() });
        self.dials.borrow_mut().clear();
        self.timely_from.set(self.now());
    }

    pub fn heard_request(&self, id: ConnectionId, said: Said) {
        let Said::Read { cookie, offset, len } = said else { return };
        self.count(|stats| stats.fetches += 1);
        self.note(|| format!("{id:?} is asked for {len} bytes at {offset} (cookie {cookie})"));
        self.fetch_on.borrow_mut().insert(id);
        if u64::from(len) < UNIT {
            return self.probed(id);
        }
        self.probed_on.borrow_mut().remove(&id);
        let (start, end) = (offset / UNIT, (offset + u64::from(len)).div_ceil(UNIT));
        if let Some(before) = self.asked.borrow_mut().insert((id, cookie), (start, end)) {
            self.broken("cookie", format!("{id:?} has a request {cookie} already, for blocks {before:?}"));
        }
        let under_way = self.asked.borrow().values().map(|(start, end)| (end - start) * UNIT).sum();
        self.most_asked.set(self.most_asked.get().max(under_way));
        for block in start..end {
            match std::mem::replace(&mut self.blocks.borrow_mut()[block as usize], Fetched::Asked(id)) {
                Fetched::Never => {}
                before => self.broken("I6", format!("block {block} is asked for on {id:?}, and is {before:?}")),
            }
        }
    }

    fn probed(&self, id: ConnectionId) {
        self.count(|stats| stats.probes += 1);
        self.probed_on.borrow_mut().insert(id);
        let now = self.now();
        let lately = |(when, bytes): &(Duration, usize)| if now - *when < MIN_DOUBT { *bytes } else { 0 };
        let heard_on = self.heard_on.borrow();
        if heard_on.values().all(|heard| heard.iter().map(lately).sum::<usize>() >= SPEAKS_BYTES) {
            self.broken("doubt", format!("{id:?} is asked for a part of a block, and every connection speaks"));
        }
    }

    pub fn heard_answer(&self, id: ConnectionId, said: Said) {
        let Said::Answered { cookie, error } = said else { return };
        self.note(|| format!("{id:?} has answered {cookie}{}", if error { " with an error" } else { "" }));
        // It may come too late, or say that it is going away: those who wait will ask there, or elsewhere.
        let is_no_answer = self.probed_on.borrow().contains(&id);
        if self.fetch_on.borrow().contains(&id) && !is_no_answer {
            let before = self.answered.replace(self.now());
            if self.now() - before > Duration::from_millis(50) {
                self.silences.borrow_mut().push((self.now(), self.now() - before));
            }
        }
        self.dials.borrow_mut().clear();
        let mut pauses = self.pauses.get();
        if let Some((_, answered)) = pauses.up.as_mut().filter(|(up, _)| *up == id) {
            // That it is going away is no sign of a good connection.
            *answered |= !error;
        }
        self.pauses.set(pauses);
        let Some((start, end)) = self.asked.borrow_mut().remove(&(id, cookie)) else { return };
        let now = self.now();
        for block in &mut self.blocks.borrow_mut()[start as usize..end as usize] {
            *block = if error { Fetched::Never } else { Fetched::Here(id, now) };
        }
    }

    // ---- the guest ---------------------------------------------------------------------------------

    pub fn begins(&self, op: u64, local: bool) {
        self.open.borrow_mut().insert(op, Open { began: self.now(), local });
    }

    pub fn ends(&self, op: u64) -> Open {
        let open = self.open.borrow_mut().remove(&op).expect("an operation ends once");
        self.check_local(op, open);
        open
    }

    fn check_local(&self, op: u64, open: Open) {
        let took = self.now() - open.began;
        if open.local && took > GRACE {
            self.broken("I8/I9", format!("op {op} has taken {took:?}, and needs nothing from the source"));
        }
    }

    pub fn open(&self) -> usize {
        self.open.borrow().len()
    }

    pub fn set_policy(&self, policy: OnLoss) {
        self.policies.borrow_mut().push((self.now(), policy));
        self.timely_from.set(self.now());
    }

    /// Until so much later, errors have another reason than the loss of the source.
    pub fn excuse(&self, duration: Duration) {
        self.excused_until.set(self.excused_until.get().max(self.now() + duration));
    }

    /// An operation has ended with an error.
    pub fn failed(&self, open: Open, what: &dyn Fn() -> String) {
        let began = open.began;
        self.count(|stats| stats.errors += 1);
        if open.local {
            return self.broken("I8/I9", format!("{} failed, and needs nothing from the source", what()));
        }
        let now = self.now();
        if self.excused_until.get() >= began {
            return;
        }
        let policies = self.policies.borrow();
        let ends = policies.iter().skip(1).map(|(since, _)| *since).chain([Duration::MAX]);
        let in_force = policies.iter().zip(ends).filter(|(_, end)| *end >= began);
        let patience = in_force.filter_map(|((_, policy), _)| match policy {
            OnLoss::Wait => None,
            OnLoss::FailAfter(patience) => Some(*patience),
        });
        let Some(patience) = patience.min() else {
            return self.broken("patience", format!("{} failed, and the policy is to wait", what()));
        };
        let silences = self.silences.borrow();
        let recent = silences.iter().rev().take_while(|(end, _)| *end >= began).map(|(_, len)| *len);
        let longest = recent.chain([now - self.answered.get()]).max().unwrap_or_default();
        if longest + Duration::from_millis(1) < patience {
            self.broken("patience", format!("{} failed after {longest:?} of silence, not {patience:?}", what()));
        }
    }

    /// Forgets what no operation that is open can need, so that a long run does not grow by being watched.
    pub fn forget(&self) {
        assert_eq!(self.open(), 0, "nothing is asked for at the moment");
        self.silences.borrow_mut().clear();
        let mut policies = self.policies.borrow_mut();
        let old = policies.len() - 1;
        policies.drain(..old);
    }

    /// Looked at now and then: does anybody wait for too long?
    pub fn look_for_laggards(&self) {
        let open = self.open.borrow();
        open.iter().for_each(|(op, open)| self.check_local(*op, *open));
        let policies = self.policies.borrow();
        let Some((_, OnLoss::FailAfter(patience))) = policies.last() else { return };
        let now = self.now();
        let from = self.heard.get().max(self.timely_from.get());
        for (op, open) in open.iter() {
            let waited = now - from.max(open.began);
            if waited > (*patience).max(MIN_SILENCE) + GRACE {
                let what =
                    format!("op {op} waits for {waited:?} after the source was heard, with fail-after:{patience:?}");
                return self.broken("in time", what);
            }
        }
    }
}

impl Stats {
    /// Did every kind of thing happen?
    pub fn saw_everything(&self) -> bool {
        let counts = [
            self.reads,
            self.writes,
            self.flushes,
            self.errors,
            self.unknown,
            self.misses,
            self.fetches,
            self.lost,
            self.probes,
            self.refused_dials,
            self.flipped_bits,
            self.device_kills,
            self.source_kills,
            self.replaced,
        ];
        counts.iter().all(|&count| count > 0)
    }
}
