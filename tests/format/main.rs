//! What is on disk: golden bytes of every format in docs/FORMAT.md, and what happens when they are damaged.
#![allow(clippy::unwrap_used)]

mod bad;
#[path = "../common/hex.rs"]
mod bytes;
mod case;
#[path = "../common/mod.rs"]
mod common;
mod flips;
mod golden;
mod hex;
mod layout;
mod lost;
mod others;
mod recovery;
#[path = "../common/rng.rs"]
mod rng;
