//! The test of the test: planted faults are found by the same search, within the same cases.

use blkferry::{cache, engine};

use crate::runner::{cases, search};
use crate::world::Options;

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The engine.
    Engine(engine::PlantedFault),
    /// The commit.
    Commit(cache::PlantedFault),
    /// The recovery: a map page that a power cut tore is taken for the newest.
    TornPageUsed,
}

fn assert_caught(fault: Fault, oracle_only: bool) {
    let options = Options { fault: Some(fault), oracle_only, ..Options::default() };
    let who = if oracle_only { "the history alone" } else { "history and rules" };
    match search(0, cases(), options).failure {
        Some((seed, violation)) => println!("{fault:?}: found by {who} in case {}: {violation}", seed + 1),
        None => panic!("{fault:?} was not found by {who} in {} cases", cases()),
    }
}

#[test]
fn a_dropped_in_flight_check_is_caught() {
    assert_caught(Fault::Engine(engine::PlantedFault::InflightIgnored), false);
}

#[test]
fn a_bit_before_its_data_is_caught() {
    assert_caught(Fault::Engine(engine::PlantedFault::BitBeforeData), false);
}

#[test]
fn a_fetch_that_overwrites_is_caught() {
    assert_caught(Fault::Engine(engine::PlantedFault::FetchOverwrites), false);
}

#[test]
fn a_bit_that_is_set_when_the_write_begins_is_caught() {
    assert_caught(Fault::Engine(engine::PlantedFault::PresentOnSubmit), false);
}

#[test]
fn a_request_that_joins_a_fetch_and_is_forgotten_is_caught() {
    assert_caught(Fault::Engine(engine::PlantedFault::WaiterDropped), false);
}

#[test]
fn a_commit_without_its_sync_of_the_data_is_caught() {
    assert_caught(Fault::Commit(cache::PlantedFault::DataNotSynced), false);
}

#[test]
fn a_map_that_is_durable_before_its_data_is_caught() {
    assert_caught(Fault::Commit(cache::PlantedFault::MapBeforeData), false);
}

/// Only a daemon that is killed within a commit, a successor and a power cut show it.
#[test]
fn a_page_that_is_written_over_while_the_other_copy_is_not_durable_is_caught() {
    assert_caught(Fault::Commit(cache::PlantedFault::FoundNotSynced), false);
}

#[test]
fn a_torn_map_page_that_is_used_is_caught() {
    assert_caught(Fault::TornPageUsed, false);
}

/// Without the rules on single actions: what a guest would see. (That a block is fetched twice, no guest sees:
/// the later fetch takes the block from the earlier one. It only breaks I6.)
#[test]
fn a_guest_would_see_wrong_data() {
    assert_caught(Fault::Engine(engine::PlantedFault::BitBeforeData), true);
    assert_caught(Fault::Engine(engine::PlantedFault::FetchOverwrites), true);
    assert_caught(Fault::Engine(engine::PlantedFault::PresentOnSubmit), true);
    assert_caught(Fault::Commit(cache::PlantedFault::DataNotSynced), true);
    assert_caught(Fault::Commit(cache::PlantedFault::MapBeforeData), true);
}
