//! From an image that a machine uses to a device on another host.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::{Child, Command, Stdio};

use blkferry::nbd::NbdError;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::client::Client;
use crate::common::{assert_same, kill, tool};
use crate::rig::{Rig, abort, activate, can_be_written, contents, control, loosen, take};

const SIZE: u64 = 8 << 20;

/// A QEMU that has the image open for writing, as a machine has.
struct User(Child);

impl User {
    fn of(rig: &Rig) -> Self {
        let socket = rig.world.path("user.sock");
        let mut command = Command::new("qemu-nbd");
        command.args(["--format=raw", "--persistent", "--socket"]).arg(&socket).arg(&rig.image);
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

/// Is it kept from being written although nobody serves it? Where files cannot be made immutable (a file system or a
/// container that does not let us), at least its permissions say so.
fn is_fenced(rig: &Rig) -> bool {
    let probe = rig.world.path("probe");
    File::create(&probe).unwrap();
    if Command::new("chattr").arg("+i").arg(&probe).output().unwrap().status.success() {
        tool("chattr", ["-i".as_ref(), probe.as_os_str()]);
        return !can_be_written(&rig.image);
    }
    std::fs::metadata(&rig.image).unwrap().permissions().mode() & 0o222 == 0
}

#[test]
fn a_disk_changes_hands_while_its_machine_runs() {
    let rig = Rig::sparse(SIZE, &[(0, SIZE / 2)]);
    let user = User::of(&rig);
    let export = rig.hand_out();
    let device = rig.attach(&export.uri, "b", &["--standby"]);
    assert_eq!(device.status()["state"], "standby");

    // Standby: what the machine writes now is seen here, nothing is kept, nothing can be written.
    OpenOptions::new().write(true).open(&rig.image).unwrap().write_all_at(&[7; 4096], 4096).unwrap();
    let mut guest = Client::connect(&device.uri);
    assert_eq!(guest.read(4096, 4096), [7; 4096]);
    assert_eq!(guest.try_write(0, &[1; 512]), Err(NbdError::Perm));
    assert_eq!(device.status()["blocks"]["present"], 0);
    assert_eq!(std::fs::metadata(&rig.cache).map(|m| std::os::unix::fs::MetadataExt::blocks(&m)).unwrap(), 0);

    // The machine still has it.
    let refused = activate(&device).unwrap_err();
    assert!(refused.contains("open for writing") && !refused.contains("--handoff"), "{refused}");
    let refused = rig.world.refused(["detach", "b"]);
    assert!(refused.contains("in standby") && refused.contains("activate b"), "{refused}");
    let said = rig.world.ok(["status", "b"]);
    assert!(said.contains("in standby: the disk is still the source's"), "{said}");
    assert_eq!(device.status()["state"], "standby");
    user.leave();

    let taken = activate(&device).unwrap();
    assert_eq!(taken, json!({ "epoch": 2, "already": false, "warning": null }));
    assert_eq!(guest.try_write(0, &[1; 512]), Ok(()));
    assert!(!can_be_written(&rig.image), "the image was given away");
    assert_eq!(activate(&device).unwrap()["already"], true);
    device.wait_complete();
    // The disk as it was given, and not as it was when the device was attached.
    rig.world.ok(["verify", "b"]);
    assert!(!can_be_written(&rig.image), "it stays so");
    assert!(abort(&device).unwrap_err().contains("is active"));
    drop(guest);
    device.detach();
    drop(export);
    assert!(is_fenced(&rig), "also when nobody serves it");
    let refused = rig.world.refused(["reclaim", rig.image.to_str().unwrap()]);
    assert!(refused.contains("was given to") && refused.contains("--force"), "{refused}");

    // What came over is what was there, but for what was written here.
    let mut wanted = std::fs::read(&rig.image).unwrap();
    wanted[..512].fill(1);
    assert!(std::fs::read(&rig.cache).unwrap() == wanted);
    rig.world.ok(["reclaim", "--force", rig.image.to_str().unwrap()]);
    assert!(can_be_written(&rig.image));
}

#[test]
fn a_handoff_that_is_called_off_leaves_no_trace() {
    let rig = Rig::new(SIZE);
    let before = std::fs::metadata(&rig.image).unwrap().permissions();
    let export = rig.hand_out();
    let device = rig.attach(&export.uri, "b", &["--standby"]);
    for epoch in [2, 4, 6] {
        let taken = take(&device).unwrap();
        assert_eq!((&taken["epoch"], device.status()["state"].as_str()), (&json!(epoch), Some("standby")));
        assert!(!can_be_written(&rig.image));
        control(&device, &json!({ "do": "call-off" })).unwrap();
        assert!(can_be_written(&rig.image));
    }
    take(&device).unwrap();
    abort(&device).unwrap();
    assert!(can_be_written(&rig.image));
    assert_eq!(std::fs::metadata(&rig.image).unwrap().permissions(), before);
    assert!(!rig.cache.exists() && !rig.world.path("b.raw.ferry").exists(), "nothing is left of the device");
    assert!(rig.world.ok(["list", "--json"]).trim() == "[]");
}

#[test]
fn killed_daemons_on_either_side_find_out_how_things_stand() {
    let rig = Rig::new(SIZE);
    let mut export = rig.hand_out();
    let device = rig.attach(&export.uri, "b", &["--standby"]);
    take(&device).unwrap();

    // Both die, after the source has given the disk and before that is on record here.
    kill(device.pid, Signal::SIGKILL);
    export.child.kill().unwrap();
    export.child.wait().unwrap();
    assert!(is_fenced(&rig), "it was given away");
    let export = rig.hand_out();
    let refused = rig.refused(&export.uri, "c", &[]);
    assert!(refused.contains("was given to") && refused.contains("the host that has it"), "{refused}");
    assert!(!rig.world.path("c.raw").exists(), "nothing is left of what was refused");

    // It comes back in standby, and asks again.
    let device = rig.attach(&export.uri, "b", &["--standby"]);
    assert_eq!(device.status()["state"], "standby");
    assert_eq!(activate(&device).unwrap()["epoch"], 2);
    let mut guest = Client::connect(&device.uri);
    assert_eq!(guest.try_write(8192, &[3; 4096]), Ok(()));
    drop(guest);

    // Killed again: it is active, whoever asks.
    kill(device.pid, Signal::SIGKILL);
    let device = rig.attach(&export.uri, "b", &["--standby"]);
    assert_eq!(Client::connect(&device.uri).read(8192, 4096), [3; 4096]);
    device.wait_complete();
    device.detach();
    let mut wanted = contents(SIZE);
    wanted[8192..12288].fill(3);
    assert!(std::fs::read(&rig.cache).unwrap() == wanted);
}

#[test]
fn a_source_that_was_taken_back_by_force_is_refused() {
    let rig = Rig::new(SIZE);
    let export = rig.hand_out();
    let uri = export.uri.clone();
    let device = rig.attach(&uri, "b", &["--standby", "--hydrate", "off"]);
    activate(&device).unwrap();
    let refused = rig.world.refused(["reclaim", "--force", rig.image.to_str().unwrap()]);
    assert!(refused.contains("is being served"), "{refused}");
    device.detach_incomplete();
    export.stop();
    rig.world.ok(["reclaim", "--force", rig.image.to_str().unwrap()]);
    let _export = rig.hand_out_again(&uri);
    let refused = rig.refused(&uri, "b", &[]);
    assert!(refused.contains("taken back"), "{refused}");
}

#[test]
fn an_image_that_was_written_past_the_fence_is_not_served() {
    let rig = Rig::new(SIZE);
    let export = rig.hand_out();
    let device = rig.attach(&export.uri, "b", &[]);
    assert_eq!(device.status()["handoff"]["epoch"], 2, "without --standby it is taken at once");
    device.detach_incomplete();
    export.stop();
    let unused = format!("unix:{}", rig.world.path("unused.sock").display());
    loosen(&rig.image);
    OpenOptions::new().write(true).open(&rig.image).unwrap().write_all_at(&[9; 512], 0).unwrap();
    let refused = rig.world.refused(["export", "--handoff", rig.image.to_str().unwrap(), "--listen", &unused]);
    assert!(refused.contains("was written to since"), "{refused}");
    std::fs::write(rig.world.path("a.raw.handoff"), "{}").unwrap();
    let refused = rig.world.refused(["export", rig.image.to_str().unwrap(), "--listen", &unused]);
    assert!(refused.contains("damaged"), "{refused}");
}

#[test]
fn the_first_write_takes_the_disk_if_so_wished() {
    let rig = Rig::new(SIZE);
    let user = User::of(&rig);
    let export = rig.hand_out();
    let device = rig.attach(&export.uri, "b", &["--standby", "--activate", "on-write"]);
    let mut guest = Client::connect(&device.uri);
    assert_eq!(guest.read(0, 4096), contents(4096));
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
    assert!(!can_be_written(&rig.image));
    device.wait_complete();
}

#[test]
fn the_lock_is_held_while_the_image_is_away() {
    let rig = Rig::sparse(SIZE, &[]);
    let export = rig.hand_out();
    let device = rig.attach(&export.uri, "b", &[]);
    // Byte 201, "nobody may write": somebody has it.
    let file = File::open(&rig.image).unwrap();
    let mut lock = nix::libc::flock { l_type: 1, l_whence: 0, l_start: 201, l_len: 1, l_pid: 0 };
    nix::fcntl::fcntl(file.as_fd(), nix::fcntl::FcntlArg::F_OFD_GETLK(&mut lock)).unwrap();
    assert_ne!(i32::from(lock.l_type), nix::libc::F_UNLCK);
    device.wait_complete();
    assert_same(&rig.image, &rig.cache);
}

#[test]
fn a_source_that_gives_nothing_away() {
    let rig = Rig::new(SIZE);
    let export = rig.world.export(&rig.image);
    let refused = rig.refused(&export.uri, "b", &["--standby"]);
    assert!(refused.contains("--handoff"), "{refused}");
    assert!(!rig.cache.exists());
    drop(export);

    // A foreign server cannot be asked; whoever activates is told what to see to.
    let socket = rig.world.path("foreign.sock");
    let mut server = Command::new("qemu-nbd");
    server.args(["--format=raw", "--persistent", "--shared=8", "--read-only", "--socket"]).arg(&socket).arg(&rig.image);
    let _server = User(server.stdin(Stdio::null()).spawn().unwrap());
    crate::common::wait_for_socket(&socket);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let device = rig.attach(&uri, "b", &["--standby"]);
    OpenOptions::new().write(true).open(&rig.image).unwrap().write_all_at(&[7; 4096], 0).unwrap();
    let taken = activate(&device).unwrap();
    assert!(taken["warning"].as_str().unwrap().contains("nobody writes"), "{taken}");
    let mut guest = Client::connect(&device.uri);
    assert_eq!(guest.read(0, 4096), [7; 4096]);
    guest.write(4096, &[8; 4096]);
    device.wait_complete();
}

#[test]
fn a_device_that_was_aborted_is_never_active() {
    let rig = Rig::new(SIZE);
    let export = rig.hand_out();
    let uri = export.uri.clone();
    let device = rig.attach(&uri, "b", &["--standby"]);
    take(&device).unwrap();
    // The source cannot be told.
    export.stop();
    let said = abort(&device).unwrap_err();
    assert!(said.contains("reclaim --force"), "{said}");
    assert!(activate(&device).unwrap_err().contains("was aborted"));
    kill(device.pid, Signal::SIGKILL);
    let _export = rig.hand_out_again(&uri);
    let refused = rig.refused(&uri, "b", &[]);
    assert!(refused.contains("was aborted"), "{refused}");
    let device = rig.attach(&uri, "b", &["--standby"]);
    abort(&device).unwrap();
    assert!(can_be_written(&rig.image));
    assert!(!rig.cache.exists());
}

#[test]
fn who_looks_on_does_not_wait_for_a_step() {
    let rig = Rig::new(SIZE);
    let user = User::of(&rig);
    let export = rig.hand_out();
    let device = rig.attach(&export.uri, "b", &["--standby"]);
    let taken = std::thread::scope(|scope| {
        let taking = scope.spawn(|| control(&device, &json!({ "do": "take", "wait_ms": 8000 })));
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert_eq!(device.status()["state"], "standby");
        // Reads go on, and newcomers are served.
        assert_eq!(Client::connect(&device.uri).read(0, 4096), contents(4096));
        assert_eq!(Client::connect(&export.uri).read(4096, 512), contents(8192)[4096..4608]);
        assert!(!taking.is_finished(), "the machine still has the disk there");
        user.leave();
        taking.join().unwrap()
    });
    assert_eq!(taken.unwrap()["epoch"], 2);
}
