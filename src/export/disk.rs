//! The image as an NBD disk.

use std::cell::RefCell;
use std::sync::Arc;

use super::giver::Giver;
use super::image::{Image, ImageError};
use crate::engine::ByteRange;
use crate::nbd::{Ask, DEFAULT_MAX_PAYLOAD, ExportInfo, NbdError, Told, TransmissionFlags};
use crate::server::{Disk, DiskExtent, hash_by_reading, without_zeros};
use crate::uring::{Buffer, Part, Residency};

/// An image on offer.
pub struct ExportDisk {
    image: Image,
    giver: Option<Arc<Giver>>,
    /// One step at a time, however many are asked for: each has a thread.
    handing_off: async_lock::Mutex<()>,
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
            tells_hot: image.io().tells_residency(),
        };
        Ok(Self { image, giver, handing_off: async_lock::Mutex::new(()), info: RefCell::new(info) })
    }

    async fn read_bytes(&self, range: ByteRange) -> Result<Buffer, NbdError> {
        let len = range.len() as usize;
        let (result, bytes) = self.image.io().read_exact_at(Buffer::to_fill(len), 0..len, range.start).await;
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

    async fn hot(&self, range: ByteRange, max: usize) -> Result<Vec<(u64, Residency)>, NbdError> {
        self.image.io().residency(range.start..range.end, max).await.map_err(|_| NbdError::Io)
    }

    async fn hand_off(&self, ask: Ask) -> Result<Told, NbdError> {
        let giver = self.giver.clone().ok_or(NbdError::NotSup)?;
        let _turn = self.handing_off.lock().await;
        giver.hand_off(self.image.clone(), ask).await
    }

    async fn hashes(&self, range: ByteRange, piece_bytes: u32) -> Result<Vec<[u8; 32]>, NbdError> {
        hash_by_reading(self, range, piece_bytes).await
    }
}
