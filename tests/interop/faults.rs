//! A source that cannot read: the request that needed it fails, the device lives on, and what can come comes.

use std::collections::HashMap;

use blkferry::nbd::{Command, CommandFlags, NbdError};

use crate::bench::{Phase, attach_in, finish, mixed_image, poll, qemu_io, run, text, try_run};
use crate::client::Client;
use crate::common::{World, assert_same};
use crate::servers::nbdkit;

const SIZE: u64 = 20 << 20;

fn reads(uri: &str, command: &str) -> bool {
    let out = try_run("qemu-io", &["-f", "raw", "-c", command, uri]);
    assert!(out.status.code() == Some(0) || out.status.code() == Some(1), "{out:?}");
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() || said.contains("Input/output error"), "{said}");
    out.status.success()
}

/// Errors for as long as a file is there: nbdkit's `error` filter.
#[test]
fn an_error_of_the_source_is_the_guests_for_that_request_only() {
    for structured in [true, false] {
        let world = World::new();
        let (image, cache, trigger) = (world.path("image.raw"), world.path("cache.raw"), world.path("fail"));
        mixed_image(&image, SIZE);
        let file = format!("error-file={}", text(&trigger));
        let mut args = vec!["--filter=error", "file", text(&image), "error-pread=EIO", "error-pread-rate=100%", &file];
        if !structured {
            args.insert(0, "--no-sr");
        }
        let server = nbdkit(&world, &args);
        let device = attach_in(&world, Phase::Before, &server.uri, &cache, &[]);
        assert!(reads(&device.uri, "read 0 64K"));
        std::fs::write(&trigger, "").unwrap();
        assert!(!reads(&device.uri, "read 1M 64K"), "the source cannot read");
        assert!(!reads(&device.uri, "write -P 1 2097153 100"), "a partial write cannot be merged");
        // Hits and whole blocks go on.
        qemu_io(&device.uri, &["read 0 64K", "write -P 0x21 3M 64K", "read -P 0x21 3M 64K", "flush"]);
        let status = device.status();
        assert_eq!((status["state"].as_str(), status["failure"].as_str()), (Some("active"), None));
        assert_eq!(status["frontend"]["waiting_requests"], 0);
        // Hydration says why it pauses, and goes on when it can.
        device.set("hydrate=auto");
        let status = device.wait_for(|status| status["hydrate"]["state"] == "paused");
        let reason = status["hydrate"]["reason"].as_str().unwrap();
        assert!(reason.contains("cannot read") && reason.contains("Input/output error"), "{reason}");
        std::fs::remove_file(&trigger).unwrap();
        assert!(reads(&device.uri, "read 1M 64K"));
        device.wait_complete();
        qemu_io(&device.uri, &["write -z 3M 64K"]);
        finish(device);
        run("qemu-io", &["-f", "raw", "-c", "write -z 3M 64K", text(&image)]);
        assert_same(&image, &cache);
    }
}

/// A disk of the letter `a` with one bad block at 8 MiB. A read over it says so (the file `asked` appears), waits for
/// the file `answer`, and fails.
fn bad_block(world: &World) -> crate::servers::Server {
    let (asked, answer) = (world.path("asked"), world.path("answer"));
    let pread = format!(
        "pread=if [ $(($4 + $3)) -gt 8388608 ] && [ $4 -lt 8392704 ]; then
             touch {}; while [ ! -e {} ]; do sleep 0.01; done; echo EIO bad >&2; exit 1
         fi
         head -c $3 /dev/zero | tr '\\0' a",
        text(&asked),
        text(&answer)
    );
    nbdkit(world, &["eval", "get_size=echo 16777216", &pread])
}

/// Lets reads over the bad block fail from now on, those that wait included.
fn let_it_answer(world: &World) {
    std::fs::write(world.path("answer"), "").unwrap();
}

#[test]
fn a_bad_block_costs_that_block_only() {
    let world = World::new();
    let cache = world.path("cache.raw");
    let server = bad_block(&world);
    let_it_answer(&world);
    let device = attach_in(&world, Phase::Before, &server.uri, &cache, &[]);
    device.set("hydrate=auto");
    // Everything else comes; the one block does not, and status says why.
    poll("all but the bad block", || device.status()["blocks"]["absent"] == 1);
    assert_eq!(device.status()["source_needed"], true);
    let status = device.wait_for(|status| status["hydrate"]["state"] == "paused");
    assert!(status["hydrate"]["reason"].as_str().unwrap().contains("8388608"), "{status}");
    assert!(!reads(&device.uri, "read -P 0x61 8M 4096"));
    assert!(reads(&device.uri, "read -P 0x61 8392704 1M"));
    assert!(world.refused(["detach", &device.name]).contains("4.00 KiB"), "it is not complete");
    // The guest can write the block anew, as one does with a bad sector: then nothing is missing.
    qemu_io(&device.uri, &["write -P 0x62 8M 4096"]);
    device.wait_complete();
    device.detach();
    let mut want = vec![b'a'; 16 << 20];
    want[8 << 20..][..4096].fill(b'b');
    assert!(std::fs::read(&cache).unwrap() == want);
}

/// Hydration asks for many blocks at once. When that fails because of one of them, guests that wait for the others
/// must still get them, and only the one who waits for the bad one fails.
#[test]
fn a_guest_does_not_fail_with_hydrations_request() {
    let world = World::new();
    let server = bad_block(&world);
    let device = attach_in(&world, Phase::Before, &server.uri, &world.path("cache.raw"), &[]);
    device.set("hydrate=auto");
    poll("hydration to ask for the bad block", || world.path("asked").exists());
    // Its neighbours stand in the same request.
    let mut client = Client::connect(&device.uri);
    let reads = [2048, 2049, 2100, 2200, 2300];
    let mut under_way = HashMap::new();
    for block in reads {
        under_way.insert(client.send(Command::Read, CommandFlags::empty(), block * 4096, 4096, &[]), block);
    }
    let write = client.send(Command::Write, CommandFlags::empty(), 2051 * 4096 + 7, 5, b"hello");
    // All have come to the device: they wait, or are answered.
    device.wait_for(|status| {
        let told = |what: &str| status["frontend"][what].as_u64().unwrap();
        told("read_hits") + told("read_misses") >= reads.len() as u64 && told("writes") >= 1
    });
    let_it_answer(&world);
    for _ in 0..=reads.len() {
        let (cookie, answer) = client.receive();
        match under_way.remove(&cookie) {
            Some(2048) => assert_eq!(answer, Err(NbdError::Io), "the bad block itself"),
            Some(block) => assert_eq!(answer.map(|bytes| bytes == [b'a'; 4096]), Ok(true), "block {block}"),
            None => assert_eq!((cookie, answer), (write, Ok(Vec::new())), "a write into a part of a block"),
        }
    }
    drop(client);
    world.ok(["detach", "--incomplete", &device.name]);
}

/// The smallest unit that fails is what is reported: a guest that reads over a bad block gets an error, not garbage.
#[test]
fn a_read_over_a_bad_block_fails_whole() {
    let world = World::new();
    let server = bad_block(&world);
    let_it_answer(&world);
    let device = attach_in(&world, Phase::Before, &server.uri, &world.path("cache.raw"), &[]);
    for mut client in [Client::connect(&device.uri), Client::plain(&device.uri)] {
        assert_eq!(client.read((8 << 20) - 8192, 16384), Err(NbdError::Io));
        assert_eq!(client.read((8 << 20) - 8192, 8192), Ok(vec![b'a'; 8192]));
    }
    world.ok(["detach", "--incomplete", &device.name]);
}
