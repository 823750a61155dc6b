//! blkferry.
pub mod cache;
pub mod engine;
pub mod export;
pub mod identity;
pub mod nbd;
pub mod remote;
pub mod server;
pub mod uring;
