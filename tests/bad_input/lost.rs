//! A source that disappears and comes back: as it was, as another disk, or in part.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use blkferry::nbd::NbdError;
use serde_json::Value;

use crate::client::{Client, socket_of};
use crate::common::{Device, Export, World, make_image, noise};
use crate::manners::Manners;
use crate::source::Source;
use crate::trace::refused;

const SIZE: u64 = 8 << 20;

fn is_degraded(status: &Value) -> bool {
    status["state"] == "degraded"
}

/// Kills an export, and waits until its socket is dead; gives the path of that.
fn kill_it(export: Export) -> PathBuf {
    let socket = socket_of(&export.uri);
    drop(export);
    let started = Instant::now();
    // The kernel lets go of what was in its ring a moment after the process is gone.
    while UnixStream::connect(&socket).is_ok() {
        assert!(started.elapsed() < Duration::from_secs(20), "somebody listens at {}", socket.display());
        std::thread::sleep(Duration::from_millis(5));
    }
    socket
}

fn serve_at(world: &World, image: &Path, socket: &Path) -> Export {
    world.export_at(image, &format!("unix:{}", socket.display()))
}

/// Serves an image where the export before it was.
fn serve_again(world: &World, image: &Path, before: Export) -> Export {
    serve_at(world, image, &kill_it(before))
}

/// A supervisor does not wait before it starts again what was killed.
#[test]
fn an_export_that_was_killed_can_be_started_again_at_once() {
    let world = World::new();
    make_image(&world.path("image"), SIZE, &[(0, SIZE)]);
    let mut export = world.export(&world.path("image"));
    let socket = socket_of(&export.uri);
    for _ in 0..20 {
        let mut client = Client::connect(&export.uri);
        client.read(0, 4096);
        drop(export);
        export = serve_at(&world, &world.path("image"), &socket);
    }
    export.stop();
}

/// What works without a source. Blocks from 0 to 64 are here.
fn works_without_a_source(client: &mut Client, expected: &mut [u8]) {
    assert!(client.read(0, 64 * 4096) == expected[..64 * 4096]);
    let changes = [(4096, vec![0xc1; 4096]), (10_000, vec![0xc2; 100]), (4 << 20, vec![0xc3; 8192])];
    for (at, data) in changes {
        client.write(at, &data);
        expected[at as usize..at as usize + data.len()].copy_from_slice(&data);
        assert!(client.read(at, data.len() as u32) == data);
    }
    client.flush();
}

fn assert_complete(device: Device<'_>, cache: &Path, expected: &[u8]) {
    device.set("hydrate=auto");
    device.wait_complete();
    device.detach();
    assert!(std::fs::read(cache).unwrap() == expected, "the cache is not what the disk should be");
}

#[test]
fn it_comes_back_as_it_was() {
    let world = World::new();
    let (image, cache) = (world.path("image"), world.path("cache"));
    make_image(&image, SIZE, &[(0, SIZE)]);
    let mut expected = std::fs::read(&image).unwrap();
    let export = world.export(&image);
    let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "off"]);
    let mut client = Client::connect(&device.uri);
    client.read(0, 64 * 4096);
    let socket = kill_it(export);
    device.wait_for(is_degraded);
    let waiting = [
        client.start_read(1 << 20, 4096),
        client.start_read(2 << 20, 1 << 20),
        client.start_write((3 << 20) + 100, &[0xc4; 50]),
    ];
    let mut other = Client::connect(&device.uri);
    works_without_a_source(&mut other, &mut expected);
    let status = device.wait_for(|status| status["frontend"]["waiting_requests"] == 3);
    assert_eq!((&status["state"], &status["source"]["connections"]), (&"degraded".into(), &0.into()), "{status}");
    assert!(status["source"]["lost_s"].is_number(), "{status}");
    assert!(!status["source"]["lost_reason"].as_str().unwrap().is_empty(), "{status}");
    assert!(world.ok(["status", "disk"]).contains("lost"));
    assert!(client.answered().is_empty());

    let back = serve_at(&world, &image, &socket);
    assert!(client.wait(waiting[0]).unwrap() == expected[1 << 20..(1 << 20) + 4096]);
    assert!(client.wait(waiting[1]).unwrap() == expected[2 << 20..3 << 20]);
    client.wait(waiting[2]).unwrap();
    expected[(3 << 20) + 100..(3 << 20) + 150].fill(0xc4);
    let status = device.wait_for(|status| status["state"] == "active");
    assert_eq!(status["source"]["lost_reason"], Value::Null);
    assert_complete(device, &cache, &expected);
    drop(back);
}

#[test]
fn it_disappears_in_the_middle_of_hydration_more_than_once() {
    let world = World::new();
    let (image, cache) = (world.path("image"), world.path("cache"));
    make_image(&image, 8 * SIZE, &[(0, 8 * SIZE)]);
    let mut export = world.export(&image);
    let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "16M"]);
    for part in 1..4 {
        device.wait_for(|status| status["bytes"]["present"].as_u64().unwrap() >= part * SIZE);
        export = serve_again(&world, &image, export);
    }
    assert_complete(device, &cache, &std::fs::read(&image).unwrap());
}

/// Another disk answers in its place: refused, in words, for as long as it is there.
fn another_disk(world: &World, other: &Path, words: &[&str]) {
    let (image, cache) = (world.path("image"), world.path("cache"));
    make_image(&image, SIZE, &[(0, SIZE)]);
    let mut expected = std::fs::read(&image).unwrap();
    let export = world.export(&image);
    let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "off"]);
    let mut client = Client::connect(&device.uri);
    client.read(0, 64 * 4096);
    let impostor = serve_again(world, other, export);
    let waiting = client.start_read(1 << 20, 1 << 20);
    device.set("hydrate=auto");
    let says_why = |status: &Value| {
        let reason = status["source"]["lost_reason"].as_str().unwrap_or_default();
        words.iter().all(|word| reason.contains(word))
    };
    let status = device.wait_for(says_why);
    assert_eq!(status["state"], "degraded");
    let present = status["bytes"]["present"].clone();
    let mut free = Client::connect(&device.uri);
    works_without_a_source(&mut free, &mut expected);
    assert!(client.answered().is_empty());
    assert!(device.status()["bytes"]["present"].as_u64().unwrap() <= present.as_u64().unwrap() + 8192 + 4096);

    let back = serve_again(world, &image, impostor);
    assert!(client.wait(waiting).unwrap() == expected[1 << 20..2 << 20], "data of the other disk");
    assert_complete(device, &cache, &expected);
    drop(back);
}

#[test]
fn it_comes_back_as_another_disk() {
    let world = World::new();
    let other = world.path("other");
    std::fs::write(&other, noise(1, SIZE as usize)).unwrap();
    another_disk(&world, &other, &["not the same disk", "refused"]);
}

#[test]
fn it_comes_back_with_another_size() {
    let world = World::new();
    for (size, name) in [(SIZE / 2, "smaller"), (SIZE * 2, "larger")] {
        let world = if name == "smaller" { &world } else { &World::new() };
        let other = world.path(name);
        make_image(&other, size, &[(0, size)]);
        another_disk(world, &other, &[&size.to_string(), &SIZE.to_string(), "refused"]);
    }
}

fn foreign() -> Manners {
    Manners { identity: None, ..Manners::default() }
}

#[test]
fn a_foreign_source_comes_back_as_another_disk() {
    let world = World::new();
    let (expected, other) = (noise(1, SIZE as usize), noise(2, SIZE as usize));
    let mut source = Source::start(&world.path("source"), expected.clone(), foreign());
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    let mut client = Client::connect(&device.uri);
    client.read(0, 4096);
    source.close();
    device.wait_for(is_degraded);
    source.set_image(other);
    source.open();
    let waiting = client.start_read(1 << 20, 4096);
    let why = |status: &Value| status["source"]["lost_reason"].to_string().contains("not the same disk");
    device.wait_for(why);
    source.close();
    source.set_image(expected.clone());
    source.open();
    assert!(client.wait(waiting).unwrap() == expected[1 << 20..(1 << 20) + 4096]);
    assert_complete(device, &world.path("cache"), &expected);
}

/// One connection breaks, and who takes its place is another server at the same address. The others still are what
/// they were, but this one has shown nothing.
#[test]
fn one_connection_of_a_foreign_source_comes_back_to_another_disk() {
    let world = World::new();
    let (expected, other) = (noise(1, SIZE as usize), noise(2, SIZE as usize));
    let source = Source::start(&world.path("source"), expected.clone(), foreign());
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    source.wait_connected(3);
    device.wait_for(|status| status["source"]["connections"] == 3);
    let mut client = Client::connect(&device.uri);
    // From now on newcomers meet the other disk.
    source.set_image(other);
    source.cut_connection(0);
    source.wait_connected(3);
    for at in (0..SIZE).step_by(1 << 20) {
        let got = client.read(at, 4096);
        assert!(got == expected[at as usize..][..4096], "data of another disk was handed to the guest");
    }
    world.ok(["detach", "disk", "--incomplete"]);
}

/// A connection stays open and nothing comes on it any more, as if a firewall had forgotten it. The source is well: to
/// fail after the time that was set would be to fail for nothing.
#[test]
fn a_connection_falls_silent() {
    let world = World::new();
    let expected = noise(1, SIZE as usize);
    let source = Source::start(&world.path("source"), expected.clone(), Manners::default());
    let options = ["--hydrate", "off", "--on-source-loss", "fail-after:6s"];
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &options);
    source.wait_connected(3);
    // The connection that demand has is dead, new ones are not.
    source.hold(|asked| asked.connection == 0);
    let mut client = Client::connect(&device.uri);
    client.set_patience(Duration::from_secs(90));
    assert!(client.read(1 << 20, 4096) == expected[1 << 20..(1 << 20) + 4096]);
    source.let_go();
    assert_complete(device, &world.path("cache"), &expected);
}

#[test]
fn it_falls_silent_in_the_middle_of_an_answer() {
    let world = World::new();
    let expected = noise(1, SIZE as usize);
    let source = Source::start(&world.path("source"), expected.clone(), Manners::default());
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    source.lie(crate::reply::Lie::Stuck);
    let mut client = Client::connect(&device.uri);
    client.set_patience(Duration::from_secs(90));
    assert!(client.read(1 << 20, 65536) == expected[1 << 20..(1 << 20) + 65536]);
    assert_complete(device, &world.path("cache"), &expected);
}

#[test]
fn it_disappears_during_a_verification() {
    let world = World::new();
    let expected = noise(1, SIZE as usize);
    // Foreign, so that it is compared by reading it.
    let mut source = Source::start(&world.path("source"), expected, foreign());
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &[]);
    device.wait_complete();
    source.hold(|asked| asked.len > 65536);
    let said = world.path("said");
    let mut verify = world.command(["verify", "disk"]);
    let mut child = verify.stderr(File::create(&said).unwrap()).stdout(Stdio::null()).spawn().unwrap();
    source.wait_held(1);
    source.close();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it waits for ever");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let said = std::fs::read_to_string(&said).unwrap();
    assert!(said.lines().count() == 1 && said.contains(&source.uri), "{said}");
    device.detach();
}

#[test]
fn an_incomplete_cache_cannot_go_on_without_it_and_a_complete_one_can() {
    let world = World::new();
    let (image, cache) = (world.path("image"), world.path("cache"));
    make_image(&image, SIZE, &[(0, SIZE)]);
    let export = world.export(&image);
    let uri = export.uri.clone();
    let device = world.attach(&uri, &cache, "disk", &["--hydrate", "off"]);
    Client::connect(&device.uri).write(0, &[9; 4096]);
    world.ok(["detach", "disk", "--incomplete"]);
    std::fs::remove_file(kill_it(export)).unwrap();
    refused(&world, ["attach", &uri, cache.to_str().unwrap(), "--name", "disk"], &["cannot connect", &uri]);

    let export = serve_at(&world, &image, &socket_of(&uri));
    let device = world.attach(&uri, &cache, "disk", &[]);
    device.wait_complete();
    device.detach();
    kill_it(export);
    let device = world.attach(&uri, &cache, "disk", &[]);
    assert_eq!(device.status()["state"], "complete");
    let mut client = Client::connect(&device.uri);
    assert_eq!(client.read(0, 4096), [9; 4096]);
    client.write(4096, &[8; 100]);
    client.flush();
    device.detach();
}

/// Not for ever: with `fail-after` whoever waits gets an error, and only who needs the source.
#[test]
fn who_waits_for_it_is_told_when_the_time_is_up() {
    let world = World::new();
    let mut expected = noise(1, SIZE as usize);
    let mut source = Source::start(&world.path("source"), expected.clone(), Manners::default());
    let more = ["--hydrate", "off", "--on-source-loss", "fail-after:500ms"];
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &more);
    let mut client = Client::connect(&device.uri);
    client.read(0, 64 * 4096);
    source.close();
    let waiting = [client.start_read(1 << 20, 1 << 20), client.start_write((3 << 20) + 100, &[0xc4; 50])];
    for cookie in waiting {
        assert_eq!(client.wait(cookie), Err(NbdError::Io));
    }
    // Later ones do not wait at all, and what is here goes on.
    assert_eq!(client.try_read(2 << 20, 4096), Err(NbdError::Io));
    works_without_a_source(&mut client, &mut expected);
    assert_eq!(device.status()["state"], "degraded");
    // Nothing is sticky: back to waiting, and the source comes back.
    device.set("on-source-loss=wait");
    let patient = client.start_read(2 << 20, 4096);
    device.wait_for(|status| status["frontend"]["waiting_requests"] == 1);
    source.open();
    assert!(client.wait(patient).unwrap() == expected[2 << 20..(2 << 20) + 4096]);
    // Changed live, it counts for those who wait already: the source is there and says nothing.
    source.hold_all();
    let waiting = client.start_read(5 << 20, 4096);
    device.wait_for(|status| status["frontend"]["waiting_requests"] == 1);
    device.set("on-source-loss=fail-after:2s");
    assert_eq!(client.wait(waiting), Err(NbdError::Io));
    source.let_go();
    device.wait_for(|status| status["state"] == "active");
    assert!(client.read(5 << 20, 4096) == expected[5 << 20..(5 << 20) + 4096]);
    assert_complete(device, &world.path("cache"), &expected);
}
