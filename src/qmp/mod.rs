//! QEMU's machine protocol: telling a running QEMU what to do, and hearing what becomes of it.
//!
//! ```text
//!   QEMU ── {"QMP":{"version":…}} ──────────────────────────► client      on connecting
//!        ◄─ {"execute":"qmp_capabilities","id":0} ──────────
//!        ── {"return":{},"id":0} ───────────────────────────►
//!        ◄─ {"execute":"migrate","arguments":{…},"id":1} ───
//!        ── {"event":"STOP","timestamp":{…}} ───────────────►            at any time
//!        ── {"return":{},"id":1}  or  {"error":{…},"id":1} ─►
//! ```
//! A thread reads each connection and notes when a line came, so that a moment is known although nobody was looking.
//! Invariants: every wait has an end; lines and what is kept of them are bounded; each failure is one clear line that
//! says which QEMU it was.
//!
//! Data is JSON as it comes: a dozen commands are used, over QEMUs of many years. A client that knows the words of one
//! release (the crate `qapi` has those of QEMU 9) cannot read an event or a state that a later one has.

mod address;
mod client;

pub use address::{Address, ParseAddressError};
pub use client::{Event, Qmp, QmpError, Version};
