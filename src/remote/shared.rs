//! What those share who use a source and those who keep its links up: the links, whose turn it is on which, and since
//! when none is left.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use event_listener::Event;
use uuid::Uuid;

use super::link::Link;
use super::policy::{LossPolicy, OnLoss};
use super::silence::Silence;
use super::stats::SourceStats;
use super::{MIN_SILENCE, SILENCE};
use crate::engine::{ByteRange, Lane};
use crate::nbd::{Standing, Uri};
use crate::uring::now;

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
pub(super) enum Patience {
    /// As long as the user's policy says.
    Policy,
    /// As long as links are kept up.
    Endless,
}

/// See the module's page.
pub(super) struct Shared {
    pub(super) uri: Uri,
    pub(super) stats: SourceStats,
    pub(super) identity: RefCell<String>,
    /// What its disk must be when it comes back.
    pub(super) expect: Cell<Expect>,
    /// How its disk stood when it was asked last.
    pub(super) standing: RefCell<Option<Standing>>,
    /// It is a blkferry export.
    pub(super) is_ferry: bool,
    pub(super) size_bytes: u64,
    pub(super) max_read_bytes: u64,
    /// Slot 0 serves demand; the others hydration, if there are any.
    pub(super) slots: RefCell<Vec<Option<Link>>>,
    pub(super) link_up: Event,
    /// One on which the source has answered what it did not answer on others: for the first slot that is free.
    pub(super) proven: Cell<Option<Link>>,
    /// Reads that are asked again on another connection since one was doubted. Who asks for the whole may wait for longer
    /// than who asks for a little of it: the source is slow there then, and the next connection is not doubted for it.
    pub(super) asked_again: RefCell<Vec<ByteRange>>,
    /// The source was asked for a connection for hydration and did not give one: it shares the demand link then.
    pub(super) bulk_refused: Cell<bool>,
    pub(super) events: RefCell<Option<Rc<dyn SourceEvents>>>,
    /// Since when no link has been left.
    pub(super) lost_since: Cell<Option<Instant>>,
    pub(super) policy: LossPolicy,
    pub(super) silence: Silence,
    /// Nobody wants links any more.
    pub(super) hung_up: Cell<bool>,
}

/// Those of some slots that are filled and whose link lives.
pub(super) fn alive(slots: &[Option<Link>]) -> impl Iterator<Item = &Link> {
    slots.iter().flatten().filter(|link| link.is_alive())
}

impl Shared {
    pub(super) fn set(&self, slot: usize, link: Option<Link>) {
        self.slots.borrow_mut()[slot] = link;
        let up = alive(&self.slots.borrow()).count();
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

    /// How long it may say nothing while requests wait. Who is to fail soon must not wait for long to find out.
    pub(super) fn longest_silence(&self) -> Duration {
        match self.policy.get() {
            OnLoss::Wait => SILENCE,
            OnLoss::FailAfter(patience) => SILENCE.min(patience.max(MIN_SILENCE)),
        }
    }

    /// Gives up what has been silent since then, for a connection that is not.
    pub(super) fn replace_silent(&self, proven: Link, since: Instant) {
        let slots = self.slots.borrow();
        let silent: Vec<&Link> = alive(&slots).filter(|link| link.is_no_better(since)).collect();
        self.asked_again.replace(silent.iter().flat_map(|link| link.awaited_reads()).collect());
        // Whose end is noticed first makes room for it.
        match silent.is_empty() {
            true => proven.close(),
            false => self.proven.set(Some(proven)),
        }
        silent.iter().for_each(|link| link.close());
    }

    /// What came since the last time ends its silence.
    pub(super) fn listen(&self) {
        self.slots.borrow().iter().flatten().for_each(|link| self.silence.hear(link.heard()));
        // What is counted when a connection ends came before it fell silent: handshakes only.
        self.silence.count(self.stats.greeted_bytes(), now());
    }

    /// `since`: when it was heard last, or when the loss was noticed.
    pub(super) fn report_lost(&self, reason: String, since: Instant) {
        if self.stats.links() == 0 {
            if self.lost_since.get().is_none() {
                // Others may have been heard after the last look, and have broken in the same moment.
                self.listen();
                self.lost_since.set(Some(self.silence.lost_since(since)));
            }
            if let Some(events) = &*self.events.borrow() {
                events.lost(Lost { reason });
            }
        }
    }

    /// Has it been lost for longer than requests are to wait?
    pub(super) fn is_given_up(&self) -> bool {
        let too_long = |since: Instant| match self.policy.get() {
            OnLoss::Wait => false,
            OnLoss::FailAfter(patience) => now().duration_since(since) >= patience,
        };
        self.lost_since.get().is_some_and(too_long)
    }

    /// The least loaded link of a lane, or of the other lane if it has none; waits until there is one. `None`: that has
    /// taken too long, or will not happen any more.
    pub(super) async fn link(&self, lane: Lane, patience: Patience) -> Option<Link> {
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

    pub(super) fn pick(&self, lane: Lane) -> Option<Link> {
        let slots = self.slots.borrow();
        let (demand, bulk) = slots.split_at(1);
        let (first, second) = match lane {
            Lane::Demand | Lane::Ahead => (demand, bulk),
            Lane::Bulk => (bulk, demand),
        };
        let own_link_may_come = demand.len() < slots.len() && !self.bulk_refused.get();
        let best = |slots: &[Option<Link>]| alive(slots).min_by_key(|link| link.load()).cloned();
        match best(first) {
            None if lane == Lane::Bulk && own_link_may_come => None,
            None => best(second),
            found => found,
        }
    }
}
