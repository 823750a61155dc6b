//! blkferry.
pub mod engine;
pub mod uring;
