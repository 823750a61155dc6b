//! Crashes: no acknowledged write is lost with its daemon, no promised one with its host, no byte is wrong.
//!
//! ```text
//!   killed.rs   real daemons, SIGKILL at random moments: under load, at their start, at their end
//!   fio.rs      the same with fio as the guest, which verifies what it wrote
//!   power.rs    a kill made into a power cut; live maps that are gone, old, or another cache's
//!   sim/        the commit protocol on a simulated disk: every step, every outcome of a power cut
//!        ┌──────────┴───────────┐
//!   workload.rs  client.rs    record.rs  inspect.rs  site.rs
//!   a guest that sends        what every sector may hold, and whether it does;
//!   anything, many at once    what lies on disk between two daemons
//! ```
//!
//! | to                                      | set                                  |
//! |-----------------------------------------|--------------------------------------|
//! | run more or fewer rounds                | `BLKFERRY_CRASH_ROUNDS=n` (100)      |
//! | simulate more or fewer disks            | `BLKFERRY_CRASH_DISKS=n` (200)       |
//! | run other seeds                         | `BLKFERRY_CRASH_FIRST=n` (0)         |
//! | run a course that failed, and no other  | its seed as `FIRST`, and `ROUNDS=1`  |
//!
//! Rounds of a course are as its seed says; only when a daemon dies on the microsecond is up to the machine.
#![allow(clippy::unwrap_used)]

mod client;
#[path = "../common/mod.rs"]
mod common;
mod fio;
mod inspect;
mod killed;
mod power;
mod record;
#[path = "../common/rng.rs"]
mod rng;
mod sim;
mod site;
mod workload;

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is no number")))
}
