//! What a start makes of two copies of a map page: every pair of states, as the table in docs/FORMAT.md says.

use std::fs;

use blkferry::cache::{MetadataFile, SealedPage};
use blkferry::engine::PageImage;

use crate::golden::{superblock, superblock_page, uuid};

/// What stands where a copy belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Blank,
    /// Whole; the sequence is also the number of bits in it.
    Whole(u64),
    /// Some sectors of one write, some of an older one.
    Torn {
        old: u64,
        new: u64,
    },
    /// Whole, then a bit was flipped.
    Flipped(u64),
    /// Whole, but of another cache.
    Foreign(u64),
}

fn page(sequence: u64, uuid: uuid::Uuid) -> Vec<u8> {
    let mut payload = ((1u64 << sequence) - 1).to_le_bytes().to_vec();
    payload.resize(3968, 0);
    SealedPage { kind: 2, version: 1, uuid, epoch: 7, index: 0, sequence, payload }.encode()
}

fn bytes(copy: Page) -> Vec<u8> {
    match copy {
        Page::Blank => vec![0; 4096],
        Page::Whole(sequence) => page(sequence, uuid()),
        Page::Torn { old, new } => {
            let old = if old == 0 { vec![0; 4096] } else { page(old, uuid()) };
            [&page(new, uuid())[..512], &old[512..]].concat()
        }
        Page::Flipped(sequence) => {
            let mut bytes = page(sequence, uuid());
            bytes[700] ^= 4;
            bytes
        }
        Page::Foreign(sequence) => page(sequence, uuid::Uuid::from_u128(99)),
    }
}

/// The bits that are read, and whether something is said about it. `None`: refused.
fn recovered(first: Page, second: Page) -> Option<(u64, bool)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let mut only_one = superblock();
    only_one.size_bytes = 1 << 20;
    MetadataFile::create(&path, &only_one).unwrap();
    let superblock = fs::read(&path).unwrap()[..8192].to_vec();
    assert_eq!(superblock[..64], superblock_page()[..64]);
    fs::write(&path, [superblock, bytes(first), bytes(second)].concat()).unwrap();
    let before = fs::read(&path).unwrap();
    let opened = MetadataFile::open(&path);
    assert_eq!(before, fs::read(&path).unwrap(), "reading changes nothing");
    match opened {
        Ok((_, recovered)) => {
            let empty = PageImage::empty(0);
            let image = recovered.pages.first().unwrap_or(&empty);
            Some((image.present[0], !recovered.notes.is_empty()))
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("bytes 0..1048576 of the disk") && text.lines().count() == 1, "{text}");
            None
        }
    }
}

#[test]
fn every_pair_of_copies_is_judged_as_the_document_says() {
    use Page::{Blank, Flipped, Foreign, Torn, Whole};
    let said = true;
    let silent = false;
    let table = [
        // Nothing was ever committed, or the first commit was cut.
        (Blank, Blank, Some((0, silent))),
        (Torn { old: 0, new: 1 }, Blank, Some((0, said))),
        // One commit, then the second.
        (Whole(1), Blank, Some((0b1, silent))),
        (Whole(1), Torn { old: 0, new: 2 }, Some((0b1, said))),
        (Whole(1), Whole(2), Some((0b11, silent))),
        (Torn { old: 1, new: 3 }, Whole(2), Some((0b11, said))),
        (Whole(3), Whole(2), Some((0b111, silent))),
        (Whole(3), Torn { old: 2, new: 4 }, Some((0b111, said))),
        // Damage to the older copy loses nothing.
        (Flipped(1), Whole(2), Some((0b11, said))),
        (Whole(3), Flipped(2), Some((0b111, said))),
        // Damage to the newer one, or to both, may have lost a promise.
        (Whole(1), Flipped(2), None),
        (Flipped(3), Whole(2), None),
        (Flipped(1), Blank, None),
        (Flipped(1), Flipped(2), None),
        (Flipped(1), Torn { old: 0, new: 2 }, None),
        (Torn { old: 1, new: 3 }, Flipped(2), None),
        (Torn { old: 1, new: 3 }, Torn { old: 2, new: 4 }, None),
        // A page of another cache is no page of this one.
        (Whole(1), Foreign(2), None),
        (Foreign(1), Blank, None),
    ];
    for (first, second, want) in table {
        assert_eq!(recovered(first, second), want, "{first:?}, {second:?}");
    }
}

#[test]
fn bits_behind_the_end_of_the_disk_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let mut short = superblock();
    // 70 blocks, the last one of a single sector.
    short.size_bytes = 69 * 4096 + 512;
    MetadataFile::create(&path, &short).unwrap();
    let mut file = fs::read(&path).unwrap();
    let page =
        SealedPage { kind: 2, version: 1, uuid: uuid(), epoch: 7, index: 0, sequence: 1, payload: vec![0xff; 3968] };
    file[8192..12288].copy_from_slice(&page.encode());
    fs::write(&path, file).unwrap();
    let (_, recovered) = MetadataFile::open(&path).unwrap();
    let image = &recovered.pages[0];
    for words in [image.present, image.dirty] {
        assert_eq!((words[0], words[1], words[2], words[247]), (u64::MAX, 0x3f, 0, 0));
    }
}
