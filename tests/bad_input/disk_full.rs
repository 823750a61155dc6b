//! The disk under the cache is full in the middle of it: writes say so, everything else goes on, and when there is
//! room again, so does hydration. Nothing is lost.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use blkferry::nbd::{Command, CommandFlags, NbdError};
use serde_json::Value;

use crate::client::Client;
use crate::common::{World, make_image, noise, tool};
use crate::manners::Manners;
use crate::namespace::{Mounted, alone};
use crate::source::Source;
use crate::trace::{assert_says, one_line};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

/// Takes all the room there is in a directory, but for so much.
fn leave_room(dir: &Path, bytes: u64) {
    let mut ballast = File::create(dir.join("ballast")).unwrap();
    let piece = vec![1; 64 << 10];
    while ballast.write_all(&piece).and_then(|()| ballast.sync_data()).is_ok() {}
    // The last bits, which a file system may give in smaller pieces.
    while ballast.write_all(&piece[..512]).and_then(|()| ballast.sync_data()).is_ok() {}
    let len = ballast.metadata().unwrap().len();
    ballast.set_len(len.saturating_sub(bytes)).unwrap();
    ballast.sync_all().unwrap();
}

/// The story, on a file system of which `small` is the mount point.
fn full_and_then_not(world: &World, small: &Path) {
    let mut expected = noise(3, SIZE as usize);
    let source = Source::start(&world.path("source"), expected.clone(), Manners::default());
    let cache = small.join("cache");
    let device = world.attach(&source.uri, &cache, "disk", &["--hydrate", "off"]);
    let mut client = Client::connect(&device.uri);
    client.write(0, &vec![0x91; 1 << 20]);
    expected[..1 << 20].fill(0x91);
    leave_room(small, 8 * MIB);
    device.set("hydrate=auto");
    let full = |status: &Value| status["hydrate"]["reason"].as_str().is_some_and(|why| why.contains("No space left"));
    let status = device.wait_for(full);
    assert_eq!(status["hydrate"]["state"], "paused");
    assert_eq!(status["state"], "active", "{status}");
    device.set("hydrate=off");
    device.wait_for(|status| status["hydrate"]["state"] == "off");

    // No room for what is written, neither in a block nor in part of one.
    assert_eq!(client.try_write(60 * MIB, &vec![0x92; 1 << 20]), Err(NbdError::NoSpc));
    // A write that failed may have written: it is the guest's to repeat, and the source's data is as good.
    assert_eq!(client.try_write(62 * MIB + 100, &vec![0x93; 1 << 20]), Err(NbdError::NoSpc));
    // What is here can be read, overwritten and flushed.
    assert!(client.read(0, 1 << 20) == expected[..1 << 20]);
    client.write(4096, &[0x94; 8192]);
    expected[4096..12288].fill(0x94);
    client.flush();
    // What is not here can be read: it comes from the source, each time if need be.
    for _ in 0..3 {
        assert!(client.read(50 * MIB, 1 << 20) == expected[50 << 20..51 << 20]);
    }
    // Room that the guest gives back is room for what it writes.
    client.perform(Command::Trim, CommandFlags::empty(), MIB / 2, (MIB / 2) as u32).unwrap();
    expected[1 << 19..1 << 20].fill(0);
    client.write(MIB / 2, &[0x95; 4096]);
    expected[1 << 19..(1 << 19) + 4096].fill(0x95);
    client.flush();
    assert_eq!(device.status()["state"], "active");

    std::fs::remove_file(small.join("ballast")).unwrap();
    client.write(60 * MIB, &vec![0x96; 1 << 20]);
    expected[60 << 20..61 << 20].fill(0x96);
    // Part of the write that failed may be there, whole sectors of it.
    let (start, end) = (62 << 20, (63 << 20) + 4096);
    let left = client.read(start as u64, (end - start) as u32);
    for at in 0..left.len() {
        let written = (100..100 + (1 << 20)).contains(&at) && left[at] == 0x93;
        assert!(left[at] == expected[start + at] || written, "byte {at} is neither old nor new");
    }
    expected[start..end].copy_from_slice(&left);
    device.set("hydrate=auto");
    device.wait_complete();
    for at in (0..SIZE).step_by(1 << 20) {
        assert!(client.read(at, 1 << 20) == expected[at as usize..][..1 << 20], "mebibyte {}", at >> 20);
    }
    drop(client);
    device.detach();
    assert!(std::fs::read(&cache).unwrap() == expected);
}

#[test]
fn on_a_file_system_in_memory() {
    alone("disk_full::on_a_file_system_in_memory", || {
        let world = World::new();
        let small = world.path("small");
        let _mounted = Mounted::tmpfs(&small, "80M");
        full_and_then_not(&world, &small);
    });
}

#[test]
fn on_ext4() {
    alone("disk_full::on_ext4", || {
        let world = World::new();
        let (image, small) = (world.path("ext4"), world.path("small"));
        File::create(&image).unwrap().set_len(96 * MIB).unwrap();
        tool("mkfs.ext4", ["-q", "-m", "0", image.to_str().unwrap()]);
        std::fs::create_dir(&small).unwrap();
        tool("mount", ["-o", "loop", image.to_str().unwrap(), small.to_str().unwrap()]);
        full_and_then_not(&world, &small);
    });
}

/// Hydration goes on by itself, without anybody who sets anything.
#[test]
fn hydration_goes_on_when_there_is_room_again() {
    alone("disk_full::hydration_goes_on_when_there_is_room_again", || {
        let world = World::new();
        let expected = noise(3, SIZE as usize);
        let source = Source::start(&world.path("source"), expected.clone(), Manners::default());
        let small = world.path("small");
        let mounted = Mounted::tmpfs(&small, "16M");
        let device = world.attach(&source.uri, &small.join("cache"), "disk", &[]);
        let no_space = |status: &Value| status["hydrate"]["reason"].to_string().contains("No space left");
        device.wait_for(no_space);
        mounted.resize("100M");
        let status = device.wait_complete();
        assert_eq!(status["hydrate"]["reason"], Value::Null);
        device.detach();
        assert!(std::fs::read(small.join("cache")).unwrap() == expected);
    });
}

/// A source that is asked again and again for what there is no room for pays for nothing.
#[test]
fn the_source_is_not_asked_for_what_there_is_no_room_for() {
    alone("disk_full::the_source_is_not_asked_for_what_there_is_no_room_for", || {
        let world = World::new();
        let source = Source::start(&world.path("source"), noise(3, SIZE as usize), Manners::default());
        let small = world.path("small");
        let _mounted = Mounted::tmpfs(&small, "8M");
        let device = world.attach(&source.uri, &small.join("cache"), "disk", &[]);
        let paused = |status: &Value| status["hydrate"]["state"] == "paused";
        let asked = || source.asked().iter().map(|asked| u64::from(asked.len)).sum::<u64>();
        device.wait_for(paused);
        for _ in 0..3 {
            device.set("hydrate=off");
            device.wait_for(|status| status["hydrate"]["state"] == "off");
            device.set("hydrate=auto");
            device.wait_for(paused);
        }
        assert!(asked() <= 10 * MIB, "{} bytes were asked for, of which 8 MiB have a place", asked());
        world.ok(["detach", "disk", "--incomplete"]);
    });
}

/// The live map lies on tmpfs, too, which may fill up later: the daemon must not be killed by that.
#[test]
fn the_run_directory_is_full() {
    alone("disk_full::the_run_directory_is_full", || {
        let world = World::new();
        let size = 64 << 30;
        make_image(&world.path("image"), size, &[(0, 4096)]);
        let export = world.export(&world.path("image"));
        let mounted = Mounted::tmpfs(&world.run_dir(), "1M");
        let cache = world.path("cache");
        // Too little for the maps of such a disk: it says so, rather than to die of it later.
        let args = ["attach", &export.uri, cache.to_str().unwrap(), "--name", "disk", "--hydrate", "off"];
        let line = one_line(&world.blkferry(args));
        assert_says(&line, &["live map", "No space left"]);
        mounted.resize("16M");
        let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "off"]);
        let mut client = Client::connect(&device.uri);
        leave_room(&world.run_dir(), 0);
        for at in (0..size).step_by(1 << 30) {
            client.write(at + 4096, &[0xa1; 4096]);
        }
        client.flush();
        assert_eq!(client.read((63 << 30) + 4096, 4096), [0xa1; 4096]);
        assert_eq!(device.status()["state"], "active");
        world.ok(["detach", "disk", "--incomplete"]);
    });
}
