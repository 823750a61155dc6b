//! What a case starts from.

use std::ops::Range;
use std::sync::Arc;

use blkferry::engine::{BlockRun, ByteRange, EngineConfig, Geometry, PAGE_BLOCKS, PageImage, Questions};

use crate::metadata::Birth;
use crate::rng::Rng;
use crate::stamp::SECTOR;

/// What a block of the cache is before the case begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initial {
    /// Not fetched.
    Absent,
    /// Fetched and committed.
    Fetched,
    /// Written by the guest and committed.
    Dirty,
}

/// Device, source and surroundings.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Sizes.
    pub geometry: Geometry,
    /// The engine's.
    pub config: EngineConfig,
    /// One for each block.
    pub blocks: Vec<Initial>,
    /// Which sectors of the source are zeros.
    pub source_zero: Vec<bool>,
    /// The metadata of these blocks.
    pub birth: Arc<Birth>,
}

impl Setup {
    /// A device with nothing special about it.
    pub fn plain(blocks: Vec<Initial>, max_fetch_blocks: u64) -> Self {
        let geometry = Geometry::new(blocks.len() as u64 * 4096, 4096).expect("a valid size");
        Self {
            geometry,
            config: EngineConfig {
                max_fetch_bytes: max_fetch_blocks * 4096,
                questions: None,
                compact: false,
                max_zero_bytes: u64::MAX,
            },
            source_zero: vec![false; blocks.len() * 8],
            birth: Arc::new(Birth::new(geometry, first_pages(&blocks))),
            blocks,
        }
    }

    /// Any device: mostly small, so that requests meet; sometimes with a short last block; new or in use.
    pub fn random(rng: &mut Rng) -> Self {
        let block_bytes = rng.one_of(&[4096, 4096, 4096, 4096, 4096, 4096, 4096, 8192, 16384]);
        let blocks = match rng.below(4000) {
            0..2600 => rng.between(1, 6),
            2600..3800 => rng.between(4, 12),
            3800..3970 => rng.between(10, 40),
            3970..3999 => rng.between(60, 140),
            // Two map pages: slow, and therefore seldom.
            _ => PAGE_BLOCKS + rng.between(1, 100),
        };
        let last_bytes = if rng.percent(40) { SECTOR * rng.between(1, block_bytes / SECTOR) } else { block_bytes };
        let size_bytes = (blocks - 1) * block_bytes + last_bytes;
        let geometry = Geometry::new(size_bytes, block_bytes).expect("a size that is allowed");
        let max_fetch_bytes = rng.one_of(&[512, block_bytes, 2 * block_bytes, 3 * block_bytes, 1 << 20]);
        // Most answers of all of it; some in several questions.
        let questions = rng.percent(50).then(|| {
            let few = Questions { bytes: block_bytes * (1 + size_bytes / 512 % 5), at_once: 1 + (blocks % 4) as usize };
            if (size_bytes / 4096).is_multiple_of(2) { Questions::AHEAD } else { few }
        });
        let max_zero_bytes = if rng.percent(50) { u64::MAX } else { 4096 << rng.below(4) };
        let config = EngineConfig { max_fetch_bytes, questions, compact: rng.percent(50), max_zero_bytes };
        let in_use = rng.percent(40);
        let states = [Initial::Absent, Initial::Absent, Initial::Fetched, Initial::Dirty];
        let state = |rng: &mut Rng| if in_use { rng.one_of(&states) } else { Initial::Absent };
        let mut states: Vec<_> = (0..blocks).map(|_| state(rng)).collect();
        // What is far from a border of map pages adds nothing.
        states[..blocks.saturating_sub(200).max(1) as usize - 1].fill(Initial::Fetched);
        let source_zero = random_zeros(rng, geometry.size_bytes() / SECTOR);
        let birth = Arc::new(Birth::new(geometry, first_pages(&states)));
        Self { geometry, config, blocks: states, source_zero, birth }
    }

    /// Number of sectors.
    pub fn sectors(&self) -> u64 {
        self.geometry.size_bytes() / SECTOR
    }

    /// The blocks that a range touches. Here and below the engine's own arithmetic is not asked: it is under test.
    pub fn touched(&self, range: ByteRange) -> Range<u64> {
        range.start / self.geometry.block_bytes()..range.end.div_ceil(self.geometry.block_bytes())
    }

    /// Does the range cover all of this block?
    pub fn covers(&self, range: ByteRange, block: u64) -> bool {
        let block_bytes = self.geometry.block_bytes();
        let end = ((block + 1) * block_bytes).min(self.geometry.size_bytes());
        range.start <= block * block_bytes && end <= range.end
    }

    /// The sectors of a run of blocks.
    pub fn sectors_in(&self, run: BlockRun) -> Range<u64> {
        let per_block = self.geometry.block_bytes() / SECTOR;
        run.start * per_block..(run.end * per_block).min(self.sectors())
    }

    /// Are these blocks zeros at the source?
    pub fn is_zero(&self, run: BlockRun) -> bool {
        let range = self.sectors_in(run);
        self.source_zero[range.start as usize..range.end as usize].iter().all(|&zero| zero)
    }
}

/// The sectors of a range of bytes.
pub fn sectors_of(range: ByteRange) -> Range<u64> {
    range.start / SECTOR..range.end / SECTOR
}

/// The map pages that hold a device's first state.
fn first_pages(blocks: &[Initial]) -> Vec<PageImage> {
    let page = |(index, blocks): (usize, &[Initial])| {
        let mut page = PageImage::empty(index as u64);
        for (block, state) in blocks.iter().enumerate() {
            page.present[block / 64] |= u64::from(*state != Initial::Absent) << (block % 64);
            page.dirty[block / 64] |= u64::from(*state == Initial::Dirty) << (block % 64);
        }
        page
    };
    blocks.chunks(PAGE_BLOCKS as usize).enumerate().map(page).collect()
}

/// Holes of all lengths between data of all lengths, sometimes only the one or the other.
fn random_zeros(rng: &mut Rng, sectors: u64) -> Vec<bool> {
    let longest = rng.one_of(&[3, 30, 100, 400]);
    let mut zeros = Vec::with_capacity(sectors as usize);
    let mut zero = rng.percent(50);
    while (zeros.len() as u64) < sectors {
        let len = rng.between(1, longest).min(sectors - zeros.len() as u64);
        zeros.extend(std::iter::repeat_n(zero, len as usize));
        zero = !zero;
    }
    zeros
}
