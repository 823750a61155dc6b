//! The NBD protocol as types and codecs, for both ends: the export and the frontend are servers, the fetch layer is
//! a client. No sockets, no threads, no clock: bytes in, bytes out.
//!
//! ```text
//!            client                                              server
//!  handshake   │ ◄──────────────── greeting ─────────────────────── │   ServerHandshake
//!              │ ─── flags, option, option … ─────────────────────► │     needs() / feed() ─► ServerStep
//!              │ ◄────────────── option replies ─────────────────── │   ClientHandshake
//!              │ ─── GO ──────────────────────────────────────────► │     needs() / feed() ─► ClientStep
//!              │ ◄────────────── export info, ACK ───────────────── │
//!  transmission│ ─── Request (28 bytes) [data] ───────────────────► │   Request::{encode, decode, validate}
//!              │ ◄── ReplyHeader (16 or 20 bytes) [payload] ─────── │   ReplyHeader, chunk::*
//!              │ ─── DISC ────────────────────────────────────────► │
//! ```
//! Written from doc/proto.md and doc/uri.md of github.com/NetworkBlockDevice/nbd ("the spec"): fixed newstyle
//! negotiation with GO, INFO, LIST and the older EXPORT_NAME; structured replies; `base:allocation`; block sizes. Ours, as
//! docs/FORMAT.md has them: the context `blkferry:hot`; an option by which two blkferry ends recognise each other (an
//! unknown option harms nobody: the answer is `NBD_REP_ERR_UNSUP`), and between these the commands for hashes, for handing
//! the disk over and for what was written since. Not yet: STARTTLS, extended headers; their seams are named in `server` and `client`.
//!
//! Invariants:
//! - All numbers are big-endian.
//! - No input makes a codec panic, or allocate more than it was given.
//! - A [`ProtocolError`] ends the connection; an [`NbdError`] ends one request.

pub mod chunk;
mod client;
mod consts;
mod errno;
mod error;
mod export_info;
mod handoff;
mod option;
pub mod option_data;
mod reply;
mod request;
mod server;
pub mod uri;
mod wire;

pub use chunk::{BlockStatus, ChunkKind, ErrorChunk, Extent, FerryHashes, Hole};
pub use client::{ClientHandshake, ClientSession, ClientStep, Wants};
pub use consts::*;
pub use errno::NbdError;
pub use error::ProtocolError;
pub use export_info::{BlockSizes, ExportInfo};
pub use handoff::{Ask, Base, HANDOFF_VERSION, MAX_HANDOFF_LEN, Standing, Told};
pub use option::{OptionHeader, OptionKind, OptionReplyHeader, OptionReplyKind, put_option, put_option_reply};
pub use reply::{ReplyHeader, put_chunk_header, put_simple_reply};
pub use request::{Command, Limits, Request};
pub use server::{ServerHandshake, ServerStep, Session};
pub use uri::{Address, Uri, UriError};
pub use wire::Defect;

#[cfg(test)]
mod tests;
