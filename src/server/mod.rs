//! An NBD server on a ring. What it serves is a [`Disk`]: the export's image, or the ferried device.
//!
//! ```text
//!   listener ─► connection ─► handshake ─► reader ──request──► a task each ─► Disk
//!                                            ▲                     │
//!                                  limits ───┘                     └─reply─► writer ─► socket
//! ```
//!
//! Invariants: a request holds its share of the limits from its arrival until its reply is sent, so a
//! client that does not read its replies stops being read from; one connection's trouble ends that
//! connection only; when all places are taken, a newcomer gets the place of who has been at its handshake for longest.

mod bind;
mod connection;
mod disk;
mod hashes;
mod listener;
mod replies;
mod stats;
mod zeros;

pub use bind::listen;
pub use disk::{Disk, DiskExtent};
pub use hashes::hash_by_reading;
pub use listener::Server;
pub use stats::ServeStats;
pub use zeros::without_zeros;

use std::time::Duration;

/// Connections that one listener serves at a time.
pub const MAX_CONNECTIONS: usize = 256;
/// Connections that have ended and still have requests under way, such as reads that wait for a lost source.
const MAX_LEFTOVERS: usize = 1024;
/// Requests of one connection that may be under way.
const MAX_REQUESTS: usize = 1024;
/// Bytes that one connection may hold: payloads of writes and replies to reads that are answered at once.
const MAX_BYTES: usize = 64 << 20;
/// The same for replies to reads that wait for something else than the disk.
const MAX_WAITING_BYTES: usize = 64 << 20;
/// How long a client may take for the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);
/// Piece of the disk that one hash of the private hash command stands for.
pub const HASH_PIECE_BYTES: u32 = 4096;
