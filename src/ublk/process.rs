//! What a process has to be before it serves a block device of its own host.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::path::PathBuf;

use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::mounts;

/// `PR_SET_IO_FLUSHER` of linux/prctl.h (Linux 5.6).
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Keeps what this process has open from the programs that it starts: a daemon that inherited its own device
/// would never see it unused.
pub fn keep_descriptors() {
    // SAFETY: marks descriptors as not to be inherited; none is closed, and no memory is named. A kernel
    // without this (before 5.11) has no ublk either.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

/// A descriptor that whoever started this program left open for it, by its number. To be taken once.
pub fn inherited(number: i32) -> io::Result<File> {
    // SAFETY: only asks whether the descriptor is open.
    if number < 3 || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: it is open, none of the three standard ones, and by its being named on the command line
    // handed to us; this program opened nothing before it that could have the number.
    Ok(unsafe { File::from_raw_fd(number) })
}

/// Makes this process fit to serve, before it has other threads. Whatever is not permitted is a line of warning.
///
/// - A mount namespace of its own, cut off from others' mounts: a file system on the device must not be
///   held by the device's own daemon, whose end would then wait for itself. Nor by another daemon, or by one
///   that took over: what is mounted from ublk devices already is let go of there, but for what lies below
///   the `needed` paths.
/// - It is an I/O flusher: when memory is short, its allocations do not wait for writes to its own device.
pub fn prepare_process(needed: &[PathBuf]) -> Vec<String> {
    let mut warnings = Vec::new();
    let apart = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>));
    match apart {
        Ok(()) => mounts::let_go(needed),
        Err(e) => warnings.push(format!(
            "no mount namespace of its own ({e}): unmount what is on the device before its daemon ends, or that may hang"
        )),
    }
    // SAFETY: changes flags of the calling thread, and names no memory.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        let e = io::Error::last_os_error();
        warnings.push(format!("not an I/O flusher ({e}): a host that is short of memory may stall on this device"));
    }
    warnings
}
