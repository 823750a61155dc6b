//! Moving a QEMU guest: the plan against everything that can die, in a small world; and two real QEMUs.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/link.rs"]
mod link;
#[path = "../common/writer.rs"]
mod writer;

mod bad_input;
mod faults;
mod guests;
mod sim;
mod site;
mod sweep;
