//! blkferry.
pub mod cache;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod device;
pub mod engine;
pub mod export;
pub mod frontend;
pub mod identity;
pub mod nbd;
pub mod remote;
pub mod server;
pub mod size;
pub mod uring;
