//! Who reads by leaps waits for a few round trips, and not for one each time.

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
const READS: u64 = 40;

/// How long these reads of 4 KiB take, one after the other, over connections of 2 MiB a second.
fn time_of(offsets: Vec<u64>) -> Duration {
    let mut setup = Setup::random(0);
    setup.block_bytes = 4096;
    setup.set_blocks(96 * MIB / 4096);
    (setup.single, setup.policy, setup.guests, setup.mode) = (false, OnLoss::Wait, 0, Mode::Auto);
    (setup.delay_us, setup.piece) = ((10_000, 10_000), 64 << 10);
    setup.source_us = (1, 10);
    let rig = Rc::new(Rig::new(setup, false));
    rig.weather.rate.set(2 * MIB);
    let main = rig.clone();
    rig.live(async move {
        main.begin().await;
        let (device, process) = (main.machine.device().unwrap(), main.machine.process().unwrap());
        let began = main.judge.now();
        for offset in offsets {
            let range = ByteRange::new(offset, 4096);
            assert_eq!(main.guests.read(device.clone(), process, range).await, Some(Ok(())));
        }
        main.judge.now() - began
    })
}

#[test]
fn a_reader_that_leaps_waits_less_than_one_that_jumps_about() {
    let leaps = time_of((0..READS).map(|number| FIRST + number * MIB).collect());
    let back = time_of((0..READS).rev().map(|number| FIRST + number * MIB).collect());
    // The same mebibytes, in another order, and somewhere in each of them.
    let anywhere = |number: u64| FIRST + number.pow(3) % 41 * MIB + number.pow(5) % 61 * 4096;
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
