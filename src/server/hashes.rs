//! Hashes of a disk that can only be read.

use super::disk::Disk;
use crate::engine::ByteRange;
use crate::nbd::NbdError;

/// Piece in which a range is read to be hashed.
pub(super) const READ_BYTES: u64 = 1 << 20;
/// Longest range that one request for hashes may name.
const MAX_HASHED_BYTES: u64 = 64 << 20;

/// BLAKE3 hashes of a range, one for each `piece_bytes`, of what is read.
pub async fn hash_by_reading<D: Disk>(disk: &D, range: ByteRange, piece_bytes: u32) -> Result<Vec<[u8; 32]>, NbdError> {
    if range.len() > MAX_HASHED_BYTES {
        return Err(NbdError::Overflow);
    }
    let mut hashes = Vec::with_capacity(range.len().div_ceil(u64::from(piece_bytes)) as usize);
    let mut at = range.start;
    while at < range.end {
        let len = READ_BYTES.min(range.end - at);
        let mut bytes = Vec::with_capacity(len as usize);
        disk.read(ByteRange::new(at, len)).await?.iter().for_each(|part| part.append_to(&mut bytes));
        hashes.extend(bytes.chunks(piece_bytes as usize).map(|piece| *blake3::hash(piece).as_bytes()));
        at += len;
    }
    Ok(hashes)
}
