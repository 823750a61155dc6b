//! A simulated world for the tasks of one thread: its time, its network and its files' delays come from one source of
//! chance, so that a run can be had again. Only with the feature `simulation`, which no release is built with.
//!
//! ```text
//!   spawn ─► task ─► ready, by number ─► one of them, drawn ─► poll
//!    sleep ─────► timers ─► none ready: the clock moves to the next one
//!    Connection ─► pipe ─► packets with a time of arrival ─► the other end
//!    FileIo ─────► a delay, then the real file, on the spot
//! ```
//!
//! What a thread does outside of a world goes through its ring as ever, also in such a build. What happens to packets,
//! connections and I/O is decided by [`Surroundings`].
//!
//! Invariants: nothing here waits for the machine; two runs with the same chance do the same; bytes of a connection
//! arrive in order or not at all.

mod connection;
mod file;
mod network;
mod pipe;
mod process;
mod world;

pub use connection::{Connection, Listener};
pub use file::FileIo;
pub use network::{ConnectionId, Network};
pub use process::ProcessId;
pub use world::{Census, Stuck, World, lot, now, sleep, spawn};

use std::io;
use std::time::Duration;

/// What becomes of an attempt to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connecting {
    /// It arrives so much later; refused if nobody listens.
    After(Duration),
    /// It is refused so much later.
    Refused(Duration),
    /// Nobody answers.
    Never,
}

/// What becomes of bytes that are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sending {
    /// They arrive so much later, or when those before them do.
    After(Duration),
    /// They vanish, and all that follows on this way, the end included. Nobody is told.
    Never,
}

/// I/O on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskWork {
    /// A read.
    Read,
    /// A write.
    Write,
    /// Zeros, by whatever means.
    Zero,
}

/// All that a world is not sure of.
pub trait Surroundings {
    /// A number below `n`.
    fn below(&self, n: u64) -> u64;
    /// Somebody connects to this address.
    fn connecting(&self, id: ConnectionId, to: &str) -> Connecting;
    /// How many of so many bytes travel together.
    fn piece(&self, len: usize) -> usize;
    /// Bytes are sent, and may be changed.
    fn sending(&self, id: ConnectionId, to_server: bool, bytes: &mut [u8]) -> Sending;
    /// Bytes are handed to their reader.
    fn received(&self, id: ConnectionId, by_client: bool, bytes: &[u8]);
    /// One side uses the connection no more: it has closed it, or it has broken there.
    fn left(&self, id: ConnectionId, client: bool);
    /// How long I/O takes, and whether it fails.
    fn disk(&self, work: DiskWork, offset_bytes: u64, len_bytes: u64) -> (Duration, io::Result<()>);
    /// Free bytes of the disk.
    fn free_bytes(&self) -> u64;
}
