//! Who waits for whom, shown by the order in which things end and never by a clock: the source is under the
//! test's control and holds its replies until they are let go.
#![allow(clippy::unwrap_used)]

#[path = "../common/client.rs"]
mod client;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/manners.rs"]
mod manners;
#[path = "../common/reply.rs"]
mod reply;
#[path = "../common/source.rs"]
mod source;

mod ahead;
mod ending;
mod hits;
mod lanes;
mod merge;
mod once;
mod register;
mod rig;
