//! Single flipped bits, anywhere in a page that is in use.

use std::fs;

use blkferry::cache::{MetadataError, MetadataFile};

use crate::case::Case;
use crate::rng::Rng;

/// Every bit, by the code that reads the file: damage to the newer copy is refused, to the older one is told.
#[test]
fn every_flipped_bit_is_noticed() {
    let case = Case::new();
    let (_, want) = MetadataFile::open(&case.metadata).unwrap();
    let dir = tempfile::Builder::new().prefix("bf").tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("m");
    let mut silent = [0; 4];
    for bit in 0..case.good.1.len() * 8 {
        let page = bit / 8 / 4096;
        let mut bytes = case.good.1.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bytes).unwrap();
        match MetadataFile::open(&path) {
            Ok((_, found)) => {
                assert!(!case.is_newer(page), "bit {bit} of the newer copy (page {page}) was passed over");
                assert_eq!((&found.superblock, &found.pages), (&want.superblock, &want.pages), "bit {bit}");
                silent[page] += u64::from(found.notes.is_empty());
            }
            Err(MetadataError::Damaged { .. }) => {
                assert!(case.is_newer(page), "bit {bit} of the older copy (page {page}) need not end it");
            }
            Err(other) => panic!("bit {bit}: {other}"),
        }
    }
    assert_eq!(silent, [0; 4], "recovered in silence, by page");
}

/// Some of them, by the whole program.
#[test]
fn an_attach_survives_or_refuses_a_flipped_bit() {
    let case = Case::new();
    let first = std::env::var("BLKFERRY_CRASH_FIRST").map_or(0, |text| text.parse().unwrap());
    println!("seed {first}");
    let mut rng = Rng::new(first, 400);
    let (mut refused, mut gone_on) = (0, 0);
    for _ in 0..200 {
        // Also the bytes that matter most: the header, the seals.
        let page = rng.below(4) as usize;
        let byte = match rng.below(4) {
            0 => rng.below(64),
            1 => rng.below(8) * 512 + rng.between(504, 511),
            _ => rng.below(4096),
        };
        let (byte, bit) = (page * 4096 + byte as usize, rng.below(8));
        let what = format!("bit {bit} of byte {byte}");
        case.restore();
        let mut bytes = case.good.1.clone();
        bytes[byte] ^= 1 << bit;
        case.put_metadata(&bytes);
        if case.is_newer(page) {
            case.refused(&what, &["damaged", case.metadata.to_str().unwrap()]);
            refused += 1;
        } else {
            case.goes_on(&what, "damaged");
            gone_on += 1;
        }
    }
    println!("{refused} refused, {gone_on} gone on");
}
