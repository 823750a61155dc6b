//! From one device of ours to the next host, and the one after that.

use serde_json::{Value, json};

use crate::client::Client;
use crate::rig::{Rig, activate, contents, control, data_bytes, offer, wait_released};

const SIZE: u64 = 16 << 20;

#[test]
fn three_hosts_in_a_row() {
    let rig = Rig::new(SIZE);
    let mut wanted = contents(SIZE);
    let export = rig.world.export(&rig.image);
    let b = rig.attach(&export.uri, "b", &["--hydrate", "off"]);
    let mut at_b = Client::connect(&b.uri);
    at_b.write(1 << 20, &[1; 8192]);
    assert_eq!(at_b.read(2 << 20, 4096), wanted[2 << 20..(2 << 20) + 4096]);

    // C waits while B goes on writing.
    let c = rig.attach(&offer(&b), "c", &["--standby", "--hydrate", "off"]);
    let mut at_c = Client::connect(&c.uri);
    at_b.write(0, &[2; 4096]);
    assert_eq!(at_c.read(0, 4096), [2; 4096]);
    assert_eq!(c.status()["blocks"]["present"], 0);
    assert_eq!(activate(&c).unwrap()["epoch"], 2);
    assert_eq!(b.status()["state"], "away");
    assert_eq!(at_b.try_write(0, &[3; 4096]), Err(blkferry::nbd::NbdError::Perm));
    assert_eq!(at_b.read(0, 4096), [2; 4096]);
    at_c.write(3 << 20, &[4; 4096]);
    let refused = rig.world.refused(["detach", "b"]);
    assert!(refused.contains("fetches from here"), "{refused}");
    c.set("hydrate=auto");
    c.wait_complete();
    rig.world.ok(["verify", "c"]);
    let identity = c.status()["source"]["identity"].clone();
    assert_eq!(identity, format!("device:{}:2", b.status()["handoff"]["disk"].as_str().unwrap()));

    // Each block crossed each wire at most once, but for what was read in standby and not kept.
    for (device, in_standby) in [(&b, 0), (&c, 4096)] {
        let data = data_bytes(device);
        assert!(data <= SIZE + in_standby, "{}: {data} bytes", device.name);
    }
    assert_eq!(wait_released(&b)["state"], "away");
    let refused = rig.world.refused(["reclaim", "--force", rig.cache.to_str().unwrap()]);
    assert!(refused.contains("in use by another process"), "{refused}");
    wanted[1 << 20..(1 << 20) + 8192].fill(1);
    wanted[..4096].fill(2);
    wanted[3 << 20..(3 << 20) + 4096].fill(4);
    drop((at_b, at_c));
    c.detach();
    assert_eq!(b.status()["source_needed"], false);
    let said: Value = serde_json::from_str(&rig.world.ok(["detach", "b", "--json"])).unwrap();
    assert_eq!(said["given_away"], true);
    assert!(std::fs::read(rig.world.path("c.raw")).unwrap() == wanted);
}

#[test]
fn a_device_that_gave_its_disk_away_stays_so() {
    let rig = Rig::new(SIZE);
    let export = rig.world.export(&rig.image);
    let b = rig.attach(&export.uri, "b", &["--hydrate", "off"]);
    let offered = offer(&b);
    let c = rig.attach(&offered, "c", &["--hydrate", "off"]);
    let mut at_c = Client::connect(&c.uri);
    at_c.write(0, &[7; 4096]);

    // A third party is told who has it; a plain reader gets what B has.
    let refused = rig.refused(&offered, "d", &[]);
    assert!(refused.contains("was given to"), "{refused}");

    // Killed, it comes back as what it is, and goes on being C's source.
    crate::common::kill(b.pid, nix::sys::signal::Signal::SIGKILL);
    let b = rig.attach(&export.uri, "b", &["--hydrate", "off"]);
    assert_eq!(b.status()["state"], "away");
    assert_eq!(Client::connect(&b.uri).try_write(0, &[8; 512]), Err(blkferry::nbd::NbdError::Perm));
    assert_eq!(offer(&b), offered);
    c.set("hydrate=auto");
    c.wait_complete();
    drop(at_c);
    c.detach();
    let mut wanted = contents(SIZE);
    wanted[..4096].fill(7);
    assert!(std::fs::read(rig.world.path("c.raw")).unwrap() == wanted);
}

#[test]
fn a_write_under_way_is_finished_before_the_disk_goes() {
    let rig = Rig::new(SIZE);
    let export = rig.world.export(&rig.image);
    let b = rig.attach(&export.uri, "b", &[]);
    let c = rig.attach(&offer(&b), "c", &["--standby"]);
    // A guest that does not stop: every write that it was told of is at C, and none after that.
    let uri = b.uri.clone();
    let acknowledged = std::thread::scope(|scope| {
        let guest = scope.spawn(move || {
            let mut guest = Client::connect(&uri);
            let writes = (0u64..).map(|n| guest.try_write(n % 4096 * 4096, &n.to_le_bytes().repeat(512)));
            writes.take_while(Result::is_ok).count() as u64
        });
        std::thread::sleep(std::time::Duration::from_millis(200));
        control(&c, &json!({ "do": "activate", "wait_ms": 5000 })).unwrap();
        guest.join().unwrap()
    });
    assert!(acknowledged > 0);
    c.wait_complete();
    let mut at_c = Client::connect(&c.uri);
    for block in 0..acknowledged.min(4096) {
        let last = (acknowledged - 1 - block) / 4096 * 4096 + block;
        let found = u64::from_le_bytes(at_c.read(block * 4096, 8).try_into().unwrap());
        assert_eq!(found, last, "block {block} of {acknowledged} writes");
    }
}
