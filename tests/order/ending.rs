//! Stopping while the source owes answers.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::client::Client;
use crate::common::kill;
use crate::manners::Manners;
use crate::rig::{BLOCK, Rig, assert_disk, assert_raw_image, filled, note};

const MIB: u64 = 1 << 20;

#[test]
fn hydrate_off_ends_new_fetches() {
    let rig = Rig::new(64 * MIB / BLOCK, Manners::default());
    rig.source.hold_all();
    let device = rig.attach("auto");
    rig.source.wait_held(2);
    device.set("hydrate=off");
    // Answers come, and with them room for more; nothing more is asked.
    let off = |status: &Value| status["hydrate"]["state"] == "off";
    rig.source.release(|asked| asked.number == 0);
    device.wait_for(off);
    let asked = rig.source.asked().len();
    rig.source.let_go();
    device.wait_for(|status| status["blocks"]["present"] == asked as u64 * 256);
    // The guest still gets what it asks for.
    let mut client = Client::connect(&device.uri);
    assert_eq!(client.read(60 * MIB, BLOCK as u32), rig.block(60 * 256));
    client.flush();
    assert_eq!(rig.source.asked().len(), asked + 1, "a fetch was started although hydration is off");
    assert_raw_image(device, &rig.cache(), &rig.expected);
}

/// How a daemon is told to stop.
type Stop = fn(&Rig, i32);

fn detach(rig: &Rig, _pid: i32) {
    rig.world.ok(["detach", "disk", "--incomplete"]);
}

fn terminate(_rig: &Rig, pid: i32) {
    kill(pid, Signal::SIGTERM);
}

/// Reads, partial writes and hydration wait for a source that never answers; the daemon stops and commits.
fn stops_and_commits(stop: Stop) {
    let rig = Rig::new(4096, Manners::default());
    let mut expected = rig.expected.clone();
    let device = rig.attach("off");
    let mut client = Client::connect(&device.uri);
    client.read(0, 16 * BLOCK as u32);
    rig.source.hold_all();
    device.set("hydrate=auto");
    let mut waiting = Client::connect(&device.uri);
    for block in (1000..1064).step_by(2) {
        waiting.start_read(block * BLOCK, BLOCK as u32);
        waiting.start_write((block + 1) * BLOCK + 7, &[1; 99]);
    }
    rig.source.wait_held(4);
    // Acknowledged and never flushed: in a block that is here, in absent ones, in one that is on its way.
    for block in [3, 2000, 2001, 1000] {
        client.write(block * BLOCK, &filled(0x81));
        note(&mut expected, block * BLOCK, &filled(0x81));
    }
    let pid = device.pid;
    stop(&rig, pid);
    wait_until_gone(pid);
    assert_eq!(rig.world.ok(["list", "--json"]).trim(), "[]", "it left its name free");

    // The late answers are nobody's now; the next daemon asks again for what was not here.
    rig.source.let_go();
    let asked = rig.source.asked().len();
    let device = rig.attach("off");
    let mut client = Client::connect(&device.uri);
    assert_disk_except(&mut client, &mut expected, 1000..1064);
    assert!(rig.source.asked().len() > asked);
    client.disconnect();
    assert_raw_image(device, &rig.cache(), &expected);
}

/// Compares; of the writes that were never acknowledged each may have happened or not.
fn assert_disk_except(client: &mut Client, expected: &mut [u8], open: std::ops::Range<u64>) {
    for block in open {
        let range = (block * BLOCK) as usize..((block + 1) * BLOCK) as usize;
        let mut merged = expected[range.clone()].to_vec();
        if block % 2 == 1 {
            merged[7..106].fill(1);
        }
        let got = client.read(block * BLOCK, BLOCK as u32);
        assert!(got == expected[range.clone()] || got == merged, "block {block}");
        expected[range].copy_from_slice(&got);
    }
    assert_disk(client, expected);
}

/// Far more than the few seconds that it may take, so that only a daemon that hangs fails.
fn wait_until_gone(pid: i32) {
    let deadline = Instant::now() + Duration::from_secs(40);
    while std::fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|mut fds| fds.next().is_some()) {
        assert!(Instant::now() < deadline, "the daemon does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn detach_while_misses_wait() {
    stops_and_commits(detach);
}

#[test]
fn sigterm_while_misses_wait() {
    stops_and_commits(terminate);
}

fn wait_with_deadline(child: &mut Child) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(40);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn ctrl_c_in_the_foreground_while_misses_wait() {
    let rig = Rig::new(1024, Manners::default());
    let cache = rig.cache();
    let mut command = rig.world.command(["attach", &rig.source.uri, cache.to_str().unwrap(), "--name", "disk"]);
    command.args(["--foreground", "--json", "--hydrate", "off"]).stdout(Stdio::piped()).stdin(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut line).unwrap();
    let status: Value = serde_json::from_str(&line).unwrap();
    let mut client = Client::connect(status["frontend"]["uri"].as_str().unwrap());
    rig.source.hold_all();
    client.start_read(9 * BLOCK, BLOCK as u32);
    rig.source.wait_held(1);
    client.write(20 * BLOCK, &filled(0x82));
    kill(child.id() as i32, Signal::SIGINT);
    assert_eq!(wait_with_deadline(&mut child), Some(0), "a clean stop");

    rig.source.let_go();
    let mut expected = rig.expected.clone();
    note(&mut expected, 20 * BLOCK, &filled(0x82));
    assert_raw_image(rig.attach("auto"), &cache, &expected);
}

#[test]
fn a_second_signal_does_not_wait() {
    let rig = Rig::new(64, Manners::default());
    rig.source.hold_all();
    let device = rig.attach("off");
    let mut client = Client::connect(&device.uri);
    client.start_read(0, BLOCK as u32);
    rig.source.wait_held(1);
    client.write(5 * BLOCK, &filled(0x83));
    let pid = device.pid;
    kill(pid, Signal::SIGTERM);
    kill(pid, Signal::SIGTERM);
    wait_until_gone(pid);
    // Stopped in order or not: what was acknowledged is here when it is attached again.
    rig.source.let_go();
    let device = rig.attach("off");
    let mut client = Client::connect(&device.uri);
    assert_eq!(client.read(5 * BLOCK, BLOCK as u32), filled(0x83));
    assert_eq!(client.read(0, BLOCK as u32), rig.block(0));
    device.world.ok(["detach", "disk", "--incomplete"]);
}

/// The guest overwrites a block that somebody waits for, and with that the device is complete: the source is let go,
/// and whoever waited for it is answered from the cache.
#[test]
fn the_last_block_is_overwritten_while_it_is_fetched() {
    let rig = Rig::new(16, Manners::default());
    rig.source.hold_all();
    let device = rig.attach("off");
    let mut reader = Client::connect(&device.uri);
    let read = reader.start_read(0, 4096);
    rig.source.wait_held(1);
    Client::connect(&device.uri).write(0, &vec![2; 16 * BLOCK as usize]);
    device.wait_complete();
    assert!(reader.wait(read).unwrap() == [2; 4096]);
    drop(reader);
    device.detach();
}
