//! What to fetch next in the background.
//!
//! In order of address, from a cursor that starts again at the front when it has come to the end:
//! blocks that failed or were taken back are absent still and are found then. After a round in which blocks
//! failed comes a rest, so that a source with bad blocks is not asked for them without end. Where the source tells
//! its holes, they are never asked for: they cross as metadata. While such a question is under way, blocks are fetched
//! as if they were data if the source sends zeros as holes: then nothing is lost if they are none, and no round trip
//! is spent on waiting.

use std::collections::VecDeque;
use std::num::NonZeroU64;

use super::geometry::{BlockRun, ByteRange, Geometry};
use super::inflight::Inflight;
use super::maps::Maps;

/// Bytes of the device that one extents query asks about: few round trips, and an answer of bounded length.
const QUERY_BYTES: u64 = 1 << 30;

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

#[derive(Debug)]
pub(super) struct Planner {
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
    /// Did a block fail in this round?
    failed: bool,
}

impl Planner {
    pub(super) fn new(extents_known: bool, compact: bool) -> Self {
        Self { cursor: 0, front: 0, extents_known, compact, extents: VecDeque::new(), asked: None, failed: false }
    }

    pub(super) fn next(&mut self, maps: &Maps, inflight: &Inflight, max_fetch: NonZeroU64) -> Next {
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
                _ if self.asked.is_some() => return Next::Wait,
                _ => {
                    let run =
                        BlockRun::new(start, geometry.blocks().min(start + geometry.blocks_in(QUERY_BYTES).get()));
                    self.extents.clear();
                    self.asked = Some(run);
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
