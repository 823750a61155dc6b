//! blkferry against the tools of the field: libnbd, nbdkit, QEMU and fio, over unix and TCP sockets.
//!
//! ```text
//!   source                                           guest
//!   blkferry export ─┐                             ┌─ nbdinfo, nbdcopy
//!   qemu-nbd        ─┼─► (relay) ─► blkferry attach┼─ qemu-img, qemu-io, fio
//!   nbdkit          ─┘                cache        └─ QEMU with a booting Linux, requests made by hand
//! ```
//! Each test states what the disk must hold without asking blkferry: from the image that it made itself, from a
//! model in memory, or from what another tool wrote. Nothing is timed; where something is waited for, it is polled
//! with a deadline. A tool that is missing fails the test: nothing is skipped.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/mod.rs"]
mod common;

mod bench;
mod client;
mod relay;
mod servers;

mod changes;
mod copies;
mod cuts;
mod cycles;
mod export;
mod fail_after;
mod far;
mod faults;
mod fio;
mod foreign;
mod guest;
mod hot;
mod oracle;
mod settings;
mod wire;
