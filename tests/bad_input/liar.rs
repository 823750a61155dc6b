//! A source that lies: the device gives the connection up, asks again on another, and never keeps what was wrong.

use std::time::{Duration, Instant};

use blkferry::nbd::NbdError;
use serde_json::Value;

use crate::client::Client;
use crate::common::{World, noise};
use crate::manners::Manners;
use crate::reply::Lie;
use crate::source::Source;

const BLOCK: u64 = 4096;
const SIZE: u64 = 8 << 20;

/// A lie to a demand fetch, one after the other; the truth is what arrives.
fn lies_are_not_believed(manners: Manners) {
    let world = World::new();
    let expected = noise(1, SIZE as usize);
    let source = Source::start(&world.path("source"), expected.clone(), manners);
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    let mut client = Client::connect(&device.uri);
    for (index, lie) in (0..).zip(Lie::BREAKING) {
        let at = index * 16 * BLOCK;
        let before = source.accepted();
        source.lie(lie);
        let got = client.read(at, 4 * BLOCK as u32);
        assert!(got == expected[at as usize..][..4 * BLOCK as usize], "{lie:?} was believed");
        assert_eq!(source.lies_left(), 0);
        // Its first answer was the truth, and was taken.
        let times = if lie == Lie::Twice { 1 } else { 2 };
        assert_eq!(
            source.times_asked(BLOCK)[(at / BLOCK) as usize],
            times,
            "{lie:?}: asked again on another connection"
        );
        // Only then the next lie meets a source with all its connections.
        let started = Instant::now();
        while source.accepted() == before {
            assert!(started.elapsed() < Duration::from_secs(60), "{lie:?}: it did not connect again");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    assert_eq!(device.wait_for(|status| status["source"]["lost_reason"].is_null())["state"], "active");
    device.set("hydrate=auto");
    device.wait_complete();
    assert!(client.read(0, SIZE as u32) == expected);
    drop(client);
    device.detach();
    assert!(std::fs::read(world.path("cache")).unwrap() == expected);
}

#[test]
fn lies_to_a_guest_are_not_believed() {
    lies_are_not_believed(Manners::default());
}

#[test]
fn lies_of_a_source_with_one_connection_are_not_believed() {
    lies_are_not_believed(Manners { several: false, ..Manners::default() });
}

#[test]
fn lies_to_hydration_are_not_believed() {
    let world = World::new();
    let expected = noise(1, 4 * SIZE as usize);
    let source = Source::start(&world.path("source"), expected.clone(), Manners::default());
    Lie::BREAKING.into_iter().for_each(|lie| source.lie(lie));
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &[]);
    device.wait_complete();
    assert_eq!(source.lies_left(), 0);
    device.detach();
    assert!(std::fs::read(world.path("cache")).unwrap() == expected);
}

/// What else was under way on the connection that broke is asked again, and only that.
#[test]
fn what_was_under_way_on_a_broken_connection_is_asked_again() {
    for lie in [Lie::Garbage, Lie::Overlap, Lie::CutInData] {
        let world = World::new();
        let expected = noise(1, SIZE as usize);
        let source = Source::start(&world.path("source"), expected.clone(), Manners::default());
        let device = world.attach(&source.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
        let mut client = Client::connect(&device.uri);
        client.read(0, 8 * BLOCK as u32);
        source.hold_all();
        let reads: Vec<(u64, u64)> =
            (10..40).step_by(2).map(|block| (block, client.start_read(block * BLOCK, BLOCK as u32))).collect();
        let held = source.wait_held(reads.len());
        // Half of them get the truth, one a lie.
        source.release(|asked| asked.number % 2 == 0);
        source.lie(lie);
        let liar = held.iter().find(|asked| asked.number % 2 == 1).unwrap().number;
        source.hold(|_| false);
        source.release(|asked| asked.number == liar);
        for (block, cookie) in reads {
            let got = client.wait(cookie).unwrap();
            assert!(got == expected[(block * BLOCK) as usize..][..BLOCK as usize], "{lie:?}: block {block}");
        }
        let times = source.times_asked(BLOCK);
        for asked in held {
            let want = if asked.number % 2 == 0 { 1 } else { 2 };
            assert_eq!(times[(asked.offset / BLOCK) as usize], want, "{lie:?}: read {} of the source", asked.number);
        }
        world.ok(["detach", "disk", "--incomplete"]);
    }
}

#[test]
fn a_refusal_reaches_the_guest_and_is_not_remembered() {
    let world = World::new();
    let expected = noise(1, SIZE as usize);
    for structured in [true, false] {
        let path = world.path(if structured { "structured" } else { "simple" });
        let source = Source::start(&path, expected.clone(), Manners { structured, ..Manners::default() });
        let cache = world.path(if structured { "cache-1" } else { "cache-2" });
        let device = world.attach(&source.uri, &cache, "disk", &["--hydrate", "off"]);
        let mut client = Client::connect(&device.uri);
        source.lie(Lie::Refusal(NbdError::Io));
        assert_eq!(client.try_read(0, 4096), Err(NbdError::Io));
        assert!(client.read(0, 4096) == expected[..4096], "the same again");
        // A partial write needs the block, and must not be half done without it.
        source.lie(Lie::Refusal(NbdError::Io));
        assert_eq!(client.try_write(5 * BLOCK + 7, &[9; 100]), Err(NbdError::Io));
        assert!(client.read(5 * BLOCK, 4096) == expected[5 * 4096..6 * 4096]);
        if structured {
            source.lie(Lie::DataThenRefusal);
            assert_eq!(client.try_read(9 * BLOCK, 4096), Err(NbdError::Io));
            assert!(client.read(9 * BLOCK, 4096) == expected[9 * 4096..10 * 4096]);
        }
        // Two that wait for the same block both hear of it.
        source.hold_all();
        let both = [client.start_read(20 * BLOCK, 4096), client.start_read(20 * BLOCK + 512, 512)];
        source.wait_held(1);
        device.wait_for(|status| status["frontend"]["waiting_requests"] == 2);
        source.lie(Lie::Refusal(NbdError::Io));
        source.let_go();
        both.iter().for_each(|cookie| assert_eq!(client.wait(*cookie), Err(NbdError::Io)));
        assert_eq!(device.status()["state"], "active", "a source that refuses one read is there");
        device.set("hydrate=auto");
        device.wait_complete();
        drop(client);
        device.detach();
        assert!(std::fs::read(&cache).unwrap() == expected);
    }
}

#[test]
fn hydration_pauses_after_a_refusal_says_why_and_goes_on() {
    let world = World::new();
    let expected = noise(1, SIZE as usize);
    let source = Source::start(&world.path("source"), expected.clone(), Manners::default());
    // More than the halves of what it is asked for at once.
    (0..8192).for_each(|_| source.lie(Lie::Refusal(NbdError::Io)));
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &[]);
    let status = device.wait_for(|status| status["hydrate"]["state"] == "paused");
    let reason = status["hydrate"]["reason"].as_str().unwrap();
    assert!(reason.contains("the source cannot read") && reason.contains("Input/output"), "{reason}");
    device.wait_complete();
    device.detach();
    assert!(std::fs::read(world.path("cache")).unwrap() == expected);
}

/// "I am going away" is a loss, not a bad block: the guest waits.
#[test]
fn a_source_that_shuts_down_is_lost_and_not_broken() {
    let world = World::new();
    let expected = noise(1, SIZE as usize);
    let source = Source::start(&world.path("source"), expected.clone(), Manners::default());
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    let mut client = Client::connect(&device.uri);
    source.lie(Lie::Refusal(NbdError::Shutdown));
    assert!(client.read(0, 4096) == expected[..4096]);
    world.ok(["detach", "disk", "--incomplete"]);
}

/// It shakes hands and then breaks every promise, for as long as it is asked: the device must say so, serve what it
/// has, and not hammer at it.
#[test]
fn a_source_that_lies_all_the_time() {
    let world = World::new();
    let expected = noise(1, SIZE as usize);
    let source = Source::start(&world.path("source"), expected.clone(), Manners::default());
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    let mut client = Client::connect(&device.uri);
    client.read(0, 4096);
    (0..1_000_000).for_each(|_| source.lie(Lie::Overlap));
    let waiting = client.start_read(1 << 20, 4096);
    let status = device.wait_for(|status: &Value| status["frontend"]["waiting_requests"] == 1);
    assert_ne!(status["state"], "failed");
    let mut other = Client::connect(&device.uri);
    let started = Instant::now();
    let before = source.accepted();
    while started.elapsed() < Duration::from_secs(4) {
        assert!(other.read(0, 4096) == expected[..4096]);
        other.write(4096, &[7; 4096]);
        other.flush();
        std::thread::sleep(Duration::from_millis(100));
    }
    // With pauses of 100 ms and growing it is a few dozen; without any it is tens of thousands.
    let attempts = source.accepted() - before;
    assert!(attempts < 500, "{attempts} connections in a few seconds: it hammers at a source that is broken");
    source.be_honest();
    assert!(client.wait(waiting).unwrap() == expected[1 << 20..(1 << 20) + 4096]);
    world.ok(["detach", "disk", "--incomplete"]);
}
