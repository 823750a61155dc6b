//! Live settings, completion, and `verify`.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::bench::{Phase, attach_in, finish, mixed_image, poll, qemu_io, run, text};
use crate::client::Client;
use crate::common::{Device, World, assert_same};
use crate::servers::{nbdkit, qemu_nbd};

const SIZE: u64 = (24 << 20) + 512;

fn present(device: &Device<'_>) -> u64 {
    device.status()["blocks"]["present"].as_u64().unwrap()
}

#[test]
fn hydration_starts_stops_and_keeps_a_rate() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let export = world.export(&image);
    let device = attach_in(&world, Phase::Before, &export.uri, &cache, &[]);
    assert_eq!(device.status()["hydrate"]["state"], "off");

    device.set("hydrate=1M");
    let status = device.wait_for(|status| status["blocks"]["present"] != 0);
    assert_eq!(
        (status["hydrate"]["mode"].as_str(), status["hydrate"]["state"].as_str()),
        (Some("1M"), Some("running"))
    );

    device.set("hydrate=off");
    device.wait_for(|status| status["hydrate"]["state"] == "off");
    // What was under way arrives; then nothing moves, not even after things that wake the fetch thread up.
    let mut before = present(&device);
    poll("hydration to stand still", || {
        let now = present(&device);
        std::mem::replace(&mut before, now) == now
    });
    qemu_io(&device.uri, &["flush"]);
    let status = device.status();
    assert_eq!(
        (&status["blocks"]["present"], &status["hydrate"]["state"]),
        (&before.into(), &"off".into()),
        "{status}"
    );
    assert_ne!(status["blocks"]["absent"], 0);

    for nonsense in ["hydrate=fast", "hydrate=", "hydrate", "speed=auto", "hydrate=-1", "hydrate=99999999999999999999"]
    {
        assert_eq!(world.blkferry(["set", &device.name, nonsense]).status.code(), Some(2));
    }
    world.refused(["set", "nobody", "hydrate=auto"]);
    assert_eq!(device.status()["hydrate"]["mode"], "off", "what is refused changes nothing");

    device.set("hydrate=2M");
    device.wait_for(|status| status["blocks"]["present"].as_u64() > Some(before));
    device.set("hydrate=auto");
    let status = device.wait_complete();
    assert_eq!((&status["hydrate"]["state"], &status["state"]), (&"done".into(), &"complete".into()));
    device.detach();
    assert_same(&image, &cache);
}

/// All blocks may be here because the guest fetched or wrote them: hydration is not what makes a device complete.
#[test]
fn a_device_that_never_hydrates_becomes_complete_too() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let export = world.export(&image);
    let device = attach_in(&world, Phase::Before, &export.uri, &cache, &[]);
    qemu_io(&device.uri, &["read 0 20M", "write -z 20M 4M", "write -P 5 24M 512"]);
    let status = device.wait_complete();
    assert_eq!(status["source"]["connections"], 0, "{status}");
    device.detach();
    export.stop();
    run("qemu-io", &["-f", "raw", "-c", "write -z 20M 4M", "-c", "write -P 5 24M 512", text(&image)]);
    assert_same(&image, &cache);
}

/// A database flushes all the time. That must not keep the device from finding out that it is complete.
#[test]
fn a_guest_that_never_stops_flushing_sees_the_end() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let export = world.export(&image);
    let device = attach_in(&world, Phase::During, &export.uri, &cache, &[]);
    let stop = AtomicBool::new(false);
    let status = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = Client::connect(&device.uri);
            while !stop.load(Ordering::SeqCst) {
                client.write(4096, &[0x77; 512]);
                client.flush();
            }
        });
        device.set("hydrate=auto");
        device.wait_for(|status| status["blocks"]["absent"] == 0);
        let commits = device.status()["cache"]["commits"].as_u64().unwrap();
        // Not a matter of time but of turns: it has had a thousand commits to notice.
        let status = device.wait_for(|status| {
            status["source_needed"] == false || status["cache"]["commits"].as_u64().unwrap() > commits + 1000
        });
        stop.store(true, Ordering::SeqCst);
        status
    });
    assert_eq!(status["source_needed"], false, "a thousand commits later it still is not complete: {status}");
    finish(device);
    drop(export);
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x77 4096 512", text(&image)]);
    assert_same(&image, &cache);
}

/// What `status` says to a person is what it says to a script.
#[test]
fn the_headline_is_not_ahead_of_the_truth() {
    let world = World::new();
    let image = world.path("image.raw");
    mixed_image(&image, SIZE);
    let export = world.export(&image);
    let device = attach_in(&world, Phase::Before, &export.uri, &world.path("cache.raw"), &[]);
    device.set("hydrate=auto");
    poll("the end", || {
        let said = world.ok(["status", &device.name]);
        let headline = said.lines().next().unwrap().contains("complete");
        assert!(!(headline && said.contains("still needed")), "complete, and yet the source is needed:\n{said}");
        headline
    });
    device.detach();
}

/// The report, and whether `verify` ended well.
fn verify(device: &Device<'_>) -> (Value, bool) {
    let out = device.world.blkferry(["verify", &device.name, "--json"]);
    assert!(out.status.code().is_some_and(|code| code < 2), "{out:?}");
    (serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out:?}")), out.status.success())
}

/// Changes one byte of the cache behind blkferry's back.
fn spoil(path: &std::path::Path, offset: u64) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

#[test]
fn verify_finds_a_spoilt_byte_by_hash_and_by_data() {
    for foreign in [false, true] {
        let world = World::new();
        let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
        mixed_image(&image, SIZE);
        let (_export, _nbdkit, uri);
        if foreign {
            let server = nbdkit(&world, &["file", text(&image)]);
            uri = server.uri.clone();
            _nbdkit = server;
        } else {
            let export = world.export(&image);
            uri = export.uri.clone();
            _export = export;
        }
        let device = attach_in(&world, Phase::Before, &uri, &cache, &[]);
        // In part present: what is not here, and what was written here, is left out and counted.
        qemu_io(&device.uri, &["read 0 4M", "write -P 9 1M 64K"]);
        // Readers are answered before what they read is in the cache.
        device.wait_for(|status| status["bytes"]["present"] == (4 << 20));
        let (report, same) = verify(&device);
        assert!(same, "{report}");
        assert_eq!(report["same_bytes"], (4 << 20) - (64 << 10), "{report}");
        assert_eq!((&report["dirty_bytes"], &report["absent_bytes"]), (&(64 << 10).into(), &(SIZE - (4 << 20)).into()));
        assert_eq!(report["method"], if foreign { "data" } else { "hash" });

        device.set("hydrate=auto");
        device.wait_complete();
        let (report, same) = verify(&device);
        assert!(same, "{report}");
        assert_eq!(report["same_bytes"], SIZE - (64 << 10));
        if !foreign {
            let received = report["received_bytes"].as_u64().unwrap();
            assert!(received < SIZE / 64, "{received} bytes for hashes alone");
        }

        // The first byte, one in the middle, the last one; and one that the guest owns, which is nobody's business.
        for offset in [0, 7_000_001, SIZE - 1, (1 << 20) + 5] {
            spoil(&cache, offset);
        }
        let (report, same) = verify(&device);
        assert!(!same, "{report}");
        assert_eq!(report["different_bytes"], 4096 * 2 + 512, "{report}");
        let first = serde_json::json!([0, 7_000_001 / 4096 * 4096, 24 << 20]);
        assert_eq!(report["first_differences"], first, "{report}");
        let said = world.blkferry(["verify", &device.name]);
        assert_eq!(said.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&said.stdout).contains("DIFFERENT"), "{said:?}");
        device.detach();
    }
}

#[test]
fn verify_of_a_source_that_is_gone_or_another_is_refused() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let export = world.export(&image);
    let device = attach_in(&world, Phase::After, &export.uri, &cache, &[]);
    let socket = export.uri.split_once("socket=").unwrap().1.to_owned();
    export.stop();
    let said = world.refused(["verify", &device.name]);
    assert!(said.contains("cannot connect"), "{said}");
    // Another disk of the same size behind the same address.
    let other = world.path("other.raw");
    run("cp", &[text(&image), text(&other)]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 3 0 4096", text(&other)]);
    let _other = world.export_at(&other, &format!("unix:{socket}"));
    let said = world.refused(["verify", &device.name]);
    assert!(said.contains("not the disk"), "{said}");
    device.detach();
}

/// A source with room for one client has that one while blocks are absent: `verify` must say so, not hang.
#[test]
fn verify_of_a_source_that_takes_one_client() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let server = qemu_nbd(&world, &["--format=raw", "--persistent"], &image);
    let device = attach_in(&world, Phase::Before, &server.uri, &cache, &[]);
    let said = world.refused(["verify", &device.name]);
    assert!(said.contains("another client"), "{said}");
    device.set("hydrate=auto");
    device.wait_complete();
    let (report, same) = verify(&device);
    assert!(same, "{report}");
    device.detach();
    assert_same(&image, &cache);
}
