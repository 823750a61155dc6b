//! What a guest is likely to read next, told by what it has just missed.
//!
//! A miss near an earlier one (a file that is read from its start, the pages of a program) is taken for a stream, and
//! blocks ahead of it are asked for beside it: twice as many each time, up to a limit. Misses that lie further apart, but
//! at a fixed distance, are those of a reader that leaps ([`super::stride`]). All others jump about, and are nobody's
//! stream. What is read from the cache is not seen here, and need not be: who reads that does not wait.

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

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// The last miss.
    start: u64,
    /// As far as was asked.
    end: u64,
    window: u64,
}

/// The streams, the last one that moved first.
#[derive(Debug, Default)]
pub(super) struct Readahead {
    streams: VecDeque<Stream>,
    strides: Strides,
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
            self.streams.truncate(STREAMS - 1);
            self.streams.push_front(Stream { start: run.start, end: run.end, window: grain });
            return Wanted::Nothing;
        };
        let mut stream = self.streams.remove(at).expect("it was just found");
        // Back or forth: the grain around it, at least.
        let mut wanted = BlockRun::new(run.start / grain * grain, run.end.next_multiple_of(grain));
        if run.start >= stream.start {
            wanted.end = wanted.end.max((run.end + stream.window).next_multiple_of(grain));
            stream.window = most.min(stream.window * 2);
        }
        stream.start = run.start;
        stream.end = stream.end.max(wanted.end);
        self.streams.push_front(stream);
        Wanted::Run(wanted.clip(geometry.all()))
    }
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
