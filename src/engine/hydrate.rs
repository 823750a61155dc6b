//! What to fetch next in the background.
//!
//! In order of address, from a cursor that starts again at the front when it has come to the end:
//! blocks that failed or were taken back are absent still and are found then. After a round in which blocks
//! failed comes a rest, so that a source with bad blocks is not asked for them without end. Where the source tells
//! its holes, they are never asked for: they cross as metadata. While a question about them is under way, blocks are fetched
//! as if they were data if the source sends zeros as holes: then nothing is lost if they are none, and no round trip
//! is spent on waiting. Not so behind zeros: there will be more of them.
//!
//! What is known to be [hot](super::hot) comes before all that, where the source sends zeros as holes: so no question is
//! needed. Zeros that were told of come first of all, wherever they are: they cost nothing, and nobody waits a round trip to
//! read them.
//!
//! Of little that is absent from the beginning, as of a disk that comes home, nothing is asked: the answer would be about the
//! rest of the disk, and would keep the source from sending what is wanted.

use std::num::NonZeroU64;

use super::event::HotRanges;
use super::geometry::{BlockRun, Geometry};
use super::hot::Hot;
use super::inflight::Inflight;
use super::maps::Maps;
use super::survey::{Extent, Known, Questions, Survey};

/// Absent bytes that are little: what is under way to the source at a time.
const LITTLE_BYTES: u64 = 24 << 20;
/// The same as a part of the disk.
const LITTLE_PART: u64 = 16;

/// Runs of zeros that are marked one after the other, before something is fetched: a link must not run dry meanwhile.
const ZEROS_IN_TURN: u32 = 32;

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
    /// What comes first.
    hot: Hot,
    cursor: u64,
    /// Everything before it is present: where to start again. On a disk of terabytes it takes long to find.
    front: u64,
    /// Where there are zeros, if the source tells.
    survey: Option<Survey>,
    /// Does it send zeros as holes, when they are read?
    compact: bool,
    /// What lies before the cursor was told to be zeros.
    behind_zeros: bool,
    /// What was known to be zeros once is not to be fetched in a later round.
    has_asked: bool,
    /// Did a block fail in this round?
    failed: bool,
    /// Runs of zeros since something else was done.
    zeros: u32,
    /// Most blocks of one.
    max_zeros: NonZeroU64,
}

impl Planner {
    pub(super) fn new(questions: Option<Questions>, compact: bool, max_zeros: NonZeroU64) -> Self {
        Self {
            hot: Hot::default(),
            cursor: 0,
            front: 0,
            survey: questions.map(Survey::new),
            compact,
            behind_zeros: false,
            has_asked: false,
            failed: false,
            zeros: 0,
            max_zeros,
        }
    }

    pub(super) fn next(&mut self, maps: &Maps, inflight: &Inflight, max_fetch: NonZeroU64) -> Next {
        if self.zeros < ZEROS_IN_TURN
            && let Some(run) = self.next_zeros(maps, inflight)
        {
            self.zeros += 1;
            return Next::Zero(run);
        }
        self.zeros = 0;
        match self.next_in_turn(maps, inflight, max_fetch) {
            Next::Wait => self.next_zeros(maps, inflight).map_or(Next::Wait, Next::Zero),
            next => next,
        }
    }

    fn next_zeros(&mut self, maps: &Maps, inflight: &Inflight) -> Option<BlockRun> {
        self.survey.as_mut()?.next_zeros(maps, inflight, self.max_zeros)
    }

    fn next_in_turn(&mut self, maps: &Maps, inflight: &Inflight, max_fetch: NonZeroU64) -> Next {
        let zeros = |run: BlockRun| self.survey.as_ref().and_then(|survey| survey.zeros_in(run.start, run.end));
        if let Some(run) = self.hot.next(maps, inflight, max_fetch, zeros) {
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
                self.survey.iter_mut().for_each(Survey::start_over);
                self.behind_zeros = false;
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

    /// Takes ranges that are to be fetched before the rest.
    pub(super) fn prefer(&mut self, geometry: Geometry, ranges: &HotRanges) {
        if self.compact {
            self.hot.add(geometry, ranges);
        }
    }

    /// The guest has missed these blocks; those that it is about to use with them.
    pub(super) fn missed(&mut self, geometry: Geometry, run: BlockRun) -> Option<BlockRun> {
        self.hot.missed(geometry, run)
    }

    fn step(&mut self, maps: &Maps, start: u64, until: u64, max_fetch: NonZeroU64) -> Next {
        let until = until.min(maps.geometry().blocks());
        let asks = self.has_asked || !self.compact || !maps.lacks_little();
        let known = match &mut self.survey {
            Some(survey) => match asks.then(|| survey.ask(maps, start)).flatten() {
                Some(run) => {
                    self.has_asked = true;
                    return Next::Query(run);
                }
                None => survey.look(start),
            },
            None => Known::Data(until),
        };
        let (end, zero) = match known {
            Known::Zeros(end) => (end.min(until), true),
            Known::Data(end) => (end.min(until), false),
            Known::Asked(end) if self.compact && !self.behind_zeros => (end.min(until), false),
            Known::No if !asks => (until, false),
            Known::Asked(_) | Known::No => return Next::Wait,
        };
        let most = if zero { self.max_zeros } else { max_fetch };
        let end = end.min(start.saturating_add(most.get()));
        let run = BlockRun::new(start, maps.absent_until(start, end));
        self.cursor = run.end;
        self.behind_zeros = zero;
        if zero { Next::Zero(run) } else { Next::Fetch(run) }
    }

    /// A block could not be read.
    pub(super) fn failed(&mut self) {
        self.failed = true;
    }

    /// Takes the answer to a question.
    pub(super) fn answer(&mut self, geometry: Geometry, asked: BlockRun, extents: &[Extent]) {
        self.survey.iter_mut().for_each(|survey| survey.answer(geometry, asked, extents));
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

#[cfg(test)]
mod tests {
    use super::super::geometry::ByteRange;
    use super::*;

    const ANY: NonZeroU64 = NonZeroU64::MAX;

    fn extent(len_bytes: u64, zero: bool) -> Extent {
        Extent { len_bytes, zero }
    }

    fn used(ranges: &[ByteRange]) -> HotRanges {
        HotRanges { used: ranges.into(), ..HotRanges::default() }
    }

    #[test]
    fn what_costs_nothing_if_it_is_a_hole_is_fetched_before_the_answer_comes() {
        let g = Geometry::new(20 * 4096, 4096).unwrap();
        let (maps, max) = (Maps::in_memory(g), g.blocks_in(4096 * 4));
        let mut planner = Planner::new(Some(Questions::AHEAD), true, ANY);
        let none = Inflight::default();
        assert_eq!(planner.next(&maps, &none, max), Next::Query(g.all()));
        assert_eq!(planner.next(&maps, &none, max), Next::Fetch(BlockRun::new(0, 4)));
        assert_eq!(planner.next(&maps, &none, max), Next::Fetch(BlockRun::new(4, 8)));
        planner.answer(g, g.all(), &[extent(4096 * 10, false), extent(4096 * 10, true)]);
        assert_eq!(planner.next(&maps, &none, max), Next::Zero(BlockRun::new(10, 20)));
        assert_eq!(planner.next(&maps, &none, max), Next::Fetch(BlockRun::new(8, 10)));
    }

    #[test]
    fn zeros_come_first_wherever_they_are_and_not_all_at_once() {
        let g = Geometry::new(400 * 4096, 4096).unwrap();
        let (maps, max) = (Maps::in_memory(g), g.blocks_in(4096 * 400));
        let mut inflight = Inflight::default();
        let mut planner = Planner::new(Some(Questions::AHEAD), true, ANY);
        assert_eq!(planner.next(&maps, &inflight, max), Next::Query(g.all()));
        // A block of data, three of zeros, a hundred times over.
        let extents: Vec<_> = (0..200).map(|at| extent(4096 * [1, 3][at % 2], at % 2 == 1)).collect();
        planner.answer(g, g.all(), &extents);
        maps.mark_present(BlockRun::new(1, 3));
        inflight.give(BlockRun::new(6, 7), super::super::inflight::Owner::Wire(super::super::FetchId(1)));
        let mut next = || {
            let next = planner.next(&maps, &inflight, max);
            if let Next::Zero(run) | Next::Fetch(run) = next {
                maps.mark_present(run);
            }
            next
        };
        let zero = |start, end| Next::Zero(BlockRun::new(start, end));
        assert_eq!([next(), next(), next(), next()], [zero(3, 4), zero(5, 6), zero(7, 8), zero(9, 12)]);
        let others = (4..ZEROS_IN_TURN).map(|_| next()).all(|step| matches!(step, Next::Zero(_)));
        assert!(others);
        assert_eq!(next(), Next::Fetch(BlockRun::new(0, 1)), "a link must not run dry");
        let rest = (0..ZEROS_IN_TURN).map(|_| next()).all(|step| matches!(step, Next::Zero(_)));
        assert!(rest);
        assert_eq!(next(), Next::Fetch(BlockRun::new(4, 5)));
    }

    #[test]
    fn zeros_that_have_to_be_written_are_stored_in_pieces() {
        let g = Geometry::new(100 * 4096, 4096).unwrap();
        let (maps, max, few) = (Maps::in_memory(g), g.blocks_in(4096 * 4), g.blocks_in(4096 * 16));
        let none = Inflight::default();
        for compact in [true, false] {
            let mut planner = Planner::new(Some(Questions::AHEAD), compact, few);
            assert_eq!(planner.next(&maps, &none, max), Next::Query(g.all()));
            planner.answer(g, g.all(), &[extent(100 * 4096, true)]);
            let runs: Vec<_> = (0..7).map(|_| planner.next(&maps, &none, max)).collect();
            let wanted = (0..7).map(|at| Next::Zero(BlockRun::new(at * 16, 100.min(at * 16 + 16))));
            assert_eq!(runs, wanted.collect::<Vec<_>>());
            // What is found in its turn, too: they were all handed out before.
            assert_eq!(planner.next(&maps, &none, max), Next::Zero(BlockRun::new(0, 16)));
        }
    }

    #[test]
    fn of_little_nothing_is_asked() {
        let g = Geometry::new(64 * 4096, 4096).unwrap();
        let (maps, max, none) = (Maps::in_memory(g), g.blocks_in(4096 * 4), Inflight::default());
        maps.mark_present(BlockRun::new(4, 63));
        assert!(!maps.lacks_little(), "one more than the sixteenth part");
        assert!(matches!(Planner::new(Some(Questions::AHEAD), true, ANY).next(&maps, &none, max), Next::Query(_)));
        maps.mark_present(BlockRun::new(0, 1));
        assert!(maps.lacks_little());
        assert_eq!(
            Planner::new(Some(Questions::AHEAD), true, ANY).next(&maps, &none, max),
            Next::Fetch(BlockRun::new(1, 4))
        );
        // Zeros that would cross as data are asked for all the same.
        assert!(matches!(Planner::new(Some(Questions::AHEAD), false, ANY).next(&maps, &none, max), Next::Query(_)));
    }

    #[test]
    fn what_is_hot_comes_first() {
        let g = Geometry::new(100 * 4096, 4096).unwrap();
        let (maps, max) = (Maps::in_memory(g), g.blocks_in(4096 * 4));
        let mut inflight = Inflight::default();
        let mut planner = Planner::new(None, true, ANY);
        let hot = |start: u64, end: u64| ByteRange { start: start * 4096, end: end * 4096 };
        planner.prefer(g, &used(&[hot(10, 16), hot(40, 43), hot(99, 120)]));
        maps.mark_present(BlockRun::new(10, 11));
        inflight.give(BlockRun::new(41, 42), super::super::inflight::Owner::Wire(super::super::FetchId(1)));
        let next: Vec<Next> = (0..6).map(|_| planner.next(&maps, &inflight, max)).collect();
        let fetch = |start, end| Next::Fetch(BlockRun::new(start, end));
        assert_eq!(next, [fetch(99, 100), fetch(40, 41), fetch(42, 43), fetch(11, 15), fetch(15, 16), fetch(0, 4)]);
        // What is known to be zeros is not asked for.
        planner = Planner::new(Some(Questions::AHEAD), true, ANY);
        assert_eq!(planner.next(&maps, &inflight, max), Next::Query(g.all()));
        planner.answer(g, g.all(), &[extent(34 * 4096, false), extent(2 * 4096, true), extent(64 * 4096, false)]);
        planner.prefer(g, &used(&[hot(32, 38)]));
        let next: Vec<Next> = (0..4).map(|_| planner.next(&maps, &inflight, max)).collect();
        assert_eq!(next, [Next::Zero(BlockRun::new(34, 36)), fetch(32, 34), fetch(36, 38), fetch(0, 4)]);
        // Where zeros cross as data they are not fetched before it is known that they are none.
        let mut careful = Planner::new(Some(Questions::AHEAD), false, ANY);
        careful.prefer(g, &used(&[hot(10, 16)]));
        assert_eq!(careful.next(&maps, &inflight, max), Next::Query(g.all()));
    }

    #[test]
    fn the_plan_skips_what_is_present_or_in_flight_and_comes_round() {
        let g = Geometry::new(12 * 4096, 4096).unwrap();
        let maps = Maps::in_memory(g);
        let mut inflight = Inflight::default();
        maps.mark_present(BlockRun::new(0, 2));
        inflight.give(BlockRun::new(4, 6), super::super::inflight::Owner::Wire(super::super::FetchId(1)));
        let mut planner = Planner::new(None, false, ANY);
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
