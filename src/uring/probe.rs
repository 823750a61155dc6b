//! Is there an io_uring, and if not, why.

use std::io;

use io_uring::IoUring;

/// Why this process cannot have a ring.
#[derive(Debug, thiserror::Error)]
pub enum UringError {
    /// The kernel has it and forbids it.
    #[error(
        "io_uring is forbidden here ({cause}): sysctl kernel.io_uring_disabled is {sysctl}; set it to 0 \
         (`sysctl kernel.io_uring_disabled=0`), or allow io_uring_setup in this container's seccomp profile"
    )]
    Forbidden {
        /// What io_uring_setup(2) said.
        cause: io::Error,
        /// The value of /proc/sys/kernel/io_uring_disabled, or why it cannot be read.
        sysctl: String,
    },
    /// The kernel does not know the system call.
    #[error("this kernel has no io_uring ({0}): blkferry needs Linux 6.0 or later built with CONFIG_IO_URING")]
    Missing(io::Error),
    /// Memory, descriptors or locked pages ran out.
    #[error("cannot set up an io_uring ({0}): check `ulimit -l` (locked memory) and `ulimit -n` (open files)")]
    Exhausted(io::Error),
}

pub(super) fn uring_error(cause: io::Error) -> UringError {
    match cause.raw_os_error() {
        Some(nix::libc::EPERM | nix::libc::EACCES) => {
            let sysctl = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
                .map_or_else(|e| format!("unreadable ({e})"), |text| text.trim().to_owned());
            UringError::Forbidden { cause, sysctl }
        }
        Some(nix::libc::ENOSYS) => UringError::Missing(cause),
        _ => UringError::Exhausted(cause),
    }
}

/// Checks once, before anything is created, that this process may use io_uring.
pub fn require_io_uring() -> Result<(), UringError> {
    IoUring::new(2).map(drop).map_err(uring_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_says_what_to_do() {
        let forbidden = uring_error(io::Error::from_raw_os_error(nix::libc::EPERM)).to_string();
        assert!(forbidden.contains("kernel.io_uring_disabled"), "{forbidden}");
        let missing = uring_error(io::Error::from_raw_os_error(nix::libc::ENOSYS)).to_string();
        assert!(missing.contains("Linux 6.0"), "{missing}");
    }
}
