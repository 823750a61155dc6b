//! The image as an NBD disk.

use std::cell::RefCell;
use std::sync::Arc;

use super::giver::Giver;
use super::image::{Image, ImageError};
use crate::engine::ByteRange;
use crate::nbd::{Ask, DEFAULT_MAX_PAYLOAD, ExportInfo, NbdError, Told, TransmissionFlags};
use crate::server::{Disk, DiskExtent};
use crate::uring::Part;

/// Granule in which zeros are looked for: a run of them crosses as a hole.
const ZERO_GRANULE: usize = 4096;
static ZEROS: [u8; ZERO_GRANULE] = [0; ZERO_GRANULE];
/// Piece in which a range is read to be hashed.
const HASH_READ_BYTES: u64 = 1 << 20;
/// Longest range that one request for hashes may name.
const MAX_HASHED_BYTES: u64 = 64 << 20;

/// An image on offer.
pub struct ExportDisk {
    image: Image,
    giver: Option<Arc<Giver>>,
    info: RefCell<ExportInfo>,
}

impl ExportDisk {
    /// Offers an image under a name; with a `giver`, it can change hands.
    pub fn new(image: Image, giver: Option<Arc<Giver>>, name: String) -> Result<Self, ImageError> {
        let flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::READ_ONLY
            | TransmissionFlags::SEND_DF
            | TransmissionFlags::CAN_MULTI_CONN
            | TransmissionFlags::SEND_CACHE;
        let identity =
            image.identity().map_err(|source| ImageError::Io { path: image.path().into(), action: "read", source })?;
        let info = ExportInfo {
            name,
            description: None,
            size_bytes: image.size_bytes(),
            flags,
            min_block: 1,
            preferred_block: 4096,
            max_block: DEFAULT_MAX_PAYLOAD,
            identity: Some(identity),
            standing: None,
        };
        Ok(Self { image, giver, info: RefCell::new(info) })
    }

    async fn read_bytes(&self, range: ByteRange) -> Result<Vec<u8>, NbdError> {
        let len = range.len() as usize;
        let (result, bytes) = self.image.io().read_exact_at(vec![0; len], 0..len, range.start).await;
        result.map_err(|e| {
            log::error!("image {}: read at {}: {e}", self.image.path().display(), range.start);
            NbdError::Io
        })?;
        Ok(bytes)
    }
}

impl Disk for ExportDisk {
    fn export(&self) -> ExportInfo {
        // Told afresh to every client: one that reconnects must notice that the image was written to.
        match self.image.size_now_bytes().and_then(|size_bytes| Ok((size_bytes, self.image.identity()?))) {
            Ok((size_bytes, identity)) => {
                let mut info = self.info.borrow_mut();
                info.size_bytes = size_bytes;
                info.identity = Some(identity);
                info.standing = self.giver.as_ref().map(|giver| giver.standing());
            }
            Err(e) => log::error!("image {}: cannot be read: {e}", self.image.path().display()),
        }
        self.info.borrow().clone()
    }

    async fn read(&self, range: ByteRange) -> Result<Vec<Part>, NbdError> {
        let bytes = self.read_bytes(range).await?;
        Ok(without_zeros(range.start, bytes))
    }

    async fn prefetch(&self, _range: ByteRange) -> Result<(), NbdError> {
        Ok(())
    }

    async fn extents(&self, range: ByteRange, max: usize) -> Result<Vec<DiskExtent>, NbdError> {
        let extents = self.image.io().extents(range.start..range.end, max);
        Ok(extents.into_iter().map(|e| DiskExtent { len_bytes: e.len_bytes, hole: e.hole, zero: e.hole }).collect())
    }

    async fn hand_off(&self, ask: Ask) -> Result<Told, NbdError> {
        let giver = self.giver.clone().ok_or(NbdError::NotSup)?;
        giver.hand_off(self.image.clone(), ask).await
    }

    async fn hashes(&self, range: ByteRange, piece_bytes: u32) -> Result<Vec<[u8; 32]>, NbdError> {
        if range.len() > MAX_HASHED_BYTES {
            return Err(NbdError::Overflow);
        }
        let mut hashes = Vec::with_capacity(range.len().div_ceil(u64::from(piece_bytes)) as usize);
        let mut at = range.start;
        while at < range.end {
            let len = HASH_READ_BYTES.min(range.end - at);
            let bytes = self.read_bytes(ByteRange::new(at, len)).await?;
            hashes.extend(bytes.chunks(piece_bytes as usize).map(|piece| *blake3::hash(piece).as_bytes()));
            at += len;
        }
        Ok(hashes)
    }
}

/// Cuts what was read into data and runs of zeros, along the granules of the disk.
fn without_zeros(offset_bytes: u64, bytes: Vec<u8>) -> Vec<Part> {
    let bytes = Arc::new(bytes);
    let mut pieces: Vec<(bool, std::ops::Range<usize>)> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let to_boundary = ZERO_GRANULE - ((offset_bytes + at as u64) % ZERO_GRANULE as u64) as usize;
        let end = bytes.len().min(at + to_boundary);
        let zero = bytes[at..end] == ZEROS[..end - at];
        match pieces.last_mut() {
            Some((was_zero, range)) if *was_zero == zero => range.end = end,
            _ => pieces.push((zero, at..end)),
        }
        at = end;
    }
    let piece = |(zero, range): (bool, std::ops::Range<usize>)| match zero {
        true => Part::Zeros(range.len()),
        false => Part::Shared { bytes: bytes.clone(), range },
    };
    pieces.into_iter().map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(offset: u64, bytes: &[u8]) -> Vec<(bool, u64)> {
        let pieces = without_zeros(offset, bytes.to_vec());
        let mut flat = Vec::new();
        pieces.iter().for_each(|part| part.append_to(&mut flat));
        assert_eq!(flat, bytes);
        pieces.iter().map(|p| (matches!(p, Part::Zeros(_)), p.len() as u64)).collect()
    }

    #[test]
    fn runs_of_zeros_become_holes_along_the_granules() {
        let mut bytes = vec![0; 5 * 4096];
        bytes[4096 * 2 + 7] = 1;
        assert_eq!(shape(0, &bytes), [(true, 8192), (false, 4096), (true, 8192)]);
        assert_eq!(shape(0, &[0; 100]), [(true, 100)]);
        // Unaligned: the granules are the disk's, not the request's.
        assert_eq!(shape(4000, &bytes[4000..12000]), [(true, 4192), (false, 3808)]);
    }
}
