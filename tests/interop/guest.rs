//! A Linux guest boots from the device under QEMU (software emulation) before its blocks are here, writes and powers
//! off; what is left in the end is a raw image that boots again by itself and holds what was written.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::bench::{Phase, attach_in, run, text};
use crate::common::World;

/// Where the guest's ext4 file system begins: behind 1 MiB and 32 MiB of boot partition.
const ROOT_OFFSET: u64 = 33 << 20;
const BOOT_SECONDS: &str = "180";

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Boots a disk and checks that it was its `number`-th boot; the script knows a good one.
fn boot(disk: &str, number: u32, qemu: &[&str]) {
    let mut command = Command::new(project("tests/guest/boot"));
    command.args(["--expect-boot", &number.to_string(), disk, BOOT_SECONDS]).stdin(Stdio::null());
    if !qemu.is_empty() {
        command.arg("--").args(qemu);
    }
    let out = command.output().unwrap();
    let console = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "boot {number} of {disk}:\n{console}\n{}", String::from_utf8_lossy(&out.stderr));
    for mark in ["FERRY-GUEST-FILES ok", &format!("FERRY-GUEST-STAMPS ok {}", number - 1), "FERRY-GUEST-DONE"] {
        assert!(console.contains(mark), "no {mark} in\n{console}");
    }
}

/// Checks the guest's file system, and gives a file of it.
fn read_file(raw: &Path, file: &str) -> String {
    let fs = format!("{}?offset={ROOT_OFFSET}", text(raw));
    run("e2fsck", &["-f", "-n", &fs]);
    run("debugfs", &["-R", &format!("cat {file}"), &fs])
}

#[test]
fn a_guest_boots_before_its_disk_is_here() {
    let world = World::new();
    let (image, cache) = (world.path("guest.raw"), world.path("cache.raw"));
    // Ready-made parts come out of the script's own cache: the first run of all fetches them.
    run(text(&project("scripts/guest-image")), &[text(&image)]);
    let export = world.export(&image);
    let device = attach_in(&world, Phase::Before, &export.uri, &cache, &[]);
    boot(&device.uri, 1, &[]);
    let status = device.status();
    let (absent, total) = (status["bytes"]["absent"].as_u64().unwrap(), status["bytes"]["total"].as_u64().unwrap());
    assert!(absent > total / 4, "the boot took what it needed and no more: {status}");
    assert!(status["blocks"]["dirty"].as_u64() > Some((8 << 20) / 4096), "the guest wrote its 8 MiB: {status}");

    device.set("hydrate=auto");
    device.wait_complete();
    device.detach();
    export.stop();
    // blkferry is out of it from here on.
    assert_eq!(read_file(&cache, "/var/lib/ferry/boots"), "1\n");
    boot(text(&cache), 2, &[]);
    assert_eq!(read_file(&cache, "/var/lib/ferry/boots"), "2\n");
    assert!(read_file(&cache, "/var/log/boots").starts_with("boot 1 "));
    assert_eq!(read_file(&image, "/var/lib/ferry/boots"), "0\n", "the source was never written to");
}

/// The same with hydration running under the guest, in a cache of larger blocks, and a second boot on the device.
#[test]
fn a_guest_boots_twice_while_its_disk_arrives() {
    let world = World::new();
    let (image, cache) = (world.path("guest.raw"), world.path("cache.raw"));
    run(text(&project("scripts/guest-image")), &[text(&image)]);
    let export = world.export_at(&image, "127.0.0.1:0");
    let device = attach_in(&world, Phase::During, &export.uri, &cache, &["--block-size", "64K"]);
    boot(&device.uri, 1, &[]);
    boot(&device.uri, 2, &[]);
    device.set("hydrate=auto");
    device.wait_complete();
    device.detach();
    export.stop();
    assert_eq!(read_file(&cache, "/var/lib/ferry/boots"), "2\n");
    boot(text(&cache), 3, &[]);
}
