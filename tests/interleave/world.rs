//! Two or three hosts and what is between them. What the real code does in one durable step is one step here; in
//! between, anything may happen.

use super::explore::Model;
use blkferry::handoff::{Deed, Move, Right, Step, Taker};
use blkferry::nbd::{Ask, HANDOFF_VERSION, Standing, Told};
use uuid::Uuid;

const DISK: Uuid = Uuid::from_u128(0xd);

/// What the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A file, written by somebody whose lock is respected.
    Image,
    /// A device of ours: it stops its own guest, and a killed daemon stops it, too.
    Device,
}

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// No Take beyond this epoch.
    pub epoch: u64,
    /// Writes of the source's guest.
    pub writes: u8,
    /// Requests of one destination that are on their way at the same time.
    pub asks: usize,
}

/// Mistakes planted in what surrounds the rules, each of which has to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flaw {
    /// The source says "given" before that is on record.
    AnswerBeforeRecord,
    /// The source does not keep writers out for as long as it is given away, only while its export runs.
    NoFence,
    /// A source that starts with its disk at home does not look for a fence that was left.
    FenceLeft,
    /// The destination lets its guest write before it is on record that it may.
    WriteBeforeRecord,
    /// The destination keeps it in mind only that it called the handoff off.
    CallOffFromMemory,
}

impl Flaw {
    pub const ALL: [Self; 5] =
        [Self::AnswerBeforeRecord, Self::NoFence, Self::FenceLeft, Self::WriteBeforeRecord, Self::CallOffFromMemory];
}

/// A step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Label {
    GuestOpens,
    GuestWrites,
    GuestCloses,
    SourceHears(usize, Ask),
    SourceRecords,
    SourceFences,
    SourceAnswers,
    SourceDies,
    SourceStarts,
    AskIsLost(usize, Ask),
    AnswerIsLost(usize),
    Asks(usize),
    GivesUpWaiting(usize),
    CallsOff(usize),
    Declines(usize),
    Hears(usize),
    RecordsActive(usize),
    Dies(usize),
    Starts(usize),
}

/// What the source is in the middle of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Job {
    from: usize,
    ask: Ask,
    todo: Move,
    recorded: bool,
    fenced: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Source {
    // On disk.
    deed: Deed,
    /// What the image was known by when it was given away.
    given_as: Option<u8>,
    fence: bool,
    content: u8,
    // In memory.
    up: bool,
    kept_out: bool,
    job: Option<Job>,
    guest: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Destination {
    // On disk.
    right: Right,
    floor: u64,
    /// What it found when it became active.
    base: u8,
    // In memory.
    up: bool,
    epoch: u64,
    waits_for: Option<Ask>,
    given: Option<u64>,
    guest_may_write: bool,
    // On the way.
    asks: Vec<Ask>,
    answer: Option<(Ask, Told)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    kind: Kind,
    flaw: Option<Flaw>,
    bounds: Bounds,
    source: Source,
    destinations: Vec<Destination>,
}

fn name(index: usize) -> Uuid {
    Uuid::from_u128(0xa0 + index as u128)
}

impl Model for World {
    type Label = Label;

    fn violation(&self) -> Option<String> {
        let writers = self.destinations.iter().filter(|d| d.right == Right::Active || d.guest_may_write).count();
        if writers > 1 {
            return Some("two destinations may write".into());
        }
        if writers == 1 && self.source_can_write() {
            return Some("both sides may write".into());
        }
        let lost = |d: &Destination| d.right == Right::Active && d.base != self.source.content;
        if self.destinations.iter().any(lost) {
            return Some("the destination has other contents than the source was left with".into());
        }
        if self.destinations.iter().any(|d| d.guest_may_write && d.right != Right::Active) {
            return Some("a guest writes without a record that it may".into());
        }
        None
    }

    /// Is there a side on which the machine can run, without force?
    fn is_settled(&self) -> bool {
        self.source_can_write() || self.destinations.iter().any(|d| d.guest_may_write)
    }

    // ---- what may happen -----------------------------------------------------------------------------

    fn next(&self) -> Vec<(Label, Self)> {
        let mut steps = Vec::new();
        self.source_steps(&mut steps);
        for index in 0..self.destinations.len() {
            self.network_steps(index, &mut steps);
            self.destination_steps(index, &mut steps);
        }
        steps
    }
}

impl World {
    pub fn new(kind: Kind, destinations: usize, flaw: Option<Flaw>, bounds: Bounds) -> Self {
        let source = Source {
            deed: Deed::new(DISK),
            given_as: None,
            fence: false,
            content: 0,
            up: true,
            kept_out: false,
            job: None,
            guest: true,
        };
        let destination = Destination {
            right: Right::Standby,
            floor: 0,
            base: 0,
            up: true,
            epoch: 2,
            waits_for: None,
            given: None,
            guest_may_write: false,
            asks: Vec::new(),
            answer: None,
        };
        Self { kind, flaw, bounds, source, destinations: vec![destination; destinations] }
    }

    // ---- what must hold ------------------------------------------------------------------------------

    /// Can somebody at the source start to write, or write, now?
    fn source_can_write(&self) -> bool {
        let source = &self.source;
        match self.kind {
            // Whoever has it open goes on; a newcomer is stopped by the lock of the export or by the fence.
            Kind::Image => source.guest || (!source.kept_out && !source.fence),
            // There is no way past the daemon, which starts with what is on record.
            Kind::Device => source.up && !source.kept_out,
        }
    }

    fn step(&self, label: Label, steps: &mut Vec<(Label, Self)>, change: impl FnOnce(&mut Self)) {
        let mut world = self.clone();
        change(&mut world);
        steps.push((label, world));
    }

    fn source_steps(&self, steps: &mut Vec<(Label, Self)>) {
        let source = &self.source;
        if !source.guest && self.source_can_write() {
            self.step(Label::GuestOpens, steps, |w| w.source.guest = true);
        }
        if source.guest {
            self.step(Label::GuestCloses, steps, |w| w.source.guest = false);
        }
        if source.guest && self.source_can_write() && source.content < self.bounds.writes {
            self.step(Label::GuestWrites, steps, |w| w.source.content += 1);
        }
        if !source.up {
            self.step(Label::SourceStarts, steps, Self::start_source);
            return;
        }
        self.step(Label::SourceDies, steps, |w| {
            w.source.up = false;
            w.source.kept_out = false;
            w.source.job = None;
            // Its connections end with it.
            w.destinations.iter_mut().for_each(|d| d.answer = None);
        });
        if let Some(job) = &source.job {
            self.job_steps(job, steps);
        }
    }

    fn start_source(&mut self) {
        self.source.up = true;
        // A file that was given away is kept under lock again, and a device comes up as what it is.
        self.source.kept_out = !self.source.deed.is_here();
        if self.source.kept_out && self.kind == Kind::Image && self.source.guest {
            // The lock is not to be had: the export refuses to start.
            self.source.up = false;
            self.source.kept_out = false;
        }
        let changed = self.source.given_as.is_some_and(|then| then != self.source.content);
        if changed {
            self.source.up = false;
            self.source.kept_out = false;
        }
        if self.source.up && !(self.flaw == Some(Flaw::FenceLeft) && self.source.deed.is_here()) {
            // Death may have come between the record and the fence.
            let keeps = self.kind == Kind::Image && self.flaw != Some(Flaw::NoFence);
            self.source.fence = keeps && !self.source.deed.is_here();
        }
    }

    fn job_steps(&self, job: &Job, steps: &mut Vec<(Label, Self)>) {
        let is_give = matches!(job.todo, Move::Give(_));
        if !job.recorded {
            self.step(Label::SourceRecords, steps, |w| {
                let (Move::Give(deed) | Move::TakeBack(deed)) = job.todo.clone() else { unreachable!() };
                w.source.deed = deed;
                w.source.given_as = is_give.then_some(w.source.content);
                w.source.job.as_mut().unwrap().recorded = true;
            });
        } else if !job.fenced {
            self.step(Label::SourceFences, steps, |w| {
                w.source.fence = is_give && w.kind == Kind::Image && w.flaw != Some(Flaw::NoFence);
                w.source.kept_out = is_give;
                w.source.job.as_mut().unwrap().fenced = true;
            });
        }
        let done = job.recorded && job.fenced;
        if done || (is_give && self.flaw == Some(Flaw::AnswerBeforeRecord)) {
            self.step(Label::SourceAnswers, steps, |w| {
                let told = match &job.todo {
                    Move::Give(deed) => Told::Given { epoch: deed.epoch, identity: String::new() },
                    Move::TakeBack(_) => Told::Back { epoch: w.source.deed.epoch },
                    Move::Say(_) | Move::Retire => unreachable!("said at once"),
                };
                w.destinations[job.from].answer = Some((job.ask.clone(), told));
                if done {
                    w.source.job = None;
                }
            });
        }
    }

    fn network_steps(&self, index: usize, steps: &mut Vec<(Label, Self)>) {
        let destination = &self.destinations[index];
        for (at, ask) in destination.asks.iter().enumerate() {
            self.step(Label::AskIsLost(index, ask.clone()), steps, |w| {
                w.destinations[index].asks.remove(at);
            });
            // One handoff at a time, in the order in which they come up: any.
            if self.source.up && self.source.job.is_none() {
                self.step(Label::SourceHears(index, ask.clone()), steps, |w| {
                    let ask = w.destinations[index].asks.remove(at);
                    w.source_hears(index, ask);
                });
            }
        }
        if destination.answer.is_some() {
            self.step(Label::AnswerIsLost(index), steps, |w| w.destinations[index].answer = None);
        }
    }

    fn source_hears(&mut self, from: usize, ask: Ask) {
        let todo = self.source.deed.on(&ask);
        let say = |told| Some((ask.clone(), told));
        match &todo {
            Move::Say(told) => self.destinations[from].answer = say(told.clone()),
            Move::Retire => self.destinations[from].answer = say(Told::Noted),
            Move::Give(_) if self.kind == Kind::Image && self.source.guest => {
                let no = Told::No { why: "in use".into(), epoch: self.source.deed.epoch, later: true };
                self.destinations[from].answer = say(no);
            }
            Move::Give(_) => {
                self.source.kept_out = true;
                self.source.job = Some(Job { from, ask, todo, recorded: false, fenced: false });
            }
            Move::TakeBack(_) => self.source.job = Some(Job { from, ask, todo, recorded: false, fenced: false }),
        }
    }

    fn taker(&self, index: usize) -> Taker {
        let Destination { right, floor, epoch, .. } = self.destinations[index];
        Taker { me: name(index), disk: DISK, right, floor, epoch }
    }

    fn destination_steps(&self, index: usize, steps: &mut Vec<(Label, Self)>) {
        let me = &self.destinations[index];
        if !me.up {
            if self.source.up {
                self.step(Label::Starts(index), steps, |w| w.start_destination(index));
            }
            return;
        }
        self.step(Label::Dies(index), steps, |w| {
            let me = &mut w.destinations[index];
            (me.up, me.waits_for, me.given, me.guest_may_write, me.answer) = (false, None, None, false, None);
            if w.flaw == Some(Flaw::CallOffFromMemory) {
                me.floor = 0;
            }
        });
        let taker = self.taker(index);
        let room = me.asks.len() < self.bounds.asks && me.waits_for.is_none();
        if let (Some(ask), true, None) = (taker.take(0), room && me.epoch <= self.bounds.epoch, me.given) {
            self.step(Label::Asks(index), steps, |w| w.ask(index, ask));
        }
        if let (Some(ask), true) = (taker.give_back(), room) {
            self.step(Label::Asks(index), steps, |w| w.ask(index, ask));
        }
        if me.right == Right::Standby && me.epoch >= me.floor && me.epoch <= self.bounds.epoch {
            self.step(Label::CallsOff(index), steps, |w| {
                let me = &mut w.destinations[index];
                (me.given, me.waits_for, me.floor) = (None, None, taker.called_off().floor);
            });
        }
        if me.right == Right::Standby && me.epoch <= self.bounds.epoch {
            self.step(Label::Declines(index), steps, |w| {
                let me = &mut w.destinations[index];
                (me.given, me.waits_for) = (None, None);
                (me.right, me.floor) = (Right::Declined, taker.declined().floor);
            });
        }
        if me.waits_for.is_some() {
            self.step(Label::GivesUpWaiting(index), steps, |w| w.destinations[index].waits_for = None);
        }
        if me.answer.is_some() {
            self.step(Label::Hears(index), steps, |w| w.hear(index));
        }
        if me.given.is_some() {
            self.step(Label::RecordsActive(index), steps, |w| {
                let me = &mut w.destinations[index];
                (me.right, me.base, me.given) = (Right::Active, w.source.content, None);
                me.guest_may_write = true;
            });
        }
    }

    fn ask(&mut self, index: usize, ask: Ask) {
        let me = &mut self.destinations[index];
        me.waits_for = Some(ask.clone());
        me.asks.push(ask);
        me.asks.sort_by_key(Ask::encode);
    }

    /// A handshake tells how the disk stands.
    fn start_destination(&mut self, index: usize) {
        let Deed { disk, epoch, given_to } = self.source.deed;
        let standing = Standing { version: HANDOFF_VERSION, disk, epoch, given_to, base: None, complete: true };
        let taker = self.taker(index).seen(&standing);
        let me = &mut self.destinations[index];
        me.up = true;
        me.epoch = taker.epoch;
        me.guest_may_write = me.right == Right::Active;
    }

    fn hear(&mut self, index: usize) {
        let taker = self.taker(index);
        let me = &mut self.destinations[index];
        let (ask, told) = me.answer.take().unwrap();
        if me.waits_for.as_ref() != Some(&ask) {
            // Whoever asked that does not wait any more.
            return;
        }
        me.waits_for = None;
        if matches!(ask, Ask::GiveBack { .. }) {
            if let Told::Back { epoch } = told {
                me.epoch = taker.back(epoch).epoch;
            }
            return;
        }
        match taker.on_told(told) {
            Step::Activate { epoch, .. } => {
                me.given = Some(epoch);
                me.guest_may_write = self.flaw == Some(Flaw::WriteBeforeRecord);
            }
            Step::AskAgain(taker) => me.epoch = taker.epoch,
            Step::Refused { .. } => {}
        }
    }
}
