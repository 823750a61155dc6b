//! blkferry.
pub mod nbd;
