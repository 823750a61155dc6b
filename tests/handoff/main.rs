//! Handing a disk over, with the real program: who may write, what is refused, what a crash at each step leaves.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/mod.rs"]
mod common;

mod back;
mod breath;
#[path = "../common/client.rs"]
mod client;
mod image;
#[path = "../common/link.rs"]
mod link;
mod onward;
mod reclaim;
mod rig;
