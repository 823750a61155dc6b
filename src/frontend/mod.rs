//! How the guest reaches the device.
//!
//! `nbd` is the embedded default: it needs no kernel driver, and QEMU, libvirt, fio and libnbd speak it.
//! `ublk` is a block device of this host, for file systems, LVM and whatever opens /dev. `onward` offers the device to
//! the next host.

mod nbd;
mod onward;
mod ublk;

use std::io;

pub use nbd::{NbdFrontend, Presentation};
pub use onward::{Onward, Owner};
pub use ublk::{ShapeError, UblkFrontend, UblkShape, logical_bytes};

use crate::ublk::UblkError;
use crate::uring::UringError;

/// Why the frontend did not come up, or does not go down.
#[derive(Debug, thiserror::Error)]
pub enum FrontendError {
    /// No ring.
    #[error(transparent)]
    Uring(#[from] UringError),
    /// No block device.
    #[error(transparent)]
    Ublk(#[from] UblkError),
    /// Not the shape of a block device.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// No thread.
    #[error("cannot start the frontend thread: {0}")]
    Thread(#[from] io::Error),
}

/// A running frontend of either kind.
pub enum Frontend {
    /// An NBD export.
    Nbd(NbdFrontend),
    /// A block device.
    Ublk(UblkFrontend),
}

impl Frontend {
    /// From now on the guest can use the device.
    pub fn go_live(&mut self) -> Result<(), FrontendError> {
        match self {
            // Its socket was listening all the time.
            Self::Nbd(_) => Ok(()),
            Self::Ublk(ublk) => ublk.go_live(),
        }
    }

    /// Takes no more users; an error if there are some that must not be cut off. [`Frontend::stop`] must follow.
    pub fn close(&self) -> Result<(), FrontendError> {
        match self {
            Self::Nbd(_) => Ok(()),
            Self::Ublk(ublk) => ublk.close(),
        }
    }

    /// Has it come to its end without being told to?
    pub fn notice_end(&mut self) -> bool {
        match self {
            Self::Nbd(_) => false,
            Self::Ublk(ublk) => ublk.notice_end(),
        }
    }

    /// Does the device go on, its requests waiting, if this process ends?
    pub fn survives_daemon(&self) -> bool {
        match self {
            Self::Nbd(_) => false,
            Self::Ublk(ublk) => ublk.device().is_recoverable(),
        }
    }

    /// Is it one that a dead daemon left, with users that wait?
    pub fn is_taken_over(&self) -> bool {
        match self {
            Self::Nbd(_) => false,
            Self::Ublk(ublk) => ublk.device().is_recovered(),
        }
    }

    /// Finishes what is under way, if that takes no longer than a few seconds, and hangs up.
    pub fn stop(self) -> Result<(), FrontendError> {
        match self {
            Self::Nbd(nbd) => {
                nbd.stop();
                Ok(())
            }
            Self::Ublk(ublk) => ublk.stop(),
        }
    }
}
