//! Who reads in an order waits for a few round trips, and not for one each time.

use std::rc::Rc;
use std::time::Duration;

use blkferry::device::Mode;
use blkferry::engine::ByteRange;
use blkferry::remote::OnLoss;

use crate::case::Rig;
use crate::setup::Setup;

const MIB: u64 = 1 << 20;
const ROUND_TRIP: Duration = Duration::from_millis(20);
/// Behind what hydration fetches meanwhile.
const FIRST: u64 = 48 * MIB;
/// A read.
const BYTES: u64 = 4096;
/// How many leaps.
const READS: u64 = 40;
/// What a connection carries in a second.
const LINK: u64 = 2 * MIB;

/// How long these reads take, one after the other, and how much of the disk is here then.
fn reads(mode: Mode, offsets: impl IntoIterator<Item = u64>) -> (Duration, u64) {
    let mut setup = Setup::random(0);
    setup.block_bytes = BYTES;
    setup.set_blocks(96 * MIB / BYTES);
    (setup.single, setup.policy, setup.guests, setup.mode) = (false, OnLoss::Wait, 0, mode);
    (setup.delay_us, setup.piece) = ((10_000, 10_000), 64 << 10);
    setup.source_us = (1, 10);
    let rig = Rc::new(Rig::new(setup, false));
    rig.weather.rate.set(LINK);
    let main = rig.clone();
    let offsets: Vec<u64> = offsets.into_iter().collect();
    rig.live(async move {
        main.begin().await;
        let (device, process) = (main.machine.device().unwrap(), main.machine.process().unwrap());
        let began = main.judge.now();
        for offset in offsets {
            let range = ByteRange::new(offset, BYTES);
            assert_eq!(main.guests.read(device.clone(), process, range).await, Some(Ok(())));
        }
        (main.judge.now() - began, device.core.maps().present_count() * BYTES)
    })
}

#[test]
fn a_reader_that_leaps_waits_less_than_one_that_jumps_about() {
    let time_of = |offsets: Vec<u64>| reads(Mode::Auto, offsets).0;
    let leaps = time_of((0..READS).map(|number| FIRST + number * MIB).collect());
    let back = time_of((0..READS).rev().map(|number| FIRST + number * MIB).collect());
    // The same mebibytes, in another order, and somewhere in each of them.
    let anywhere = |number: u64| FIRST + number.pow(3) % 41 * MIB + number.pow(5) % 61 * BYTES;
    let jumps = time_of((1..=READS).map(anywhere).collect());
    println!("{READS} reads at {ROUND_TRIP:?}: {leaps:?} by leaps, {back:?} back, {jumps:?} anywhere");
    assert!(jumps > ROUND_TRIP * READS as u32, "{jumps:?}: each one waits");
    for leaps in [leaps, back] {
        assert!(
            leaps < ROUND_TRIP * 16,
            "{leaps:?}: three steps, then a round trip for 2, 4, 8, 16 of them, and their bytes"
        );
    }
}

/// Somebody who wants little of the link to be used in the background still reads files from their start.
#[test]
fn a_rate_for_the_background_is_none_for_who_reads_on_and_on() {
    let (rate, file) = (MIB, 8 * MIB);
    let seconds = file / LINK;
    let (took, present) = reads(Mode::Rate(rate), (FIRST..FIRST + file).step_by(BYTES as usize));
    let beside = present - file;
    println!("{file} bytes took {took:?}, {beside} came beside them");
    assert!(took < Duration::from_millis(seconds * 1100), "{took:?}: a round trip each");
    // What was read ahead counts: there is less of the rest than the rate would allow.
    assert!((1..=seconds * rate * 3 / 4).contains(&beside), "{beside} bytes in {took:?}");
}
