//! Out and back again: what was not written at the other host does not cross a second time.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use blkferry::control::RunDir;
use blkferry::nbd::{Command, CommandFlags, NbdError};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::client::Client;
use crate::common::{Device, Export, assert_same, kill, make_image, wait_for_socket};
use crate::link::Link;
use crate::rig::{
    Rig, abort, activate, can_be_written, contents, data_bytes, offer, take, wait_released, write_blocks,
};

const SIZE: u64 = 32 << 20;

/// The disk lives at B.
struct Out<'a> {
    b: Device<'a>,
    at_b: Client,
    wanted: Vec<u8>,
}

/// It is complete there; its source is not needed any more.
fn go_out(rig: &Rig) -> Out<'_> {
    let export = rig.hand_out();
    let b = rig.attach(&export.uri, "b", &[]);
    let mut at_b = Client::connect(&b.uri);
    let mut wanted = contents(SIZE);
    for block in [0u64, 77, 78, 4000, SIZE / 4096 - 1] {
        write_blocks(&mut at_b, &mut wanted, block..block + 1, block as u8 | 1);
    }
    // A part of a block.
    at_b.write(100 * 4096 + 7, &[9; 100]);
    wanted[100 * 4096 + 7..][..100].fill(9);
    at_b.flush();
    b.wait_complete();
    export.stop();
    Out { b, at_b, wanted }
}

/// Twenty blocks were written there, and nothing was fetched: the export is its source.
fn go_out_empty(rig: &Rig) -> (Export, Out<'_>) {
    let export = rig.hand_out();
    let b = rig.attach(&export.uri, "b", &["--hydrate", "off"]);
    let mut at_b = Client::connect(&b.uri);
    let mut wanted = contents(SIZE);
    write_blocks(&mut at_b, &mut wanted, 10..30, 7);
    (export, Out { b, at_b, wanted })
}

#[test]
fn only_what_was_written_comes_back() {
    let rig = Rig::new(SIZE);
    let Out { b, mut at_b, mut wanted } = go_out(&rig);
    let a = rig.attach(&offer(&b), "a", &["--standby"]);
    let mut at_a = Client::connect(&a.uri);
    // B still has it, and writes.
    at_b.write(5 * 4096, &[5; 4096]);
    wanted[5 * 4096..6 * 4096].fill(5);
    assert_eq!(at_a.read(5 * 4096, 4096), [5; 4096]);
    assert!(!can_be_written(&rig.image), "standby: the image is as it was left");

    assert_eq!(activate(&a).unwrap()["epoch"], 3);
    assert!(at_b.try_write(0, &[1; 512]).is_err());
    at_a.write(6 * 4096, &[6; 4096]);
    wanted[6 * 4096..7 * 4096].fill(6);
    a.wait_complete();
    // Seven blocks were written there, one was read in standby.
    assert_eq!(data_bytes(&a), 8 * 4096);
    assert!(!rig.world.path("a.raw.handoff").exists());
    drop((at_a, at_b));
    a.detach();
    assert!(std::fs::read(&rig.image).unwrap() == wanted);
    assert!(can_be_written(&rig.image));
    assert_eq!(wait_released(&b)["state"], "away");
    let said = rig.world.ok(["status", "b"]);
    assert!(said.contains("in epoch 3, which has all of it"), "{said}");
}

#[test]
fn killed_on_the_way_home() {
    let rig = Rig::new(SIZE);
    let Out { b, at_b, wanted } = go_out(&rig);
    drop(at_b);
    let uri = offer(&b);
    let a = rig.attach(&uri, "a", &["--standby"]);
    // Given, and not on record here.
    take(&a).unwrap();
    kill(a.pid, Signal::SIGKILL);
    assert!(!can_be_written(&rig.image));
    let a = rig.attach(&uri, "a", &["--standby", "--hydrate", "off"]);
    assert_eq!(a.status()["state"], "standby");
    activate(&a).unwrap();
    let status = a.status();
    let given =
        format!("given to {} in epoch 3, which still fetches from here", status["handoff"]["disk"].as_str().unwrap());
    for verb in [&["status", "b"][..], &["list"]] {
        let said = rig.world.ok(verb);
        assert!(said.contains(&given), "{said}");
    }
    // On record; what it kept is in the live map.
    kill(a.pid, Signal::SIGKILL);
    // As if death had come before the record beside the image was cleared up.
    let a = rig.attach(&uri, "a", &[]);
    a.wait_complete();
    assert_eq!(data_bytes(&a), 6 * 4096);
    a.detach();
    assert!(std::fs::read(&rig.image).unwrap() == wanted);
}

#[test]
fn nobody_gets_a_disk_that_is_still_coming_home() {
    let rig = Rig::new(SIZE);
    let Out { b, at_b, wanted } = go_out(&rig);
    drop(at_b);
    b.set("export=127.0.0.1:0");
    let direct = b.status()["handoff"]["export"].as_str().unwrap().to_owned();
    let (address, _) = direct.strip_prefix("nbd://").unwrap().split_once('/').unwrap();
    let link = Link::with_rtt(address, 300);
    let uri = direct.replace(address, &link.address);
    let a = rig.attach(&uri, "a", &["--standby", "--hydrate", "off"]);
    let record = rig.world.path("a.raw.handoff");
    let before = std::fs::read(&record).unwrap();
    activate(&a).unwrap();
    kill(a.pid, Signal::SIGKILL);
    // Death came before the record beside the image was cleared up: the next attach asks what was written at B.
    std::fs::write(&record, before).unwrap();
    let offered = rig.world.path("a.onward");
    let (at, onward) = (format!("unix:{}", offered.display()), format!("nbd+unix:///a?socket={}", offered.display()));
    let (a, c) = std::thread::scope(|scope| {
        let attached = scope.spawn(|| rig.attach(&uri, "a", &["--hydrate", "off", "--export", &at]));
        wait_for_socket(&offered);
        let c = rig.attach(&onward, "c", &["--standby"]);
        // It was answered less than a round trip after A asked: A does not know yet.
        link.freeze();
        let taken = scope.spawn(move || {
            take(&c).unwrap();
            c
        });
        std::thread::sleep(Duration::from_millis(200));
        link.thaw();
        (attached.join().unwrap(), taken.join().unwrap())
    });
    // There is one who writes.
    activate(&c).unwrap();
    assert_eq!(a.status()["state"], "away");
    assert_eq!(Client::connect(&a.uri).try_write(0, &[1; 512]), Err(NbdError::Perm));
    c.wait_complete();
    c.detach();
    assert!(std::fs::read(rig.world.path("c.raw")).unwrap() == wanted);
}

#[test]
fn a_disk_does_not_come_home_to_a_stranger() {
    let rig = Rig::new(SIZE);
    let Out { b, at_b, wanted } = go_out(&rig);
    let uri = offer(&b);
    // Another disk's image, given away to somebody else.
    let other = rig.world.path("o.raw");
    make_image(&other, SIZE, &[(0, 4096)]);
    let export = rig.hand_out_other(&other);
    rig.attach(&export.uri, "p", &[]).wait_complete();
    export.stop();
    let refused = rig.refused(&uri, "o", &["--standby"]);
    assert!(refused.contains("no part of that"), "{refused}");
    assert_eq!(b.status()["state"], "complete", "nothing was asked of the source");

    // After a doubt about what was written there, all of it crosses, into another file.
    drop(at_b);
    let whole = rig.world.path("whole.raw");
    let device = rig.attach(&uri, "whole", &[]);
    device.wait_complete();
    assert_eq!(data_bytes(&device), SIZE);
    device.detach();
    assert!(std::fs::read(&whole).unwrap() == wanted);
    assert_same(&whole, &rig.cache);
    assert!(std::fs::metadata(&whole).unwrap().blocks() > 0);
}

/// A → B → A → B → A: each time only what was written on the other side crosses.
#[test]
fn lap_after_lap_only_what_was_written_crosses() {
    let rig = Rig::new(SIZE);
    let Out { mut b, at_b, mut wanted } = go_out(&rig);
    drop(at_b);
    let mut uri = offer(&b);
    let (mut here, mut there) = (rig.image.clone(), rig.cache.clone());
    for (lap, name) in ["a2", "b2", "a3"].into_iter().enumerate() {
        // The way that the blocks of the lap before took is known from the last one: seven, or what the lap wrote.
        let device = rig.world.attach(&uri, &here, name, &["--standby"]);
        activate(&device).unwrap();
        device.wait_complete();
        let crossed = data_bytes(&device);
        assert_eq!(crossed, if lap == 0 { 6 * 4096 } else { (10 + lap as u64) * 4096 }, "{name}");
        wait_released(&b);
        b.detach();
        let mut client = Client::connect(&device.uri);
        write_blocks(&mut client, &mut wanted, 200 * lap as u64..200 * lap as u64 + 11 + lap as u64, 0x51 + lap as u8);
        assert!(client.read(0, SIZE as u32) == wanted, "{name}");
        drop(client);
        uri = offer(&device);
        b = device;
        std::mem::swap(&mut here, &mut there);
    }
    b.detach();
    assert!(std::fs::read(&there).unwrap() == wanted);
}

/// B has fetched next to nothing: what it lacks is at A all the while, and does not cross at all.
#[test]
fn an_incomplete_device_gives_back_what_was_written_and_nothing_else() {
    let rig = Rig::new(SIZE);
    let (mut export, Out { b, mut at_b, mut wanted }) = go_out_empty(&rig);
    // A part of a block, which fetches it; and one that is read.
    at_b.write(100 * 4096 + 7, &[9; 100]);
    wanted[100 * 4096 + 7..][..100].fill(9);
    at_b.perform(Command::WriteZeroes, CommandFlags::empty(), 300 * 4096, 8 * 4096).unwrap();
    wanted[300 * 4096..][..8 * 4096].fill(0);
    at_b.flush();
    assert_eq!(at_b.read(1000 * 4096, 4096), wanted[1000 * 4096..][..4096]);
    let out = data_bytes(&b);
    assert_eq!(out, 2 * 4096);

    let a = rig.attach(&offer(&b), "a", &["--standby"]);
    let mut at_a = Client::connect(&a.uri);
    // What neither has is fetched through both, while the machine still runs at B.
    assert_eq!(at_a.read(2000 * 4096, 4096), wanted[2000 * 4096..][..4096]);
    write_blocks(&mut at_b, &mut wanted, 40..41, 8);
    activate(&a).unwrap();
    // The export has been asked to leave, and did so in order.
    assert!(export.child.wait().unwrap().success());
    assert!(at_a.read(0, SIZE as u32) == wanted);
    write_blocks(&mut at_a, &mut wanted, 2000..2010, 3);
    a.wait_complete();
    // 20 + 1 + 1 blocks; trimmed ones cross as holes; one was read in standby.
    assert_eq!(data_bytes(&a), (22 + 1) * 4096);
    assert_eq!(data_bytes(&b), out + 4096, "nothing else was fetched there");
    assert!(!rig.world.path("a.raw.handoff").exists());
    wait_released(&b);
    drop((at_a, at_b));
    a.detach();
    b.detach();
    assert!(std::fs::read(&rig.image).unwrap() == wanted);
    assert!(can_be_written(&rig.image));
}

/// More than one question fits into: what was written is asked for piece by piece.
#[test]
fn a_large_disk_comes_home_in_pieces() {
    const LARGE: u64 = 5 << 30;
    let rig = Rig::sparse(LARGE, &[(LARGE - (1 << 20), 1 << 20)]);
    let export = rig.hand_out();
    let b = rig.attach(&export.uri, "b", &["--hydrate", "off"]);
    let mut at_b = Client::connect(&b.uri);
    let places = [0, (2 << 30) - 4096, 2 << 30, (4 << 30) + 8192, LARGE - 4096];
    for (number, at) in places.into_iter().enumerate() {
        at_b.write(at, &[number as u8 + 1; 4096]);
    }
    let a = rig.attach(&offer(&b), "a", &["--standby"]);
    activate(&a).unwrap();
    a.wait_complete();
    assert_eq!(data_bytes(&a), places.len() as u64 * 4096);
    let mut at_a = Client::connect(&a.uri);
    for (number, at) in places.into_iter().enumerate() {
        assert_eq!(at_a.read(at, 4096), [number as u8 + 1; 4096]);
    }
    let untouched = at_a.read(LARGE - 8192, 4096);
    assert!(untouched.iter().any(|byte| *byte != 0));
}

/// It is on record at A that the disk is here again, and nothing more is done when the daemon dies: as in a power cut, which
/// also takes the live map. What A has kept is known from B again, which could not get it anywhere else.
#[test]
fn a_power_cut_on_the_doorstep_loses_nothing() {
    let rig = Rig::new(SIZE);
    let (export, Out { b, at_b: _at_b, wanted }) = go_out_empty(&rig);
    let uri = offer(&b);
    let a = rig.attach(&uri, "a", &["--standby", "--hydrate", "off"]);
    let record = rig.world.path("a.raw.handoff");
    let kept = std::fs::read(&record).unwrap();
    let metadata_in_standby = std::fs::read(rig.world.path("a.raw.ferry")).unwrap();
    activate(&a).unwrap();
    let disk = a.status()["handoff"]["disk"].as_str().unwrap().to_owned();
    kill(a.pid, Signal::SIGKILL);
    // The superblock as it is, the map pages as they were: nothing that came after the record.
    let metadata = rig.world.path("a.raw.ferry");
    let mut now = std::fs::read(&metadata).unwrap();
    now[8192..].copy_from_slice(&metadata_in_standby[8192..]);
    std::fs::write(&metadata, now).unwrap();
    std::fs::write(&record, kept).unwrap();
    let live = RunDir::at(rig.world.run_dir()).live_dir().unwrap().join(format!("{disk}.live"));
    std::fs::remove_file(live).unwrap();
    drop(export);
    let a = rig.attach(&uri, "a", &["--forget-unflushed"]);
    assert!(!record.exists());
    let mut at_a = Client::connect(&a.uri);
    assert!(at_a.read(0, SIZE as u32) == wanted);
    drop(at_a);
    a.wait_complete();
    a.detach();
    assert!(std::fs::read(&rig.image).unwrap() == wanted);
}

/// B dies when A has the disk again, and what was written at B has not crossed: B's own source is gone for good.
#[test]
fn a_device_that_gave_the_disk_back_needs_no_source() {
    let rig = Rig::new(SIZE);
    let (export, Out { b, at_b, wanted }) = go_out_empty(&rig);
    drop(at_b);
    let refused = rig.refused(&export.uri, "x", &["--no-source"]);
    assert!(refused.contains("was not given away"), "{refused}");
    let a = rig.attach(&offer(&b), "a", &["--standby", "--hydrate", "off"]);
    activate(&a).unwrap();
    b.kill_daemon();
    let refused = rig.refused(&export.uri, "b", &[]);
    assert!(refused.contains("--no-source"), "{refused}");
    let b = rig.attach(&export.uri, "b", &["--no-source"]);
    assert_eq!(b.status()["state"], "away");
    offer(&b);
    a.set("hydrate=auto");
    a.wait_complete();
    assert_eq!(data_bytes(&a), 20 * 4096);
    wait_released(&b);
    b.detach();
    a.detach();
    assert!(std::fs::read(&rig.image).unwrap() == wanted);
}

/// Called off after the export has left: B has the disk again, and finds its source when that is served again.
#[test]
fn called_off_at_the_door_the_disk_goes_on_where_it_was() {
    // Nothing but holes: no abort may take it for an empty cache.
    let rig = Rig::sparse(SIZE, &[]);
    let export = rig.hand_out();
    let b = rig.attach(&export.uri, "b", &["--hydrate", "off"]);
    let mut at_b = Client::connect(&b.uri);
    at_b.write(0, &[1; 4096]);
    let a = rig.attach(&offer(&b), "a", &["--standby"]);
    take(&a).unwrap();
    assert_eq!(b.status()["state"], "away");
    abort(&a).unwrap();
    assert_eq!(b.status()["state"], "active");
    at_b.write(4096, &[2; 4096]);
    assert_eq!(at_b.read(8192, 4096), [0; 4096]);
    assert!(rig.image.exists(), "somebody's image is not removed");
    assert!(!can_be_written(&rig.image));
}

/// What is not whole, or not given to the one who offers it, is no home.
#[test]
fn a_cache_that_is_not_whole_is_no_home() {
    let rig = Rig::new(SIZE);
    let export = rig.world.export(&rig.image);
    let b = rig.attach(&export.uri, "b", &["--hydrate", "off"]);
    let c = rig.attach(&offer(&b), "c", &["--hydrate", "off"]);
    let to_c = offer(&c);
    kill(b.pid, Signal::SIGKILL);
    let refused = rig.world.refused(["export", rig.cache.to_str().unwrap(), "--listen", "127.0.0.1:0"]);
    assert!(refused.contains("is the cache of a device that is not complete"), "{refused}");
    let refused = rig.refused(&to_c, "b", &["--standby"]);
    assert!(refused.contains("still needs what is here"), "{refused}");
    let b = rig.attach(&export.uri, "b", &["--hydrate", "off"]);
    offer(&b);
    c.set("hydrate=auto");
    c.wait_complete();
    wait_released(&b);
    // Who comes after it knows that, too.
    kill(b.pid, Signal::SIGKILL);
    let b = rig.attach(&export.uri, "b", &[]);
    let status = b.status();
    assert_eq!((&status["handoff"]["released"], &status["source_needed"]), (&json!(true), &json!(false)));
    b.detach();
}
