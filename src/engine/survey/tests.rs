//! Questions and answers, beside a naive list of what was told of each block.

use super::*;

fn extent(len_bytes: u64, zero: bool) -> Extent {
    Extent { len_bytes, zero }
}

const BLOCK: u64 = 4096;

fn disk(blocks: u64) -> (Geometry, Maps) {
    let geometry = Geometry::new(blocks * BLOCK, BLOCK).unwrap();
    (geometry, Maps::in_memory(geometry))
}

fn survey(blocks: u64, at_once: usize) -> Survey {
    Survey::new(Questions { bytes: blocks * BLOCK, at_once })
}

#[test]
fn only_whole_blocks_of_zeros_are_zeros() {
    let g = Geometry::new(10 * 4096 + 512, 4096).unwrap();
    let runs =
        to_blocks(g, g.all(), &[extent(5000, false), extent(4096, true), extent(8192, true), extent(1 << 40, false)]);
    // Zeros from 5000 to 17288: blocks 2 and 3 are inside.
    assert_eq!(runs, [(BlockRun::new(0, 2), false), (BlockRun::new(2, 4), true), (BlockRun::new(4, 11), false)]);
    let tail = to_blocks(g, BlockRun::new(8, 11), &[extent(1 << 40, true)]);
    assert_eq!(tail, [(BlockRun::new(8, 11), true)]);
}

#[test]
fn a_short_answer_is_asked_about_again_and_one_that_says_nothing_counts_as_data() {
    let (g, maps) = disk(10);
    assert_eq!(to_blocks(g, g.all(), &[extent(4096 * 3 + 100, false)]), [(BlockRun::new(0, 3), false)]);
    let mut survey = survey(10, 8);
    assert_eq!(survey.ask(&maps, 0), Some(g.all()));
    assert_eq!(survey.ask(&maps, 0), None);
    survey.answer(g, g.all(), &[extent(4096 * 4 + 100, true)]);
    assert_eq!((survey.look(0), survey.look(4)), (Known::Zeros(4), Known::No));
    assert_eq!(survey.ask(&maps, 0), Some(BlockRun::new(4, 10)));
    // Less than a block.
    survey.answer(g, BlockRun::new(4, 10), &[extent(100, true)]);
    assert_eq!(survey.look(4), Known::Data(10));
}

#[test]
fn questions_go_ahead_two_at_first_and_then_more_but_not_far_beyond_enough_data() {
    let blocks = 4 * ENOUGH_BYTES / BLOCK;
    let (g, maps) = disk(blocks);
    let piece = blocks / 64;
    let mut survey = survey(piece, 8);
    let run = |number| BlockRun::new(number * piece, (number + 1) * piece);
    let asked = |survey: &mut Survey| std::iter::from_fn(|| survey.ask(&maps, 0)).collect::<Vec<_>>();
    assert_eq!(asked(&mut survey), [run(0), run(1)]);
    let zeros = [extent(piece * BLOCK, true)];
    let data = [extent(piece * BLOCK, false)];
    // The second answer comes first.
    survey.answer(g, run(1), &zeros);
    assert_eq!(asked(&mut survey), [run(2), run(3), run(4)]);
    assert_eq!((survey.look(0), survey.look(piece)), (Known::Asked(piece), Known::Zeros(2 * piece)));
    survey.answer(g, run(0), &data);
    assert_eq!(asked(&mut survey).len(), 5, "eight at once");
    for number in 2..10 {
        survey.answer(g, run(number), &data);
        asked(&mut survey);
    }
    // Data of ten pieces is known, 16 are enough; those that are asked already are answered.
    let known = (0..64).take_while(|number| survey.look(number * piece) != Known::No).count() as u64;
    for number in 10..known {
        survey.answer(g, run(number), &data);
    }
    assert!((16..16 + 8).contains(&known), "{known}");
    assert_eq!(survey.ask(&maps, 0), None);
    // Three pieces on there is less ahead.
    let cursor = (known - 15) * piece;
    assert_eq!(survey.ask(&maps, cursor), Some(run(known)));
    assert_eq!(survey.look(cursor), Known::Data((known - 14) * piece));
}

#[test]
fn what_is_here_is_not_asked_about() {
    let (_, maps) = disk(100);
    maps.mark_present(BlockRun::new(0, 30));
    maps.mark_present(BlockRun::new(40, 90));
    let mut survey = survey(20, 8);
    assert_eq!(survey.ask(&maps, 30), Some(BlockRun::new(30, 50)));
    assert_eq!(survey.ask(&maps, 30), Some(BlockRun::new(90, 100)));
    assert_eq!(survey.ask(&maps, 30), None);
}

#[test]
fn no_more_is_remembered_than_there_is_room_for_and_the_rest_is_asked_again() {
    let pieces = 4;
    let piece = MAX_TOLD as u64;
    let (g, maps) = disk(pieces * piece);
    let mut survey = survey(piece, 8);
    let mut asked = Vec::new();
    let mut ask = |survey: &mut Survey, cursor| {
        let run = survey.ask(&maps, cursor);
        asked.extend(run);
        run
    };
    // Every block is another run. The answer to the second question comes before that to the first.
    let answer = |run: BlockRun| (run.start..run.end).map(|block| extent(BLOCK, block % 2 == 0)).collect::<Vec<_>>();
    assert!(ask(&mut survey, 0).is_some() && ask(&mut survey, 0).is_some());
    for run in [BlockRun::new(piece, 2 * piece), BlockRun::new(0, piece)] {
        survey.answer(g, run, &answer(run));
    }
    assert_eq!(survey.told.len(), MAX_TOLD);
    assert_eq!((survey.look(0), survey.look(piece)), (Known::Zeros(1), Known::No), "the nearest are kept");
    // All of it is passed in the end.
    let mut cursor = 0;
    while cursor < g.blocks() {
        while let Some(run) = survey.ask(&maps, cursor) {
            survey.answer(g, run, &answer(run));
            assert!(survey.told.len() <= MAX_TOLD);
        }
        cursor = match survey.look(cursor) {
            Known::Zeros(end) | Known::Data(end) => end,
            other => panic!("{other:?} of block {cursor}"),
        };
    }
}

/// Any answers in any order, short, empty or of crumbs, while blocks become present and the cursor goes on and round.
#[test]
fn what_is_known_is_what_was_told() {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut below = |n: u64| rng.u64(..n);
    for _ in 0..300 {
        let blocks = 1 + below(60);
        let (g, maps) = disk(blocks);
        let mut survey = survey(1 + below(20), 1 + below(5) as usize);
        let source: Vec<bool> = (0..blocks).map(|_| below(2) == 0).collect();
        // What was told of each block: zeros or not.
        let mut told: Vec<Option<bool>> = vec![None; blocks as usize];
        let mut open: Vec<BlockRun> = Vec::new();
        let mut cursor = 0;
        for _ in 0..200 {
            match below(4) {
                0 if !open.is_empty() => {
                    let asked = open.swap_remove(below(open.len() as u64) as usize);
                    let len = below(asked.len() + 1);
                    let zero = |at: u64| source[at as usize];
                    let extents: Vec<_> = (asked.start..asked.start + len).map(|at| extent(BLOCK, zero(at))).collect();
                    survey.answer(g, asked, &extents);
                    let end = if len == 0 { asked.end } else { asked.start + len };
                    (asked.start..end).for_each(|at| told[at as usize] = Some(len > 0 && zero(at)));
                }
                1 => {
                    let at = below(blocks);
                    maps.mark_present(BlockRun::new(at, at + 1));
                }
                2 if below(8) == 0 => {
                    survey.start_over();
                    told.fill(None);
                    cursor = 0;
                }
                _ => {
                    let Some(next) = maps.next_absent(cursor) else { continue };
                    let asked = survey.ask(&maps, next);
                    if let Some(run) = asked {
                        assert!(!maps.is_present(run.start) && !run.is_empty());
                        assert!(open.iter().all(|other| other.clip(run).is_empty()), "{run} is asked already");
                        assert!((run.start..run.end).all(|at| told[at as usize].is_none()), "{run} was told");
                        open.push(run);
                        assert!(open.len() <= survey.questions.at_once);
                    }
                    for at in next..blocks {
                        let is_asked = open.iter().any(|run| run.contains(at));
                        let right = match survey.look(at) {
                            Known::Data(_) => told[at as usize] == Some(false),
                            Known::Zeros(_) => told[at as usize] == Some(true),
                            Known::Asked(_) => is_asked,
                            Known::No => !is_asked && told[at as usize].is_none(),
                        };
                        assert!(right, "block {at}: {:?}, told {:?}", survey.look(at), told[at as usize]);
                    }
                    match survey.look(next) {
                        Known::Data(end) | Known::Zeros(end) => cursor = end,
                        Known::Asked(_) => {}
                        Known::No => assert!(open.len() >= survey.allowed, "nobody asks about block {next}"),
                    }
                }
            }
        }
    }
}

#[test]
fn zeros_that_are_here_already_are_not_looked_for_in_the_rest_of_the_disk() {
    // 64 GiB of which one block could not be read. It is asked about again, and what lies behind it is told again.
    let blocks = 64 << 18;
    let (g, maps) = disk(blocks);
    maps.mark_present(BlockRun::new(1, blocks));
    let asked = BlockRun::new(0, 8192);
    let mut survey = survey(asked.len(), 8);
    assert_eq!(survey.ask(&maps, 0), Some(asked));
    let extents: Vec<_> = (0..asked.len()).map(|at| extent(BLOCK, at % 2 == 1)).collect();
    survey.answer(g, asked, &extents);
    let before = super::super::maps::WORDS_SEEN.get();
    assert_eq!(survey.next_zeros(&maps, &Inflight::default(), NonZeroU64::MAX), None);
    let seen = super::super::maps::WORDS_SEEN.get() - before;
    assert!(seen <= 2 * asked.len(), "{seen} words for {} runs of zeros", asked.len() / 2);
}
