//! Bad input, of users, sources, clients and disks: one clear line, a non-zero exit, and nothing lost.
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

mod caches;
mod changed;
mod disk_full;
mod hostile;
mod images;
mod liar;
mod log_lines;
mod lost;
mod names;
mod namespace;
mod requests;
mod sources;
mod stop;
mod strangers;
mod target;
mod trace;
mod uring;
