//! A machine of libvirt's moves with `virsh migrate`, between two libvirtds on this machine, and its disk follows.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/link.rs"]
mod link;
#[path = "../common/writer.rs"]
mod writer;

mod definitions;
mod host;
mod moves;
mod site;
