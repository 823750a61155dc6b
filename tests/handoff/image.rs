//! From an image that a machine uses to a device on another host.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use blkferry::nbd::NbdError;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::client::Client;
use crate::common::{Export, World, assert_same, kill, make_image, noise, tool};
use crate::{activate, control};

const SIZE: u64 = 8 << 20;

/// `blkferry export --handoff`
pub fn hand_out(world: &World, image: &Path) -> Export {
    let socket = world.path(&format!("h{}.sock", std::fs::read_dir(world.path("")).unwrap().count()));
    world.export_with(image, &format!("unix:{}", socket.display()), &["--handoff"])
}

/// A QEMU that has the image open for writing, as a machine has.
struct User(Child);

impl User {
    fn of(world: &World, image: &Path) -> Self {
        let socket = world.path("user.sock");
        let mut command = Command::new("qemu-nbd");
        command.args(["--format=raw", "--persistent", "--socket"]).arg(&socket).arg(image);
        let user = Self(command.stdin(Stdio::null()).spawn().expect("scripts/test installs qemu-nbd"));
        crate::common::wait_for_socket(&socket);
        user
    }

    fn leave(mut self) {
        kill(self.0.id() as i32, Signal::SIGTERM);
        self.0.wait().unwrap();
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn can_be_written(image: &Path) -> bool {
    // As QEMU does: opens it for writing, and locks it.
    let out = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512"]).arg(image).output().unwrap();
    out.status.success()
}

/// Is it kept from being written although nobody serves it? Where files cannot be made immutable (a file system or a
/// container that does not let us), at least its permissions say so.
fn is_fenced(world: &World, image: &Path) -> bool {
    let probe = world.path("probe");
    File::create(&probe).unwrap();
    if Command::new("chattr").arg("+i").arg(&probe).output().unwrap().status.success() {
        tool("chattr", ["-i".as_ref(), probe.as_os_str()]);
        return !can_be_written(image);
    }
    std::fs::metadata(image).unwrap().permissions().mode() & 0o222 == 0
}

/// Whoever tests with files that were made immutable has to take that back.
pub struct Loosened<'a>(pub &'a Path);

impl Drop for Loosened<'_> {
    fn drop(&mut self) {
        let _ = Command::new("chattr").arg("-i").arg(self.0).output();
    }
}

#[test]
fn a_disk_changes_hands_while_its_machine_runs() {
    let world = World::new();
    let (image, cache) = (world.path("a.raw"), world.path("b.raw"));
    make_image(&image, SIZE, &[(0, SIZE / 2)]);
    let _loosened = Loosened(&image);
    let user = User::of(&world, &image);
    let export = hand_out(&world, &image);
    let device = world.attach(&export.uri, &cache, "b", &["--standby"]);
    assert_eq!(device.status()["state"], "standby");

    // Standby: what the machine writes now is seen here, nothing is kept, nothing can be written.
    OpenOptions::new().write(true).open(&image).unwrap().write_all_at(&[7; 4096], 4096).unwrap();
    let mut guest = Client::connect(&device.uri);
    assert_eq!(guest.read(4096, 4096), [7; 4096]);
    assert_eq!(guest.try_write(0, &[1; 512]), Err(NbdError::Perm));
    assert_eq!(device.status()["blocks"]["present"], 0);
    assert_eq!(std::fs::metadata(&cache).map(|m| std::os::unix::fs::MetadataExt::blocks(&m)).unwrap(), 0);

    // The machine still has it.
    let refused = activate(&device).unwrap_err();
    assert!(refused.contains("open for writing"), "{refused}");
    assert_eq!(device.status()["state"], "standby");
    user.leave();

    let taken = activate(&device).unwrap();
    assert_eq!(taken, json!({ "epoch": 2, "already": false, "warning": null }));
    assert_eq!(guest.try_write(0, &[1; 512]), Ok(()));
    assert!(!can_be_written(&image), "the image was given away");
    assert_eq!(activate(&device).unwrap()["already"], true);
    device.wait_complete();
    assert!(!can_be_written(&image), "it stays so");
    assert!(control(&device, &json!({ "do": "abort" })).unwrap_err().contains("is active"));
    drop(guest);
    device.detach();
    drop(export);
    assert!(is_fenced(&world, &image), "also when nobody serves it");
    let refused = world.refused(["reclaim", image.to_str().unwrap()]);
    assert!(refused.contains("was given to") && refused.contains("--force"), "{refused}");

    // What came over is what was there, but for what was written here.
    let mut wanted = std::fs::read(&image).unwrap();
    wanted[..512].fill(1);
    assert!(std::fs::read(&cache).unwrap() == wanted);
    world.ok(["reclaim", "--force", image.to_str().unwrap()]);
    assert!(can_be_written(&image));
}

#[test]
fn a_handoff_that_is_called_off_leaves_no_trace() {
    let world = World::new();
    let (image, cache) = (world.path("a.raw"), world.path("b.raw"));
    make_image(&image, SIZE, &[(0, SIZE)]);
    let _loosened = Loosened(&image);
    let before = std::fs::metadata(&image).unwrap().permissions();
    let export = hand_out(&world, &image);
    let device = world.attach(&export.uri, &cache, "b", &["--standby"]);
    for epoch in [2, 4, 6] {
        let taken = control(&device, &json!({ "do": "take", "wait_ms": 0 })).unwrap();
        assert_eq!((&taken["epoch"], device.status()["state"].as_str()), (&json!(epoch), Some("standby")));
        assert!(!can_be_written(&image));
        control(&device, &json!({ "do": "call-off" })).unwrap();
        assert!(can_be_written(&image));
    }
    control(&device, &json!({ "do": "take", "wait_ms": 0 })).unwrap();
    control(&device, &json!({ "do": "abort" })).unwrap();
    assert!(can_be_written(&image));
    assert_eq!(std::fs::metadata(&image).unwrap().permissions(), before);
    assert!(!cache.exists() && !world.path("b.raw.ferry").exists(), "nothing is left of the device");
    assert!(world.ok(["list", "--json"]).trim() == "[]");
}

#[test]
fn killed_daemons_on_either_side_find_out_how_things_stand() {
    let world = World::new();
    let (image, cache) = (world.path("a.raw"), world.path("b.raw"));
    make_image(&image, SIZE, &[(0, SIZE)]);
    let _loosened = Loosened(&image);
    let mut export = hand_out(&world, &image);
    let device = world.attach(&export.uri, &cache, "b", &["--standby"]);
    control(&device, &json!({ "do": "take", "wait_ms": 0 })).unwrap();

    // Both die, after the source has given the disk and before that is on record here.
    kill(device.pid, Signal::SIGKILL);
    export.child.kill().unwrap();
    export.child.wait().unwrap();
    assert!(is_fenced(&world, &image), "it was given away");
    let elsewhere = world.path("c.raw");
    let export = hand_out(&world, &image);
    let refused = world.refused(["attach", &export.uri, elsewhere.to_str().unwrap(), "--name", "c"]);
    assert!(refused.contains("was given to"), "{refused}");
    assert!(!elsewhere.exists(), "nothing is left of what was refused");

    // It comes back in standby, and asks again.
    let device = world.attach(&export.uri, &cache, "b", &["--standby"]);
    assert_eq!(device.status()["state"], "standby");
    assert_eq!(activate(&device).unwrap()["epoch"], 2);
    let mut guest = Client::connect(&device.uri);
    assert_eq!(guest.try_write(8192, &[3; 4096]), Ok(()));
    drop(guest);

    // Killed again: it is active, whoever asks.
    kill(device.pid, Signal::SIGKILL);
    let device = world.attach(&export.uri, &cache, "b", &["--standby"]);
    assert_eq!(Client::connect(&device.uri).read(8192, 4096), [3; 4096]);
    device.wait_complete();
    device.detach();
    let mut wanted = noise(0xfe44, SIZE as usize);
    wanted[8192..12288].fill(3);
    assert!(std::fs::read(&cache).unwrap() == wanted);
}

#[test]
fn a_source_that_was_taken_back_by_force_is_refused() {
    let world = World::new();
    let (image, cache) = (world.path("a.raw"), world.path("b.raw"));
    make_image(&image, SIZE, &[(0, SIZE)]);
    let _loosened = Loosened(&image);
    let export = hand_out(&world, &image);
    let uri = export.uri.clone();
    let device = world.attach(&uri, &cache, "b", &["--standby", "--hydrate", "off"]);
    activate(&device).unwrap();
    let refused = world.refused(["reclaim", "--force", image.to_str().unwrap()]);
    assert!(refused.contains("is being served"), "{refused}");
    device.detach_incomplete();
    export.stop();
    world.ok(["reclaim", "--force", image.to_str().unwrap()]);
    let listen = uri.split_once("socket=").unwrap().1.to_owned();
    let export = world.export_with(&image, &format!("unix:{listen}"), &["--handoff"]);
    assert_eq!(export.uri, uri);
    let refused = world.refused(["attach", &uri, cache.to_str().unwrap(), "--name", "b"]);
    assert!(refused.contains("taken back"), "{refused}");
}

#[test]
fn an_image_that_was_written_past_the_fence_is_not_served() {
    let world = World::new();
    let (image, cache) = (world.path("a.raw"), world.path("b.raw"));
    make_image(&image, SIZE, &[(0, SIZE)]);
    let _loosened = Loosened(&image);
    let export = hand_out(&world, &image);
    let device = world.attach(&export.uri, &cache, "b", &[]);
    assert_eq!(device.status()["handoff"]["epoch"], 2, "without --standby it is taken at once");
    device.detach_incomplete();
    export.stop();
    // As somebody who means it.
    let _ = Command::new("chattr").arg("-i").arg(&image).output().unwrap();
    OpenOptions::new().write(true).open(&image).unwrap().write_all_at(&[9; 512], 0).unwrap();
    let refused = world.refused(["export", "--handoff", image.to_str().unwrap(), "--listen", "unix:/tmp/unused.sock"]);
    assert!(refused.contains("was written to since"), "{refused}");
    std::fs::write(world.path("a.raw.handoff"), "{}").unwrap();
    let refused = world.refused(["export", image.to_str().unwrap(), "--listen", "unix:/tmp/unused.sock"]);
    assert!(refused.contains("damaged"), "{refused}");
}

#[test]
fn the_first_write_takes_the_disk_if_so_wished() {
    let world = World::new();
    let (image, cache) = (world.path("a.raw"), world.path("b.raw"));
    make_image(&image, SIZE, &[(0, SIZE)]);
    let _loosened = Loosened(&image);
    let user = User::of(&world, &image);
    let export = hand_out(&world, &image);
    let device = world.attach(&export.uri, &cache, "b", &["--standby", "--activate", "on-write"]);
    let mut guest = Client::connect(&device.uri);
    assert_eq!(guest.read(0, 4096), noise(0xfe44, 4096));
    assert_eq!(device.status()["state"], "standby", "a read changes nothing");
    let writing = std::thread::scope(|scope| {
        let write = scope.spawn(|| guest.try_write(0, &[5; 4096]));
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!write.is_finished(), "the machine still has the disk there");
        user.leave();
        write.join().unwrap()
    });
    assert_eq!(writing, Ok(()));
    assert_eq!(device.status()["handoff"]["epoch"], 2);
    assert!(!can_be_written(&image));
    device.wait_complete();
}

#[test]
fn the_lock_is_held_while_the_image_is_away() {
    let world = World::new();
    let image = world.path("a.raw");
    make_image(&image, SIZE, &[]);
    let _loosened = Loosened(&image);
    let export = hand_out(&world, &image);
    let device = world.attach(&export.uri, &world.path("b.raw"), "b", &[]);
    // Byte 201, "nobody may write": somebody has it.
    let file = File::open(&image).unwrap();
    let mut lock = nix::libc::flock { l_type: 1, l_whence: 0, l_start: 201, l_len: 1, l_pid: 0 };
    nix::fcntl::fcntl(file.as_fd(), nix::fcntl::FcntlArg::F_OFD_GETLK(&mut lock)).unwrap();
    assert_ne!(i32::from(lock.l_type), nix::libc::F_UNLCK);
    device.wait_complete();
    assert_same(&image, &world.path("b.raw"));
}

#[test]
fn a_source_that_gives_nothing_away() {
    let world = World::new();
    let (image, cache) = (world.path("a.raw"), world.path("b.raw"));
    make_image(&image, SIZE, &[(0, SIZE)]);
    let export = world.export(&image);
    let cache_name = cache.to_str().unwrap();
    let refused = world.refused(["attach", &export.uri, cache_name, "--name", "b", "--standby"]);
    assert!(refused.contains("--handoff"), "{refused}");
    assert!(!cache.exists());
    drop(export);

    // A foreign server cannot be asked; whoever activates is told what to see to.
    let socket = world.path("foreign.sock");
    let mut server = Command::new("qemu-nbd");
    server.args(["--format=raw", "--persistent", "--shared=8", "--read-only", "--socket"]).arg(&socket).arg(&image);
    let _server = User(server.stdin(Stdio::null()).spawn().unwrap());
    crate::common::wait_for_socket(&socket);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let device = world.attach(&uri, &cache, "b", &["--standby"]);
    OpenOptions::new().write(true).open(&image).unwrap().write_all_at(&[7; 4096], 0).unwrap();
    let taken = activate(&device).unwrap();
    assert!(taken["warning"].as_str().unwrap().contains("nobody writes"), "{taken}");
    let mut guest = Client::connect(&device.uri);
    assert_eq!(guest.read(0, 4096), [7; 4096]);
    guest.write(4096, &[8; 4096]);
    device.wait_complete();
}

#[test]
fn a_device_that_was_aborted_is_never_active() {
    let world = World::new();
    let (image, cache) = (world.path("a.raw"), world.path("b.raw"));
    make_image(&image, SIZE, &[(0, SIZE)]);
    let _loosened = Loosened(&image);
    let export = hand_out(&world, &image);
    let uri = export.uri.clone();
    let device = world.attach(&uri, &cache, "b", &["--standby"]);
    control(&device, &json!({ "do": "take", "wait_ms": 0 })).unwrap();
    // The source cannot be told.
    export.stop();
    let said = control(&device, &json!({ "do": "abort" })).unwrap_err();
    assert!(said.contains("reclaim --force"), "{said}");
    assert!(activate(&device).unwrap_err().contains("was aborted"));
    kill(device.pid, Signal::SIGKILL);
    let socket = uri.split_once("socket=").unwrap().1.to_owned();
    let _export = world.export_with(&image, &format!("unix:{socket}"), &["--handoff"]);
    let refused = world.refused(["attach", &uri, cache.to_str().unwrap(), "--name", "b"]);
    assert!(refused.contains("was aborted"), "{refused}");
    let device = world.attach(&uri, &cache, "b", &["--standby"]);
    control(&device, &json!({ "do": "abort" })).unwrap();
    assert!(can_be_written(&image));
    assert!(!cache.exists());
}

#[test]
fn who_looks_on_does_not_wait_for_a_step() {
    let world = World::new();
    let image = world.path("a.raw");
    make_image(&image, SIZE, &[(0, SIZE)]);
    let _loosened = Loosened(&image);
    let user = User::of(&world, &image);
    let export = hand_out(&world, &image);
    let device = world.attach(&export.uri, &world.path("b.raw"), "b", &["--standby"]);
    let taken = std::thread::scope(|scope| {
        let taking = scope.spawn(|| control(&device, &json!({ "do": "take", "wait_ms": 8000 })));
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert_eq!(device.status()["state"], "standby");
        // Reads go on, and newcomers are served.
        assert_eq!(Client::connect(&device.uri).read(0, 4096), noise(0xfe44, 4096));
        assert_eq!(Client::connect(&export.uri).read(4096, 512), noise(0xfe44, 8192)[4096..4608]);
        assert!(!taking.is_finished(), "the machine still has the disk there");
        user.leave();
        taking.join().unwrap()
    });
    assert_eq!(taken.unwrap()["epoch"], 2);
}
