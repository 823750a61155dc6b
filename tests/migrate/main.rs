//! Moving a QEMU guest: the plan against everything that can die, and two real QEMUs.
#![allow(clippy::unwrap_used, missing_docs)]

mod faults;
mod sim;
