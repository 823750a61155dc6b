//! Attached and detached, again and again, in every manner: nothing is left behind, and the source's server does not
//! grow.

use std::path::Path;

use crate::bench::{mixed_image, qemu_io, text};
use crate::common::{World, assert_same};

const SIZE: u64 = (2 << 20) + 512;
/// Cycles in an ordinary run; `BLKFERRY_CYCLES` asks for another number.
const CYCLES: u64 = 20;
/// The first so many show what one has anyway.
const WARM_UP: u64 = 10;
/// What the allocator may keep on top of that, in KiB.
const SLACK_KIB: u64 = 8 << 10;

/// Descriptors and resident KiB of a process.
fn usage(pid: u32) -> (usize, u64) {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    (descriptors, line.split_whitespace().nth(1).unwrap().parse().unwrap())
}

/// Every file below a directory.
fn files(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => names.extend(files(&entry.path())),
            false => names.push(entry.path().display().to_string()),
        }
    }
    names.sort();
    names
}

#[test]
fn nothing_is_left_of_a_device_that_was_detached() {
    let cycles = std::env::var("BLKFERRY_CYCLES").map_or(CYCLES, |text| text.parse().unwrap());
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let export = world.export(&image);
    let mut before = None;
    for cycle in 0..cycles {
        let device = world.attach(&export.uri, &cache, "cycle", &["--hydrate", "off"]);
        qemu_io(&device.uri, &["read 0 64K", "write -P 7 1M 4K"]);
        match cycle % 4 {
            0 => drop(world.ok(["detach", "cycle", "--incomplete"])),
            1 => {
                device.set("hydrate=auto");
                device.wait_complete();
                device.detach();
            }
            // It goes on with what a killed one left.
            2 => {
                device.kill_daemon();
                drop(world.attach(&export.uri, &cache, "cycle", &["--hydrate", "off"]));
                world.ok(["detach", "cycle", "--incomplete"]);
            }
            _ => {
                device.kill_daemon();
                world.ok(["detach", "cycle", "--force"]);
            }
        }
        if cycle % 4 != 2 {
            std::fs::remove_file(&cache).unwrap();
            std::fs::remove_file(format!("{}.ferry", text(&cache))).unwrap();
        }
        if cycle + 1 >= WARM_UP && cycle % 4 == 3 {
            let now = (usage(export.child.id()), files(&world.run_dir()));
            let ((descriptors, kib), left) = before.get_or_insert_with(|| now.clone()).clone();
            assert_eq!(now.1, left, "files after {} cycles", cycle + 1);
            // Connections of the last one may still be on their way out.
            assert!(now.0.0 <= descriptors + 8, "{} descriptors of the export, {descriptors} before", now.0.0);
            assert!(now.0.1 <= kib + SLACK_KIB, "{} KiB of the export, {kib} before", now.0.1);
        }
    }
    let device = world.attach(&export.uri, &cache, "cycle", &[]);
    device.wait_complete();
    device.detach();
    let expected = world.path("expected.raw");
    std::fs::copy(&image, &expected).unwrap();
    if cycles % 4 == 3 {
        crate::bench::run("qemu-io", &["-f", "raw", "-c", "write -P 7 1M 4K", text(&expected)]);
    }
    assert_same(&expected, &cache);
}
