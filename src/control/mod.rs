//! Telling a daemon what to do, and asking it how it is: newline-delimited JSON on a unix socket.
//!
//! ```text
//!   client ── {"do":"status"} ──────────────► daemon
//!          ◄─ {"ok":{…}} ────────────────────
//!          ── {"do":"verify"} ──────────────►
//!          ◄─ {"progress":{…}} … {"ok":{…}} ─     or {"error":"one clear line"}
//! ```
//! Invariants: the socket is its owner's only; a request is one line of at most 64 KiB; a client that is
//! slow or silent holds one of a bounded number of threads, and for a bounded time.

mod client;
mod protocol;
mod rundir;
mod server;
mod status;

pub use client::{Client, ControlError};
pub use protocol::{Answer, Detached, Request, SETTINGS, Taken};
pub use rundir::{Claim, Entry, NameError, RunDir, RunDirError, UblkEntry, check_name};
pub use server::{ControlServer, Handler};
pub use status::{
    BlockStatus, ByteStatus, CacheStatus, FrontendStatus, HandoffStatus, HydrateStatus, SourceStatus, State, Status,
    WireStatus,
};
