//! The test of the test: planted faults of the fetch layer are found by the same seeds as those that the search runs.

use blkferry::remote::{PlantedFault, plant};

use crate::case::run_seed;
use crate::{KEPT_SEEDS, cases, search::search};

fn assert_caught(fault: PlantedFault) {
    let run = |seed| {
        plant(Some(fault));
        let checked = run_seed(seed);
        plant(None);
        checked
    };
    let kept = KEPT_SEEDS.iter().find_map(|&seed| run(seed).err().map(|violation| (seed, violation)));
    match kept.or_else(|| search(0, cases(), run).failure) {
        Some((seed, violation)) => println!("{fault:?}: found by seed {seed}: {violation}"),
        None => panic!("{fault:?} was not found in {} cases", cases()),
    }
}

#[test]
fn an_answer_to_another_read_is_caught() {
    assert_caught(PlantedFault::AnswerOfAnother);
}

#[test]
fn a_read_that_is_not_asked_again_is_caught() {
    assert_caught(PlantedFault::WaiterDropped);
}

#[test]
fn a_source_that_need_not_be_the_same_is_caught() {
    assert_caught(PlantedFault::IdentityUnchecked);
}

#[test]
fn a_loss_that_is_told_once_only_is_caught() {
    assert_caught(PlantedFault::GivenUpOnce);
}

#[test]
fn silence_that_nobody_notices_is_caught() {
    assert_caught(PlantedFault::SilenceUnnoticed);
}

#[test]
fn a_buffer_that_is_kept_is_caught() {
    assert_caught(PlantedFault::BufferKept);
}
