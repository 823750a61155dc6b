//! The machine goes down, not only the daemon: the live map is gone, and only the durable maps count.
//!
//! A power cut is made out of a kill: the live map is removed and the superblock is told that it was written in another
//! boot. All blocks that are not durably present are scribbled on, as if their data had never reached the
//! disk.

use std::fs;

use crate::common::World;
use crate::inspect::Depth;
use crate::killed::{Course, rounds};
use crate::record::Crash;
use crate::site::{Present, change_superblock, live_path, quiet_cache, reboot, scribble_on_absent_blocks, superblock};

#[test]
fn after_a_power_cut_everything_that_was_promised_is_there() {
    let first = crate::from_env("BLKFERRY_CRASH_FIRST").unwrap_or(0);
    let world = World::new();
    for seed in first..first + rounds().div_ceil(8) {
        let mut course = Course::new(&world, 1_000_000 + seed);
        let mut crash = Crash::Kill;
        for _ in 0..course.rng.between(1, 3) {
            course.kill_under_load(crash);
            crash = if course.rng.percent(70) { Crash::PowerCut } else { Crash::Kill };
            if crash == Crash::PowerCut {
                drop(quiet_cache(&course.cache));
                reboot(&world, &course.metadata);
                let durable = Present::from_metadata(&course.metadata);
                scribble_on_absent_blocks(&course.cache, course.geometry, &durable, seed);
            }
        }
        if crash == Crash::PowerCut {
            let device = course.attach();
            course.inspect(&device, Depth::Present, crash);
            // A block may have been written without its dirty bit, and that is known from now on.
            assert!(!superblock(&course.metadata).unwrap().dirty_exact);
            device.kill_daemon();
        }
        course.end();
    }
}

#[test]
fn in_the_same_boot_a_lost_live_map_is_not_passed_over() {
    let world = World::new();
    let mut course = Course::new(&world, 7);
    course.kill_under_load(Crash::Kill);
    drop(quiet_cache(&course.cache));
    let live = live_path(&world, &course.metadata);
    fs::remove_file(&live).unwrap();
    let before = (fs::read(&course.cache).unwrap(), fs::read(&course.metadata).unwrap());
    for _ in 0..2 {
        let said = course.refused(&[]);
        assert!(said.contains("--forget-unflushed") && said.contains(live.to_str().unwrap()), "{said}");
        assert!(!live.exists(), "a refused attach left a live map");
        let after = (fs::read(&course.cache).unwrap(), fs::read(&course.metadata).unwrap());
        assert!(before == after, "a refused attach changed something");
    }
    // With the price accepted it goes on from what was promised.
    let durable = Present::from_metadata(&course.metadata);
    scribble_on_absent_blocks(&course.cache, course.geometry, &durable, 7);
    let device = course.attach_with(&["--forget-unflushed"]);
    course.inspect(&device, Depth::Present, Crash::PowerCut);
    assert!(!superblock(&course.metadata).unwrap().dirty_exact);
    device.kill_daemon();
    course.end();
}

/// The live map of a cache that was left in order is nobody's: it must have been made for another copy of it.
#[test]
fn a_live_map_does_not_count_for_a_cache_that_was_left_in_order() {
    let world = World::new();
    let mut course = Course::new(&world, 8);
    let device = course.attach_with(&["--hydrate", "off"]);
    course.inspect(&device, Depth::Present, Crash::Kill);
    world.ok(["detach", &device.name, "--incomplete"]);
    // A backup, then more writes and a kill, and the backup comes back.
    let backup = (fs::read(&course.cache).unwrap(), fs::read(&course.metadata).unwrap());
    let device = course.attach_with(&["--hydrate", "off"]);
    let mut guest = crate::client::Client::connect(&device.uri, true).unwrap();
    guest.write(course.record.first_data(), &[0xaa; 64 << 10]);
    device.kill_daemon();
    drop(quiet_cache(&course.cache));
    assert!(live_path(&world, &course.metadata).exists());
    fs::write(&course.cache, &backup.0).unwrap();
    fs::write(&course.metadata, &backup.1).unwrap();
    let device = course.attach_with(&["--hydrate", "off"]);
    course.inspect(&device, Depth::Everything, Crash::Kill);
    device.kill_daemon();
    course.end();
}

/// Copying a cache and its metadata makes two caches of one name; they must not share a live map.
#[test]
fn two_copies_of_a_cache_do_not_share_their_maps() {
    let world = World::new();
    let mut course = Course::new(&world, 9);
    let device = course.attach_with(&["--hydrate", "off"]);
    world.ok(["detach", &device.name, "--incomplete"]);
    let (copy, copy_metadata) = (world.path("copy"), world.path("copy.ferry"));
    fs::copy(&course.cache, &copy).unwrap();
    fs::copy(&course.metadata, &copy_metadata).unwrap();
    let device = course.attach_with(&["--hydrate", "off"]);
    let other =
        world.blkferry(["attach", course.source(), copy.to_str().unwrap(), "--name", "copy", "--hydrate", "off"]);
    if other.status.success() {
        let uri = world.ok(["status", "copy", "--json"]);
        let uri: serde_json::Value = serde_json::from_str(&uri).unwrap();
        let mut guest = crate::client::Client::connect(uri["frontend"]["uri"].as_str().unwrap(), true).unwrap();
        guest.write(course.record.first_data(), &[0xaa; 64 << 10]);
    } else {
        let said = String::from_utf8_lossy(&other.stderr).into_owned();
        assert!(said.lines().count() == 1 && said.contains("in use"), "{said}");
    }
    course.inspect(&device, Depth::Everything, Crash::Kill);
    device.kill_daemon();
    course.end();
}

/// Another boot id, but the live map is still there: it was written in that other boot, and says nothing now.
#[test]
fn a_live_map_of_another_boot_does_not_count() {
    let world = World::new();
    let mut course = Course::new(&world, 10);
    course.kill_under_load(Crash::Kill);
    drop(quiet_cache(&course.cache));
    let live = live_path(&world, &course.metadata);
    let mut bytes = fs::read(&live).unwrap();
    bytes[8..24].fill(0x11);
    fs::write(&live, bytes).unwrap();
    change_superblock(&course.metadata, |superblock| {
        superblock.boot_id = "11111111-1111-1111-1111-111111111111".into();
    });
    let durable = Present::from_metadata(&course.metadata);
    scribble_on_absent_blocks(&course.cache, course.geometry, &durable, 10);
    let device = course.attach();
    course.inspect(&device, Depth::Present, Crash::PowerCut);
    device.kill_daemon();
    course.end();
}
