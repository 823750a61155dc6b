//! A connection is doubted that owes data and says nothing; a source that is slow keeps its time, and its connections.

use std::rc::Rc;
use std::time::Duration;

use blkferry::device::Mode;
use blkferry::engine::ByteRange;
use blkferry::remote::OnLoss;
use blkferry::uring::sleep;

use crate::case::Rig;
use crate::judge::Stats;
use crate::setup::Setup;

/// A device with `fail-after:6s`, so that it doubts after 3 s, whose guest reads a block after 1 s; what had happened 20 s
/// later.
fn live(mode: Mode, prepare: impl FnOnce(&Rig)) -> Stats {
    let mut setup = Setup::random(0);
    setup.block_bytes = 4096;
    setup.set_blocks(1024);
    (setup.single, setup.guests, setup.mode) = (false, 0, mode);
    setup.policy = OnLoss::FailAfter(Duration::from_secs(6));
    (setup.delay_us, setup.source_us) = ((1000, 1000), (1, 10));
    let rig = Rc::new(Rig::new(setup, false));
    prepare(&rig);
    let main = rig.clone();
    rig.live(async move {
        main.begin().await;
        sleep(Duration::from_secs(1)).await;
        let (device, process) = (main.machine.device().unwrap(), main.machine.process().unwrap());
        assert_eq!(main.guests.read(device, process, ByteRange::new(1 << 20, 4096)).await, Some(Ok(())));
        sleep(Duration::from_secs(20)).await;
        main.judge.stats.get()
    })
}

#[test]
fn a_source_that_is_slow_keeps_its_time() {
    let stats = live(Mode::Off, |rig| rig.source.mood.dawdles.set(Duration::from_millis(4500)));
    assert_eq!((stats.probes, stats.lost, stats.dials), (1, 0, 4), "asked again, and not given up");
}

#[test]
fn a_question_that_takes_long_is_no_reason_to_doubt() {
    // So slow that nothing else is said meanwhile.
    let stats = live(Mode::Rate(1 << 10), |rig| rig.source.mood.ponders.set(Duration::from_secs(5)));
    assert_eq!((stats.probes, stats.lost), (0, 0));
}
