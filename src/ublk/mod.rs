//! Block devices whose requests are answered by a process: Linux's ublk.
//!
//! ```text
//!   /dev/ublk-control ◄── control (a thread and a ring a command) ◄── Device: add, start, stop, delete
//!   /dev/ublkcN       ◄── Channel, Tag: in the ring of the queue's own thread
//!   /dev/ublkbN           what the users of the device open
//! ```
//!
//! Invariant: a tag and its memory are either with the kernel or with one task, never with both.
//!
//! This module is one of the two homes of `unsafe` (the other is `uring`): the memory that is shared with
//! the driver.
#![allow(unsafe_code)]

mod abi;
mod channel;
mod control;
mod device;
mod error;
mod mounts;
mod params;
mod process;
mod users;

pub use abi::{DeviceInfo, DeviceState, Features, Operation, Request, RequestFlags};
pub use channel::{Channel, Next, Tag};
pub use control::probe;
pub use device::{Device, MAX_DEPTH, MAX_IO_BYTES, MAX_QUEUES, Wanted, block_path, is_orphan, remove_orphan};
pub use error::UblkError;
pub use params::Params;
pub use process::{inherited, keep_descriptors, prepare_process};
