//! Who reads by leaps: a field of each record, a column of a table, blocks that lie at a fixed distance.
//!
//! ```text
//!    x       x       x       x       ?       ?
//!    ├─ step ┼─ step ┼─ step ┤       └───────┴─ asked for ahead: as long as what is read, and nothing between
//!     1st     2nd     3rd    the third equal step: it is a reader
//! ```
//!
//! Only misses are seen. What was asked for ahead is a hit when it is read, so that the next miss is some steps on: a
//! reader is known again by any whole number of its steps, and each time it comes to the end of what was asked for,
//! twice as much is asked. Back or forth. Invariants: nothing is wanted before three equal steps were seen, nothing but
//! the places of a next step, and at most [`MAX_STEPS`] steps or [`MAX_BYTES`] ahead.

use std::collections::VecDeque;

use super::geometry::{BlockRun, ByteRange, Geometry};

/// Misses that are remembered: those of some readers at a time.
const MISSES: usize = 16;
/// Readers that are followed.
const READERS: usize = 8;
/// Steps ahead at first, and at most.
const FIRST_STEPS: u64 = 2;
const MAX_STEPS: u64 = 32;
/// Bytes ahead of one reader, if that is less; but one step always.
const MAX_BYTES: u64 = 512 << 10;

/// Places that may be wanted next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Steps {
    read: ByteRange,
    step: i64,
    /// Steps from `read`, the first and the last.
    from: u64,
    to: u64,
}

impl Steps {
    /// The blocks of each place that lies on the disk, in the order in which they will be read.
    pub(super) fn runs(self, geometry: Geometry) -> impl Iterator<Item = BlockRun> {
        (self.from..=self.to).filter_map(move |number| {
            let offset = self.step.checked_mul(number as i64)?;
            let start = self.read.start.checked_add_signed(offset)?;
            let end = start.checked_add(self.read.len()).filter(|end| *end <= geometry.size_bytes())?;
            Some(geometry.covering(ByteRange { start, end }))
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Reader {
    /// The miss that has come furthest.
    last: ByteRange,
    step: i64,
    /// Steps from there that were asked for.
    asked: u64,
    /// Steps to ask for next time.
    ahead: u64,
}

impl Reader {
    /// How many steps further than the last miss this is, if it is on its way.
    fn steps_to(&self, read: ByteRange) -> Option<i64> {
        let way = read.start as i64 - self.last.start as i64;
        let number = way / self.step;
        let near = -(MAX_STEPS as i64)..=2 * MAX_STEPS as i64;
        (read.len() == self.last.len() && way % self.step == 0 && near.contains(&number)).then_some(number)
    }
}

/// What a miss says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leap {
    /// It is no reader's.
    Stranger,
    /// It is a reader's, and these may be wanted next.
    Reader(Option<Steps>),
}

/// The readers, the one that moved last first.
#[derive(Debug, Default)]
pub(super) struct Strides {
    /// The last ones, in no order.
    misses: Vec<ByteRange>,
    /// Which of them is replaced next.
    oldest: usize,
    /// A bit for each of their starts: most places that are looked for are not among them.
    traces: u64,
    readers: VecDeque<Reader>,
}

impl Strides {
    /// A read missed. Leaps of at most `near` bytes are not looked for.
    pub(super) fn missed(&mut self, near: u64, read: ByteRange) -> Leap {
        let known = self.readers.iter().enumerate().find_map(|(at, reader)| Some((at, reader.steps_to(read)?)));
        if let Some((at, number)) = known {
            let mut reader = self.readers.remove(at).expect("it was just found");
            let steps = reader.goes_on(read, number);
            self.readers.push_front(reader);
            return Leap::Reader(steps);
        }
        let step = self.third_equal_step(near, read);
        self.remember(read);
        let Some(step) = step else { return Leap::Stranger };
        let mut reader = Reader { last: read, step, asked: 0, ahead: FIRST_STEPS };
        let steps = reader.ask();
        self.readers.truncate(READERS - 1);
        self.readers.push_front(reader);
        Leap::Reader(Some(steps))
    }

    /// The step with which this read follows three others, all as long as it is.
    fn third_equal_step(&self, near: u64, read: ByteRange) -> Option<i64> {
        let here = read.start as i64;
        let steps = self.misses.iter().filter(|miss| miss.len() == read.len()).map(|miss| here - miss.start as i64);
        let mut leaps = steps.filter(|step| step.unsigned_abs() > near.max(read.len()));
        leaps
            .find(|step| [2, 3].iter().all(|times| self.has_missed(here.wrapping_sub(step.wrapping_mul(*times)), read)))
    }

    fn has_missed(&self, start: i64, read: ByteRange) -> bool {
        let is_it = |miss: &ByteRange| miss.start as i64 == start && miss.len() == read.len();
        self.traces & trace(start) != 0 && self.misses.iter().any(is_it)
    }

    fn remember(&mut self, read: ByteRange) {
        if self.misses.len() < MISSES {
            self.misses.push(read);
        } else {
            self.misses[self.oldest] = read;
            self.oldest = (self.oldest + 1) % MISSES;
        }
        self.traces = self.misses.iter().fold(0, |traces, miss| traces | trace(miss.start as i64));
    }
}

/// One bit of 64, as good as any other.
fn trace(start: i64) -> u64 {
    1 << ((start as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58)
}

impl Reader {
    /// It has missed `number` steps further on.
    fn goes_on(&mut self, read: ByteRange, number: i64) -> Option<Steps> {
        // Late, or again: nothing new.
        let number = u64::try_from(number).ok().filter(|number| *number > 0)?;
        if number <= self.asked + 1 {
            self.ahead = (self.ahead * 2).min(MAX_STEPS);
        }
        self.last = read;
        self.asked = self.asked.saturating_sub(number);
        (self.asked < self.most()).then(|| self.ask())
    }

    fn most(&self) -> u64 {
        self.ahead.min(MAX_BYTES / self.last.len().max(1)).max(1)
    }

    /// What was not asked for yet.
    fn ask(&mut self) -> Steps {
        let (from, to) = (self.asked + 1, self.most());
        self.asked = to;
        Steps { read: self.last, step: self.step, from, to }
    }
}

#[cfg(test)]
mod tests;
