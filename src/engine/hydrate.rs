//! What to fetch next in the background.
//!
//! In order of address, from a cursor that starts again at the front when it has come to the end:
//! blocks that failed or were taken back are absent still and are found then. After a round in which blocks
//! failed comes a rest, so that a source with bad blocks is not asked for them without end. Where the source tells
//! its holes, they are never asked for: they cross as metadata. While such a question is under way, blocks are fetched
//! as if they were data if the source sends zeros as holes: then nothing is lost if they are none, and no round trip
//! is spent on waiting.
//!
//! What is known to be *hot* comes before all that, where the source sends zeros as holes: so no question is needed.
//!
//! Of little that is absent from the beginning, as of a disk that comes home, nothing is asked: the answer would be about the
//! rest of the disk, and would keep the source from sending what is wanted.

use std::collections::VecDeque;
use std::num::NonZeroU64;

use super::geometry::{BlockRun, ByteRange, Geometry};
use super::inflight::Inflight;
use super::maps::Maps;

/// Bytes of the device that one extents query asks about: few round trips, and an answer of bounded length.
const QUERY_BYTES: u64 = 1 << 30;

/// Absent bytes that are little: what is under way to the source at a time.
const LITTLE_BYTES: u64 = 24 << 20;
/// The same as a part of the disk.
const LITTLE_PART: u64 = 16;

/// A stretch of the source, as it describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len_bytes: u64,
    /// Reads as zeros.
    pub zero: bool,
}

/// What hydration does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Fetch these blocks.
    Fetch(BlockRun),
    /// Mark these blocks as zeros.
    Zero(BlockRun),
    /// Ask the source about these blocks.
    Query(BlockRun),
    /// Everything that is absent is on its way, or the source has been asked.
    Wait,
    /// A round is over in which blocks failed.
    Rest,
    /// Nothing is absent.
    Done,
}

/// Most hot runs that are remembered: a mebibyte of them. What is more comes in its turn.
const MAX_HOT_RUNS: usize = 64 << 10;

#[derive(Debug)]
pub(super) struct Planner {
    /// What comes first.
    hot: VecDeque<BlockRun>,
    cursor: u64,
    /// Everything before it is present: where to start again. On a disk of terabytes it takes long to find.
    front: u64,
    /// Does the source tell its extents?
    extents_known: bool,
    /// Does it send zeros as holes, when they are read?
    compact: bool,
    /// What the source said, in order: run and "zeros".
    extents: VecDeque<(BlockRun, bool)>,
    asked: Option<BlockRun>,
    /// What was known to be zeros once is not to be fetched in a later round.
    has_asked: bool,
    /// Did a block fail in this round?
    failed: bool,
}

impl Planner {
    pub(super) fn new(extents_known: bool, compact: bool) -> Self {
        Self {
            hot: VecDeque::new(),
            cursor: 0,
            front: 0,
            extents_known,
            compact,
            extents: VecDeque::new(),
            asked: None,
            has_asked: false,
            failed: false,
        }
    }

    pub(super) fn next(&mut self, maps: &Maps, inflight: &Inflight, max_fetch: NonZeroU64) -> Next {
        if let Some(run) = self.next_hot(maps, inflight, max_fetch) {
            return Next::Fetch(run);
        }
        let mut at_front_again = false;
        loop {
            let Some(start) = maps.next_absent(self.cursor) else {
                if maps.absent_count() == 0 {
                    return Next::Done;
                }
                if at_front_again {
                    return Next::Wait;
                }
                at_front_again = true;
                self.front = maps.next_absent(self.front).unwrap_or(self.front);
                self.cursor = self.front;
                self.extents.clear();
                if std::mem::take(&mut self.failed) {
                    return Next::Rest;
                }
                continue;
            };
            let (owner, until) = inflight.look(start);
            if owner.is_some() {
                self.cursor = until;
                continue;
            }
            return self.step(maps, start, until, max_fetch);
        }
    }

    fn next_hot(&mut self, maps: &Maps, inflight: &Inflight, max_fetch: NonZeroU64) -> Option<BlockRun> {
        while let Some(hot) = self.hot.front_mut() {
            if hot.is_empty() {
                self.hot.pop_front();
            } else if maps.is_present(hot.start) {
                hot.start = maps.present_until(hot.start, hot.end);
            } else {
                let (owner, until) = inflight.look(hot.start);
                let until = until.min(hot.end);
                // The runs that the source has told lie in order; of zeros there is nothing to fetch.
                let at = self.extents.partition_point(|(run, _)| run.end <= hot.start);
                let zeros = self.extents.range(at..).find(|(_, zero)| *zero).map(|(zeros, _)| *zeros);
                let zeros = zeros.filter(|zeros| zeros.start < until);
                if let Some(zeros) = zeros.filter(|zeros| zeros.contains(hot.start)) {
                    hot.start = zeros.end.min(hot.end);
                    continue;
                }
                let until = zeros.map_or(until, |zeros| zeros.start);
                if owner.is_none() {
                    let end = maps.absent_until(hot.start, until.min(hot.start + max_fetch.get()));
                    return Some(BlockRun::new(std::mem::replace(&mut hot.start, end), end));
                }
                hot.start = until;
            }
        }
        None
    }

    /// Takes ranges that are to be fetched before the rest.
    pub(super) fn prefer(&mut self, geometry: Geometry, ranges: &[ByteRange]) {
        let room = if self.compact { MAX_HOT_RUNS - self.hot.len() } else { 0 };
        self.hot.extend(ranges.iter().map(|range| geometry.covering(*range).clip(geometry.all())).take(room));
    }

    fn step(&mut self, maps: &Maps, start: u64, until: u64, max_fetch: NonZeroU64) -> Next {
        let geometry = maps.geometry();
        let until = until.min(geometry.blocks());
        let (end, zero) = if self.extents_known {
            while self.extents.front().is_some_and(|(run, _)| run.end <= start) {
                self.extents.pop_front();
            }
            match self.extents.front() {
                Some((run, zero)) if run.contains(start) => (run.end.min(until), *zero),
                _ if self.asked.is_some_and(|asked| self.compact && asked.contains(start)) => (until, false),
                _ if self.compact && !self.has_asked && maps.lacks_little() => (until, false),
                _ if self.asked.is_some() => return Next::Wait,
                _ => {
                    let run =
                        BlockRun::new(start, geometry.blocks().min(start + geometry.blocks_in(QUERY_BYTES).get()));
                    self.extents.clear();
                    (self.asked, self.has_asked) = (Some(run), true);
                    return Next::Query(run);
                }
            }
        } else {
            (until, false)
        };
        let end = if zero { end } else { end.min(start + max_fetch.get()) };
        let run = BlockRun::new(start, maps.absent_until(start, end));
        self.cursor = run.end;
        if zero { Next::Zero(run) } else { Next::Fetch(run) }
    }

    /// A block could not be read.
    pub(super) fn failed(&mut self) {
        self.failed = true;
    }

    /// Takes the answer to the query. An empty one (the source could not say) counts as data.
    pub(super) fn answer(&mut self, geometry: Geometry, extents: &[Extent]) {
        let Some(asked) = self.asked.take() else {
            return;
        };
        self.extents = to_blocks(geometry, asked, extents);
        if self.extents.is_empty() {
            self.extents.push_back((asked, false));
        }
    }
}

impl Maps {
    /// Is so little absent that all of it can be fetched in the time of a question?
    pub fn lacks_little(&self) -> bool {
        let geometry = self.geometry();
        let little = geometry.blocks_in(LITTLE_BYTES).get().min(geometry.blocks() / LITTLE_PART);
        self.absent_count() <= little
    }
}

/// Extents in bytes → runs of blocks. Only a block that is zeros whole counts as zeros.
fn to_blocks(geometry: Geometry, asked: BlockRun, extents: &[Extent]) -> VecDeque<(BlockRun, bool)> {
    let bytes = geometry.bytes_of(asked);
    let mut runs = VecDeque::new();
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

fn push(runs: &mut VecDeque<(BlockRun, bool)>, run: BlockRun, zero: bool) {
    if !run.is_empty() {
        runs.push_back((run, zero));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(len_bytes: u64, zero: bool) -> Extent {
        Extent { len_bytes, zero }
    }

    #[test]
    fn only_whole_blocks_of_zeros_are_zeros() {
        let g = Geometry::new(10 * 4096 + 512, 4096).unwrap();
        let runs = to_blocks(
            g,
            g.all(),
            &[extent(5000, false), extent(4096, true), extent(8192, true), extent(1 << 40, false)],
        );
        // Zeros from 5000 to 17288: blocks 2 and 3 are inside.
        assert_eq!(runs, [(BlockRun::new(0, 2), false), (BlockRun::new(2, 4), true), (BlockRun::new(4, 11), false)]);
        let tail = to_blocks(g, BlockRun::new(8, 11), &[extent(1 << 40, true)]);
        assert_eq!(tail, [(BlockRun::new(8, 11), true)]);
    }

    #[test]
    fn a_short_answer_is_asked_about_again() {
        let g = Geometry::new(10 * 4096, 4096).unwrap();
        assert_eq!(to_blocks(g, g.all(), &[extent(4096 * 3 + 100, false)]), [(BlockRun::new(0, 3), false)]);
        // An answer of less than a block says nothing, and counts as data.
        let mut planner = Planner::new(true, false);
        let maps = Maps::in_memory(g);
        let max = g.blocks_in(4096 * 4);
        assert_eq!(planner.next(&maps, &Inflight::default(), max), Next::Query(g.all()));
        assert_eq!(planner.next(&maps, &Inflight::default(), max), Next::Wait);
        planner.answer(g, &[extent(100, true)]);
        assert_eq!(planner.next(&maps, &Inflight::default(), max), Next::Fetch(BlockRun::new(0, 4)));
    }

    #[test]
    fn what_costs_nothing_if_it_is_a_hole_is_fetched_before_the_answer_comes() {
        let g = Geometry::new(20 * 4096, 4096).unwrap();
        let (maps, max) = (Maps::in_memory(g), g.blocks_in(4096 * 4));
        let mut planner = Planner::new(true, true);
        let none = Inflight::default();
        assert_eq!(planner.next(&maps, &none, max), Next::Query(g.all()));
        assert_eq!(planner.next(&maps, &none, max), Next::Fetch(BlockRun::new(0, 4)));
        assert_eq!(planner.next(&maps, &none, max), Next::Fetch(BlockRun::new(4, 8)));
        planner.answer(g, &[extent(4096 * 10, false), extent(4096 * 10, true)]);
        assert_eq!(planner.next(&maps, &none, max), Next::Fetch(BlockRun::new(8, 10)));
        assert_eq!(planner.next(&maps, &none, max), Next::Zero(BlockRun::new(10, 20)));
    }

    #[test]
    fn of_little_nothing_is_asked() {
        let g = Geometry::new(64 * 4096, 4096).unwrap();
        let (maps, max, none) = (Maps::in_memory(g), g.blocks_in(4096 * 4), Inflight::default());
        maps.mark_present(BlockRun::new(4, 63));
        assert!(!maps.lacks_little(), "one more than the sixteenth part");
        assert!(matches!(Planner::new(true, true).next(&maps, &none, max), Next::Query(_)));
        maps.mark_present(BlockRun::new(0, 1));
        assert!(maps.lacks_little());
        assert_eq!(Planner::new(true, true).next(&maps, &none, max), Next::Fetch(BlockRun::new(1, 4)));
        // Zeros that would cross as data are asked for all the same.
        assert!(matches!(Planner::new(true, false).next(&maps, &none, max), Next::Query(_)));
    }

    #[test]
    fn what_is_hot_comes_first() {
        let g = Geometry::new(40 * 4096, 4096).unwrap();
        let (maps, max) = (Maps::in_memory(g), g.blocks_in(4096 * 4));
        let mut inflight = Inflight::default();
        let mut planner = Planner::new(false, true);
        let hot = |start: u64, end: u64| ByteRange { start: start * 4096, end: end * 4096 };
        planner.prefer(g, &[hot(10, 16), hot(30, 33), hot(39, 60)]);
        maps.mark_present(BlockRun::new(10, 11));
        inflight.give(BlockRun::new(31, 32), super::super::inflight::Owner::Wire(super::super::FetchId(1)));
        let next: Vec<Next> = (0..6).map(|_| planner.next(&maps, &inflight, max)).collect();
        let fetch = |start, end| Next::Fetch(BlockRun::new(start, end));
        assert_eq!(next, [fetch(11, 15), fetch(15, 16), fetch(30, 31), fetch(32, 33), fetch(39, 40), fetch(0, 4)]);
        // What is known to be zeros is not asked for.
        planner = Planner::new(true, true);
        assert_eq!(planner.next(&maps, &inflight, max), Next::Query(g.all()));
        planner.answer(g, &[extent(34 * 4096, false), extent(2 * 4096, true), extent(4 * 4096, false)]);
        planner.prefer(g, &[hot(32, 38)]);
        let next: Vec<Next> = (0..3).map(|_| planner.next(&maps, &inflight, max)).collect();
        assert_eq!(next, [fetch(32, 34), fetch(36, 38), fetch(0, 4)]);
        // Where zeros cross as data they are not fetched before it is known that they are none.
        let mut careful = Planner::new(true, false);
        careful.prefer(g, &[hot(10, 16)]);
        assert_eq!(careful.next(&maps, &inflight, max), Next::Query(g.all()));
    }

    #[test]
    fn the_plan_skips_what_is_present_or_in_flight_and_comes_round() {
        let g = Geometry::new(12 * 4096, 4096).unwrap();
        let maps = Maps::in_memory(g);
        let mut inflight = Inflight::default();
        maps.mark_present(BlockRun::new(0, 2));
        inflight.give(BlockRun::new(4, 6), super::super::inflight::Owner::Wire(super::super::FetchId(1)));
        let mut planner = Planner::new(false, false);
        let max = g.blocks_in(4096 * 5);
        let mut seen = Vec::new();
        while let Next::Fetch(run) = planner.next(&maps, &inflight, max) {
            seen.push((run.start, run.end));
            inflight.give(run, super::super::inflight::Owner::Wire(super::super::FetchId(2)));
        }
        assert_eq!(seen, [(2, 4), (6, 11), (11, 12)]);
        assert_eq!(planner.next(&maps, &inflight, max), Next::Wait);
        // One fetch fails: its blocks come again.
        inflight.free(BlockRun::new(6, 11));
        assert_eq!(planner.next(&maps, &inflight, max), Next::Fetch(BlockRun::new(6, 11)));
        // A block that cannot be read is tried again after the rest of the disk, and a rest.
        inflight.free(BlockRun::new(4, 6));
        planner.failed();
        inflight.give(BlockRun::new(6, 11), super::super::inflight::Owner::Wire(super::super::FetchId(3)));
        assert_eq!(planner.next(&maps, &inflight, max), Next::Rest);
        assert_eq!(planner.next(&maps, &inflight, max), Next::Fetch(BlockRun::new(4, 6)));
        inflight.free(BlockRun::new(0, 12));
        maps.mark_present(g.all());
        assert_eq!(planner.next(&maps, &inflight, max), Next::Done);
    }
}
