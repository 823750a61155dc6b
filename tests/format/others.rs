//! Others who want the cache while it is attached: a second daemon, QEMU, anyone who honours its locks.

use std::fs::{self, File, OpenOptions};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::case::Case;
use crate::common::{tool, tool_output};

/// Is a byte of the file locked by somebody against shared locks, too?
fn is_locked(file: &File, byte: i64) -> bool {
    let mut lock = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).unwrap();
    lock.l_type != libc::F_UNLCK as libc::c_short
}

#[test]
fn nobody_else_gets_an_attached_cache() {
    let case = Case::new();
    let device = case.world.attach(&case.export.uri, &case.cache, "first", &["--hydrate", "off"]);
    // From here on it has no reason of its own to write.
    device.wait_for(|status| status["cache"]["commits"] != 0);
    let cache = case.cache.to_str().unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&case.cache).unwrap();
    for byte in 90..220 {
        let ours = (100..105).contains(&byte) || (200..205).contains(&byte);
        assert_eq!(is_locked(&file, byte), ours, "byte {byte}");
    }
    let before = fs::read(&case.cache).unwrap();
    // (`qemu-img info` of a raw image reads nothing of it and takes no lock.)
    for (tool, arguments) in [
        ("qemu-img", vec!["check", cache]),
        ("qemu-img", vec!["map", cache]),
        ("qemu-img", vec!["map", "-U", cache]),
        ("qemu-img", vec!["convert", "-f", "raw", "-O", "raw", cache, "/dev/null"]),
        ("qemu-io", vec!["-f", "raw", "-c", "write 0 4k", cache]),
        ("qemu-io", vec!["-r", "-f", "raw", "-c", "read 0 4k", cache]),
    ] {
        let out = tool_output(tool, &arguments);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains("lock"), "{tool} {arguments:?}: {said}");
    }
    case.refused("a second daemon", &["in use by another process"]);
    let link = case.world.path("link");
    fs::hard_link(&case.cache, &link).unwrap();
    let metadata = case.metadata.to_str().unwrap();
    let link = link.to_str().unwrap();
    let by_link = ["attach", &case.export.uri, link, "--name", "again", "--metadata", metadata];
    case.refused_as("a second daemon by another path", &by_link, &["in use by another process"]);
    let as_new = ["attach", &case.export.uri, link, "--name", "again"];
    case.refused_as("a second daemon without the metadata", &as_new, &[link]);
    let same_name = ["attach", &case.export.uri, "elsewhere", "--name", "first"];
    case.refused_as("a second device of that name", &same_name, &["the name first is in use"]);
    assert!(before == fs::read(&case.cache).unwrap());
    case.world.ok(["detach", "first", "--incomplete"]);
    // Nothing is held any more.
    assert!(!(90..220).any(|byte| is_locked(&file, byte)));
    drop(file);
    tool("qemu-img", ["map", "-f", "raw", cache]);
}

#[test]
fn a_cache_that_qemu_has_open_is_refused() {
    let case = Case::new();
    let cache = case.cache.to_str().unwrap();
    let socket = case.world.path("qemu.sock");
    let mut qemu = std::process::Command::new("qemu-nbd")
        .args(["-f", "raw", "--persistent", "-k", socket.to_str().unwrap(), cache])
        .spawn()
        .unwrap();
    crate::common::wait_for_socket(&socket);
    case.refused("a cache that QEMU writes to", &["in use by another process"]);
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    case.world.ok(case.arguments());
    case.world.ok(["detach", "again", "--incomplete"]);
}
