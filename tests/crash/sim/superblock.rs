//! The superblock under power cuts: after each of them it is the old one or the new one.

use std::fs;

use blkferry::cache::{Committer, MetadataFile, PAGE_BYTES};
use blkferry::engine::Geometry;

use super::platter::{memory_dir, superblock};
use crate::rng::Rng;

/// What a power cut makes of a page that is being written: the sectors of `mask` are new.
fn torn(before: &[u8], after: &[u8], mask: u32) -> Vec<u8> {
    let pieces = before.chunks(512).zip(after.chunks(512)).enumerate();
    let first = (0..before.len() / 512).find(|at| before[at * 512..][..512] != after[at * 512..][..512]).unwrap_or(0);
    let page = first * 512 / PAGE_BYTES * 8;
    let is_new = |at: usize| at >= page && at < page + 8 && mask & (1 << (at - page)) != 0;
    pieces.flat_map(|(at, (old, new))| if is_new(at) { new } else { old }.iter().copied()).collect()
}

#[test]
fn a_torn_superblock_is_the_old_one() {
    let dir = memory_dir();
    let path = dir.path().join("metadata");
    let first = superblock(Geometry::new(1 << 20, 4096).unwrap());
    let (mut file, mut recovered) = MetadataFile::create(&path, &first).unwrap();
    let mut old = first;
    let mut rng = Rng::new(0, 300);
    for round in 0..20u64 {
        let mut committer = Committer::new(&recovered);
        let before = fs::read(&path).unwrap();
        // Longer and shorter than before, so that a mix of both is no good JSON.
        let source = format!("nbd://host/{}", "x".repeat(rng.below(1000) as usize));
        committer.update(&file, |superblock| (superblock.source, superblock.epoch) = (source, round)).unwrap();
        let after = fs::read(&path).unwrap();
        for mask in 0..256 {
            fs::write(&path, torn(&before, &after, mask)).unwrap();
            let found = MetadataFile::open(&path).map(|(_, recovered)| recovered.superblock);
            let found = found.unwrap_or_else(|e| panic!("sectors {mask:#010b} of a superblock were written: {e}"));
            // The sectors behind the text are the same in both but for their seals.
            let want = if mask == 255 { committer.superblock() } else { &old };
            assert_eq!(&found, want, "sectors {mask:#010b}");
        }
        fs::write(&path, &after).unwrap();
        old = committer.superblock().clone();
        (file, recovered) = MetadataFile::open(&path).unwrap();
    }
}

/// Two power cuts in a row, each in the middle of a write of the same page: sectors of the first write must
/// not pass for sectors of the second.
#[test]
fn two_torn_superblocks_do_not_make_a_whole_one() {
    let dir = memory_dir();
    let path = dir.path().join("metadata");
    let old = superblock(Geometry::new(1 << 20, 4096).unwrap());
    MetadataFile::create(&path, &old).unwrap();
    let fresh = fs::read(&path).unwrap();
    for mask in 1..255 {
        fs::write(&path, &fresh).unwrap();
        let (file, recovered) = MetadataFile::open(&path).unwrap();
        let mut committer = Committer::new(&recovered);
        committer.update(&file, |superblock| superblock.source = format!("nbd://a/{}", "x".repeat(600))).unwrap();
        let first_cut = torn(&fresh, &fs::read(&path).unwrap(), mask);
        fs::write(&path, &first_cut).unwrap();

        let (file, recovered) = MetadataFile::open(&path).unwrap();
        assert_eq!(recovered.superblock, old);
        let mut committer = Committer::new(&recovered);
        committer.update(&file, |superblock| superblock.source = format!("nbd://b/{}", "y".repeat(700))).unwrap();
        let second_cut = torn(&first_cut, &fs::read(&path).unwrap(), !mask & 0xff);
        fs::write(&path, &second_cut).unwrap();

        let found = MetadataFile::open(&path).map(|(_, recovered)| recovered.superblock);
        let found = found.unwrap_or_else(|e| panic!("sectors {mask:#010b}, then the others: {e}"));
        assert_eq!(found, old, "sectors {mask:#010b}, then the others");
    }
}
