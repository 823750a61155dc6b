//! How the guest reaches the device.
//!
//! `nbd` is the embedded default: it needs no kernel driver, and QEMU, libvirt, fio and libnbd speak it.

mod nbd;

pub use nbd::{FrontendError, NbdFrontend, Presentation};
