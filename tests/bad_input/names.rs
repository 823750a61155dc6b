//! Names and sockets that cannot be had, devices that are not there, settings that mean nothing.

use std::fs::{File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::unistd::geteuid;
use serde_json::Value;

use crate::client::Client;
use crate::common::{BLKFERRY, Export, World, make_image};
use crate::trace::{Tree, assert_says, misused, one_line, refused};

fn with_source() -> (World, Export) {
    let world = World::new();
    make_image(&world.path("image"), 1 << 20, &[(0, 1 << 20)]);
    let export = world.export(&world.path("image"));
    (world, export)
}

/// Attaches a new cache in a way that cannot be.
fn attach_refused(world: &World, export: &Export, more: &[&str], words: &[&str]) {
    let cache = world.path("new-cache");
    let mut args = vec!["attach", &export.uri, cache.to_str().unwrap()];
    args.extend(more);
    refused(world, args, words);
}

#[test]
fn a_name_that_is_in_use() {
    let (world, export) = with_source();
    let device = world.attach(&export.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    attach_refused(&world, &export, &["--name", "disk"], &["disk", "in use by a running device", "--name"]);
    let mut client = Client::connect(&device.uri);
    client.write(0, &[9; 4096]);
    client.flush();
    assert_eq!(device.status()["state"], "active");
    // Also if it would have another socket.
    let socket = world.path("other.sock");
    let args = ["--name", "disk", "--socket", socket.to_str().unwrap()];
    attach_refused(&world, &export, &args, &["in use by a running device"]);
    assert_eq!(client.read(0, 4096), [9; 4096]);
    world.ok(["detach", "disk", "--incomplete"]);
}

#[test]
fn a_name_that_is_none() {
    let (world, export) = with_source();
    let cache = world.path("new-cache");
    for name in ["", "a/b", "../up", ".hidden", "-dash", "with space", "ümlaut", &"x".repeat(49)] {
        let name = format!("--name={name}");
        let args = ["attach", &export.uri, cache.to_str().unwrap(), &name];
        misused(&world, args, &["no name for a device", "1 to 48"]);
    }
    misused(&world, ["attach", &export.uri, cache.to_str().unwrap(), "--name=new\nline"], &["invalid value"]);
}

#[test]
fn a_socket_that_cannot_be_had() {
    let (world, export) = with_source();
    let socket_refused = |socket: &Path, words: &[&str]| {
        attach_refused(&world, &export, &["--name", "disk", "--socket", socket.to_str().unwrap()], words);
    };
    let long = world.path(&"x".repeat(108));
    socket_refused(&long, &["too long", "107", "shorter"]);
    let _listener = UnixListener::bind(world.path("taken")).unwrap();
    socket_refused(&world.path("taken"), &["taken", "another path"]);
    std::fs::write(world.path("file"), "precious").unwrap();
    socket_refused(&world.path("file"), &["not a socket"]);
    socket_refused(&world.path("no/where"), &["No such file", "directory has to be there"]);
    // One that a dead process left is nobody's.
    drop(UnixListener::bind(world.path("left")).unwrap());
    let left = world.path("left");
    let more = ["--hydrate", "off", "--socket", left.to_str().unwrap()];
    let device = world.attach(&export.uri, &world.path("cache"), "disk", &more);
    Client::connect(&device.uri).read(0, 4096);
    world.ok(["detach", "disk", "--incomplete"]);
    assert!(!left.exists());
}

#[test]
fn a_shape_that_the_frontend_does_not_have() {
    let (world, export) = with_source();
    for shape in ["--queues=2", "--depth=8", "--ublk-id=5", "--logical-block-size=4096"] {
        let name = shape.split_once('=').unwrap().0;
        attach_refused(&world, &export, &[shape, "--frontend", "nbd"], &[name, "block device", "--frontend nbd"]);
        attach_refused(&world, &export, &[shape, "--socket", "s"], &[name, "block device", "--socket"]);
    }
    attach_refused(&world, &export, &["--frontend", "ublk", "--socket", "s"], &["--socket", "NBD", "--frontend nbd"]);
}

#[test]
fn a_run_directory_that_cannot_be_used() {
    let (world, export) = with_source();
    let cache = world.path("cache");
    let attach = |dir: &Path| {
        let before = Tree::of(&world.path(""));
        let args = ["attach", &export.uri, cache.to_str().unwrap(), "--name", "disk"];
        let out = world.command(args).env("BLKFERRY_RUN_DIR", dir).output().unwrap();
        assert_eq!(before, Tree::of(&world.path("")));
        one_line(&out)
    };
    std::fs::write(world.path("file"), "").unwrap();
    assert_says(&attach(&world.path("file/run")), &["run directory", "file/run", "BLKFERRY_RUN_DIR"]);
    assert_says(&attach(Path::new("/proc/run")), &["run directory", "/proc/run", "BLKFERRY_RUN_DIR"]);
}

/// Who only asks makes none.
#[test]
fn a_run_directory_that_is_not_there() {
    let world = World::new();
    let missing = world.path("no/run");
    let asks = [&["list"][..], &["status", "disk"], &["set", "disk", "hydrate=off"], &["detach", "disk", "--force"]];
    for args in asks {
        let out = world.command(args).env("BLKFERRY_RUN_DIR", &missing).output().unwrap();
        assert_says(&one_line(&out), &["run directory", "no/run", "No such file", "BLKFERRY_RUN_DIR"]);
        assert!(!world.path("no").exists());
    }
}

#[test]
fn a_run_directory_of_another_user() {
    // Whoever is not root has nobody else to be.
    if !geteuid().is_root() {
        return;
    }
    let (world, export) = with_source();
    let device = world.attach(&export.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    let program = world.path("blkferry");
    std::fs::copy(BLKFERRY, &program).unwrap();
    std::fs::set_permissions(world.path(""), Permissions::from_mode(0o711)).unwrap();
    std::fs::set_permissions(world.run_dir(), Permissions::from_mode(0o700)).unwrap();
    let as_nobody = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.args(args).env("BLKFERRY_RUN_DIR", world.run_dir()).env("BLKFERRY_FRONTEND", "nbd").uid(65534);
        one_line(&command.output().unwrap())
    };
    let run_dir = world.run_dir();
    let run_dir = run_dir.to_str().unwrap();
    assert_says(&as_nobody(&["status", "disk"]), &["permission denied", run_dir, "the user that runs it"]);
    assert_says(&as_nobody(&["list"]), &["Permission denied", run_dir]);
    let cache = world.path("new-cache");
    let args = ["attach", &export.uri, cache.to_str().unwrap(), "--name", "other"];
    assert_says(&as_nobody(&args), &["cannot claim the name other", run_dir, "BLKFERRY_RUN_DIR"]);
    device.detach_incomplete();
}

#[test]
fn a_run_directory_whose_path_is_too_long_for_sockets() {
    let (world, export) = with_source();
    let long = world.path(&"x".repeat(100));
    std::fs::create_dir(&long).unwrap();
    let cache = world.path("cache");
    let args = ["attach", &export.uri, cache.to_str().unwrap(), "--name", "disk"];
    let line = one_line(&world.command(args).env("BLKFERRY_RUN_DIR", &long).output().unwrap());
    assert_says(&line, &["socket path", "too long", "107"]);
    assert!(!cache.exists());
    assert_eq!(std::fs::read_dir(&long).unwrap().count(), 0);
}

#[test]
fn a_device_that_is_not_there() {
    let (world, _export) = with_source();
    for args in [&["status", "ghost"][..], &["detach", "ghost"], &["verify", "ghost"], &["set", "ghost", "hydrate=off"]]
    {
        refused(&world, args, &["no device named ghost", "blkferry list"]);
    }
    refused(&world, ["status", "../../etc/passwd"], &["../../etc/passwd"]);
}

#[test]
fn a_device_that_never_was_cannot_be_forgotten() {
    let (world, _export) = with_source();
    refused(&world, ["detach", "ghost", "--force"], &["no device named ghost"]);
}

#[test]
fn a_setting_that_means_nothing() {
    let (world, export) = with_source();
    let device = world.attach(&export.uri, &world.path("cache"), "disk", &["--hydrate", "50M"]);
    let cases: [(&str, &[&str]); 6] = [
        ("hydrate", &["KEY=VALUE"]),
        ("hydrate=fast", &["fast", "auto", "50M"]),
        ("hydrate=-1", &["-1", "auto"]),
        ("on-source-loss=panic", &["panic", "wait"]),
        ("colour=red", &["colour", "hydrate="]),
        ("=", &["hydrate="]),
    ];
    for (setting, words) in cases {
        // Nothing is changed if one of several cannot be.
        let out = world.blkferry(["set", "disk", "hydrate=off", setting]);
        assert_eq!(out.status.code(), Some(2), "{out:?}");
        assert_says(String::from_utf8_lossy(&out.stderr).lines().next().unwrap(), words);
    }
    assert_eq!(device.status()["hydrate"]["mode"], "50M");
    device.wait_complete();
    device.detach();
}

#[test]
fn a_device_that_is_not_complete_is_not_let_go() {
    let (world, export) = with_source();
    let device = world.attach(&export.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    let mut client = Client::connect(&device.uri);
    client.read(0, 8192);
    let line = one_line(&world.blkferry(["detach", "disk"]));
    assert_says(&line, &["not complete", "1016.00 KiB", "--incomplete"]);
    client.write(4096, &[9; 100]);
    assert_eq!(device.status()["state"], "active");
    world.ok(["detach", "disk", "--incomplete"]);
}

/// Its entry says where its cache is: an attach that fails must not take that away.
#[test]
fn a_dead_device_stays_listed_when_it_cannot_be_attached_again() {
    let (world, export) = with_source();
    let cache = world.path("cache");
    let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "off"]);
    Client::connect(&device.uri).write(0, &[9; 4096]);
    device.kill_daemon();
    let listed = || serde_json::from_str::<Value>(&world.ok(["list", "--json"])).unwrap();
    assert_eq!(listed()[0]["state"], "dead");
    let nowhere = format!("nbd+unix:///?socket={}", world.path("nowhere").display());
    one_line(&world.blkferry(["attach", &nowhere, cache.to_str().unwrap(), "--name", "disk"]));
    assert_eq!(listed()[0]["state"], "dead", "{}", listed());
    let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "off"]);
    assert_eq!(Client::connect(&device.uri).read(0, 4096), [9; 4096]);
    world.ok(["detach", "disk", "--incomplete"]);
}

/// Standard output on a full disk, as with `blkferry list > file`.
#[test]
fn an_output_that_cannot_be_written() {
    let (world, export) = with_source();
    let device = world.attach(&export.uri, &world.path("cache"), "disk", &[]);
    device.wait_complete();
    let listen = format!("unix:{}", world.path("socket").display());
    let image = world.path("image");
    for args in [
        &["list"][..],
        &["list", "--json"],
        &["status", "disk"],
        &["status", "disk", "--json"],
        &["set", "disk", "hydrate=off"],
        &["verify", "disk"],
        &["export", image.to_str().unwrap(), "--listen", &listen],
        &["detach", "disk"],
    ] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let out = world.command(args).stdout(full).output().unwrap();
        assert_says(&one_line(&out), &["No space left on device"]);
    }
}

fn say(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    // It may hang up before it has taken all.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut said = String::new();
    let _ = stream.read_to_string(&mut said);
    said
}

#[test]
fn garbage_on_the_control_socket() {
    let (world, export) = with_source();
    let device = world.attach(&export.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    let control = world.run_dir().join("disk.ctl");
    for garbage in [&b"hello\n"[..], b"{}\n", b"{\"do\":\"explode\"}\n", b"\xff\xfe\n"] {
        let said = say(&control, garbage);
        assert!(said.is_empty() || said.contains("error"), "{said}");
    }
    assert!(say(&control, &vec![b'x'; 1 << 20]).contains("64 KiB"));
    say(&control, b"");
    say(&control, b"{\"do\":");
    // More clients than it serves at a time, which say nothing.
    let idle: Vec<UnixStream> = (0..64).map(|_| UnixStream::connect(&control).unwrap()).collect();
    drop(idle);
    device.wait_for(|status| status["state"] == "active");
    world.ok(["detach", "disk", "--incomplete"]);
    assert!(!control.exists());
    File::open(world.path("cache")).unwrap();
}
