//! Where the source has zeros: what it has told of the way ahead, and what it is being asked.
//!
//! ```text
//!      cursor                                       asked so far
//!   ─────┼── data ──┼──── zeros ────┼── ? ──┼─ data ─┼── ? ──┼── nobody has asked ───►
//!        └──────── told ────────────┘ asked └─ told ─┘ asked
//! ```
//!
//! Several questions are under way at a time, each about a long range: a sparse disk of terabytes is thousands of
//! questions, and one after the other they would take a round trip each. They are asked in the order of addresses, and
//! no further ahead than keeps hydration busy. Invariants: no block is in two of them, nor in one and in what was told;
//! at most [`MAX_TOLD`] runs are remembered, the nearest ones: what is further is asked again in its turn.

use std::collections::BTreeMap;
use std::num::NonZeroU64;

use super::geometry::{BlockRun, ByteRange, Geometry};
use super::inflight::Inflight;
use super::maps::Maps;

/// Runs that are remembered: 2 MiB of them.
const MAX_TOLD: usize = 64 << 10;
/// With so much data known ahead nothing is asked: more than is fetched in a round trip.
const ENOUGH_BYTES: u64 = 256 << 20;
/// Questions under way before the first answer: a source full of data answers as well with these.
const FIRST_QUESTIONS: usize = 2;

/// A stretch of the source, as it describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len_bytes: u64,
    /// Reads as zeros.
    pub zero: bool,
}

/// How a source that tells its holes is asked about them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Questions {
    /// Bytes of the disk that one is about, at most.
    pub bytes: u64,
    /// How many are under way at a time, at most.
    pub at_once: usize,
}

impl Questions {
    /// Of a source that hydration has connections of its own to.
    pub const AHEAD: Self = Self { bytes: (4 << 30) - (1 << 20), at_once: 32 };
    /// Of one whose only connection it shares with those who wait.
    pub const SHARED: Self = Self { at_once: 4, ..Self::AHEAD };
}

/// What is known of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Data up to there.
    Data(u64),
    /// Zeros up to there.
    Zeros(u64),
    /// The source is being asked, up to there.
    Asked(u64),
    /// Nothing.
    No,
}

/// See the module's page.
#[derive(Debug)]
pub(super) struct Survey {
    questions: Questions,
    /// How many may be under way now.
    allowed: usize,
    /// By its start, the end of each run and "zeros".
    told: BTreeMap<u64, (u64, bool)>,
    /// Blocks of those that are data.
    told_data: u64,
    /// The ends of questions under way, by their starts.
    asked: BTreeMap<u64, u64>,
    /// All before it is told, asked or present.
    ask_from: u64,
    /// All zeros before it that were told have been handed out.
    zeros_from: u64,
}

impl Survey {
    pub(super) fn new(questions: Questions) -> Self {
        let allowed = FIRST_QUESTIONS.min(questions.at_once);
        Self {
            questions,
            allowed,
            told: BTreeMap::new(),
            told_data: 0,
            asked: BTreeMap::new(),
            ask_from: 0,
            zeros_from: 0,
        }
    }

    /// The next question, if it is time for one: `cursor` is what is to be fetched next, an absent block.
    pub(super) fn ask(&mut self, maps: &Maps, cursor: u64) -> Option<BlockRun> {
        self.pass(cursor);
        if self.asked.len() >= self.allowed {
            return None;
        }
        let geometry = maps.geometry();
        let start = self.next_unknown(maps, self.ask_from.max(cursor));
        self.ask_from = start.unwrap_or(u64::MAX);
        let start = start.filter(|&start| start == cursor || !self.knows_enough(geometry, cursor))?;
        let next_told = self.told.range(start..).next().map_or(u64::MAX, |(&start, _)| start);
        let next_asked = self.asked.range(start..).next().map_or(u64::MAX, |(&start, _)| start);
        let most = start + geometry.blocks_in(self.questions.bytes).get();
        let run = BlockRun::new(start, most.min(geometry.blocks()).min(next_told).min(next_asked));
        self.asked.insert(run.start, run.end);
        self.ask_from = run.end;
        Some(run)
    }

    /// Takes the answer to a question. An empty one (the source could not say) counts as data.
    pub(super) fn answer(&mut self, geometry: Geometry, asked: BlockRun, extents: &[Extent]) {
        let was_asked = self.asked.remove(&asked.start);
        debug_assert_eq!(was_asked, Some(asked.end), "an answer to a question that was not asked");
        self.allowed = self.questions.at_once.min(self.allowed * 2);
        self.zeros_from = self.zeros_from.min(asked.start);
        let mut runs = to_blocks(geometry, asked, extents);
        runs.truncate(MAX_TOLD);
        if runs.is_empty() {
            runs.push((asked, false));
        }
        if let Some((last, _)) = runs.last()
            && last.end < asked.end
        {
            self.ask_from = self.ask_from.min(last.end);
        }
        for (run, zero) in runs {
            self.told.insert(run.start, (run.end, zero));
            self.told_data += if zero { 0 } else { run.len() };
        }
        while self.told.len() > MAX_TOLD
            && let Some((start, run)) = self.told.pop_last()
        {
            self.forget(start, run);
            self.ask_from = self.ask_from.min(start);
        }
    }

    /// What is known of this block.
    pub(super) fn look(&self, block: u64) -> Known {
        if let Some((_, &(end, zero))) = self.told.range(..=block).next_back()
            && block < end
        {
            return if zero { Known::Zeros(end) } else { Known::Data(end) };
        }
        match self.asked.range(..=block).next_back() {
            Some((_, &end)) if block < end => Known::Asked(end),
            _ => Known::No,
        }
    }

    /// The first zeros that were told of from `block` on, before `until`.
    pub(super) fn zeros_in(&self, block: u64, until: u64) -> Option<BlockRun> {
        let first = self.told.range(..=block).next_back().map_or(block, |(&start, _)| start);
        let mut runs = self.told.range(first..until).filter(|(_, (end, zero))| *zero && *end > block);
        runs.next().map(|(&start, &(end, _))| BlockRun::new(start, end))
    }

    /// The next zeros that were told of, wherever the cursor is, of which nothing is here or on its way; so many at most.
    pub(super) fn next_zeros(&mut self, maps: &Maps, inflight: &Inflight, max: NonZeroU64) -> Option<BlockRun> {
        while let Some(zeros) = self.zeros_in(self.zeros_from, u64::MAX) {
            // No further than they go: where the rest of the disk is here that would be all of the map, each time.
            let start = maps.present_until(zeros.start.max(self.zeros_from), zeros.end);
            if start == zeros.end {
                self.zeros_from = zeros.end;
                continue;
            }
            let (owner, until) = inflight.look(start);
            let until = until.min(zeros.end).min(start.saturating_add(max.get()));
            let run = BlockRun::new(start, maps.absent_until(start, until));
            self.zeros_from = run.end;
            if owner.is_none() {
                return Some(run);
            }
        }
        None
    }

    /// A new round begins at the front: what is asked and answered from now on is about what is left.
    pub(super) fn start_over(&mut self) {
        self.told.clear();
        self.told_data = 0;
        self.ask_from = 0;
        self.zeros_from = 0;
    }

    /// What lies behind the cursor is of no use any more.
    fn pass(&mut self, cursor: u64) {
        while let Some(first) = self.told.first_entry()
            && first.get().0 <= cursor
        {
            let (start, run) = first.remove_entry();
            self.forget(start, run);
        }
    }

    fn forget(&mut self, start: u64, (end, zero): (u64, bool)) {
        self.told_data -= if zero { 0 } else { end - start };
    }

    /// So much that nothing further need be asked: enough to do, or to remember.
    fn knows_enough(&self, geometry: Geometry, cursor: u64) -> bool {
        self.told.len() >= MAX_TOLD / 2 || self.data_ahead(cursor) >= geometry.blocks_in(ENOUGH_BYTES).get()
    }

    /// Blocks of data that are known of from the cursor on, after [`Survey::pass`].
    fn data_ahead(&self, cursor: u64) -> u64 {
        let passed = match self.told.first_key_value() {
            Some((&start, (_, false))) => cursor.saturating_sub(start),
            _ => 0,
        };
        self.told_data - passed
    }

    /// The first absent block, from there on, of which nothing is known and nothing is asked.
    fn next_unknown(&self, maps: &Maps, from: u64) -> Option<u64> {
        let mut at = from;
        loop {
            at = maps.next_absent(at)?;
            match self.look(at) {
                Known::Data(end) | Known::Zeros(end) | Known::Asked(end) => at = end,
                Known::No => return Some(at),
            }
        }
    }
}

/// Extents in bytes → runs of blocks. Only a block that is zeros whole counts as zeros.
fn to_blocks(geometry: Geometry, asked: BlockRun, extents: &[Extent]) -> Vec<(BlockRun, bool)> {
    let bytes = geometry.bytes_of(asked);
    let mut runs = Vec::new();
    let mut done = asked.start;
    let mut at = bytes.start;
    let mut extents = extents.iter().peekable();
    let mut zeros_since = None;
    while let Some(extent) = extents.next() {
        let start = if extent.zero { *zeros_since.get_or_insert(at) } else { at };
        at = at.saturating_add(extent.len_bytes).min(bytes.end);
        let more_zeros = extents.peek().is_some_and(|next| next.zero);
        if extent.zero && !more_zeros {
            let inside = geometry.inside(ByteRange { start, end: at }).clip(asked);
            if !inside.is_empty() {
                push(&mut runs, BlockRun::new(done, inside.start), false);
                push(&mut runs, inside, true);
                done = inside.end;
            }
            zeros_since = None;
        }
    }
    // What the answer covers only in part (the end of a short answer) is asked about again.
    let covered = geometry.inside(ByteRange { start: bytes.start, end: at }).end.clamp(done, asked.end);
    push(&mut runs, BlockRun::new(done, covered), false);
    runs
}

fn push(runs: &mut Vec<(BlockRun, bool)>, run: BlockRun, zero: bool) {
    if !run.is_empty() {
        runs.push((run, zero));
    }
}

#[cfg(test)]
mod tests;
