//! From bytes to blocks and back.

use std::fmt;
use std::num::NonZeroU64;

/// Smallest block size in bytes.
pub const MIN_BLOCK_BYTES: u32 = 4 << 10;
/// Largest block size in bytes.
pub const MAX_BLOCK_BYTES: u32 = 1 << 20;
/// The size of a device is a whole number of these.
pub const SECTOR_BYTES: u64 = 512;

/// A range of byte offsets on the device, `start..end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl ByteRange {
    /// `len_bytes` bytes from `start`.
    pub fn new(start: u64, len_bytes: u64) -> Self {
        Self { start, end: start + len_bytes }
    }

    /// Length in bytes.
    pub fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Nothing in it?
    pub fn is_empty(self) -> bool {
        self.end <= self.start
    }

    /// What both have in common (empty if nothing).
    pub fn clip(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self { start, end: self.end.min(other.end).max(start) }
    }
}

/// A run of whole blocks, `start..end`, by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockRun {
    /// First block.
    pub start: u64,
    /// One past the last block.
    pub end: u64,
}

impl BlockRun {
    /// Blocks `start..end`.
    pub fn new(start: u64, end: u64) -> Self {
        Self { start, end: end.max(start) }
    }

    /// Number of blocks.
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// Nothing in it?
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// What both have in common (empty if nothing).
    pub fn clip(self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Does it hold this block?
    pub fn contains(self, block: u64) -> bool {
        (self.start..self.end).contains(&block)
    }

    /// Cuts the run into pieces of at most `max` blocks.
    pub fn pieces(self, max: NonZeroU64) -> impl Iterator<Item = Self> {
        (self.start..self.end).step_by(max.get() as usize).map(move |at| Self::new(at, self.end.min(at + max.get())))
    }
}

impl fmt::Display for BlockRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blocks {}..{}", self.start, self.end)
    }
}

/// Why a size or a block size cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The device's size is not a whole number of sectors.
    #[error("size {0} is not a multiple of 512 bytes; pad the image (`truncate -s %512 IMAGE`)")]
    OddSize(u64),
    /// A device without bytes.
    #[error("size 0: there is nothing to ferry")]
    Empty,
    /// Larger than offsets can say.
    #[error("size {0} is beyond 2^63 bytes")]
    TooLarge(u64),
    /// Not a power of two between the limits.
    #[error("block size {0} is not a power of two from 4K to 1M")]
    BlockSize(u64),
}

/// Size of a device and of its blocks. The last block may be shorter than the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size_bytes: u64,
    block_shift: u32,
}

impl Geometry {
    /// Checks and keeps both sizes, in bytes.
    pub fn new(size_bytes: u64, block_bytes: u64) -> Result<Self, GeometryError> {
        let limits = u64::from(MIN_BLOCK_BYTES)..=u64::from(MAX_BLOCK_BYTES);
        if !block_bytes.is_power_of_two() || !limits.contains(&block_bytes) {
            return Err(GeometryError::BlockSize(block_bytes));
        }
        match size_bytes {
            0 => Err(GeometryError::Empty),
            odd if odd % SECTOR_BYTES != 0 => Err(GeometryError::OddSize(odd)),
            large if large > i64::MAX as u64 => Err(GeometryError::TooLarge(large)),
            _ => Ok(Self { size_bytes, block_shift: block_bytes.trailing_zeros() }),
        }
    }

    /// Size of the device in bytes.
    pub fn size_bytes(self) -> u64 {
        self.size_bytes
    }

    /// Size of a block in bytes.
    pub fn block_bytes(self) -> u64 {
        1 << self.block_shift
    }

    /// Number of blocks, the last one perhaps short.
    pub fn blocks(self) -> u64 {
        self.size_bytes.div_ceil(self.block_bytes())
    }

    /// All blocks.
    pub fn all(self) -> BlockRun {
        BlockRun::new(0, self.blocks())
    }

    /// The block that holds this byte.
    pub fn block_of(self, offset_bytes: u64) -> u64 {
        offset_bytes >> self.block_shift
    }

    /// The blocks that a range touches.
    pub fn covering(self, range: ByteRange) -> BlockRun {
        if range.is_empty() {
            return BlockRun::new(self.block_of(range.start), self.block_of(range.start));
        }
        BlockRun::new(self.block_of(range.start), self.block_of(range.end - 1) + 1)
    }

    /// The blocks that lie in a range whole. A range up to the end of the device holds its short last block.
    pub fn inside(self, range: ByteRange) -> BlockRun {
        let start = range.start.div_ceil(self.block_bytes());
        let end = if range.end >= self.size_bytes { self.blocks() } else { self.block_of(range.end) };
        BlockRun::new(start, end)
    }

    /// The bytes of a run of blocks, cut at the end of the device.
    pub fn bytes_of(self, run: BlockRun) -> ByteRange {
        ByteRange { start: run.start << self.block_shift, end: (run.end << self.block_shift).min(self.size_bytes) }
    }

    /// How many blocks fit into that many bytes, at least one.
    pub fn blocks_in(self, bytes: u64) -> NonZeroU64 {
        NonZeroU64::new(bytes >> self.block_shift).unwrap_or(NonZeroU64::MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covering_inside_and_a_short_last_block() {
        let g = Geometry::new(3 * 4096 + 512, 4096).unwrap();
        assert_eq!(g.blocks(), 4);
        assert_eq!(g.covering(ByteRange { start: 1, end: 4097 }), BlockRun::new(0, 2));
        assert_eq!(g.covering(ByteRange { start: 4096, end: 8192 }), BlockRun::new(1, 2));
        assert_eq!(g.inside(ByteRange { start: 1, end: 8191 }), BlockRun::new(1, 1));
        assert_eq!(g.inside(ByteRange { start: 1, end: 3 * 4096 + 512 }), BlockRun::new(1, 4));
        assert_eq!(g.inside(ByteRange { start: 3 * 4096, end: 3 * 4096 + 511 }), BlockRun::new(3, 3));
        assert_eq!(g.bytes_of(BlockRun::new(3, 4)), ByteRange { start: 12288, end: 12800 });
        assert!(g.covering(ByteRange::new(4096, 0)).is_empty());
    }

    #[test]
    fn bad_sizes_are_refused() {
        assert_eq!(Geometry::new(4097, 4096), Err(GeometryError::OddSize(4097)));
        assert_eq!(Geometry::new(0, 4096), Err(GeometryError::Empty));
        for block in [0, 512, 4095, 6000, 2 << 20] {
            assert_eq!(Geometry::new(4096, block), Err(GeometryError::BlockSize(block)));
        }
    }
}
