//! What stands where in the metadata file, and how its pages are written: see docs/FORMAT.md.

use uuid::Uuid;

use super::page::{PAGE_BYTES, PAYLOAD_BYTES, SealedPage};
use super::superblock::{FORMAT_VERSION, Superblock};
use crate::engine::PageImage;

pub(super) const KIND_SUPERBLOCK: u32 = 1;
pub(super) const KIND_MAP: u32 = 2;
/// Copies of the superblock come first, then all first copies of the map pages, then all second ones.
pub(super) const SUPERBLOCK_COPIES: u64 = 2;

/// The page as it goes to disk: present words, then dirty words, little-endian.
pub(super) fn encode_map(uuid: Uuid, epoch: u64, sequence: u64, image: &PageImage) -> Vec<u8> {
    let mut payload = Vec::with_capacity(PAYLOAD_BYTES);
    image.present.iter().chain(&image.dirty).for_each(|word| payload.extend_from_slice(&word.to_le_bytes()));
    SealedPage { kind: KIND_MAP, version: FORMAT_VERSION, uuid, epoch, index: image.page, sequence, payload }.encode()
}

/// The page as it goes to disk: JSON, padded with zeros. A new cache's first one has sequence 1, in copy 0.
pub fn encode_superblock(superblock: &Superblock, sequence: u64) -> Vec<u8> {
    let payload = serde_json::to_vec(superblock).expect("plain data serializes");
    assert!(payload.len() <= PAYLOAD_BYTES, "names and URIs are checked to be short before");
    let (uuid, epoch) = (superblock.uuid, superblock.epoch);
    SealedPage { kind: KIND_SUPERBLOCK, version: FORMAT_VERSION, uuid, epoch, index: 0, sequence, payload }.encode()
}

/// Would this superblock fit into its page?
pub(super) fn fits(superblock: &Superblock) -> bool {
    serde_json::to_vec(superblock).is_ok_and(|json| json.len() <= PAYLOAD_BYTES)
}

/// Length of the file for so many map pages.
pub fn file_bytes(pages: u64) -> u64 {
    (SUPERBLOCK_COPIES + 2 * pages) * PAGE_BYTES as u64
}

/// Where a copy of a map page lies, in the file for so many of them.
pub fn map_offset(pages: u64, page: u64, copy: u64) -> u64 {
    (SUPERBLOCK_COPIES + copy * pages + page) * PAGE_BYTES as u64
}
