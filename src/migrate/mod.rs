//! Moving a QEMU guest whose disks are in standby at the destination.
//!
//! ```text
//!   source's QEMU            this                    the disks            destination's QEMU
//!        │ ◄──────────── 1. checks ──────────────────────┼───────────────────► │
//!        │ ◄──────────── 2. memory: migrate ─────────────┼─────────────────────┤ loads
//!   guest stands still ─ 3. all well? go on: ────────────┤                     │
//!        │ ◄───────────────── migrate-continue           │                     │
//!   lets go of the images                                │                     │ has loaded everything
//!        │               4. take ──────────────────────► │ source's images are locked, synced, given
//!        │               5. activate ──────────────────► │ they may be written here    (no way back)
//!        │               6. cont ────────────────────────┼───────────────────► │ guest runs
//! ```
//! [`plan`] decides the next step from what is to be seen, and from nothing else: whoever starts in the middle, because
//! somebody was killed there, goes on from there. [`Driver`] carries it out in a [`World`].
//!
//! Invariants: until the first disk is activated the guest can go on at the source, and does if anything fails; from then
//! on nothing here lets it run there. The guest is let go at the source only after every disk that may have been taken
//! was called off, and at the destination only after every disk is active. Every wait has an end.

mod advice;
mod check;
mod disks;
mod driver;
mod machine;
mod places;
pub mod plan;
mod real;
mod report;

pub use check::{Block, Found, Problems};
pub use disks::{activate_all, ask_all};
pub use driver::{Driver, Limits, NotActive, Outcome, State, Watcher, World};
pub use machine::Memory;
pub use places::Places;
pub use real::{Prepared, Real};
pub use report::{DiskReport, Moments, Report};
