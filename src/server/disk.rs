//! What a server serves.

use std::future::Future;

use crate::engine::ByteRange;
use crate::nbd::{Ask, ExportInfo, NbdError, Told};
use crate::uring::{Buffer, Part, Residency};

/// A stretch of the disk as BLOCK_STATUS (`base:allocation`) tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskExtent {
    /// Length in bytes.
    pub len_bytes: u64,
    /// Takes no space.
    pub hole: bool,
    /// Reads as zeros.
    pub zero: bool,
}

/// A disk. Requests have been checked: they lie on it, and it has said that it can do what they ask.
pub trait Disk: 'static {
    /// How it presents itself.
    fn export(&self) -> ExportInfo;

    /// Will a read of this range be answered without waiting for anything but this disk? What waits for
    /// something else has limits of its own, so that it does not stand in the way of what does not.
    fn reads_at_once(&self, range: ByteRange) -> bool {
        let _ = range;
        true
    }

    /// Reads a range. The parts cover it exactly, in order; [`Part::Zeros`] need not cross as data.
    fn read(&self, range: ByteRange) -> impl Future<Output = Result<Vec<Part>, NbdError>>;

    /// Writes `data` from `offset_bytes`.
    fn write(&self, offset_bytes: u64, data: Buffer, fua: bool) -> impl Future<Output = Result<(), NbdError>> {
        let _ = (offset_bytes, data, fua);
        async { Err(NbdError::Perm) }
    }

    /// Makes a range read as zeros: keeping the space, and only if that is fast, if so asked.
    fn zero(
        &self,
        range: ByteRange,
        fua: bool,
        keep_allocated: bool,
        fast_only: bool,
    ) -> impl Future<Output = Result<(), NbdError>> {
        let _ = (range, fua, keep_allocated, fast_only);
        async { Err(NbdError::Perm) }
    }

    /// Gives a range up.
    fn trim(&self, range: ByteRange, fua: bool) -> impl Future<Output = Result<(), NbdError>> {
        let _ = (range, fua);
        async { Err(NbdError::Perm) }
    }

    /// Makes all acknowledged writes durable.
    fn flush(&self) -> impl Future<Output = Result<(), NbdError>> {
        async { Ok(()) }
    }

    /// Makes a range quick to read.
    fn prefetch(&self, range: ByteRange) -> impl Future<Output = Result<(), NbdError>>;

    /// Holes and zeros from the start of a range: at least one stretch, at most `max`, perhaps short of its end.
    fn extents(&self, range: ByteRange, max: usize) -> impl Future<Output = Result<Vec<DiskExtent>, NbdError>>;

    /// Stretches from the start of a range, and how they stand with the page cache: at least one, at most `max`, perhaps
    /// short of its end. Only asked of a disk whose export tells it.
    fn hot(&self, range: ByteRange, max: usize) -> impl Future<Output = Result<Vec<(u64, Residency)>, NbdError>> {
        let _ = (range, max);
        async { Err(NbdError::NotSup) }
    }

    /// BLAKE3 hashes of a range, one for each `piece_bytes`; only asked by a blkferry client.
    fn hashes(&self, range: ByteRange, piece_bytes: u32) -> impl Future<Output = Result<Vec<[u8; 32]>, NbdError>> {
        let _ = (range, piece_bytes);
        async { Err(NbdError::NotSup) }
    }

    /// A step of a handoff; only asked of a disk whose export says how it stands.
    fn hand_off(&self, ask: Ask) -> impl Future<Output = Result<Told, NbdError>> {
        let _ = ask;
        async { Err(NbdError::NotSup) }
    }

    /// Stretches from the start of a range that were (true) or were not written since the disk was made from its base:
    /// at least one, at most `max`, perhaps short of its end.
    fn changed(&self, range: ByteRange, max: usize) -> impl Future<Output = Result<Vec<(u64, bool)>, NbdError>> {
        let _ = (range, max);
        async { Err(NbdError::NotSup) }
    }
}
