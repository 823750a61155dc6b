//! A link that is cut, refused or silent again and again, under fio that verifies: nobody sees an error, nothing is
//! lost, and what was not in flight does not cross again.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::bench::{Phase, attach_in, mixed_image, run, text};
use crate::common::{World, assert_same};
use crate::fio::written;
use crate::oracle::Dice;
use crate::relay::Relay;

const SIZE: u64 = 96 << 20;
/// Cuts in an ordinary run; `BLKFERRY_CUTS` asks for another number.
const CUTS: u64 = 25;

fn cuts() -> u64 {
    std::env::var("BLKFERRY_CUTS").map_or(CUTS, |text| text.parse().unwrap())
}

/// One time of trouble, and the peace after it.
fn trouble(relay: &Relay, dice: &mut Dice) {
    if dice.below(4) == 0 {
        relay.fall_silent();
    } else {
        relay.cut();
    }
    std::thread::sleep(Duration::from_millis(dice.below(300)));
    relay.mend();
    std::thread::sleep(Duration::from_millis(20 + dice.below(150)));
}

/// Runs fio on a third of the disk until the trouble is over; gives the logs of what it wrote.
fn guest(world: &World, uri: &str, third: u64, seed: u64, left: &AtomicU64) -> Vec<PathBuf> {
    let mut logs = Vec::new();
    while left.load(Ordering::SeqCst) > 0 {
        let log = world.path(&format!("{third}-{}.log", logs.len()));
        let seed = seed * 1_000_000 + third * 1000 + logs.len() as u64;
        let offset = third * (SIZE / 3);
        run(
            "fio",
            &[
                "--name=guest",
                "--ioengine=nbd",
                &format!("--uri={uri}"),
                "--rw=randrw",
                "--bsrange=512-64k",
                "--bs_unaligned",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_state_save=0",
                &format!("--aux-path={}", text(&world.path(""))),
                "--fsync=32",
                "--iodepth=16",
                &format!("--offset={offset}"),
                &format!("--size={}", SIZE / 3),
                "--io_size=2M",
                &format!("--randseed={seed}"),
                &format!("--write_iolog={}", text(&log)),
            ],
        );
        logs.push(log);
    }
    logs
}

#[test]
fn nobody_notices_that_the_link_is_cut() {
    let seed = std::env::var("BLKFERRY_TEST_SEED").map_or(1, |text| text.parse().unwrap());
    println!("BLKFERRY_TEST_SEED={seed}");
    let world = World::new();
    let (image, cache, copy) = (world.path("image.raw"), world.path("cache.raw"), world.path("copy.raw"));
    mixed_image(&image, SIZE);
    let export = world.export_at(&image, "127.0.0.1:0");
    let relay = Relay::before(&export.uri);
    let device = attach_in(&world, Phase::Before, &relay.uri(), &cache, &[]);
    device.set("hydrate=2M");
    let mut dice = Dice::new(seed);
    let left = AtomicU64::new(cuts());
    let logs: Vec<PathBuf> = std::thread::scope(|scope| {
        let (world, uri, left) = (&world, &device.uri, &left);
        let guests: Vec<_> = (0..3).map(|third| scope.spawn(move || guest(world, uri, third, seed, left))).collect();
        while left.load(Ordering::SeqCst) > 0 && !guests.iter().any(|guest| guest.is_finished()) {
            trouble(&relay, &mut dice);
            left.fetch_sub(1, Ordering::SeqCst);
        }
        left.store(0, Ordering::SeqCst);
        guests.into_iter().flat_map(|guest| guest.join().unwrap()).collect()
    });
    let status = device.status();
    assert_eq!(status["source"]["lost_reason"], serde_json::Value::Null, "nothing is sticky: {status}");
    // A cut that comes before the link is up again meets nothing.
    assert!(relay.connections() > cuts() / 2, "{} connections were made", relay.connections());
    device.set("hydrate=auto");
    device.wait_complete();
    run("nbdcopy", &[&device.uri, text(&copy)]);
    device.detach();
    assert_same(&copy, &cache);

    let (mut want, got) = (std::fs::read(&image).unwrap(), std::fs::read(&cache).unwrap());
    for (offset, len) in logs.iter().flat_map(|log| written(log)) {
        let range = offset as usize..(offset + len) as usize;
        want[range.clone()].copy_from_slice(&got[range]);
    }
    if let Some(at) = (0..want.len()).find(|&i| want[i] != got[i]) {
        panic!("the image differs from its source at {at}, where fio wrote nothing");
    }
}
