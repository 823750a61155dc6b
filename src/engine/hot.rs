//! What the source's machine used last, and the guest will use next: it comes before everything else in the background.
//!
//! In order of address from the guest's last miss on, since what is used together lies together. A short stretch in which
//! the guest misses a block is one that it is about to use: a file, as far as it was read, the pages of a program that were
//! touched. It is fetched at once. A long one says no more than that much is in memory there.

use std::collections::BTreeMap;
use std::num::NonZeroU64;

use super::geometry::{BlockRun, ByteRange, Geometry};
use super::inflight::Inflight;
use super::maps::Maps;

/// Most runs that are remembered: some mebibytes of them. What is more comes in its turn.
const MAX_RUNS: usize = 64 << 10;
/// A run no longer than this is fetched at once when one of its blocks is missed.
const TOGETHER_BYTES: u64 = 512 << 10;

/// The runs that are left.
#[derive(Debug, Default)]
pub(super) struct Hot {
    /// Start to end; none overlaps another.
    runs: BTreeMap<u64, u64>,
    /// Where the guest is.
    cursor: u64,
}

impl Hot {
    /// Takes ranges; blocks that are here already or on their way are left out later.
    pub(super) fn add(&mut self, geometry: Geometry, ranges: &[ByteRange]) {
        for range in ranges {
            let mut run = geometry.covering(*range).clip(geometry.all());
            if self.runs.len() >= MAX_RUNS {
                return;
            }
            if let Some((_, &end)) = self.runs.range(..=run.start).next_back() {
                run.start = run.start.max(end);
            }
            while let Some((&start, &end)) = self.runs.range(run.start..run.end.max(run.start)).next() {
                self.runs.remove(&start);
                run.end = run.end.max(end);
            }
            if !run.is_empty() {
                self.runs.insert(run.start, run.end);
            }
        }
    }

    /// The guest has missed these blocks. What is hot goes on from there; those around it, if it is about to use them.
    pub(super) fn missed(&mut self, geometry: Geometry, run: BlockRun) -> Option<BlockRun> {
        if self.runs.is_empty() {
            return None;
        }
        self.cursor = run.start;
        let (&start, &end) = self.runs.range(..run.end).next_back().filter(|(_, end)| **end > run.start)?;
        if start < run.start && self.runs.len() < MAX_RUNS {
            // The next one begins here.
            self.runs.insert(start, run.start);
            self.runs.insert(run.start, end);
        }
        let around = BlockRun::new(start, end);
        (around.len() <= geometry.blocks_in(TOGETHER_BYTES).get()).then_some(around)
    }

    /// The next blocks to fetch; `zeros`: the first run that is known to be zeros within a run.
    pub(super) fn next(
        &mut self,
        maps: &Maps,
        inflight: &Inflight,
        max_fetch: NonZeroU64,
        zeros: impl Fn(BlockRun) -> Option<BlockRun>,
    ) -> Option<BlockRun> {
        while !self.runs.is_empty() {
            let next = self.runs.range(self.cursor..).next().or_else(|| self.runs.iter().next());
            let (mut start, end) = next.map(|(&start, &end)| (start, end))?;
            self.runs.remove(&start);
            let mut found = None;
            while start < end && found.is_none() {
                if maps.is_present(start) {
                    start = maps.present_until(start, end);
                    continue;
                }
                let (owner, until) = inflight.look(start);
                let until = until.min(end);
                // Of zeros there is nothing to fetch.
                let zeros = zeros(BlockRun::new(start, until));
                match zeros {
                    Some(zeros) if zeros.contains(start) => start = zeros.end.min(end),
                    _ if owner.is_some() => start = until,
                    _ => {
                        let until = zeros.map_or(until, |zeros| zeros.start).min(start + max_fetch.get());
                        let run = BlockRun::new(start, maps.absent_until(start, until));
                        start = run.end;
                        found = Some(run);
                    }
                }
            }
            if start < end {
                self.runs.insert(start, end);
            }
            if found.is_some() {
                self.cursor = start;
                return found;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::inflight::{FetchId, Owner};
    use super::*;

    const MAX: NonZeroU64 = NonZeroU64::new(4).unwrap();

    fn disk() -> (Geometry, Maps) {
        let geometry = Geometry::new(1000 * 4096, 4096).unwrap();
        (geometry, Maps::in_memory(geometry))
    }

    fn bytes(start: u64, end: u64) -> ByteRange {
        ByteRange { start: start * 4096, end: end * 4096 }
    }

    fn all(hot: &mut Hot, maps: &Maps) -> Vec<(u64, u64)> {
        let next = || hot.next(maps, &Inflight::default(), MAX, |_| None);
        std::iter::from_fn(next).map(|run| (run.start, run.end)).collect()
    }

    #[test]
    fn overlaps_are_one_and_what_is_here_or_on_its_way_is_left_out() {
        let (geometry, maps) = disk();
        let mut hot = Hot::default();
        hot.add(
            geometry,
            &[bytes(30, 33), bytes(10, 16), bytes(12, 14), bytes(15, 17), bytes(999, 2000), bytes(29, 31)],
        );
        maps.mark_present(BlockRun::new(10, 11));
        let mut inflight = Inflight::default();
        inflight.give(BlockRun::new(31, 32), Owner::Wire(FetchId(1)));
        let next = || hot.next(&maps, &inflight, MAX, |_| None);
        let found: Vec<_> = std::iter::from_fn(next).map(|run| (run.start, run.end)).collect();
        assert_eq!(found, [(11, 15), (15, 16), (16, 17), (29, 31), (32, 33), (999, 1000)]);
    }

    #[test]
    fn it_goes_on_where_the_guest_is_and_comes_round() {
        let (geometry, maps) = disk();
        let mut hot = Hot::default();
        hot.add(geometry, &[bytes(10, 12), bytes(50, 58), bytes(90, 92)]);
        assert_eq!(hot.missed(geometry, BlockRun::new(54, 55)), Some(BlockRun::new(50, 58)));
        assert_eq!(all(&mut hot, &maps), [(54, 58), (90, 92), (10, 12), (50, 54)]);
        assert_eq!(hot.missed(geometry, BlockRun::new(54, 55)), None, "nothing is left");
    }

    #[test]
    fn what_is_used_together_is_short() {
        let (geometry, _) = disk();
        let mut hot = Hot::default();
        hot.add(geometry, &[bytes(0, 500), bytes(600, 728)]);
        assert_eq!(hot.missed(geometry, BlockRun::new(100, 101)), None, "half of the disk");
        assert_eq!(hot.missed(geometry, BlockRun::new(599, 600)), None, "not hot");
        assert_eq!(hot.missed(geometry, BlockRun::new(599, 601)), Some(BlockRun::new(600, 728)));
    }

    #[test]
    fn no_more_is_remembered_than_there_is_room_for() {
        let geometry = Geometry::new(1 << 40, 4096).unwrap();
        let mut hot = Hot::default();
        let runs: Vec<_> = (0..MAX_RUNS as u64 + 10).map(|at| bytes(at * 1000, at * 1000 + 500)).collect();
        hot.add(geometry, &runs);
        for at in 0..100 {
            hot.missed(geometry, BlockRun::new(at * 1000 + 7, at * 1000 + 8));
        }
        assert_eq!(hot.runs.len(), MAX_RUNS);
    }

    #[test]
    fn zeros_are_not_asked_for() {
        let (geometry, maps) = disk();
        let mut hot = Hot::default();
        hot.add(geometry, &[bytes(32, 38)]);
        let zeros = |run: BlockRun| Some(BlockRun::new(34, 36)).filter(|zeros| !zeros.clip(run).is_empty());
        let next = || hot.next(&maps, &Inflight::default(), MAX, zeros);
        let found: Vec<_> = std::iter::from_fn(next).map(|run| (run.start, run.end)).collect();
        assert_eq!(found, [(32, 34), (36, 38)]);
    }
}
