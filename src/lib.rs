//! blkferry: live storage migration.
//!
//! A machine moves *now*; its disk's blocks follow. On the new host the disk is a device whose blocks are
//! still on the old one: fetched when they are read, pulled in the background, kept in a local cache with
//! a present map. What the guest writes goes to the cache and is never copied again, so nothing tracks
//! dirty blocks and nothing is sent twice. When every block is here, the cache is a plain raw image.
//!
//! ```text
//!        host A                                             host B
//!  ┌───────────────┐   NBD over TCP   ┌──────────────────────────────────────────────────┐
//!  │ export  image ├─────────────────►│ remote ──► device ──► frontend ◄── guest (QEMU,   │
//!  └───────────────┘   holes stay     │  links      │  ▲       NBD or a         fio, …)   │
//!   (or any other      holes          │             ▼  │       block device              │
//!    NBD server)                      │           engine (pure: events in, actions out)   │
//!                                     │             │                                    │
//!                                     │           cache: data + metadata + live map       │
//!                                     └──────────────────────────────────────────────────┘
//! ```
//!
//! # Where things are
//!
//! | module | what it is | knows |
//! |---|---|---|
//! | [`cli`] | one file a verb | everything below |
//! | [`daemon`] | one device: puts the parts together and takes them apart | everything below |
//! | [`migrate`] | moves a QEMU guest whose disks are in standby | `control`, `qmp` |
//! | [`qmp`] | QEMU's machine protocol | nothing |
//! | [`control`] | control socket, status, run directory | `device` (reports), `uring` |
//! | [`frontend`] | how the guest reaches the device | `device`, `server`, `ublk` |
//! | [`export`] | the source side: an image on offer | `server`, `identity` |
//! | [`device`] | the shell around the engine: threads, queues, hydration, commits | `engine`, `cache`, `remote` |
//! | [`server`] | an NBD server on a ring; what it serves is a trait | `nbd`, `uring` |
//! | [`remote`] | the fetch layer: links to a source, reconnect, identity | `nbd`, `uring` |
//! | [`cache`] | data file, metadata format, commit protocol, live map | `engine` (maps), `uring` |
//! | [`handoff`] | who a disk belongs to, and how it changes hands: pure rules for both sides | `nbd` (messages) |
//! | [`engine`] | what happens to every block; no I/O, no clock, no thread | nothing but std |
//! | [`nbd`] | the protocol as types and codecs | nothing |
//! | [`ublk`] | the kernel's ublk driver: control, requests and answers; a home of `unsafe` | `uring` |
//! | [`uring`] | the io_uring reactor; the other home of `unsafe` | nothing |
//! | [`identity`], [`beside`], [`size`] | what a disk is known by; where its files lie; `64K` and friends | next to nothing |
//!
//! `scripts/check-layers` holds these lines.
//!
//! # Words
//!
//! - **source**: where absent blocks come from; an NBD export, read-only.
//! - **cache**: the local file or block device that becomes the disk; same size and layout.
//! - **block**: granule of the maps; a power of two from 4 KiB to 1 MiB.
//! - **present map**: bit set: the cache holds this block's truth. Bits only go from 0 to 1.
//! - **dirty map**: bit set: the guest wrote this block here. It makes the way back cheap.
//! - **fetch**: reading absent blocks, by *demand* (somebody waits) or by *hydration* (in the background).
//! - **hit**, **miss**: a request whose blocks are all present, or not.
//! - **standby**, **active**, **away**: the disk is still the source's; it is ours; it was given to the next host.
//! - **epoch**: grows by one each time a disk changes hands; the fence against whoever missed that.
//! - **complete**: all blocks present and committed; the source may be switched off.
//!
//! # Invariants
//!
//! - **I1** A durable present bit implies durable data.
//! - **I2** A completed FLUSH implies that data *and* bits of every write acknowledged before it are
//!   durable; a completed FUA write implies it of that write.
//! - **I3** A fetch never overwrites what the guest wrote, whatever the order of completions.
//! - **I4** TRIM and WRITE_ZEROES make blocks present too; source data never comes back.
//! - **I5** A partial write to an absent block fetches and merges first.
//! - **I6** A block crosses the wire at most once per attach; only what was in flight on a connection that
//!   broke, or was fetched but not committed at a crash, may cross again, and a sector of what a silent one owes.
//!   Holes and zeros cross as metadata.
//! - **I7** In standby nothing is cached and nothing is written.
//! - **I8** A hit never waits for a miss, and a demand fetch never waits behind hydration.
//! - **I9** A write of whole blocks never waits for the network.
//! - **I10** Everything is bounded: in-flight operations, waiters, buffers, batches, retries.
//! - **I11** An error is never swallowed. A failed fsync stops the device for good.
//!

pub mod beside;
pub mod cache;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod device;
pub mod engine;
pub mod export;
pub mod frontend;
pub mod handoff;
pub mod identity;
pub mod migrate;
pub mod nbd;
pub mod qmp;
pub mod remote;
pub mod server;
pub mod size;
pub mod ublk;
pub mod uring;
