//! What is under way from a source is bounded (I10), and the bound is used.

use std::rc::Rc;

use blkferry::device::Mode;
use blkferry::remote::OnLoss;

use crate::case::Rig;
use crate::setup::Setup;

const MIB: u64 = 1 << 20;

/// Most bytes under way from the source while hydration fetches 64 MiB over a slow link that is so long that it may be a
/// fast one: what is asked for at first would fill it.
fn most_asked(single: bool) -> u64 {
    let mut setup = Setup::random(0);
    setup.block_bytes = 64 << 10;
    setup.set_blocks(1024);
    (setup.single, setup.policy, setup.guests, setup.mode) = (single, OnLoss::Wait, 0, Mode::Auto);
    setup.delay_us = (100_000, 100_001);
    let rig = Rc::new(Rig::new(setup, false));
    rig.weather.rate.set(MIB);
    let main = rig.clone();
    rig.live(async move {
        main.begin().await;
        main.all_comes().await;
        main.judge.most_asked.get()
    })
}

#[test]
fn hydration_keeps_to_its_window_and_fills_it() {
    // Of the two connections that are its own; and of the one that it shares with demand.
    for (single, window) in [(false, 24 * MIB), (true, 4 * MIB)] {
        let most = most_asked(single);
        assert!(most <= window && most > window / 2, "{most} bytes under way, with a window of {window}");
    }
}
