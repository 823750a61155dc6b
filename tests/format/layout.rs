//! Where the pages lie, the live map, and the identity of a disk.

use std::fs;
use std::io;
use std::sync::atomic::AtomicU64;

use blkferry::cache::{Committer, Durable, MetadataFile};
use blkferry::engine::{Geometry, Maps, PageImage, load_page};
use blkferry::identity::{IdentityHasher, sample_ranges};

use crate::case::{Case, live_path, qemu_io, superblock_of};
use crate::common::make_image;
use crate::golden::{
    BLOCKS, map_image, map_page, second_map_page, superblock, superblock_page, superblock_page_complete,
};
use crate::hex::assert_bytes;

/// Writes down what a commit does.
#[derive(Default)]
struct Notes {
    steps: Vec<String>,
    pages: Vec<(u64, u64, Vec<u8>)>,
}

impl Durable for Notes {
    fn sync_data(&mut self) -> io::Result<()> {
        self.steps.push("sync data".into());
        Ok(())
    }

    fn write_map(&mut self, page: u64, copy: u64, bytes: &[u8]) -> io::Result<()> {
        self.steps.push(format!("write page {page}, copy {copy}"));
        self.pages.push((page, copy, bytes.to_vec()));
        Ok(())
    }

    fn sync_metadata(&mut self) -> io::Result<()> {
        self.steps.push("sync metadata".into());
        Ok(())
    }
}

fn geometry() -> Geometry {
    Geometry::new(BLOCKS * 4096, 4096).unwrap()
}

fn maps_with(images: &[PageImage]) -> Maps {
    let words: Box<[AtomicU64]> = (0..Maps::words_needed(geometry())).map(|_| AtomicU64::new(0)).collect();
    images.iter().for_each(|image| load_page(&words, image));
    Maps::new(geometry(), Box::new(words))
}

#[test]
fn a_new_metadata_file_is_a_superblock_and_blank_pages() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    MetadataFile::create(&path, &superblock()).unwrap();
    // Two superblocks, two map pages, two copies of them.
    let mut want = vec![0; 6 * 4096];
    want[..4096].copy_from_slice(&superblock_page());
    assert_bytes(&fs::read(&path).unwrap(), &want);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something else was left behind");
}

#[test]
fn a_changed_superblock_goes_to_the_other_copy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let (file, recovered) = MetadataFile::create(&path, &superblock()).unwrap();
    let mut committer = Committer::new(&recovered);
    let change = |superblock: &mut blkferry::cache::Superblock| {
        superblock.state = blkferry::cache::CacheState::Complete;
        superblock.clean = true;
    };
    committer.update(&file, change).unwrap();
    let mut want = vec![0; 6 * 4096];
    want[..4096].copy_from_slice(&superblock_page());
    want[4096..8192].copy_from_slice(&superblock_page_complete());
    assert_bytes(&fs::read(&path).unwrap(), &want);
    // What says nothing new is not written.
    committer.update(&file, change).unwrap();
    assert_bytes(&fs::read(&path).unwrap(), &want);
    committer.update(&file, |superblock| *superblock = crate::golden::superblock()).unwrap();
    let (_, recovered) = MetadataFile::open(&path).unwrap();
    assert_eq!(recovered.superblock, superblock());
    assert_bytes(&fs::read(&path).unwrap()[4096..8192], &superblock_page_complete());
}

#[test]
fn map_pages_and_the_order_of_a_commit() {
    let dir = tempfile::tempdir().unwrap();
    let (_, recovered) = MetadataFile::create(&dir.path().join("m"), &superblock()).unwrap();
    let mut committer = Committer::new(&recovered);
    let mut second = PageImage::empty(1);
    second.present[0] = 1;
    let mut notes = Notes::default();
    committer.commit(&maps_with(&[map_image(), second]), &mut notes).unwrap();
    // What the process found is made durable before anything is written over.
    let steps = ["sync data", "sync metadata", "write page 0, copy 0", "write page 1, copy 0", "sync metadata"];
    assert_eq!(notes.steps, steps);
    assert_bytes(&notes.pages[0].2, &map_page(1));
    assert_bytes(&notes.pages[1].2, &second_map_page());
    // The next writes go over the older copies.
    let mut notes = Notes::default();
    committer.commit(&maps_with(&[map_image()]), &mut notes).unwrap();
    assert_eq!(notes.steps, ["sync data", "write page 0, copy 1", "sync metadata"]);
    assert_bytes(&notes.pages[0].2, &map_page(2));
    let mut notes = Notes::default();
    committer.commit(&maps_with(&[map_image()]), &mut notes).unwrap();
    assert_eq!(notes.steps, ["sync data", "write page 0, copy 0", "sync metadata"]);
    // Nothing changed: the data alone.
    let mut notes = Notes::default();
    committer.commit(&maps_with(&[]), &mut notes).unwrap();
    assert_eq!(notes.steps, ["sync data"]);
}

#[test]
fn a_metadata_file_written_by_hand_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let pages =
        [superblock_page(), superblock_page_complete(), map_page(1), second_map_page(), map_page(2), vec![0; 4096]];
    fs::write(&path, pages.concat()).unwrap();
    let (_, recovered) = MetadataFile::open(&path).unwrap();
    assert!(recovered.superblock.clean, "the one with the higher sequence counts");
    let mut second = PageImage::empty(1);
    second.present[0] = 1;
    assert_eq!(recovered.pages, [map_image(), second]);
    assert!(recovered.notes.is_empty(), "{:?}", recovered.notes);
}

#[test]
fn the_live_map_is_what_the_document_says() {
    let case = Case::new();
    case.restore();
    let size = 16_000 * 4096;
    let (image, cache) = (case.world.path("larger"), case.world.path("live"));
    make_image(&image, size, &[(0, 1 << 20)]);
    let export = case.world.export(&image);
    let device = case.world.attach(&export.uri, &cache, "live", &["--hydrate", "off"]);
    // Blocks 0 to 3 are written; 64 and 65, and 15 999 of the second page, are only read.
    qemu_io(&device.uri, &["write 0 16k", "read 256k 8k", "read 65531904 4k"]);
    let uuid = superblock_of(&case.world.path("live.ferry")).uuid;
    // A read is answered before its blocks stand in the cache.
    device.wait_for(|status| status["blocks"]["present"] == 7);
    let found = fs::read(live_path(&case.world, uuid)).unwrap();
    device.set("hydrate=auto");
    device.wait_complete();
    device.detach();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    // A UUID as it is printed is a big-endian number; here it stands as two little-endian ones.
    let halves = |text: &str| u128::from_str_radix(&text.trim().replace('-', ""), 16).unwrap();
    let put = |number: u128| [((number >> 64) as u64).to_le_bytes(), (number as u64).to_le_bytes()].concat();
    // Present words of two pages, then as many dirty words.
    let mut want = vec![0; 4096 + 2 * 2 * 248 * 8];
    want[0..8].copy_from_slice(b"BFLIVE01");
    want[8..24].copy_from_slice(&put(halves(&boot)));
    want[24..40].copy_from_slice(&put(halves(&uuid.to_string())));
    want[40..48].copy_from_slice(&size.to_le_bytes());
    want[48..56].copy_from_slice(&4096u64.to_le_bytes());
    let (present, dirty) = (4096, 4096 + 2 * 248 * 8);
    (want[present], want[present + 8], want[present + 15_999 / 8]) = (0b1111, 0b11, 1 << (15_999 % 8));
    want[dirty] = 0b1111;
    assert_bytes(&found, &want);
}

#[test]
fn the_identity_is_what_the_document_says() {
    let size = 100 * 4096 + 512u64;
    let ranges: Vec<(u64, u64)> = sample_ranges(size).map(|range| (range.start, range.end)).collect();
    let starts = [0, 6, 13, 20, 26, 33, 40, 46, 53, 60, 66, 73, 80, 86, 93, 100].map(|unit| unit * 4096);
    let want: Vec<(u64, u64)> = starts.iter().map(|&start| (start, size.min(start + 4096))).collect();
    assert_eq!(ranges, want);
    for modified in [None, Some((1_700_000_000, 123_456_789))] {
        let mut hasher = IdentityHasher::new(size, modified);
        let mut text = b"blkferry identity v1".to_vec();
        text.extend(size.to_le_bytes());
        if let Some((seconds, nanoseconds)) = modified {
            text.extend(seconds.to_le_bytes());
            text.extend(nanoseconds.to_le_bytes());
        }
        for (start, end) in &want {
            let sample = vec![(start / 4096) as u8; (end - start) as usize];
            hasher.sample(&sample);
            text.extend(&sample);
        }
        let kind = if modified.is_some() { "image" } else { "sampled" };
        let identity = hasher.finish(kind);
        assert_eq!(identity, format!("{kind}:{}", &blake3::hash(&text).to_hex()[..32]));
        let pinned = if modified.is_some() { PINNED_IMAGE } else { PINNED_SAMPLED };
        assert_eq!(identity, pinned);
    }
}

const PINNED_IMAGE: &str = "image:ad6e6dcf513987e971908e9a8a2f05b0";
const PINNED_SAMPLED: &str = "sampled:46119e5a1f04965985546fc4cdf3494f";
