//! What a guest is likely to read next is asked for beside its misses, and what somebody waits for goes first.

use crate::client::Client;
use crate::manners::Manners;
use crate::rig::{BLOCK, Rig, assert_raw_image};
use crate::source::Asked;

const MIB: u64 = 1 << 20;

/// Hydration comes from the front, and never gets this far while its reads are held.
fn is_far(asked: &Asked) -> bool {
    asked.offset >= 48 * MIB
}

/// Reads of the far end of the disk while all of hydration is held: what crossed of it, in order.
fn far_reads(mode: &str, reads: &[u64]) -> Vec<(u64, u64)> {
    far_reads_in_turn(mode, reads, &[])
}

/// The same; after each read it is waited for that so many blocks are here, so that none comes before what was asked for
/// ahead of it.
fn far_reads_in_turn(mode: &str, reads: &[u64], here: &[u64]) -> Vec<(u64, u64)> {
    let rig = Rig::new(64 * MIB / BLOCK, Manners::default());
    rig.source.hold(|asked| !is_far(asked));
    let device = rig.attach(mode);
    let mut client = Client::connect(&device.uri);
    for (at, &block) in reads.iter().enumerate() {
        assert_eq!(client.read(block * BLOCK, BLOCK as u32), rig.block(block));
        if let Some(&blocks) = here.get(at) {
            device.wait_for(|status| status["blocks"]["present"] == blocks);
        }
    }
    // A last one goes the same way: when it is answered, the source has heard what was asked before it.
    client.read(LAST * BLOCK, BLOCK as u32);
    let far = rig.source.asked().into_iter().filter(is_far);
    let mut runs: Vec<_> = far.map(|asked| (asked.offset / BLOCK, u64::from(asked.len) / BLOCK)).collect();
    assert_eq!(runs.pop(), Some((LAST, 1)));
    rig.source.let_go();
    assert_raw_image(device, &rig.cache(), &rig.expected);
    assert!(rig.source.times_asked(BLOCK).iter().all(|&times| times <= 1), "a block crosses once");
    runs
}

const FAR: u64 = 56 * MIB / BLOCK;
const LAST: u64 = 64 * MIB / BLOCK - 100;

#[test]
fn a_second_miss_nearby_brings_what_is_around_it_and_ahead() {
    // The second block is asked for by itself, first; then the rest of its 64 KiB and the next ones.
    let runs = far_reads("auto", &[FAR, FAR + 1]);
    assert_eq!(runs[..2], [(FAR, 1), (FAR + 1, 1)]);
    assert_eq!(runs[2..], [(FAR + 2, 30)], "to the end of the second 64 KiB");
}

#[test]
fn misses_that_jump_about_bring_nothing_else() {
    let reads: Vec<u64> = [0, 700, 300, 1500, 1000].iter().map(|jump| FAR + jump).collect();
    let runs = far_reads("auto", &reads);
    assert_eq!(runs, reads.iter().map(|block| (*block, 1)).collect::<Vec<_>>());
}

#[test]
fn the_third_equal_step_brings_the_next_ones_and_nothing_between() {
    let leap = |number: u64| FAR + number * 150;
    let reads: Vec<u64> = (0..4).map(leap).collect();
    assert_eq!(far_reads("auto", &reads), (0..6).map(|number| (leap(number), 1)).collect::<Vec<_>>());
    // Back, and more each time: two for the fourth, four for the seventh.
    let leap = |number: u64| FAR + 1500 - number * 150;
    let runs = far_reads_in_turn("auto", &(0..7).map(leap).collect::<Vec<_>>(), &[1, 2, 3, 6, 6, 6, 11]);
    assert_eq!(runs, (0..11).map(|number| (leap(number), 1)).collect::<Vec<_>>());
}

#[test]
fn nothing_is_brought_that_was_not_asked_for_where_hydration_is_off() {
    assert_eq!(far_reads("off", &[FAR, FAR + 1, FAR + 2]), [(FAR, 1), (FAR + 1, 1), (FAR + 2, 1)]);
    let reads: Vec<u64> = (0..5).map(|number| FAR + number * 150).collect();
    assert_eq!(far_reads("off", &reads), reads.iter().map(|block| (*block, 1)).collect::<Vec<_>>());
}
