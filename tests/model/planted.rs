//! The test of the test: faults planted in the engine are found by the same search, within the same cases.

use blkferry::engine::PlantedFault;

use crate::runner::{cases, explain, search};
use crate::world::Options;

fn assert_caught(fault: PlantedFault, oracle_only: bool) {
    let options = Options { fault: Some(fault), oracle_only, ..Options::default() };
    let Some((seed, violation)) = search(0, cases(), options).failure else {
        panic!("{fault:?} was not found in {} cases (oracle only: {oracle_only})", cases());
    };
    println!("{fault:?} (oracle only: {oracle_only}): found by case {}: {violation}", seed + 1);
    println!("{}", explain(seed, options));
}

/// The second fetch of a block is seen at once; that it can also do harm is for the next tests.
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

/// The history alone, without the rules on single actions, sees what a guest would see.
#[test]
fn a_guest_would_see_wrong_data() {
    assert_caught(PlantedFault::BitBeforeData, true);
    assert_caught(PlantedFault::FetchOverwrites, true);
}
