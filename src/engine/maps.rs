//! The present map and the dirty map, as words that many threads read and set without a lock.
//!
//! Order is the point here. A present bit is set with `Release` after the data stands in the cache,
//! and read with `Acquire` before the cache is read: whoever sees the bit sees the data. (This is why
//! the words are plain atomics: the `bitvec` crate sets atomic bits relaxed.)
//!
//! Each bit that changes also flags its *map page* (see [`PAGE_BLOCKS`]) as changed, after the bit
//! itself. A commit takes the flags, then reads the words: a bit that it misses has its flag still to come.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::geometry::{BlockRun, Geometry};

/// 64-bit words of one map (present or dirty) that a map page holds.
pub const PAGE_WORDS: usize = 248;
/// Blocks that one map page tells about.
pub const PAGE_BLOCKS: u64 = PAGE_WORDS as u64 * 64;

/// Where the words live: in a plain box, or in memory that survives the process.
pub trait Words: Send + Sync {
    /// First the present words, then as many dirty words.
    fn words(&self) -> &[AtomicU64];

    /// Which of them may hold bits when maps are opened on them; all others are zero, and are not looked at. A look
    /// would make memory of what is a hole so far, and take time in proportion to the disk.
    fn filled(&self) -> Vec<Range<usize>> {
        std::iter::once(0..self.words().len()).collect()
    }
}

impl Words for Box<[AtomicU64]> {
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

/// The words of one map page, as they were when they were read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageImage {
    /// Index of the page.
    pub page: u64,
    /// Present words.
    pub present: [u64; PAGE_WORDS],
    /// Dirty words.
    pub dirty: [u64; PAGE_WORDS],
}

impl PageImage {
    /// A page with no bit set.
    pub fn empty(page: u64) -> Self {
        Self { page, present: [0; PAGE_WORDS], dirty: [0; PAGE_WORDS] }
    }
}

/// Both maps of a device.
#[derive(Clone)]
pub struct Maps {
    inner: Arc<Inner>,
}

struct Inner {
    geometry: Geometry,
    words: Box<dyn Words>,
    map_words: usize,
    /// Pages with bits that no commit has taken yet, and pages of the commit that is running: one bit a page.
    changed: Box<[AtomicU64]>,
    committing: Box<[AtomicU64]>,
    present_count: AtomicU64,
    dirty_count: AtomicU64,
    /// Threads that are between setting a bit and flagging its page. While there is one, a bit that is seen
    /// may have its flag still to come, and counts as not committed.
    marking: AtomicU64,
}

fn zeroed(words: usize) -> Box<[AtomicU64]> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

/// The lowest `most` of the set bits.
fn lowest(mut bits: u64, most: usize) -> u64 {
    while bits.count_ones() as usize > most {
        bits &= !(1 << (63 - bits.leading_zeros()));
    }
    bits
}

/// The words that a run of blocks touches, each with the mask of the run's bits in it.
fn masks(run: BlockRun) -> impl Iterator<Item = (usize, u64)> {
    let words = if run.is_empty() { 0..0 } else { run.start / 64..(run.end - 1) / 64 + 1 };
    words.map(move |word| {
        let low = run.start.saturating_sub(word * 64);
        let high = (run.end - word * 64).min(64);
        let mask = (u64::MAX >> (64 - (high - low))) << low;
        (word as usize, mask)
    })
}

impl Maps {
    /// Words that a device needs in all, for both maps.
    pub fn words_needed(geometry: Geometry) -> usize {
        2 * Self::map_words(geometry)
    }

    /// Map pages of a device.
    pub fn pages(geometry: Geometry) -> u64 {
        geometry.blocks().div_ceil(PAGE_BLOCKS)
    }

    fn map_words(geometry: Geometry) -> usize {
        Self::pages(geometry) as usize * PAGE_WORDS
    }

    /// Maps over words that may hold bits already. Bits beyond the device's end must be clear.
    /// All pages with a bit count as not yet committed.
    pub fn new(geometry: Geometry, words: Box<dyn Words>) -> Self {
        let map_words = Self::map_words(geometry);
        assert_eq!(words.words().len(), 2 * map_words, "the words must fit the geometry");
        let flags = Self::pages(geometry).div_ceil(64) as usize;
        let changed = zeroed(flags);
        let mut counts = [0, 0];
        for index in words.filled().into_iter().flatten() {
            let word = words.words()[index].load(Ordering::Relaxed);
            if word != 0 {
                counts[index / map_words] += u64::from(word.count_ones());
                let page = index % map_words / PAGE_WORDS;
                changed[page / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
            }
        }
        let [present_count, dirty_count] = counts.map(AtomicU64::new);
        let committing = zeroed(flags);
        Self {
            inner: Arc::new(Inner {
                geometry,
                words,
                map_words,
                changed,
                committing,
                present_count,
                dirty_count,
                marking: AtomicU64::new(0),
            }),
        }
    }

    /// Empty maps in plain memory.
    pub fn in_memory(geometry: Geometry) -> Self {
        Self::new(geometry, Box::new(zeroed(Self::words_needed(geometry))))
    }

    /// Sizes of the device.
    pub fn geometry(&self) -> Geometry {
        self.inner.geometry
    }

    fn present(&self) -> &[AtomicU64] {
        &self.inner.words.words()[..self.inner.map_words]
    }

    fn dirty(&self) -> &[AtomicU64] {
        &self.inner.words.words()[self.inner.map_words..]
    }

    /// Does the cache hold this block's truth?
    pub fn is_present(&self, block: u64) -> bool {
        self.present()[block as usize / 64].load(Ordering::Acquire) & (1 << (block % 64)) != 0
    }

    /// Does the cache hold all of these blocks?
    pub fn all_present(&self, run: BlockRun) -> bool {
        let present = self.present();
        masks(run).all(|(word, mask)| present[word].load(Ordering::Acquire) & mask == mask)
    }

    /// Did the guest write any of these blocks here?
    pub fn any_dirty(&self, run: BlockRun) -> bool {
        let dirty = self.dirty();
        masks(run).any(|(word, mask)| dirty[word].load(Ordering::Acquire) & mask != 0)
    }

    /// The first absent block at or after `from`.
    pub fn next_absent(&self, from: u64) -> Option<u64> {
        self.find(from, self.inner.geometry.blocks(), |word| !word)
    }

    /// The end of the absent run that starts at `from`, at most `limit`.
    pub fn absent_until(&self, from: u64, limit: u64) -> u64 {
        self.find(from, limit, |word| word).unwrap_or(limit)
    }

    /// The end of the present run that starts at `from`, at most `limit`.
    pub fn present_until(&self, from: u64, limit: u64) -> u64 {
        self.find(from, limit, |word| !word).unwrap_or(limit)
    }

    /// Was the block at `from` written here, and up to where (at most `limit`) is it the same?
    pub fn dirty_stretch(&self, from: u64, limit: u64) -> (bool, u64) {
        let dirty = self.any_dirty(BlockRun::new(from, from + 1));
        let end = find_in(self.dirty(), from, limit, |word| if dirty { !word } else { word });
        (dirty, end.unwrap_or(limit))
    }

    fn find(&self, from: u64, limit: u64, wanted: impl Fn(u64) -> u64) -> Option<u64> {
        find_in(self.present(), from, limit, wanted)
    }

    /// Number of present blocks.
    pub fn present_count(&self) -> u64 {
        self.inner.present_count.load(Ordering::Relaxed)
    }

    /// Number of dirty blocks.
    pub fn dirty_count(&self) -> u64 {
        self.inner.dirty_count.load(Ordering::Relaxed)
    }

    /// Number of absent blocks.
    pub fn absent_count(&self) -> u64 {
        self.inner.geometry.blocks() - self.present_count()
    }

    /// Says that the cache holds these blocks. Only after their data was written (I1).
    pub(super) fn mark_present(&self, run: BlockRun) {
        self.mark(self.present(), run, &self.inner.present_count);
    }

    /// Says that the guest writes these blocks here. Before the write, so that the dirty map is never short of a block.
    pub fn mark_dirty(&self, run: BlockRun) {
        self.mark(self.dirty(), run, &self.inner.dirty_count);
    }

    fn mark(&self, map: &[AtomicU64], run: BlockRun, count: &AtomicU64) {
        let mut fresh = 0;
        let marking = &self.inner.marking;
        for (word, mask) in masks(run) {
            // Set already, and by somebody who has flagged the page too.
            if map[word].load(Ordering::SeqCst) & mask == mask && marking.load(Ordering::SeqCst) == 0 {
                continue;
            }
            marking.fetch_add(1, Ordering::SeqCst);
            let old = map[word].fetch_or(mask, Ordering::SeqCst);
            fresh += u64::from((mask & !old).count_ones());
            let page = word / PAGE_WORDS;
            self.inner.changed[page / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
            marking.fetch_sub(1, Ordering::SeqCst);
        }
        if fresh > 0 {
            count.fetch_add(fresh, Ordering::Relaxed);
        }
    }

    /// Are all bits of these blocks committed? May say no of bits that are, never yes of bits that are not.
    pub fn is_committed(&self, run: BlockRun) -> bool {
        if run.is_empty() {
            return true;
        }
        // The caller may have seen a bit whose flag another thread is about to set.
        if self.inner.marking.load(Ordering::SeqCst) != 0 {
            return false;
        }
        let pages = run.start / PAGE_BLOCKS..=(run.end - 1) / PAGE_BLOCKS;
        pages.into_iter().all(|page| {
            let (word, bit) = (page as usize / 64, 1 << (page % 64));
            // In this order: a commit moves a page from changed to committing by setting before clearing.
            self.inner.changed[word].load(Ordering::SeqCst) & bit == 0
                && self.inner.committing[word].load(Ordering::SeqCst) & bit == 0
        })
    }

    /// Is there a bit that no commit has taken?
    pub fn has_uncommitted(&self) -> bool {
        self.inner.changed.iter().chain(&self.inner.committing).any(|w| w.load(Ordering::SeqCst) != 0)
    }

    /// Takes the first `most` of the changed pages from page `from` on for a commit, and reads them. One commit at a
    /// time, which may take several times: [`Maps::committed`] or [`Maps::commit_failed`] must follow.
    pub fn take_changed(&self, from: u64, most: usize) -> Vec<PageImage> {
        let all: u32 = self.inner.changed.iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum();
        // No more room than is needed: a vector that grows is twice as large for a moment.
        let mut pages = Vec::with_capacity(most.min(all as usize));
        for (index, changed) in self.inner.changed.iter().enumerate().skip(from as usize / 64) {
            let first = from.saturating_sub(index as u64 * 64);
            let bits = lowest(changed.load(Ordering::SeqCst) & (u64::MAX << first), most - pages.len());
            if bits == 0 {
                continue;
            }
            self.inner.committing[index].fetch_or(bits, Ordering::SeqCst);
            changed.fetch_and(!bits, Ordering::SeqCst);
            let taken = (0..64).filter(|bit| bits & (1 << bit) != 0);
            pages.extend(taken.map(|bit| self.read_page(index as u64 * 64 + bit)));
            if pages.len() == most {
                break;
            }
        }
        pages
    }

    /// The pages that were taken are durable.
    pub fn committed(&self) {
        self.inner.committing.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    /// The pages that were taken are not durable: they count as changed again.
    pub fn commit_failed(&self) {
        for (changed, committing) in self.inner.changed.iter().zip(&self.inner.committing) {
            changed.fetch_or(committing.load(Ordering::SeqCst), Ordering::SeqCst);
            committing.store(0, Ordering::SeqCst);
        }
    }

    /// The words of a page as they are now.
    pub fn read_page(&self, page: u64) -> PageImage {
        let first = page as usize * PAGE_WORDS;
        let mut image = PageImage::empty(page);
        for (offset, word) in image.present.iter_mut().enumerate() {
            *word = self.present()[first + offset].load(Ordering::SeqCst);
        }
        for (offset, word) in image.dirty.iter_mut().enumerate() {
            *word = self.dirty()[first + offset].load(Ordering::SeqCst);
        }
        image
    }
}

#[cfg(test)]
thread_local! {
    /// How many words searches have looked at: what is cheap on any disk must not go through all of its map.
    pub(super) static WORDS_SEEN: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// The first block of a range whose bit is set in what `wanted` makes of the words.
fn find_in(words: &[AtomicU64], from: u64, limit: u64, wanted: impl Fn(u64) -> u64) -> Option<u64> {
    masks(BlockRun::new(from, limit)).find_map(|(word, mask)| {
        #[cfg(test)]
        WORDS_SEEN.set(WORDS_SEEN.get() + 1);
        let hits = wanted(words[word].load(Ordering::Acquire)) & mask;
        (hits != 0).then(|| word as u64 * 64 + u64::from(hits.trailing_zeros()))
    })
}

/// Fills words from committed pages, before [`Maps::new`]: bits are added, never taken away.
pub fn load_page(words: &[AtomicU64], image: &PageImage) {
    let (present, dirty) = words.split_at(words.len() / 2);
    let first = image.page as usize * PAGE_WORDS;
    for (map, bits) in [(present, &image.present), (dirty, &image.dirty)] {
        for (offset, bits) in bits.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            map[first + offset].fetch_or(*bits, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn maps(blocks: u64) -> Maps {
        Maps::in_memory(Geometry::new(blocks * 4096, 4096).unwrap())
    }

    proptest! {
        #[test]
        fn runs_behave_like_a_list_of_bools(runs in prop::collection::vec((0u64..40_000, 0u64..20_000), 0..12), probe in 0u64..40_000) {
            let blocks = 40_000;
            let maps = maps(blocks);
            let mut naive = vec![false; blocks as usize];
            for (start, len) in runs {
                let run = BlockRun::new(start, (start + len).min(blocks));
                maps.mark_present(run);
                naive[run.start as usize..run.end as usize].fill(true);
            }
            prop_assert_eq!(maps.present_count(), naive.iter().filter(|&&b| b).count() as u64);
            let tail = &naive[probe as usize..];
            prop_assert_eq!(maps.next_absent(probe), tail.iter().position(|&b| !b).map(|n| n as u64 + probe));
            let until = |b: bool| tail.iter().position(|&x| x != b).map_or(blocks, |n| n as u64 + probe);
            prop_assert_eq!(maps.absent_until(probe, blocks), until(false));
            prop_assert_eq!(maps.present_until(probe, blocks), until(true));
            let run = BlockRun::new(probe, (probe + 130).min(blocks));
            prop_assert_eq!(maps.all_present(run), naive[run.start as usize..run.end as usize].iter().all(|&b| b));
        }
    }

    #[test]
    fn a_commit_takes_what_changed_and_nothing_else() {
        let maps = maps(3 * PAGE_BLOCKS);
        assert!(maps.take_changed(0, usize::MAX).is_empty());
        maps.mark_dirty(BlockRun::new(PAGE_BLOCKS, PAGE_BLOCKS + 1));
        maps.mark_present(BlockRun::new(PAGE_BLOCKS, PAGE_BLOCKS + 1));
        assert!(!maps.is_committed(BlockRun::new(PAGE_BLOCKS, PAGE_BLOCKS + 1)));
        assert!(maps.is_committed(BlockRun::new(0, PAGE_BLOCKS)));
        let taken = maps.take_changed(0, usize::MAX);
        assert_eq!((taken.len(), taken[0].page, taken[0].present[0], taken[0].dirty[0]), (1, 1, 1, 1));
        // While the commit runs, the page is neither committed nor forgotten.
        assert!(!maps.is_committed(BlockRun::new(PAGE_BLOCKS, PAGE_BLOCKS + 1)));
        maps.commit_failed();
        assert_eq!(maps.take_changed(0, usize::MAX), taken);
        maps.mark_present(BlockRun::new(PAGE_BLOCKS + 1, PAGE_BLOCKS + 2));
        maps.committed();
        assert!(!maps.is_committed(BlockRun::new(PAGE_BLOCKS, PAGE_BLOCKS + 1)));
        assert_eq!(maps.take_changed(0, usize::MAX)[0].present[0], 3);
        maps.committed();
        assert!(!maps.has_uncommitted());
    }

    #[test]
    fn changed_pages_are_taken_in_batches() {
        let maps = maps(200 * PAGE_BLOCKS);
        let changed = [0, 1, 63, 64, 130, 199];
        changed.iter().for_each(|page| maps.mark_dirty(BlockRun::new(page * PAGE_BLOCKS, page * PAGE_BLOCKS + 1)));
        let mut seen = Vec::new();
        loop {
            let from = seen.last().map_or(0, |page| page + 1);
            let batch = maps.take_changed(from, 2);
            assert!(batch.len() <= 2);
            // Pages that were passed, and change again meanwhile, are for the next commit.
            maps.mark_dirty(BlockRun::new(1, 2));
            seen.extend(batch.iter().map(|image| image.page));
            if batch.is_empty() {
                break;
            }
        }
        assert_eq!(seen, changed);
        maps.committed();
        assert!(maps.is_committed(BlockRun::new(PAGE_BLOCKS, 200 * PAGE_BLOCKS)));
        assert_eq!(maps.take_changed(0, usize::MAX).len(), 1);
    }

    #[test]
    fn only_filled_words_are_looked_at() {
        struct Sparse(Box<[AtomicU64]>, Vec<Range<usize>>);
        impl Words for Sparse {
            fn words(&self) -> &[AtomicU64] {
                &self.0
            }
            fn filled(&self) -> Vec<Range<usize>> {
                self.1.clone()
            }
        }
        let geometry = Geometry::new(3 * PAGE_BLOCKS * 4096, 4096).unwrap();
        let words = zeroed(Maps::words_needed(geometry));
        let map_words = 3 * PAGE_WORDS;
        words[5].store(3, Ordering::Relaxed);
        words[map_words + 2 * PAGE_WORDS].store(1, Ordering::Relaxed);
        // Over the border of both maps, too.
        let maps = Maps::new(geometry, Box::new(Sparse(words, vec![0..8, map_words - 1..2 * map_words])));
        assert_eq!((maps.present_count(), maps.dirty_count()), (2, 1));
        assert_eq!(maps.take_changed(0, usize::MAX).iter().map(|image| image.page).collect::<Vec<_>>(), [0, 2]);
    }

    #[test]
    fn a_range_over_two_pages_is_committed_when_both_are() {
        let maps = maps(2 * PAGE_BLOCKS);
        let across = BlockRun::new(PAGE_BLOCKS - 1, PAGE_BLOCKS + 1);
        assert!(maps.is_committed(across));
        maps.mark_dirty(BlockRun::new(PAGE_BLOCKS, PAGE_BLOCKS + 1));
        assert!(!maps.is_committed(across), "the second page has changed");
        maps.take_changed(0, usize::MAX);
        maps.committed();
        maps.mark_dirty(BlockRun::new(PAGE_BLOCKS - 1, PAGE_BLOCKS));
        assert!(!maps.is_committed(across), "the first page has changed");
    }

    #[test]
    fn pages_load_back() {
        let old = maps(PAGE_BLOCKS + 5);
        old.mark_present(BlockRun::new(3, PAGE_BLOCKS + 2));
        old.mark_dirty(BlockRun::new(3, 4));
        let words = zeroed(Maps::words_needed(old.geometry()));
        old.take_changed(0, usize::MAX).iter().for_each(|page| load_page(&words, page));
        let new = Maps::new(old.geometry(), Box::new(words));
        assert_eq!((new.present_count(), new.dirty_count()), (PAGE_BLOCKS - 1, 1));
        assert!(new.all_present(BlockRun::new(3, PAGE_BLOCKS + 2)) && new.any_dirty(BlockRun::new(0, 4)));
        assert!(new.has_uncommitted());
    }
}
