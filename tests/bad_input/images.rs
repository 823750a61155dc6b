//! Images that cannot be served, and addresses that cannot be had.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::client::Client;
use crate::common::{World, make_image};
use crate::trace::{misused, refused};

fn export_refused(world: &World, image: &str, words: &[&str]) {
    let (image, listen) = (world.path(image), format!("unix:{}", world.path("socket").display()));
    let line = refused(world, ["export", image.to_str().unwrap(), "--listen", &listen], words);
    assert!(line.contains(image.to_str().unwrap()), "the image is named: {line}");
}

#[test]
fn an_image_that_is_no_disk() {
    let world = World::new();
    export_refused(&world, "nowhere", &["No such file", "right path"]);
    std::fs::create_dir(world.path("directory")).unwrap();
    export_refused(&world, "directory", &["neither a regular file nor a block device"]);
    std::fs::write(world.path("empty"), []).unwrap();
    export_refused(&world, "empty", &["empty"]);
    for size in [1, 511, 513, 1_000_000_001] {
        let name = format!("odd-{size}");
        File::create(world.path(&name)).unwrap().set_len(size).unwrap();
        export_refused(&world, &name, &["not a multiple of 512", &size.to_string(), "truncate -s %512"]);
    }
    refused(&world, ["export", "/dev/null"], &["/dev/null", "neither a regular file nor a block device"]);
}

#[test]
fn an_image_that_is_another_format() {
    let world = World::new();
    let image = world.path("image.qcow2");
    let words = ["qcow2", "qemu-nbd", "qemu-img convert -O raw", "--raw"];
    // The size of a qcow2 image is a multiple of nothing.
    for len in [700, 1024] {
        std::fs::write(&image, &[&b"QFI\xfb\x00\x00\x00\x03"[..], &[0; 1024]].concat()[..len]).unwrap();
        export_refused(&world, "image.qcow2", &words);
    }
    let export = world.export_with(&image, &format!("unix:{}", world.path("raw").display()), &["--raw"]);
    assert_eq!(Client::connect(&export.uri).read(0, 4), b"QFI\xfb");
}

/// Locks a byte of a file as QEMU does.
fn lock(file: &File, kind: i32, byte: i64) {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).unwrap();
}

#[test]
fn an_image_that_a_machine_writes_to() {
    let world = World::new();
    let image = world.path("image");
    make_image(&image, 1 << 20, &[(0, 4096)]);
    // A running QEMU: "somebody writes" (shared), and "nobody else may" (shared, too).
    let qemu = File::options().read(true).write(true).open(&image).unwrap();
    lock(&qemu, libc::F_RDLCK, 101);
    lock(&qemu, libc::F_RDLCK, 201);
    export_refused(&world, "image", &["open for writing", "QEMU", "--handoff"]);
    let socket = format!("unix:{}", world.path("in-use").display());
    let mut export = world.command(["export", image.to_str().unwrap(), "--in-use", "--listen", &socket]);
    let mut child = export.stdout(std::process::Stdio::null()).spawn().unwrap();
    crate::common::wait_for_socket(&world.path("in-use"));
    crate::common::kill(child.id() as i32, nix::sys::signal::Signal::SIGINT);
    assert!(child.wait().unwrap().success());
    drop(qemu);
    drop(world.export(&image));
}

#[test]
fn an_address_that_cannot_be_had() {
    let world = World::new();
    let image = world.path("image");
    make_image(&image, 1 << 20, &[(0, 4096)]);
    let image = image.to_str().unwrap();
    let listen_refused = |listen: &str, words: &[&str]| {
        refused(&world, ["export", image, "--listen", listen], words);
    };
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = tcp.local_addr().unwrap().to_string();
    listen_refused(&taken, &[&taken, "in use", "another port"]);
    listen_refused("192.0.2.1:10809", &["192.0.2.1:10809", "assign"]);
    let _unix = UnixListener::bind(world.path("taken")).unwrap();
    listen_refused(&format!("unix:{}", world.path("taken").display()), &["taken", "another path"]);
    std::fs::write(world.path("file"), "precious").unwrap();
    listen_refused(&format!("unix:{}", world.path("file").display()), &["not a socket", "remove it"]);
    listen_refused(&format!("unix:{}", world.path("no/where").display()), &["No such file"]);
    let long = world.path(&"x".repeat(100));
    misused(&world, ["export", image, "--listen", &format!("unix:{}", long.display())], &["107 bytes"]);
    misused(&world, ["export", image, "--listen", "somewhere"], &["HOST:PORT", "unix:PATH"]);
    // One of two is bad: the good one is given back.
    let good = format!("unix:{}", world.path("good").display());
    refused(&world, ["export", image, "--listen", &good, "--listen", &taken], &[&taken]);
    assert!(!world.path("good").exists());
}
