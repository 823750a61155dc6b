//! What a guest is likely to read next, told by what it has just missed.
//!
//! A miss near an earlier one (a file that is read from its start, the pages of a program) is taken for a stream, and
//! blocks ahead of it are asked for beside it: twice as many each time, up to a limit. Misses that lie further apart, but
//! at a fixed distance, are those of a reader that leaps ([`super::stride`]). All others jump about, and are nobody's
//! stream. What is read from the cache is not seen here, and need not be: who reads that does not wait.
//!
//! The first miss at a place says nothing by itself; what became of others like it does. A machine that starts comes back
//! to most places, a database to few. So it is counted how often somebody came back to what lies beside a first miss, by
//! those for which nothing was fetched but the miss itself, and where that is often, a first miss gets what is around it.
//! One in some gets nothing even then: only there it can be seen that nobody comes back any more.

use std::collections::VecDeque;

use super::geometry::{BlockRun, ByteRange, Geometry};
use super::stride::{Leap, Steps, Strides};

/// Streams that are followed at a time: those of a few programs that start.
const STREAMS: usize = 16;
/// A miss so far from a stream still belongs to it.
const NEAR_BYTES: u64 = 512 << 10;
/// Blocks ahead are asked for in whole ones of these.
const GRAIN_BYTES: u64 = 64 << 10;
/// Most that is asked for ahead of a stream.
const MAX_WINDOW_BYTES: u64 = 512 << 10;

/// How often somebody comes back beside a first miss, in 256ths.
const ALWAYS: u32 = 256;
/// From there on a first miss gets what is around it.
const OFTEN: u32 = ALWAYS / 4;
/// Of so many first misses one gets nothing beside it.
const PROBE_EVERY: u32 = 8;
/// So many of them ago counts for little.
const MEMORY: u32 = 8;

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// The last miss.
    start: u64,
    /// As far as was asked.
    end: u64,
    window: u64,
    /// The first miss, if nothing was asked beside it and nobody came back yet.
    probe: Option<BlockRun>,
}

/// Does somebody come back to what lies beside a first miss?
#[derive(Debug, Default)]
struct Returns {
    often: u32,
    turn: u32,
}

impl Returns {
    fn judge(&mut self, came_back: bool) {
        if came_back {
            self.often += (ALWAYS - self.often).div_ceil(MEMORY);
        } else {
            self.often -= self.often.div_ceil(MEMORY);
        }
    }

    /// Is more than the miss to be fetched, this time?
    fn take_turn(&mut self) -> bool {
        self.turn = (self.turn + 1) % PROBE_EVERY;
        self.often >= OFTEN && self.turn != 0
    }
}

/// The streams, the last one that moved first.
#[derive(Debug, Default)]
pub(super) struct Readahead {
    streams: VecDeque<Stream>,
    strides: Strides,
    returns: Returns,
}

/// What may be wanted next, some of which may be here or on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Nothing that is known of.
    Nothing,
    /// These blocks.
    Run(BlockRun),
    /// Those at the next places of a reader that leaps.
    Steps(Steps),
}

impl Readahead {
    /// A read missed.
    pub(super) fn missed(&mut self, geometry: Geometry, read: ByteRange) -> Wanted {
        let run = geometry.covering(read);
        let [near, grain, most] =
            [NEAR_BYTES, GRAIN_BYTES, MAX_WINDOW_BYTES].map(|bytes| geometry.blocks_in(bytes).get());
        let belongs = |s: &Stream| run.start + near >= s.start && run.start <= s.end + near;
        let Some(at) = self.streams.iter().position(belongs) else {
            match self.strides.missed(NEAR_BYTES, read) {
                Leap::Reader(steps) => return steps.map_or(Wanted::Nothing, Wanted::Steps),
                Leap::Stranger => {}
            }
            return self.first(run, around(run, grain).clip(geometry.all()), grain);
        };
        let mut stream = self.streams.remove(at).expect("it was just found");
        // The same blocks again are another reader's.
        let came_back = |first: &BlockRun| {
            let beside = around(*first, grain);
            run.start < beside.end && run.end > beside.start && (run.start < first.start || run.end > first.end)
        };
        if stream.probe.take_if(|first| came_back(first)).is_some() {
            self.returns.judge(true);
        }
        // Back or forth: the grain around it, at least.
        let mut wanted = around(run, grain);
        if run.start >= stream.start {
            wanted.end = wanted.end.max((run.end + stream.window).next_multiple_of(grain));
            stream.window = most.min(stream.window * 2);
        }
        stream.start = run.start;
        stream.end = stream.end.max(wanted.end);
        self.streams.push_front(stream);
        Wanted::Run(wanted.clip(geometry.all()))
    }

    /// Somebody is where nobody was lately. Who was away for longest is forgotten.
    fn first(&mut self, run: BlockRun, beside: BlockRun, window: u64) -> Wanted {
        if self.streams.len() == STREAMS && self.streams.pop_back().is_some_and(|stream| stream.probe.is_some()) {
            self.returns.judge(false);
        }
        // Of a read of whole grains there is nothing beside it, and nothing to be learned.
        let is_more = beside != run && self.returns.take_turn();
        let probe = (beside != run && !is_more).then_some(run);
        let end = if is_more { beside.end } else { run.end };
        self.streams.push_front(Stream { start: run.start, end, window, probe });
        if is_more { Wanted::Run(beside) } else { Wanted::Nothing }
    }
}

/// The whole grains that blocks lie in.
fn around(run: BlockRun, grain: u64) -> BlockRun {
    BlockRun::new(run.start / grain * grain, run.end.next_multiple_of(grain))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry::new(1 << 40, 4096).unwrap()
    }

    fn missed(ahead: &mut Readahead, start: u64, end: u64) -> Option<BlockRun> {
        match ahead.missed(geometry(), geometry().bytes_of(BlockRun::new(start, end))) {
            Wanted::Nothing => None,
            Wanted::Run(run) => Some(run),
            Wanted::Steps(steps) => panic!("nobody leaps here: {steps:?}"),
        }
    }

    #[test]
    fn who_reads_on_is_read_ahead_for_and_more_each_time() {
        let mut ahead = Readahead::default();
        let mut miss = |start, end| missed(&mut ahead, start, end);
        assert_eq!(miss(1000, 1004), None, "the first miss says nothing");
        assert_eq!(miss(1004, 1008), Some(BlockRun::new(992, 1024)));
        assert_eq!(miss(1024, 1028), Some(BlockRun::new(1024, 1072)));
        // Back, but near: what is around it.
        assert_eq!(miss(960, 961), Some(BlockRun::new(960, 976)));
        let mut at = 1072;
        for _ in 0..10 {
            let wanted = miss(at, at + 1).unwrap();
            assert!(wanted.len() <= 128 + 2 * 16, "{wanted}");
            at = wanted.end;
        }
        let last = geometry().blocks() - 1;
        assert_eq!(miss(last - 20, last - 19), None);
        assert_eq!(miss(last, last + 1), Some(BlockRun::new(last - 15, last + 1)), "the disk ends");
    }

    #[test]
    fn who_jumps_about_is_not_and_two_who_read_on_are_told_apart() {
        let mut ahead = Readahead::default();
        let mut miss = |block| missed(&mut ahead, block, block + 1);
        for jump in 0..200_u64 {
            assert_eq!(miss(jump.pow(3) % 10_007 * 1000), None);
        }
        assert_eq!(miss(20_000_000), None);
        assert_eq!(miss(20_010_500), None);
        assert!(miss(20_000_001).is_some() && miss(20_010_501).is_some() && miss(20_000_030).is_some());
    }

    #[test]
    fn who_comes_back_gets_what_is_around_a_first_miss_until_nobody_does() {
        let mut ahead = Readahead::default();
        // One after the other, far apart and at no fixed distance: is what is around the first miss fetched with it?
        let mut place = 0_u64;
        let mut visit = |ahead: &mut Readahead, comes_back: bool| {
            place += 1;
            let block = place * 8192 + place.pow(3) % 251 * 16;
            let first = missed(ahead, block + 5, block + 6);
            if comes_back && first.is_none() {
                assert!(missed(ahead, block + 9, block + 10).is_some());
            }
            assert!(first.is_none_or(|run| run == BlockRun::new(block, block + 16)), "{first:?}");
            first.is_some()
        };
        let with_more = |ahead: &mut Readahead, visit: &mut dyn FnMut(&mut Readahead, bool) -> bool, comes_back| {
            (0..64).filter(|_| visit(ahead, comes_back)).count()
        };
        assert_eq!(with_more(&mut ahead, &mut visit, false), 0, "nobody ever came back");
        let more = with_more(&mut ahead, &mut visit, true);
        assert!(more > 30, "{more} of 64");
        assert_eq!(with_more(&mut ahead, &mut visit, true), 56, "all but one in eight");
        let more: Vec<usize> = (0..4).map(|_| with_more(&mut ahead, &mut visit, false)).collect();
        assert_eq!(more[3], 0, "nobody comes back any more: {more:?}");
        // The same block again says nothing.
        for jump in 0..200_u64 {
            let block = jump.pow(3) % 10_007 * 1000 + 5;
            assert_eq!(missed(&mut ahead, block, block + 1), None);
            missed(&mut ahead, block, block + 1);
        }
        assert_eq!(with_more(&mut ahead, &mut visit, false), 0);
    }

    #[test]
    fn who_leaps_is_followed_without_what_lies_between_and_streams_go_on() {
        let mut ahead = Readahead::default();
        let mut miss = |block| ahead.missed(geometry(), geometry().bytes_of(BlockRun::new(block, block + 1)));
        let leap = |number: u64| number * 1000;
        assert!(miss(600_000) == Wanted::Nothing && matches!(miss(600_001), Wanted::Run(_)));
        assert!((0..3).all(|number| miss(leap(number)) == Wanted::Nothing));
        let Wanted::Steps(steps) = miss(leap(3)) else { panic!("three equal steps") };
        let runs: Vec<_> = steps.runs(geometry()).collect();
        assert_eq!(runs, [4, 5].map(|number| BlockRun::new(leap(number), leap(number) + 1)));
        assert!(matches!(miss(600_020), Wanted::Run(_)));
        assert!(matches!(miss(leap(6)), Wanted::Steps(_)));
    }
}
