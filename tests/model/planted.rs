//! The test of the test: faults planted in the engine are found by the same search, within the same cases.

use blkferry::engine::PlantedFault;

use crate::runner::{cases, search};
use crate::world::Options;

fn assert_caught(fault: PlantedFault, oracle_only: bool) {
    let options = Options { fault: Some(fault), oracle_only, ..Options::default() };
    let who = if oracle_only { "the history alone" } else { "history and rules" };
    match search(0, cases(), options).failure {
        Some((seed, violation)) => println!("{fault:?}: found by {who} in case {}: {violation}", seed + 1),
        None => panic!("{fault:?} was not found by {who} in {} cases", cases()),
    }
}

#[test]
fn a_dropped_in_flight_check_is_caught() {
    assert_caught(PlantedFault::InflightIgnored, false);
}

#[test]
fn a_bit_before_its_data_is_caught() {
    assert_caught(PlantedFault::BitBeforeData, false);
}

#[test]
fn a_fetch_that_overwrites_is_caught() {
    assert_caught(PlantedFault::FetchOverwrites, false);
}

/// Without the rules on single actions: what a guest would see. (That a block is fetched twice, no guest sees:
/// the later fetch takes the block from the earlier one. It only breaks I6.)
#[test]
fn a_guest_would_see_wrong_data() {
    assert_caught(PlantedFault::BitBeforeData, true);
    assert_caught(PlantedFault::FetchOverwrites, true);
}
