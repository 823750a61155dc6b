//! Handing a disk over: every interleaving of a source and its destinations, with crashes after every step and messages
//! that are lost, late or repeated. Both sides decide with the code that runs in the product (`blkferry::handoff`).
#![allow(clippy::unwrap_used, missing_docs)]

mod explore;
mod laps;
mod world;

use explore::{Explored, explore};
use world::{Bounds, Flaw, Kind, World};

fn check(kind: Kind, destinations: usize, flaw: Option<Flaw>, bounds: Bounds) -> Result<Explored, String> {
    explore(World::new(kind, destinations, flaw, bounds))
}

fn assert_sound(kind: Kind, destinations: usize, bounds: Bounds) {
    match check(kind, destinations, None, bounds) {
        Ok(Explored { states, steps }) => {
            println!("{kind:?}, {destinations} destination(s), {bounds:?}: {states} states, {steps} steps");
            assert!(states > 1000, "an exploration of {states} states has not seen much");
        }
        Err(trace) => panic!("{trace}"),
    }
}

const ONE: Bounds = Bounds { epoch: 5, writes: 1, asks: 2 };
/// With `epoch: 3` 4.6 million states, and minutes.
const TWO: Bounds = Bounds { epoch: 2, writes: 1, asks: 1 };
/// Deep enough for what was planted.
const FLAWED: Bounds = Bounds { epoch: 3, writes: 1, asks: 3 };

#[test]
fn an_image_has_one_writer_whatever_happens() {
    assert_sound(Kind::Image, 1, ONE);
}

#[test]
fn a_device_has_one_writer_whatever_happens() {
    assert_sound(Kind::Device, 1, ONE);
}

#[test]
fn two_destinations_do_not_both_get_it() {
    assert_sound(Kind::Image, 2, TWO);
    assert_sound(Kind::Device, 2, TWO);
}

/// The exploration is worth something only if it finds what is there.
#[test]
fn every_planted_flaw_is_found() {
    for flaw in Flaw::ALL {
        let trace = check(Kind::Image, 1, Some(flaw), FLAWED).err().unwrap_or_else(|| panic!("{flaw:?} was not found"));
        println!("{flaw:?}:\n{trace}\n");
    }
}

/// Three changes of hands, and one that is called off: deep enough for what was planted, too.
const LAPS: laps::Bounds = laps::Bounds { writes: 2, epoch: 5 };

#[test]
fn a_disk_that_goes_to_and_fro_is_whole_whatever_happens() {
    match explore(laps::Laps::new(None, LAPS)) {
        Ok(Explored { states, steps }) => {
            println!("laps, {LAPS:?}: {states} states, {steps} steps");
            assert!(states > 1000, "an exploration of {states} states has not seen much");
        }
        Err(trace) => panic!("{trace}"),
    }
}

#[test]
fn every_flaw_planted_in_the_way_back_is_found() {
    for flaw in laps::Flaw::ALL {
        let found = explore(laps::Laps::new(Some(flaw), LAPS)).err();
        println!("{flaw:?}:\n{}\n", found.unwrap_or_else(|| panic!("{flaw:?} was not found")));
    }
}
