//! The io_uring reactor: one ring a thread, and everything that waits waits in it.
//!
//! ```text
//!   task ──submit──► slab of operations ──SQE──► kernel
//!    ▲                    │ owns fd and buffers until the CQE
//!    └──────wake──────────┘◄──CQE──
//! ```
//!
//! Invariant: the memory and the descriptor that an operation names belong to its slab entry from
//! submission to completion. A future that is dropped leaves its entry behind (and asks the kernel
//! to cancel), so the kernel never writes into memory that somebody else got. A reactor that goes
//! away cancels and waits for all that is still in flight.
//!
//! This module is one of the two homes of `unsafe` (the other is the ublk adapter): rings, the shared mapping of the live
//! maps, and what the kernel says of a file's pages.
#![allow(unsafe_code)]

mod budget;
mod buffer;
mod cached;
mod clock;
mod command;
mod file;
mod idle;
mod mailbox;
mod net;
mod now;
mod page_flags;
mod peer;
mod probe;
mod reactor;
mod residency;
mod shared;
#[cfg(feature = "simulation")]
pub mod simulation;
mod stream;

pub use budget::{Budget, Lent};
pub use buffer::Buffer;
pub use clock::{lot, now};
pub use command::{CommandRing, command};
pub use file::{FileExtent, PAGE_BYTES, ZeroMode};
pub use mailbox::Mailbox;
pub use net::{BindError, Part, bind_private};
pub use peer::{connect_to_living, is_dying};
pub use probe::{UringError, require_io_uring};
pub use reactor::{Reactor, Task};
pub use residency::Residency;
pub use shared::SharedWords;
pub use stream::BufferedReader;

#[cfg(not(feature = "simulation"))]
pub use {
    file::FileIo,
    net::{Connection, Listener},
    reactor::{sleep, spawn},
};
// The same, by the kernel or by a simulated world, whichever a thread is in.
#[cfg(feature = "simulation")]
pub use simulation::{Connection, FileIo, Listener, sleep, spawn};
