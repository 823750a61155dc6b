//! No io_uring: said in one line that names the sysctl, before anything is made.
//!
//! The machine's own sysctl is left alone. A small Python program puts a seccomp filter on itself that fails
//! io_uring_setup(2), as a container's profile does, and becomes blkferry.

use std::process::Output;

use crate::common::{World, make_image, tool_output};
use crate::trace::{Tree, assert_says, one_line};

const LAUNCHER: &str = r#"
import ctypes, os, struct, sys
IO_URING_SETUP = 425  # the same on every architecture
ALLOW, ERRNO = 0x7fff0000, 0x00050000
def op(code, jt, jf, k):
    return struct.pack("HBBI", code, jt, jf, k)
program = b"".join([
    op(0x20, 0, 0, 0),                           # load the number of the system call
    op(0x15, 0, 1, IO_URING_SETUP),              # is it this one?
    op(0x06, 0, 0, ERRNO | int(sys.argv[1])),
    op(0x06, 0, 0, ALLOW),
])
buffer = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
filter = Filter(len(program) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
NO_NEW_PRIVS, SECCOMP, MODE_FILTER = 38, 22, 2
assert libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0
assert libc.prctl(SECCOMP, MODE_FILTER, ctypes.byref(filter), 0, 0) == 0, os.strerror(ctypes.get_errno())
os.environ["BLKFERRY_RUN_DIR"] = sys.argv[2]
os.execv(sys.argv[3], sys.argv[3:])
"#;

/// `blkferry ARGS` where io_uring_setup(2) fails with `errno`.
fn without_uring(world: &World, errno: i32, args: &[&str]) -> Output {
    let (errno, run_dir) = (errno.to_string(), world.run_dir());
    let mut all = vec!["-c", LAUNCHER, &errno, run_dir.to_str().unwrap(), env!("CARGO_BIN_EXE_blkferry")];
    all.extend(args);
    tool_output("python3", all)
}

fn refused_without_uring(errno: i32, words: &[&str]) {
    let world = World::new();
    make_image(&world.path("image"), 1 << 20, &[(0, 4096)]);
    let export = world.export(&world.path("image"));
    let (image, cache) = (world.path("image"), world.path("cache"));
    let listen = format!("unix:{}", world.path("socket").display());
    let before = Tree::of(&world.path(""));
    for args in [
        &["attach", &export.uri, cache.to_str().unwrap(), "--name", "disk"][..],
        &["attach", &export.uri, cache.to_str().unwrap(), "--name", "disk", "--foreground"],
        &["export", image.to_str().unwrap(), "--listen", &listen],
    ] {
        assert_says(&one_line(&without_uring(&world, errno, args)), words);
        assert_eq!(before, Tree::of(&world.path("")));
    }
    // What needs no ring works.
    let out = without_uring(&world, errno, &["list"]);
    assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "no devices", "{out:?}");
}

#[test]
fn io_uring_is_forbidden() {
    refused_without_uring(nix::libc::EPERM, &["io_uring", "forbidden", "sysctl kernel.io_uring_disabled", "seccomp"]);
}

#[test]
fn io_uring_is_not_in_this_kernel() {
    refused_without_uring(nix::libc::ENOSYS, &["no io_uring", "Linux 6.0", "CONFIG_IO_URING"]);
}

#[test]
fn no_memory_for_io_uring() {
    refused_without_uring(nix::libc::ENOMEM, &["io_uring", "ulimit -l", "ulimit -n"]);
}
