//! A connection is doubted that owes data and says nothing; a source that is slow keeps its time, and its connections.

use std::rc::Rc;
use std::time::Duration;

use blkferry::device::Mode;
use blkferry::engine::{ByteRange, Errno};
use blkferry::remote::OnLoss;
use blkferry::uring::{now, sleep};
use futures_util::FutureExt;
use futures_util::future::{Either, select};

use crate::case::Rig;
use crate::judge::Stats;
use crate::setup::Setup;

/// A device with `fail-after:6s`, so that it doubts after 3 s, whose guest reads a block after 1 s; the answer, how long it
/// took, and what had happened 20 s later.
fn live(mode: Mode, prepare: impl FnOnce(&Rig)) -> (Result<(), Errno>, Duration, Stats) {
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
        let asked = now();
        let read = main.guests.read(device, process, ByteRange::new(1 << 20, 4096)).boxed_local();
        let Either::Left((answer, _)) = select(read, sleep(Duration::from_secs(60)).boxed_local()).await else {
            panic!("it is not answered in any time");
        };
        let answer = answer.expect("nobody was killed");
        let took = now() - asked;
        sleep(Duration::from_secs(20)).await;
        (answer, took, main.judge.stats.get())
    })
}

#[test]
fn a_source_that_is_slow_keeps_its_time() {
    let (answer, _, stats) = live(Mode::Off, |rig| rig.source.mood.dawdles.set(Duration::from_millis(4500)));
    assert_eq!(answer, Ok(()));
    assert_eq!((stats.probes, stats.lost, stats.dials), (1, 0, 4), "asked again, and not given up");
}

#[test]
fn a_question_that_takes_long_is_no_reason_to_doubt() {
    // So slow that nothing else is said meanwhile.
    let (answer, _, stats) = live(Mode::Rate(1 << 10), |rig| rig.source.mood.ponders.set(Duration::from_secs(5)));
    assert_eq!(answer, Ok(()));
    assert_eq!((stats.probes, stats.lost), (0, 0));
}

#[test]
fn a_source_that_is_slow_in_one_place_is_asked_there_once_more_and_not_for_ever() {
    // A little of it is read at once, so that the connection looks dead; all of it takes more than half of the patience.
    let (answer, took, stats) = live(Mode::Off, |rig| rig.source.mood.drags.set(Duration::from_millis(4500)));
    assert_eq!((answer, stats.probes), (Ok(()), 1));
    assert!(took < Duration::from_secs(8), "{took:?}");
}

#[test]
fn a_place_that_is_never_answered_fails_in_its_time() {
    let (answer, took, stats) = live(Mode::Off, |rig| rig.source.mood.drags.set(Duration::from_secs(1000)));
    assert_eq!((answer.is_err(), stats.probes), (true, 1), "{answer:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
}
