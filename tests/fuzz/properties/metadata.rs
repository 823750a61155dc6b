//! A metadata file as a device finds it: any bytes.
//!
//! Checksums keep a fuzzer out of what is behind them, so the input is a list of orders that make the file: sealed
//! pages, whole or torn, flipped bits, garbage ([`Platter::obey`]). Whatever comes of it:
//! - it is loaded or refused, without a panic and without memory that it does not need;
//! - a page with a copy that is damaged and may have been the newest is refused;
//! - what is loaded has the bits of all good copies, and none besides;
//! - the next commit is found again with all of them, also if the power is cut within it.

use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicU64;

use blkferry::cache::{
    CacheState, Committer, CopyState, Durable, PAGE_BYTES, ReadAt, Recovered, Recovery, SealedPage, Step, Superblock,
    encode_superblock, file_bytes, map_offset,
};
use blkferry::engine::{Geometry, Maps, PAGE_BLOCKS, PAGE_WORDS, PageImage, load_page};
use uuid::Uuid;

const SECTOR_BYTES: usize = 512;
const KIND_MAP: u32 = 2;
/// Pages of the largest file that orders make.
const MAX_PAGES: usize = 10;

/// The bytes of a file.
#[derive(Default)]
struct Platter {
    bytes: RefCell<Vec<u8>>,
}

impl ReadAt for Platter {
    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.bytes.borrow().len() as u64)
    }

    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let all = self.bytes.borrow();
        let from = all.get(offset as usize..offset as usize + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(from);
        Ok(())
    }
}

/// Where the next commit goes: nothing is left behind but what was written.
struct Target<'a> {
    platter: &'a Platter,
    pages: u64,
}

impl Durable for Target<'_> {
    fn sync_data(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn write_map(&mut self, page: u64, copy: u64, bytes: &[u8]) -> io::Result<()> {
        self.platter.write(map_offset(self.pages, page, copy) as usize, bytes, !0);
        Ok(())
    }

    fn sync_metadata(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads the orders; zeros when there are no more.
struct Orders<'a>(&'a [u8]);

impl Orders<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn short(&mut self) -> usize {
        usize::from(self.byte()) << 8 | usize::from(self.byte())
    }

    /// Small numbers, and those at the ends of what 32 and 64 bits hold.
    fn number(&mut self) -> u64 {
        let (kind, value) = (self.byte(), u64::from(self.byte()));
        match kind {
            0..=127 => value,
            128..=159 => u64::from(u32::MAX) - value,
            160..=191 => (1 << 32) + value,
            192..=223 => u64::MAX - value,
            _ => value << (kind & 63),
        }
    }
}

impl Platter {
    /// Writes sectors of a page; the mask says which.
    fn write(&self, offset: usize, page: &[u8], mask: u8) {
        let mut bytes = self.bytes.borrow_mut();
        for (index, sector) in page.chunks(SECTOR_BYTES).enumerate() {
            let at = offset + index * SECTOR_BYTES;
            if mask & (1 << index) != 0 && at + sector.len() <= bytes.len() {
                bytes[at..at + sector.len()].copy_from_slice(sector);
            }
        }
    }

    fn made_by(orders: &mut Orders<'_>) -> Self {
        let length = orders.short() % (MAX_PAGES * PAGE_BYTES + 1);
        let platter = Self { bytes: RefCell::new(vec![0; length]) };
        while !orders.0.is_empty() {
            platter.obey(orders);
        }
        platter
    }

    fn obey(&self, orders: &mut Orders<'_>) {
        let slot = |orders: &mut Orders<'_>| usize::from(orders.byte()) % MAX_PAGES * PAGE_BYTES;
        match orders.byte() % 5 {
            0 => {
                let (offset, mask) = (slot(orders), orders.byte());
                self.write(offset, &superblock_page(orders), mask);
            }
            1 => {
                let (offset, mask) = (slot(orders), orders.byte());
                self.write(offset, &map_page(orders), mask);
            }
            2 => {
                let (at, bit) = (orders.short(), orders.byte() % 8);
                if let Some(byte) = self.bytes.borrow_mut().get_mut(at) {
                    *byte ^= 1 << bit;
                }
            }
            3 => {
                let (at, len) = (orders.short(), usize::from(orders.byte()));
                let garbage: Vec<u8> = (0..len).map(|_| orders.byte()).collect();
                if let Some(place) = self.bytes.borrow_mut().get_mut(at..at + len) {
                    place.copy_from_slice(&garbage);
                }
            }
            _ => {
                let (from, to) = (slot(orders), slot(orders));
                let page = self.bytes.borrow().get(from..from + PAGE_BYTES).map(<[u8]>::to_vec);
                page.into_iter().for_each(|page| self.write(to, &page, !0));
            }
        }
    }

    fn recover(&self) -> Option<Recovered> {
        Recovery::new(Path::new("platter"), self).run().ok()
    }

    fn copy(&self, pages: u64, page: u64, copy: u64) -> CopyState {
        let mut bytes = vec![0; PAGE_BYTES];
        self.read_exact_at(&mut bytes, map_offset(pages, page, copy)).unwrap();
        SealedPage::decode(&bytes, KIND_MAP, page)
    }
}

fn uuid_of(byte: u8) -> Uuid {
    Uuid::from_u128(u128::from(byte & 3))
}

fn superblock_page(orders: &mut Orders<'_>) -> Vec<u8> {
    let sequence = orders.number();
    let form = orders.byte();
    if form >= 0xf0 {
        // Not what we write: any text, or another version.
        let payload = (0..orders.byte()).map(|_| orders.byte()).collect();
        let (kind, version) = (u32::from(orders.byte() & 3), u32::from(orders.byte() & 3));
        return SealedPage { kind, version, uuid: uuid_of(0), epoch: 0, index: 0, sequence, payload }.encode();
    }
    let superblock = Superblock {
        uuid: uuid_of(form),
        epoch: orders.number(),
        size_bytes: if form & 4 == 0 { orders.short() as u64 * 4096 } else { orders.number() << 9 },
        block_bytes: if form & 8 == 0 { 4096 } else { orders.number() },
        source: "nbd://host/disk".into(),
        source_identity: "image:0".into(),
        state: if form & 16 == 0 { CacheState::Active } else { CacheState::Complete },
        dirty_exact: form & 32 == 0,
        clean: form & 64 == 0,
        boot_id: String::new(),
        gift: None,
        floor: 0,
        given_to: None,
        released: false,
    };
    encode_superblock(&superblock, sequence)
}

fn map_page(orders: &mut Orders<'_>) -> Vec<u8> {
    let (sequence, index, form) = (orders.number(), orders.number(), orders.byte());
    let kind = if form & 0x40 == 0 { KIND_MAP } else { u32::from(orders.byte()) };
    let mut payload = vec![if form & 0x80 == 0 { 0 } else { 0xff }; 2 * PAGE_WORDS * 8];
    for _ in 0..orders.byte() % 16 {
        let at = orders.short() % payload.len();
        payload[at] = orders.byte();
    }
    SealedPage { kind, version: 1, uuid: uuid_of(form), epoch: 1, index, sequence, payload }.encode()
}

// ---- what must hold -------------------------------------------------------------------------------------------------

fn geometry_of(superblock: &Superblock) -> Geometry {
    Geometry::new(superblock.size_bytes, superblock.block_bytes).expect("an impossible geometry is refused")
}

/// The bits of all copies that are good, within the device.
fn bits_of(copies: &[CopyState; 2], page: u64, superblock: &Superblock) -> PageImage {
    let blocks = geometry_of(superblock).blocks();
    let mut image = PageImage::empty(page);
    for copy in copies {
        let CopyState::Valid(sealed) = copy else { continue };
        let mut words = sealed.payload.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        for word in image.present.iter_mut().chain(&mut image.dirty) {
            *word |= words.next().unwrap();
        }
    }
    for bit in 0..PAGE_BLOCKS {
        if page * PAGE_BLOCKS + bit >= blocks {
            let (word, mask) = (bit as usize / 64, !(1 << (bit % 64)));
            image.present[word] &= mask;
            image.dirty[word] &= mask;
        }
    }
    image
}

/// Is this copy worth nothing, and may have been newer than that one?
fn may_have_been_newer(damaged: &CopyState, other: &CopyState) -> bool {
    let CopyState::Damaged(named) = damaged else { return false };
    match (named, other) {
        (Some(named), CopyState::Valid(other)) => *named >= other.sequence as u32,
        _ => true,
    }
}

/// Compares what was loaded with what stands there.
fn check_loaded(platter: &Platter, recovered: &Recovered) {
    let superblock = &recovered.superblock;
    let pages = Maps::pages(geometry_of(superblock));
    assert!(file_bytes(pages) <= platter.size_bytes().unwrap(), "a file that is too short was loaded");
    for page in 0..pages {
        let copies = [0, 1].map(|copy| match platter.copy(pages, page, copy) {
            // Of another cache.
            CopyState::Valid(found) if found.uuid != superblock.uuid => CopyState::Damaged(None),
            state => state,
        });
        let [first, second] = &copies;
        assert!(
            !may_have_been_newer(first, second) && !may_have_been_newer(second, first),
            "map page {page} was loaded, though its newest copy may be lost: {copies:?}"
        );
        let want = bits_of(&copies, page, superblock);
        let found = recovered.pages.iter().find(|image| image.page == page);
        assert_eq!(found.unwrap_or(&PageImage::empty(page)), &want, "map page {page}");
    }
}

/// All bits of `before` are there.
fn check_kept(before: &[PageImage], after: &[PageImage]) {
    let empty = PageImage::empty(0);
    for old in before {
        let new = after.iter().find(|new| new.page == old.page).unwrap_or(&empty);
        let kept = |old: &[u64], new: &[u64]| old.iter().zip(new).all(|(old, new)| old & new == *old);
        assert!(kept(&old.present, &new.present) && kept(&old.dirty, &new.dirty), "map page {} lost bits", old.page);
    }
}

/// A process goes on with what it found: two commits, in the second one of which the power is cut.
fn check_commits(platter: &Platter, found: &Recovered, cut: u8) {
    let geometry = geometry_of(&found.superblock);
    let pages = Maps::pages(geometry);
    let mut target = Target { platter, pages };
    let mut committer = Committer::new(found);
    let mut known = found.pages.clone();
    for fresh_block in [0, geometry.blocks() - 1] {
        let mut fresh = PageImage::empty(fresh_block / PAGE_BLOCKS);
        fresh.present[(fresh_block % PAGE_BLOCKS / 64) as usize] |= 1 << (fresh_block % 64);
        let words: Box<[AtomicU64]> = (0..Maps::words_needed(geometry)).map(|_| AtomicU64::new(0)).collect();
        known.iter().chain([&fresh]).for_each(|image| load_page(&words, image));
        let maps = Maps::new(geometry, Box::new(words));
        if fresh_block == 0 {
            committer.commit(&maps, &mut target).expect("nothing fails here");
            let again = platter.recover().expect("what was just committed is whole");
            check_loaded(platter, &again);
            check_kept(&known, &again.pages);
            known = again.pages;
            continue;
        }
        let mut commit = committer.begin(&maps);
        while let Some(step) = committer.next_step(&mut commit, &maps) {
            let Step::WriteMap { page, copy, bytes } = step else { continue };
            platter.write(map_offset(pages, page, copy) as usize, &bytes, cut);
            let after = platter.recover().expect("a power cut is no damage");
            check_loaded(platter, &after);
            check_kept(&known, &after.pages);
        }
    }
}

pub fn check(input: &[u8]) {
    let mut orders = Orders(input);
    let cut = orders.byte();
    let platter = Platter::made_by(&mut orders);
    if let Some(recovered) = platter.recover() {
        check_loaded(&platter, &recovered);
        check_commits(&platter, &recovered, cut);
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let length = |bytes: usize| (bytes as u16).to_be_bytes().to_vec();
    // Both copies of the superblock; 100 blocks of 4 KiB.
    let superblocks = [0, 0, 0xff, 0, 1, 1, 0, 1, 0, 100, 0, 1, 0xff, 0, 2, 1, 0, 1, 0, 100];
    let map = |slot: u8, mask: u8, sequence: u8, bits: u8| {
        vec![1, slot, mask, 0, sequence, 0, 0, 1, 2, 0, 0, bits, 0, 5, 0xff]
    };
    let file =
        |cut: u8, orders: &[&[u8]]| [&[cut][..], &length(4 * PAGE_BYTES), &superblocks, &orders.concat()].concat();
    vec![
        file(0xff, &[]),
        file(0x0f, &[&map(2, 0xff, 1, 0x55)]),
        file(0x01, &[&map(2, 0xff, 1, 0x55), &map(3, 0xff, 2, 0xff)]),
        file(0xaa, &[&map(2, 0xff, 3, 0x55), &map(3, 0x0f, 4, 0xff)]),
        file(0x80, &[&map(2, 0xff, 3, 0x55), &map(3, 0xff, 4, 0xff), &[2, 0x30, 0x10, 3]]),
        file(0x33, &[&map(2, 0xff, 3, 0x55), &map(3, 0xff, 4, 0xff), &[2, 0x20, 0x10, 3]]),
        file(0x0f, &[&map(2, 0xff, 3, 0x55), &[4, 2, 3]]),
        // Two map pages: 16,000 blocks.
        [
            &[0x0f][..],
            &length(6 * PAGE_BYTES),
            &[0, 0, 0xff, 0, 9, 1, 0, 1, 0x3e, 0x80],
            &map(2, 0xff, 1, 1),
            &map(4, 0xff, 2, 3),
            &[1, 3, 0xff, 0, 1, 0, 1, 1, 1, 0, 0, 1],
        ]
        .concat(),
        [&[1][..], &length(100)].concat(),
    ]
}
