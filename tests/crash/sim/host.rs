//! A device on the simulated disk: the real engine, the real maps, a guest that never waits, and the rules.
//!
//! *Backed* blocks have durable data, *acknowledged* ones were answered, *promised* ones were covered by a
//! flush or FUA that was answered, or were seen after a power cut.

use std::collections::HashMap;
use std::io;

use blkferry::cache::{Durable, Recovered};
use blkferry::engine::{
    Action, BlockRun, Engine, EngineConfig, Errno, Event, FetchId, Geometry, IoId, Maps, OpId, OpKind, load_page,
};

use super::bits::{Bits, missing};
use super::platter::Platter;
use crate::rng::Rng;

struct Op {
    run: BlockRun,
    kind: OpKind,
    /// When its last piece of data that is not durable by itself was written.
    written_at: u64,
}

enum Task {
    Io { io: IoId, op: OpId, run: BlockRun, dsync: bool },
    Fetch { fetch: FetchId },
    Store { fetch: FetchId, run: BlockRun },
}

/// Which step of a commit goes wrong, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    PowerCut,
    Error,
}

pub struct Host {
    pub engine: Engine,
    pub platter: Platter,
    pub rng: Rng,
    pub wants_commit: bool,
    /// The step that goes wrong, counted down.
    pub fault: Option<(u64, Fault)>,
    pub has_lost_power: bool,
    pub promised: Bits,
    pub states_looked_at: u64,
    pub flushes_answered: u64,
    every_outcome: bool,
    pages: u64,
    acknowledged: Bits,
    acknowledged_at: u64,
    backed: Bits,
    /// Data written and not durable: when, and where.
    unsynced: Vec<(u64, BlockRun)>,
    now: u64,
    synced_until: u64,
    tasks: Vec<Task>,
    ops: HashMap<OpId, Op>,
    flushes: HashMap<OpId, (Bits, u64)>,
    next_op: u64,
}

fn engine_on(geometry: Geometry, recovered: &Recovered) -> Engine {
    let words: Box<[_]> = std::iter::repeat_with(Default::default).take(Maps::words_needed(geometry)).collect();
    recovered.pages.iter().for_each(|image| load_page(&words, image));
    let config = EngineConfig { max_fetch_bytes: 64 << 10, questions: None, compact: false, max_zero_bytes: u64::MAX };
    Engine::new(Maps::new(geometry, Box::new(words)), config)
}

impl Host {
    pub fn new(geometry: Geometry, rng: Rng, every_outcome: bool) -> (Self, Recovered) {
        let (platter, recovered) = Platter::new(geometry);
        let pages = Maps::pages(geometry);
        let none = Bits::none(pages);
        let host = Self {
            engine: engine_on(geometry, &recovered),
            platter,
            rng,
            wants_commit: false,
            fault: None,
            has_lost_power: false,
            promised: none.clone(),
            states_looked_at: 0,
            flushes_answered: 0,
            every_outcome,
            pages,
            acknowledged: none.clone(),
            acknowledged_at: 0,
            backed: none,
            unsynced: Vec::new(),
            now: 0,
            synced_until: 0,
            tasks: Vec::new(),
            ops: HashMap::new(),
            flushes: HashMap::new(),
            next_op: 0,
        };
        (host, recovered)
    }

    pub fn maps(&self) -> Maps {
        self.engine.maps().clone()
    }

    /// The power is cut and comes back; a new process takes over.
    pub fn lose_power(&mut self) -> Recovered {
        let survivors = self.platter.any_survivors(&mut self.rng);
        self.platter.lose_power(&survivors);
        let recovered = self.platter.recover(&Vec::new()).unwrap();
        let seen = Bits::of(self.pages, &recovered);
        self.check(&seen);
        self.engine = engine_on(self.maps().geometry(), &recovered);
        // What was seen once may be built upon.
        self.promised = seen.clone();
        (self.acknowledged, self.backed) = (seen.clone(), seen);
        self.tasks.clear();
        self.ops.clear();
        self.flushes.clear();
        self.unsynced.clear();
        (self.wants_commit, self.has_lost_power, self.fault) = (false, false, None);
        recovered
    }

    // ---- the rules ---------------------------------------------------------------------------------

    fn check(&self, found: &Bits) {
        let set = Bits::set_in(self.engine.maps());
        let rules = [
            ("I2: a promised bit is lost", missing(&self.promised.present, &found.present)),
            ("I2: a promised dirty bit is lost", missing(&self.promised.dirty, &found.dirty)),
            ("a bit that was never set", missing(&found.present, &set.present)),
            ("a dirty bit that was never set", missing(&found.dirty, &set.dirty)),
            ("I1: the data is not durable", missing(&found.present, &self.backed.present)),
        ];
        for (rule, violation) in rules {
            assert!(violation.is_none(), "{rule}: block {}", violation.unwrap_or_default());
        }
    }

    /// What if the power were cut now?
    pub fn look_at_outcomes(&mut self) {
        for survivors in self.platter.outcomes(&mut self.rng, self.every_outcome) {
            let recovered = self.platter.recover(&survivors);
            let recovered = recovered.unwrap_or_else(|e| panic!("after a power cut ({survivors:02x?}): {e}"));
            self.check(&Bits::of(self.pages, &recovered));
            self.states_looked_at += 1;
        }
    }

    /// Between two steps: outcomes are looked at, the guest goes on, and the step may be the one that goes wrong.
    fn step(&mut self) -> io::Result<()> {
        self.look_at_outcomes();
        for _ in 0..self.rng.below(4) {
            self.guest();
        }
        match &mut self.fault {
            Some((0, fault)) => {
                self.has_lost_power = *fault == Fault::PowerCut;
                Err(io::Error::from_raw_os_error(5))
            }
            Some((steps, _)) => {
                *steps -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    // ---- the guest ---------------------------------------------------------------------------------

    /// One thing that a guest, hydration or the disk does.
    pub fn guest(&mut self) {
        match self.rng.weighted(&[30, 40, 8, 8, 4]) {
            0 => self.submit(),
            1 if !self.tasks.is_empty() => self.carry_out(),
            2 => self.flush(),
            3 => self.apply(Event::Hydrate),
            4 => self.apply(Event::CommitDue),
            _ => {}
        }
    }

    fn fresh_op(&mut self) -> OpId {
        self.next_op += 1;
        OpId(self.next_op)
    }

    fn submit(&mut self) {
        let blocks = self.maps().geometry().blocks();
        // Close to the borders of words and pages, and to where others have been.
        let near = self.rng.one_of(&[0, 60, 448 * 8, 15_860, 15_872 + 60, blocks - 3]);
        let start = (near + self.rng.below(12)).min(blocks - 1);
        let len = self.rng.one_of(&[1, 1, 2, 70]);
        let run = BlockRun::new(start, (start + len).min(blocks));
        let fua = self.rng.percent(15);
        let kind = match self.rng.below(4) {
            0 => OpKind::Trim { fua },
            1 => OpKind::Zero { fua, keep_allocated: true, fast_only: false },
            _ => OpKind::Write { fua },
        };
        let op = self.fresh_op();
        self.ops.insert(op, Op { run, kind, written_at: 0 });
        self.apply(Event::Submit { op, kind, range: self.maps().geometry().bytes_of(run) });
    }

    pub fn flush(&mut self) {
        let op = self.fresh_op();
        self.flushes.insert(op, (self.acknowledged.clone(), self.acknowledged_at));
        self.apply(Event::Flush { op });
    }

    fn carry_out(&mut self) {
        let at = self.rng.below(self.tasks.len() as u64) as usize;
        match self.tasks.swap_remove(at) {
            Task::Io { io, op, run, dsync } => {
                self.written(run, dsync);
                let op = self.ops.get_mut(&op).expect("open");
                op.written_at = if dsync { op.written_at } else { self.now };
                self.apply(Event::LocalDone { io, result: Ok(()) });
            }
            Task::Fetch { fetch } => self.apply(Event::Fetched { fetch, result: Ok(()) }),
            Task::Store { fetch, run } => {
                self.written(run, false);
                self.apply(Event::Stored { fetch, run, result: Ok(()) });
            }
        }
    }

    fn written(&mut self, run: BlockRun, durably: bool) {
        self.now += 1;
        if durably {
            self.backed.add(run, false);
        } else {
            self.unsynced.push((self.now, run));
        }
    }

    pub fn apply(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.engine.apply(event, &mut actions);
        let geometry = self.maps().geometry();
        for action in actions {
            match action {
                Action::WriteLocal { io, op, range, dsync } => {
                    self.tasks.push(Task::Io { io, op, run: geometry.covering(range), dsync });
                }
                Action::ZeroLocal { io, op, range, .. } => {
                    self.tasks.push(Task::Io { io, op, run: geometry.covering(range), dsync: false });
                }
                Action::Fetch { fetch, .. } => self.tasks.push(Task::Fetch { fetch }),
                Action::Store { fetch, run } => self.tasks.push(Task::Store { fetch, run }),
                Action::Commit => {
                    assert!(!self.wants_commit, "one commit at a time");
                    self.wants_commit = true;
                }
                Action::Complete { op, result } => self.completed(op, result),
                Action::Release { .. } | Action::HydrationWaits | Action::HydrationRests | Action::HydrationDone => {}
                other => unreachable!("{other:?}"),
            }
        }
    }

    fn completed(&mut self, op: OpId, result: Result<(), Errno>) {
        if let Some((bits, written_at)) = self.flushes.remove(&op) {
            if result.is_ok() {
                assert!(written_at <= self.synced_until, "I2: a flush was answered before the data was durable");
                self.promised.join(&bits);
                self.flushes_answered += 1;
            }
            return;
        }
        let op = self.ops.remove(&op).expect("open");
        if result.is_err() {
            return;
        }
        self.acknowledged.add(op.run, true);
        self.acknowledged_at = self.acknowledged_at.max(op.written_at);
        let (OpKind::Write { fua } | OpKind::Zero { fua, .. } | OpKind::Trim { fua }) = op.kind else { return };
        if fua {
            assert!(op.written_at <= self.synced_until, "I2: FUA was answered before the data was durable");
            self.promised.add(op.run, true);
        }
    }
}

impl Durable for Host {
    fn sync_data(&mut self) -> io::Result<()> {
        // What is written from now on is not covered.
        let covered = self.now;
        self.step()?;
        let backed = self.unsynced.extract_if(.., |(written, _)| *written <= covered);
        backed.for_each(|(_, run)| self.backed.add(run, false));
        self.synced_until = covered;
        Ok(())
    }

    fn write_map(&mut self, page: u64, copy: u64, bytes: &[u8]) -> io::Result<()> {
        // A write that fails may have been done in part.
        self.platter.write_map(page, copy, bytes);
        self.step()
    }

    fn sync_metadata(&mut self) -> io::Result<()> {
        self.step()?;
        self.platter.sync();
        self.look_at_outcomes();
        Ok(())
    }
}
