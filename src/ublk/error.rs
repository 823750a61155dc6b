//! What can be wrong with ublk, and what to do about it.

use std::io;
use std::path::PathBuf;

use crate::uring::UringError;

/// Why a ublk device cannot be had, or cannot be got rid of.
#[derive(Debug, thiserror::Error)]
pub enum UblkError {
    /// The kernel has no driver, or it is not loaded.
    #[error(
        "this kernel has no ublk driver, or it is not loaded: try `modprobe ublk_drv` (Debian has the module in its \
         kernels from 6.12 on, others where CONFIG_BLK_DEV_UBLK is set); --frontend nbd works without it"
    )]
    NoDriver,
    /// Not for us.
    #[error("ublk devices are made by root only (CAP_SYS_ADMIN); --frontend nbd works for everybody")]
    Denied,
    /// The driver knows other commands.
    #[error("the ublk driver of this kernel is too old: blkferry needs Linux 6.4 for it; --frontend nbd works")]
    TooOld,
    /// A device node.
    #[error("{path}: {source}")]
    Open {
        /// The node.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No such node: udev or devtmpfs should have made it.
    #[error("{0} did not appear although the device was made: is /dev a devtmpfs here?")]
    NoNode(PathBuf),
    /// The driver said no.
    #[error("the ublk driver refused {command}: {source}")]
    Command {
        /// The command, as the kernel names it.
        command: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// The driver says nothing.
    #[error(
        "the ublk driver has not answered {command} within {seconds} s; some kernels are known to hang there (see \
         `dmesg`). The process may stay until the next boot; --frontend nbd works without the driver"
    )]
    Hangs {
        /// The command, as the kernel names it.
        command: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
    /// Another device has the id.
    #[error("ublk device {0} exists already (/dev/ublkb{0}); choose another with --ublk-id, or leave it out")]
    Taken(u32),
    /// There is no such device.
    #[error("ublk device {0} does not exist any more: attach the cache again")]
    Gone(u32),
    /// The id belongs to something else by now.
    #[error("ublk device {0} is not the one that was attached under this name; it is left alone")]
    Foreign(u32),
    /// Its daemon is alive, or it never went live.
    #[error("ublk device {id} does not wait for a daemon (it is {state}): there is nothing to recover")]
    NotQuiesced {
        /// The device.
        id: u32,
        /// How it is.
        state: String,
    },
    /// A queue did not come up.
    #[error("queue {queue} of the ublk device cannot be served: {source}")]
    Queue {
        /// Which.
        queue: u16,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody has it open.
    #[error("/dev/ublkb{id} is in use ({by}): unmount or close it first; the device goes on")]
    Busy {
        /// The device.
        id: u32,
        /// By whom.
        by: String,
    },
    /// No ring.
    #[error(transparent)]
    Uring(#[from] UringError),
    /// No thread.
    #[error("cannot start a thread for ublk: {0}")]
    Thread(#[source] io::Error),
}

impl UblkError {
    /// The error number, if the driver gave one.
    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            Self::Command { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
