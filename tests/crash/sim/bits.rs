//! Sets of blocks as the maps keep them, one word for 64 blocks, so that a rule is one operation a word.

use blkferry::cache::Recovered;
use blkferry::engine::{BlockRun, Maps, PAGE_WORDS, PageImage};

/// Present and dirty words.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Bits {
    pub present: Vec<u64>,
    pub dirty: Vec<u64>,
}

impl Bits {
    pub fn none(pages: u64) -> Self {
        let words = vec![0; pages as usize * PAGE_WORDS];
        Self { present: words.clone(), dirty: words }
    }

    pub fn of(pages: u64, recovered: &Recovered) -> Self {
        let mut bits = Self::none(pages);
        recovered.pages.iter().for_each(|image| bits.put(image));
        bits
    }

    /// All bits of live maps.
    pub fn set_in(maps: &Maps) -> Self {
        let pages = Maps::pages(maps.geometry());
        let mut bits = Self::none(pages);
        (0..pages).for_each(|page| bits.put(&maps.read_page(page)));
        bits
    }

    fn put(&mut self, image: &PageImage) {
        let words = image.page as usize * PAGE_WORDS..(image.page as usize + 1) * PAGE_WORDS;
        self.present[words.clone()].copy_from_slice(&image.present);
        self.dirty[words].copy_from_slice(&image.dirty);
    }

    pub fn add(&mut self, run: BlockRun, dirty: bool) {
        for block in run.start..run.end {
            self.present[block as usize / 64] |= 1 << (block % 64);
            self.dirty[block as usize / 64] |= u64::from(dirty) << (block % 64);
        }
    }

    pub fn join(&mut self, other: &Self) {
        self.present.iter_mut().zip(&other.present).for_each(|(word, other)| *word |= other);
        self.dirty.iter_mut().zip(&other.dirty).for_each(|(word, other)| *word |= other);
    }
}

/// A bit of `inner` that `outer` lacks.
pub fn missing(inner: &[u64], outer: &[u64]) -> Option<usize> {
    let at = inner.iter().zip(outer).position(|(inner, outer)| inner & !outer != 0)?;
    Some(at * 64 + (inner[at] & !outer[at]).trailing_zeros() as usize)
}
