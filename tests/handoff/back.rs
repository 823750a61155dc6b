//! Out and back again: what was not written at the other host does not cross a second time.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::client::Client;
use crate::common::{Device, Export, World, assert_same, kill, make_image, noise};
use crate::image::{Loosened, can_be_written, hand_out};
use crate::{activate, control};

const SIZE: u64 = 32 << 20;

/// An image at A whose disk lives at B, complete; B is offered to the next host.
struct Out<'a> {
    b: Device<'a>,
    at_b: Client,
    uri: String,
    wanted: Vec<u8>,
}

fn go_out<'a>(world: &'a World, image: &Path) -> Out<'a> {
    make_image(image, SIZE, &[(0, SIZE)]);
    let export: Export = hand_out(world, image);
    let b = world.attach(&export.uri, &world.path("b.raw"), "b", &[]);
    let mut at_b = Client::connect(&b.uri);
    let mut wanted = noise(0xfe44, SIZE as usize);
    for block in [0u64, 77, 78, 4000, SIZE / 4096 - 1] {
        at_b.write(block * 4096, &[block as u8 | 1; 4096]);
        wanted[block as usize * 4096..][..4096].fill(block as u8 | 1);
    }
    // A part of a block.
    at_b.write(100 * 4096 + 7, &[9; 100]);
    wanted[100 * 4096 + 7..][..100].fill(9);
    at_b.flush();
    b.wait_complete();
    export.stop();
    b.set(&format!("export=unix:{}", world.path("b.onward").display()));
    let uri = b.status()["handoff"]["export"].as_str().unwrap().to_owned();
    Out { b, at_b, uri, wanted }
}

#[test]
fn only_what_was_written_comes_back() {
    let world = World::new();
    let image = world.path("a.raw");
    let _loosened = Loosened(&image);
    let Out { b, mut at_b, uri, mut wanted } = go_out(&world, &image);
    let a = world.attach(&uri, &image, "a", &["--standby"]);
    let mut at_a = Client::connect(&a.uri);
    // B still has it, and writes.
    at_b.write(5 * 4096, &[5; 4096]);
    wanted[5 * 4096..6 * 4096].fill(5);
    assert_eq!(at_a.read(5 * 4096, 4096), [5; 4096]);
    assert!(!can_be_written(&image), "standby: the image is as it was left");

    assert_eq!(activate(&a).unwrap()["epoch"], 3);
    assert!(at_b.try_write(0, &[1; 512]).is_err());
    at_a.write(6 * 4096, &[6; 4096]);
    wanted[6 * 4096..7 * 4096].fill(6);
    let status = a.wait_complete();
    let data = status["wire"]["data_bytes"].as_u64().unwrap();
    // Seven blocks were written there, one was read in standby.
    assert_eq!(data, 8 * 4096);
    assert!(!world.path("a.raw.handoff").exists());
    drop((at_a, at_b));
    a.detach();
    assert!(std::fs::read(&image).unwrap() == wanted);
    assert!(can_be_written(&image));
    assert_eq!(b.wait_for(|status| status["handoff"]["released"] == true)["state"], "away");
}

#[test]
fn killed_on_the_way_home() {
    let world = World::new();
    let image = world.path("a.raw");
    let _loosened = Loosened(&image);
    let Out { b: _b, at_b, uri, wanted } = go_out(&world, &image);
    drop(at_b);
    let a = world.attach(&uri, &image, "a", &["--standby"]);
    // Given, and not on record here.
    control(&a, &json!({ "do": "take", "wait_ms": 0 })).unwrap();
    kill(a.pid, Signal::SIGKILL);
    assert!(!can_be_written(&image));
    let a = world.attach(&uri, &image, "a", &["--standby", "--hydrate", "off"]);
    assert_eq!(a.status()["state"], "standby");
    activate(&a).unwrap();
    // On record; what it kept is in the live map.
    kill(a.pid, Signal::SIGKILL);
    // As if death had come before the record beside the image was cleared up.
    let a = world.attach(&uri, &image, "a", &[]);
    let data = a.wait_complete()["wire"]["data_bytes"].as_u64().unwrap();
    assert_eq!(data, 6 * 4096);
    a.detach();
    assert!(std::fs::read(&image).unwrap() == wanted);
}

#[test]
fn a_disk_does_not_come_home_to_a_stranger() {
    let world = World::new();
    let image = world.path("a.raw");
    let _loosened = Loosened(&image);
    let Out { b, at_b, uri, wanted } = go_out(&world, &image);
    // Another disk's image, given away to somebody else.
    let other = world.path("o.raw");
    make_image(&other, SIZE, &[(0, 4096)]);
    let _other_loosened = Loosened(&other);
    let export = hand_out(&world, &other);
    world.attach(&export.uri, &world.path("p.raw"), "p", &[]).wait_complete();
    export.stop();
    let refused = world.refused(["attach", &uri, other.to_str().unwrap(), "--name", "o", "--standby"]);
    assert!(refused.contains("no part of that"), "{refused}");
    assert_eq!(b.status()["state"], "complete", "nothing was asked of the source");

    // After a doubt about what was written there, all of it crosses, into another file.
    drop(at_b);
    let whole = world.path("whole.raw");
    let a = world.attach(&uri, &whole, "a", &[]);
    assert_eq!(a.wait_complete()["wire"]["data_bytes"].as_u64().unwrap(), SIZE);
    a.detach();
    assert!(std::fs::read(&whole).unwrap() == wanted);
    assert_same(&whole, &world.path("b.raw"));
    assert!(std::fs::metadata(&whole).unwrap().blocks() > 0);
}
