//! The sealed page: 4096 bytes on disk that tell a torn write from damage.
//!
//! Each of its eight sectors carries the sequence number and a checksum of its own. A write that a power
//! cut tore leaves sectors that are each whole but of different sequences; a sector whose own checksum is
//! wrong was damaged after it was written. The difference matters: a torn page was never promised to
//! anybody, a damaged one may have been. Byte by byte in docs/FORMAT.md.

use uuid::Uuid;

/// Bytes of a sealed page.
pub const PAGE_BYTES: usize = 4096;
/// Bytes that a sealed page carries.
pub const PAYLOAD_BYTES: usize = PAGE_BYTES - HEADER_BYTES - SECTORS * SEAL_BYTES;

const SECTOR_BYTES: usize = 512;
const SECTORS: usize = PAGE_BYTES / SECTOR_BYTES;
const HEADER_BYTES: usize = 64;
const SEAL_BYTES: usize = 8;
const SEAL_AT: usize = SECTOR_BYTES - SEAL_BYTES;
const MAGIC: &[u8; 8] = b"BLKFERRY";
/// No page is written so often. There has to be a next one after any that is found.
const MAX_SEQUENCE: u64 = u64::MAX >> 1;
static BLANK: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// What a sealed page holds and where it belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedPage {
    /// What it is: superblock or map.
    pub kind: u32,
    /// Format version of the writer.
    pub version: u32,
    /// The cache that it belongs to.
    pub uuid: Uuid,
    /// Epoch in which it was written.
    pub epoch: u64,
    /// Which of its kind.
    pub index: u64,
    /// Grows with each write of this page; the low 32 bits stand in each sector.
    pub sequence: u64,
    /// The contents, [`PAYLOAD_BYTES`] long.
    pub payload: Vec<u8>,
}

/// What was found where a copy of a page belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyState {
    /// Never written.
    Blank,
    /// As it was written.
    Valid(SealedPage),
    /// A write that did not come to its end; what it was to say was never promised. The newest sequence
    /// (low bits) in it: it must not be used again, or sectors of two such writes could pass for one.
    Torn(u32),
    /// Changed after it was written. The newest sequence (low bits) that its good sectors name, if any.
    Damaged(Option<u32>),
}

fn payload_range(sector: usize) -> std::ops::Range<usize> {
    let start = if sector == 0 { HEADER_BYTES } else { 0 };
    sector * SECTOR_BYTES + start..sector * SECTOR_BYTES + SEAL_AT
}

/// What a page carries, whatever its seals say.
pub(super) fn payload(bytes: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(PAYLOAD_BYTES);
    (0..SECTORS).for_each(|sector| payload.extend_from_slice(&bytes[payload_range(sector)]));
    payload
}

/// A sector of another page, or at another place in this one, must not pass.
fn checksum(kind: u32, index: u64, sector: usize, bytes: &[u8]) -> u32 {
    let mut place = [0; 16];
    place[..4].copy_from_slice(&kind.to_le_bytes());
    place[4..12].copy_from_slice(&index.to_le_bytes());
    place[12..].copy_from_slice(&(sector as u32).to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c(&place), &bytes[..SECTOR_BYTES - 4])
}

impl SealedPage {
    /// The page as it goes to disk. A shorter payload is padded with zeros.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.payload.len() <= PAYLOAD_BYTES, "the caller keeps to the size of a page");
        let mut out = vec![0; PAGE_BYTES];
        out[0..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&self.kind.to_le_bytes());
        out[12..16].copy_from_slice(&self.version.to_le_bytes());
        out[16..32].copy_from_slice(self.uuid.as_bytes());
        out[32..40].copy_from_slice(&self.epoch.to_le_bytes());
        out[40..48].copy_from_slice(&self.index.to_le_bytes());
        out[48..56].copy_from_slice(&self.sequence.to_le_bytes());
        let mut rest = &self.payload[..];
        for sector in 0..SECTORS {
            let range = payload_range(sector);
            let (now, later) = rest.split_at(rest.len().min(range.len()));
            out[range.start..range.start + now.len()].copy_from_slice(now);
            rest = later;
            let bytes = &mut out[sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES];
            bytes[SEAL_AT..SEAL_AT + 4].copy_from_slice(&(self.sequence as u32).to_le_bytes());
            let sum = checksum(self.kind, self.index, sector, bytes);
            bytes[SEAL_AT + 4..].copy_from_slice(&sum.to_le_bytes());
        }
        out
    }

    /// Judges the bytes found where page `index` of `kind` belongs.
    pub fn decode(bytes: &[u8], kind: u32, index: u64) -> CopyState {
        assert_eq!(bytes.len(), PAGE_BYTES, "a copy is read whole");
        if bytes == BLANK {
            return CopyState::Blank;
        }
        let mut sequences = Vec::with_capacity(SECTORS);
        let mut damaged = false;
        for (sector, bytes) in bytes.chunks_exact(SECTOR_BYTES).enumerate() {
            if u32_at(bytes, SEAL_AT + 4) == checksum(kind, index, sector, bytes) {
                sequences.push(u32_at(bytes, SEAL_AT));
            } else if bytes.iter().all(|&b| b == 0) {
                // Not yet reached by the first write of this copy.
                sequences.push(0);
            } else {
                damaged = true;
            }
        }
        let newest = sequences.iter().copied().max();
        if damaged {
            return CopyState::Damaged(newest);
        }
        let header = Self::header(bytes);
        if sequences.iter().any(|&s| s != header.sequence as u32) {
            return CopyState::Torn(newest.unwrap_or(0));
        }
        let is_ours = &bytes[..8] == MAGIC && header.kind == kind && header.index == index;
        if !is_ours || header.sequence > MAX_SEQUENCE {
            return CopyState::Damaged(None);
        }
        CopyState::Valid(Self { payload: payload(bytes), ..header })
    }

    fn header(bytes: &[u8]) -> Self {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[16..32]);
        Self {
            kind: u32_at(bytes, 8),
            version: u32_at(bytes, 12),
            uuid: Uuid::from_bytes(uuid),
            epoch: u64_at(bytes, 32),
            index: u64_at(bytes, 40),
            sequence: u64_at(bytes, 48),
            payload: Vec::new(),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(sequence: u64, fill: u8) -> SealedPage {
        let payload = vec![fill; PAYLOAD_BYTES];
        SealedPage { kind: 7, version: 1, uuid: Uuid::from_u128(9), epoch: 1, index: 3, sequence, payload }
    }

    #[test]
    fn every_flipped_bit_is_damage_and_every_tear_is_a_tear() {
        let old = page(4, 1).encode();
        let new = page(6, 2).encode();
        assert_eq!(SealedPage::decode(&new, 7, 3), CopyState::Valid(page(6, 2)));
        for bit in 0..PAGE_BYTES * 8 {
            let mut bad = new.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(SealedPage::decode(&bad, 7, 3), CopyState::Damaged(Some(6))), "bit {bit}");
        }
        let torn = |before: &[u8], new: &[u8], written: u32| {
            let mut torn = before.to_vec();
            for sector in (0..SECTORS).filter(|s| written & (1 << s) != 0) {
                let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
                torn[range.clone()].copy_from_slice(&new[range]);
            }
            SealedPage::decode(&torn, 7, 3)
        };
        let blank = vec![0; PAGE_BYTES];
        for written in 1..255u32 {
            assert_eq!(torn(&old, &new, written), CopyState::Torn(6), "sectors {written:#b}");
            assert_eq!(torn(&blank, &new, written), CopyState::Torn(6), "sectors {written:#b} of the first write");
        }
        assert_eq!(SealedPage::decode(&[0; PAGE_BYTES], 7, 3), CopyState::Blank);
        // The right page in the wrong place is not taken for the page of that place.
        assert!(matches!(SealedPage::decode(&new, 7, 4), CopyState::Damaged(None)));
        assert!(matches!(SealedPage::decode(&new, 8, 3), CopyState::Damaged(None)));
    }

    #[test]
    fn a_sequence_that_has_no_next_is_damage() {
        let last = page(MAX_SEQUENCE, 1);
        assert_eq!(SealedPage::decode(&last.encode(), 7, 3), CopyState::Valid(last));
        for sequence in [MAX_SEQUENCE + 1, u64::MAX] {
            assert_eq!(SealedPage::decode(&page(sequence, 1).encode(), 7, 3), CopyState::Damaged(None));
        }
    }
}
