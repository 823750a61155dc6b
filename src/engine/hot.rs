//! What the source's machine used last, and the guest will use next: it comes before everything else in the background.
//!
//! What lies between two stretches that are close to each other counts as one: a guest reads across it, now or another time,
//! and would wait for a few blocks in the middle of what is here.
//!
//! The shortest stretches come first: each one makes the guest wait for about one round trip, however long it is, and a
//! hundred short ones, a file system's metadata and small files, are but a few mebibytes. What was used comes before what
//! is merely in memory: that may only have been read ahead, and on a slow link it would stand in the way. Where the guest
//! misses a block it
//! is about to use what lies around it. If that is a short stretch (a file, as far as it was read, the pages of a program
//! that were touched) it is fetched at once. A long one says no more than that much is in memory there: it comes next from
//! there on, to its end or until the guest goes elsewhere, if the guest missed another block near it just before. Who reads
//! at random is not followed, or not for long where two were near each other by chance: it would only meet hydration, and
//! wait for all that is on its way there.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;

use super::event::HotRanges;
use super::geometry::{BlockRun, ByteRange, Geometry};
use super::inflight::Inflight;
use super::maps::Maps;

/// Most runs that are remembered: some mebibytes of them. What is more comes in its turn.
const MAX_RUNS: usize = 64 << 10;
/// A run no longer than this is fetched at once when one of its blocks is missed; so near is what is near.
const TOGETHER_BYTES: u64 = 512 << 10;
/// Stretches no further from each other than this are close.
const GAP_BYTES: u64 = 64 << 10;
/// After so many misses in long stretches with none near the one before, the guest is no longer where it was followed to.
const STRAYS: u32 = 8;

/// A stretch, or what is left of it in one piece.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    left: BlockRun,
    /// Where it stands among the others.
    rank: Rank,
}

/// The smaller comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    heat: Heat,
    /// Length of all of it, in blocks: a part of a long one says no more than the whole.
    told: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Heat {
    Used,
    InMemory,
}

/// What is left.
#[derive(Debug, Default)]
pub(super) struct Hot {
    /// By start; none overlaps another.
    runs: BTreeMap<u64, Stretch>,
    /// The same by rank, and start.
    by_rank: BTreeSet<(Rank, u64)>,
    /// Where the guest is: the start of a run, unless that is gone.
    guest: Option<u64>,
    /// What it missed last in a long stretch.
    missed: Option<u64>,
    /// How many it has missed since two of them were near each other.
    strays: u32,
}

impl Hot {
    /// Takes ranges; blocks that are here already or on their way are left out later.
    pub(super) fn add(&mut self, geometry: Geometry, ranges: &HotRanges) {
        self.add_ranges(geometry, &ranges.used, Heat::Used);
        self.add_ranges(geometry, &ranges.in_memory, Heat::InMemory);
    }

    fn add_ranges(&mut self, geometry: Geometry, ranges: &[ByteRange], heat: Heat) {
        let runs = ranges.iter().map(|range| geometry.covering(*range).clip(geometry.all()));
        // What lies beyond the end of the disk is next to nothing on it.
        let runs = runs.filter(|run| !run.is_empty());
        runs.clone().for_each(|run| self.add_run(run, heat));
        for (before, after) in runs.clone().zip(runs.skip(1)) {
            if before.end < after.start && after.start - before.end <= geometry.blocks_in(GAP_BYTES).get() {
                self.add_run(BlockRun::new(before.end, after.start), heat);
            }
        }
    }

    /// What is there already keeps its rank.
    fn add_run(&mut self, run: BlockRun, heat: Heat) {
        let before = self.runs.range(..=run.start).next_back();
        let mut start = before.map_or(run.start, |(_, before)| run.start.max(before.left.end));
        while start < run.end && self.has_room_for(heat) {
            let next = self.runs.range(start..run.end).next().map(|(_, next)| next.left);
            let left = BlockRun::new(start, next.map_or(run.end, |next| next.start));
            self.insert(Stretch { left, rank: Rank { heat, told: left.len() } });
            start = next.map_or(run.end, |next| next.end);
        }
    }

    /// What is merely in memory makes room for what was used.
    fn has_room_for(&mut self, heat: Heat) -> bool {
        if self.runs.len() < MAX_RUNS {
            return true;
        }
        let last = self.by_rank.last().filter(|(rank, _)| rank.heat > heat).map(|(_, start)| self.runs[start]);
        last.inspect(|last| self.remove(*last)).is_some()
    }

    /// The guest has missed these blocks. What is hot goes on from there; those around it, if it is about to use them.
    pub(super) fn missed(&mut self, geometry: Geometry, run: BlockRun) -> Option<BlockRun> {
        let (_, &around) = self.runs.range(..run.end).next_back().filter(|(_, around)| around.left.end > run.start)?;
        let Stretch { left, rank } = around;
        let together = geometry.blocks_in(TOGETHER_BYTES).get();
        if rank.told <= together {
            return Some(left);
        }
        let before = self.missed.replace(run.start);
        if before.is_none_or(|before| before.abs_diff(run.start) > together) {
            self.strays = self.strays.saturating_add(1);
            if self.strays >= STRAYS {
                self.guest = None;
            }
            return None;
        }
        self.strays = 0;
        self.guest = Some(left.start.max(run.start));
        if left.start < run.start && self.runs.len() < MAX_RUNS {
            self.remove(around);
            self.insert(Stretch { left: BlockRun::new(left.start, run.start), rank });
            self.insert(Stretch { left: BlockRun::new(run.start, left.end), rank });
        }
        None
    }

    /// The next blocks to fetch; `zeros`: the first run that is known to be zeros within a run.
    pub(super) fn next(
        &mut self,
        maps: &Maps,
        inflight: &Inflight,
        max_fetch: NonZeroU64,
        zeros: impl Fn(BlockRun) -> Option<BlockRun>,
    ) -> Option<BlockRun> {
        while let Some(stretch) = self.first() {
            let BlockRun { mut start, end } = stretch.left;
            let is_guests = self.guest == Some(start);
            self.remove(stretch);
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
            self.insert(Stretch { left: BlockRun::new(start, end), rank: stretch.rank });
            if is_guests {
                self.guest = Some(start);
            }
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// Where the guest is, or the first by rank.
    fn first(&self) -> Option<Stretch> {
        let guests = self.guest.and_then(|start| self.runs.get(&start));
        guests.or_else(|| self.by_rank.first().map(|(_, start)| &self.runs[start])).copied()
    }

    fn insert(&mut self, stretch: Stretch) {
        if !stretch.left.is_empty() {
            self.runs.insert(stretch.left.start, stretch);
            self.by_rank.insert((stretch.rank, stretch.left.start));
        }
    }

    fn remove(&mut self, stretch: Stretch) {
        self.runs.remove(&stretch.left.start);
        self.by_rank.remove(&(stretch.rank, stretch.left.start));
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

    fn in_memory(ranges: &[ByteRange]) -> HotRanges {
        HotRanges { in_memory: ranges.into(), ..HotRanges::default() }
    }

    fn bytes(start: u64, end: u64) -> ByteRange {
        ByteRange { start: start * 4096, end: end * 4096 }
    }

    #[test]
    fn what_overlaps_is_taken_once_and_what_is_here_or_on_its_way_is_left_out() {
        let (geometry, maps) = disk();
        let mut hot = Hot::default();
        hot.add(
            geometry,
            &in_memory(&[bytes(30, 33), bytes(10, 16), bytes(12, 14), bytes(15, 17), bytes(999, 2000), bytes(29, 31)]),
        );
        maps.mark_present(BlockRun::new(10, 11));
        let mut inflight = Inflight::default();
        inflight.give(BlockRun::new(31, 32), Owner::Wire(FetchId(1)));
        let next = || hot.next(&maps, &inflight, MAX, |_| None);
        let found: Vec<_> = std::iter::from_fn(next).map(|run| (run.start, run.end)).collect();
        assert_eq!(found, [(16, 17), (29, 30), (999, 1000), (30, 31), (32, 33), (11, 15), (15, 16)]);
    }

    #[test]
    fn nothing_lies_beyond_the_end_of_the_disk() {
        let (geometry, maps) = disk();
        let mut hot = Hot::default();
        hot.add(geometry, &in_memory(&[bytes(990, 998), bytes(1003, 1010), bytes(1 << 40, 1 << 41)]));
        let next = || hot.next(&maps, &Inflight::default(), NonZeroU64::new(64).unwrap(), |_| None);
        let found: Vec<_> = std::iter::from_fn(next).map(|run| (run.start, run.end)).collect();
        assert_eq!(found, [(990, 998)]);
    }

    #[test]
    fn the_shortest_come_first_and_a_long_one_goes_on_where_the_guest_is() {
        let (geometry, maps) = disk();
        let mut hot = Hot::default();
        let found = |hot: &mut Hot| {
            let next = || hot.next(&maps, &Inflight::default(), NonZeroU64::new(64).unwrap(), |_| None);
            std::iter::from_fn(next).map(|run| (run.start, run.end)).collect::<Vec<_>>()
        };
        hot.add(
            geometry,
            &in_memory(&[bytes(0, 20), bytes(100, 240), bytes(300, 304), bytes(400, 600), bytes(700, 701)]),
        );
        hot.add(geometry, &in_memory(&[bytes(304, 318), bytes(800, 819)]));
        assert_eq!(hot.missed(geometry, BlockRun::new(450, 451)), None, "more than half a mebibyte");
        assert_eq!(hot.missed(geometry, BlockRun::new(500, 501)), None);
        let (follow, rest) = ([(500, 564), (564, 600)], [(700, 701), (300, 304), (304, 318), (800, 819), (0, 20)]);
        let all = found(&mut hot);
        assert_eq!(all[..2], follow);
        assert_eq!(all[2..7], rest);
        assert_eq!(all[7..], [(100, 164), (164, 228), (228, 240), (400, 464), (464, 500)]);
        assert!(hot.runs.is_empty() && hot.by_rank.is_empty());
        assert_eq!(hot.missed(geometry, BlockRun::new(502, 503)), None, "nothing is left");
    }

    #[test]
    fn what_was_used_comes_before_what_is_merely_in_memory() {
        let (geometry, maps) = disk();
        let mut hot = Hot::default();
        let used = vec![bytes(100, 140), bytes(150, 160), bytes(200, 203)];
        hot.add(
            geometry,
            &HotRanges { used, in_memory: vec![bytes(0, 2), bytes(90, 100), bytes(140, 150), bytes(160, 170)] },
        );
        // Told again, as a part of more: it keeps its place.
        hot.add(geometry, &in_memory(&[bytes(190, 210)]));
        let next = || hot.next(&maps, &Inflight::default(), NonZeroU64::new(64).unwrap(), |_| None);
        let found: Vec<_> = std::iter::from_fn(next).map(|run| (run.start, run.end)).collect();
        let used = [(200, 203), (140, 150), (150, 160), (100, 140)];
        assert_eq!(found[..4], used, "and the gap between two of them");
        assert_eq!(found[4..], [(0, 2), (203, 210), (90, 100), (160, 170), (190, 200)]);
    }

    #[test]
    fn what_lies_between_two_that_are_close_counts_as_one() {
        let (geometry, maps) = disk();
        let mut hot = Hot::default();
        hot.add(geometry, &in_memory(&[bytes(0, 20), bytes(24, 30), bytes(46, 48), bytes(65, 70), bytes(70, 71)]));
        let next = || hot.next(&maps, &Inflight::default(), NonZeroU64::new(64).unwrap(), |_| None);
        let found: Vec<_> = std::iter::from_fn(next).map(|run| (run.start, run.end)).collect();
        assert_eq!(found, [(70, 71), (46, 48), (20, 24), (65, 70), (24, 30), (30, 46), (0, 20)], "and not 48 to 65");
    }

    #[test]
    fn the_guest_may_miss_something_else_in_the_middle() {
        let (geometry, maps) = disk();
        // The first miss at a place may be one at random.
        let reads = |hot: &mut Hot, start, end| {
            hot.missed(geometry, BlockRun::new(start, start + 1));
            hot.missed(geometry, BlockRun::new(start, end));
        };
        let mut hot = Hot::default();
        let next = |hot: &mut Hot| hot.next(&maps, &Inflight::default(), MAX, |_| None).map(|run| run.start);
        hot.add(geometry, &in_memory(&[bytes(0, 400), bytes(500, 999)]));
        reads(&mut hot, 600, 610);
        assert_eq!([next(&mut hot), next(&mut hot)], [Some(600), Some(604)]);
        hot.missed(geometry, BlockRun::new(300, 301));
        assert_eq!(next(&mut hot), Some(608), "at random");
        reads(&mut hot, 200, 201);
        assert_eq!([next(&mut hot), next(&mut hot)], [Some(200), Some(204)]);
        // Not hot: it says nothing.
        hot.missed(geometry, BlockRun::new(450, 451));
        assert_eq!(next(&mut hot), Some(208));
        // It reads on, across what is on its way, into what is not hot.
        reads(&mut hot, 995, 1000);
        assert_eq!([next(&mut hot), next(&mut hot)], [Some(995), Some(0)], "the shortest");
    }

    #[test]
    fn who_reads_at_random_is_not_followed_for_long() {
        let (geometry, maps) = disk();
        let mut hot = Hot::default();
        let next = |hot: &mut Hot| hot.next(&maps, &Inflight::default(), MAX, |_| None).map(|run| run.start);
        hot.add(geometry, &in_memory(&[bytes(0, 400), bytes(500, 999)]));
        let miss = |hot: &mut Hot, start| hot.missed(geometry, BlockRun::new(start, start + 1));
        // Two of many are near each other.
        for start in [600, 601] {
            miss(&mut hot, start);
        }
        let elsewhere = [10, 800, 200, 950, 350, 520, 20, 700];
        for start in &elsewhere[..7] {
            miss(&mut hot, *start);
        }
        assert_eq!(next(&mut hot), Some(601));
        miss(&mut hot, elsewhere[7]);
        assert_eq!([next(&mut hot), next(&mut hot)], [Some(0), Some(4)], "the shortest");
        // It has come to a place to stay.
        for start in [800, 801] {
            miss(&mut hot, start);
        }
        assert_eq!(next(&mut hot), Some(801));
    }

    #[test]
    fn what_is_used_together_is_short() {
        let (geometry, _) = disk();
        let mut hot = Hot::default();
        hot.add(geometry, &in_memory(&[bytes(0, 500), bytes(600, 728)]));
        assert_eq!(hot.missed(geometry, BlockRun::new(100, 101)), None, "half of the disk");
        assert_eq!(hot.missed(geometry, BlockRun::new(599, 600)), None, "not hot");
        assert_eq!(hot.missed(geometry, BlockRun::new(599, 601)), Some(BlockRun::new(600, 728)));
        assert_eq!(hot.missed(geometry, BlockRun::new(105, 106)), None, "half of the disk");
        assert_eq!(hot.missed(geometry, BlockRun::new(102, 103)), None, "a part of it is no less");
    }

    #[test]
    fn no_more_is_remembered_than_there_is_room_for() {
        let geometry = Geometry::new(1 << 40, 4096).unwrap();
        let mut hot = Hot::default();
        let runs: Vec<_> = (0..MAX_RUNS as u64 + 10).map(|at| bytes(at * 1000, at * 1000 + 500)).collect();
        hot.add(geometry, &in_memory(&runs));
        for at in 0..100 {
            hot.missed(geometry, BlockRun::new(at * 1000 + 7, at * 1000 + 8));
            hot.missed(geometry, BlockRun::new(at * 1000 + 9, at * 1000 + 10));
        }
        assert_eq!(hot.runs.len(), MAX_RUNS);
        assert_eq!(hot.by_rank.len(), MAX_RUNS);
    }

    #[test]
    fn what_is_merely_in_memory_makes_room_for_what_was_used() {
        let geometry = Geometry::new(1 << 40, 4096).unwrap();
        let mut hot = Hot::default();
        let runs: Vec<_> = (0..MAX_RUNS as u64 + 10).map(|at| bytes(at * 1000, at * 1000 + 1 + at)).collect();
        hot.add(geometry, &in_memory(&runs[..MAX_RUNS]));
        let used = vec![bytes(500, 600), bytes(100_000_500, 100_000_700)];
        hot.add(geometry, &HotRanges { used, in_memory: vec![bytes(700, 701)] });
        assert_eq!((hot.runs.len(), hot.by_rank.len()), (MAX_RUNS, MAX_RUNS));
        let in_memory = hot.runs.values().filter(|stretch| stretch.rank.heat == Heat::InMemory);
        assert_eq!(in_memory.count(), MAX_RUNS - 2, "and no room for another one of those");
        assert!(
            hot.runs.contains_key(&0) && !hot.runs.contains_key(&((MAX_RUNS as u64 - 1) * 1000)),
            "the longest went"
        );
    }

    #[test]
    fn zeros_are_not_asked_for() {
        let (geometry, maps) = disk();
        let mut hot = Hot::default();
        hot.add(geometry, &in_memory(&[bytes(32, 38)]));
        let zeros = |run: BlockRun| Some(BlockRun::new(34, 36)).filter(|zeros| !zeros.clip(run).is_empty());
        let next = || hot.next(&maps, &Inflight::default(), MAX, zeros);
        let found: Vec<_> = std::iter::from_fn(next).map(|run| (run.start, run.end)).collect();
        assert_eq!(found, [(32, 34), (36, 38)]);
    }
}
