//! Payloads of structured reply chunks (spec: "Structured reply types").
//!
//! Encoders append to a buffer of headers, so that data can go out from where it lies. Decoders take exactly the
//! payload that the header announced and allocate no more than that.

use super::consts::{MAX_EXTENTS, MAX_FERRY_HASHES, MAX_NAME, ReplyFlags, StateFlags};
use super::errno::NbdError;
use super::error::ProtocolError;
use super::handoff::{MAX_HANDOFF_LEN, Told};
use super::option::wire_enum;
use super::reply::put_chunk_header;
use super::wire::{Defect, Reader, cut, printable};
use std::fmt;

wire_enum! {
    /// What is in a chunk (spec: "Structured reply types").
    ChunkKind: u16 {
        /// Nothing: the end of a reply.
        None = 0, "NBD_REPLY_TYPE_NONE";
        /// Data of a read.
        OffsetData = 1, "NBD_REPLY_TYPE_OFFSET_DATA";
        /// A part of a read that is all zeros.
        OffsetHole = 2, "NBD_REPLY_TYPE_OFFSET_HOLE";
        /// Extents of one metadata context.
        BlockStatus = 5, "NBD_REPLY_TYPE_BLOCK_STATUS";
        /// Private to blkferry: BLAKE3 hashes of a range.
        FerryHashes = 0x6672, "FERRY_HASHES";
        /// Private to blkferry: what is said to a step of a handoff.
        FerryTold = 0x6673, "FERRY_TOLD";
        /// The request failed.
        Error = 0x8001, "NBD_REPLY_TYPE_ERROR";
        /// The request failed at one place.
        ErrorOffset = 0x8002, "NBD_REPLY_TYPE_ERROR_OFFSET";
    }
}

impl ChunkKind {
    /// Whether this is an error chunk: bit 15 is set, known or not.
    pub const fn is_error(self) -> bool {
        self.to_wire() & (1 << 15) != 0
    }
}

/// Bytes of an `OFFSET_DATA` payload before the data: the offset.
pub const DATA_OFFSET_LEN: usize = 8;

const HOLE_LEN: usize = 12;
/// Bytes of an extent on the wire.
pub const EXTENT_LEN: usize = 8;
/// Bytes of a hash on the wire.
pub const HASH_LEN: usize = 32;
const FERRY_HASHES_HEAD_LEN: usize = 12;
/// Room in an error chunk for the message and what later kinds of error may add.
const MAX_ERROR_LEN: usize = 6 + MAX_NAME + 1024;

/// Whether a chunk of this kind can be `len` bytes long. See [`ReplyHeader::check`](super::ReplyHeader::check).
pub(super) fn check_len(kind: ChunkKind, len: u32, max_payload: u32) -> Result<(), ProtocolError> {
    let (min, step, max) = match kind {
        ChunkKind::None => (0, 1, 0),
        ChunkKind::OffsetData => (DATA_OFFSET_LEN + 1, 1, DATA_OFFSET_LEN + max_payload as usize),
        ChunkKind::OffsetHole => (HOLE_LEN, 1, HOLE_LEN),
        ChunkKind::BlockStatus => (4 + EXTENT_LEN, EXTENT_LEN, 4 + EXTENT_LEN * MAX_EXTENTS),
        ChunkKind::FerryHashes => {
            (FERRY_HASHES_HEAD_LEN + HASH_LEN, HASH_LEN, FERRY_HASHES_HEAD_LEN + HASH_LEN * MAX_FERRY_HASHES)
        }
        ChunkKind::FerryTold => (2, 1, MAX_HANDOFF_LEN),
        ChunkKind::ErrorOffset => (14, 1, MAX_ERROR_LEN),
        kind if kind.is_error() => (6, 1, MAX_ERROR_LEN),
        kind => return Err(ProtocolError::UnexpectedChunk { kind }),
    };
    let len_usize = len as usize;
    if len_usize > max {
        let max_bytes = u32::try_from(max).unwrap_or(u32::MAX);
        return Err(ProtocolError::ChunkTooLong { kind, len_bytes: len, max_bytes });
    }
    if len_usize < min || !(len_usize - min).is_multiple_of(step) {
        return Err(ProtocolError::MalformedChunk { kind, defect: Defect::WrongLength });
    }
    Ok(())
}

fn malformed(kind: ChunkKind) -> impl FnOnce(Defect) -> ProtocolError {
    move |defect| ProtocolError::MalformedChunk { kind, defect }
}

/// Appends the chunk that ends a reply with success (or after error chunks).
pub fn put_none_chunk(out: &mut Vec<u8>, cookie: u64) {
    put_chunk_header(out, cookie, ReplyFlags::DONE, ChunkKind::None, 0);
}

/// Appends all of an `OFFSET_DATA` chunk but its `data_len` bytes of data, which are to be sent next. `data_len` is
/// not 0, and within the payload limit.
pub fn put_data_chunk_head(out: &mut Vec<u8>, cookie: u64, flags: ReplyFlags, offset: u64, data_len: u32) {
    let len = data_len.checked_add(DATA_OFFSET_LEN as u32).expect("the payload limit keeps data far below 4 GiB");
    put_chunk_header(out, cookie, flags, ChunkKind::OffsetData, len);
    out.extend_from_slice(&offset.to_be_bytes());
}

/// The offset that starts the payload of an `OFFSET_DATA` chunk, in bytes from the start of the export.
pub fn decode_data_offset(bytes: [u8; DATA_OFFSET_LEN]) -> u64 {
    u64::from_be_bytes(bytes)
}

/// Payload of `OFFSET_HOLE`: a range that reads as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hole {
    /// First byte, from the start of the export.
    pub offset: u64,
    /// Length in bytes, not 0.
    pub len: u32,
}

impl Hole {
    /// Appends the whole chunk.
    pub fn put(&self, out: &mut Vec<u8>, cookie: u64, flags: ReplyFlags) {
        put_chunk_header(out, cookie, flags, ChunkKind::OffsetHole, HOLE_LEN as u32);
        out.extend_from_slice(&self.offset.to_be_bytes());
        out.extend_from_slice(&self.len.to_be_bytes());
    }

    /// Reads the payload. Fails with [`ProtocolError::MalformedChunk`].
    pub fn decode(payload: &[u8]) -> Result<Self, ProtocolError> {
        Self::read(payload).map_err(malformed(ChunkKind::OffsetHole))
    }

    fn read(payload: &[u8]) -> Result<Self, Defect> {
        let mut reader = Reader::new(payload);
        let hole = Self { offset: reader.u64()?, len: reader.u32()? };
        reader.end()?;
        if hole.len == 0 { Err(Defect::Zero) } else { Ok(hole) }
    }
}

/// One extent of a block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, not 0.
    pub len: u32,
    /// Its state; of the bits that this version does not name nothing follows.
    pub flags: StateFlags,
}

/// Payload of `BLOCK_STATUS`: consecutive extents, the first of which begins at the request's offset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// The metadata context that it belongs to.
    pub context_id: u32,
    /// At least one.
    pub extents: Vec<Extent>,
}

impl BlockStatus {
    /// Reads the payload. Fails with [`ProtocolError::MalformedChunk`].
    pub fn decode(payload: &[u8]) -> Result<Self, ProtocolError> {
        Self::read(payload).map_err(malformed(ChunkKind::BlockStatus))
    }

    fn read(payload: &[u8]) -> Result<Self, Defect> {
        let mut reader = Reader::new(payload);
        let context_id = reader.u32()?;
        if reader.left() == 0 || !reader.left().is_multiple_of(EXTENT_LEN) {
            return Err(Defect::WrongLength);
        }
        let mut extents = Vec::with_capacity(reader.left() / EXTENT_LEN);
        while reader.left() > 0 {
            let extent = Extent { len: reader.u32()?, flags: StateFlags::from_bits_retain(reader.u32()?) };
            if extent.len == 0 {
                return Err(Defect::Zero);
            }
            extents.push(extent);
        }
        Ok(Self { context_id, extents })
    }
}

/// Appends a whole `BLOCK_STATUS` chunk. `extents` is not empty and has at most
/// [`MAX_EXTENTS`] elements.
pub fn put_block_status_chunk(out: &mut Vec<u8>, cookie: u64, flags: ReplyFlags, context_id: u32, extents: &[Extent]) {
    debug_assert!(!extents.is_empty() && extents.len() <= MAX_EXTENTS);
    let len = 4 + EXTENT_LEN * extents.len();
    put_chunk_header(out, cookie, flags, ChunkKind::BlockStatus, len as u32);
    out.extend_from_slice(&context_id.to_be_bytes());
    for extent in extents {
        out.extend_from_slice(&extent.len.to_be_bytes());
        out.extend_from_slice(&extent.flags.bits().to_be_bytes());
    }
}

/// Payload of any error chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorChunk {
    /// Why.
    pub error: NbdError,
    /// The server's words, freed of control characters; may be empty.
    pub message: String,
    /// Where, in bytes from the start of the export (`ERROR_OFFSET` only).
    pub offset: Option<u64>,
}

impl ErrorChunk {
    /// Reads the payload of an error chunk of any kind; of a kind that this version does not know, only what all
    /// kinds share. Fails with [`ProtocolError::MalformedChunk`].
    pub fn decode(kind: ChunkKind, payload: &[u8]) -> Result<Self, ProtocolError> {
        Self::read(kind, payload).map_err(malformed(kind))
    }

    fn read(kind: ChunkKind, payload: &[u8]) -> Result<Self, Defect> {
        let mut reader = Reader::new(payload);
        let error = NbdError::from_wire(reader.u32()?).ok_or(Defect::Zero)?;
        let message_len = usize::from(reader.u16()?);
        if message_len > MAX_NAME {
            return Err(Defect::StringTooLong);
        }
        let message = printable(reader.take(message_len)?);
        let offset = if kind == ChunkKind::ErrorOffset { Some(reader.u64()?) } else { None };
        Ok(Self { error, message, offset })
    }
}

/// Appends a whole error chunk: `ERROR_OFFSET` if `offset` (in bytes from the start of the export) is known, else
/// `ERROR`. A message beyond 4096 bytes is cut.
pub fn put_error_chunk(
    out: &mut Vec<u8>,
    cookie: u64,
    flags: ReplyFlags,
    error: NbdError,
    message: &str,
    offset: Option<u64>,
) {
    let message = cut(message, MAX_NAME);
    let (kind, tail_len) = match offset {
        Some(_) => (ChunkKind::ErrorOffset, 8),
        None => (ChunkKind::Error, 0),
    };
    put_chunk_header(out, cookie, flags, kind, (6 + message.len() + tail_len) as u32);
    out.extend_from_slice(&error.to_wire().to_be_bytes());
    out.extend_from_slice(&(message.len() as u16).to_be_bytes());
    out.extend_from_slice(message.as_bytes());
    if let Some(offset) = offset {
        out.extend_from_slice(&offset.to_be_bytes());
    }
}

/// Payload of the private `FERRY_HASHES` chunk: offset (8), piece length (4), hashes (32 each).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FerryHashes {
    /// First byte of the first piece, from the start of the export.
    pub offset: u64,
    /// Length of each piece in bytes, not 0; the last piece ends where the range ends.
    pub piece_len_bytes: u32,
    /// BLAKE3 of each piece; at least one.
    pub hashes: Vec<[u8; 32]>,
}

impl FerryHashes {
    /// Reads the payload. Fails with [`ProtocolError::MalformedChunk`].
    pub fn decode(payload: &[u8]) -> Result<Self, ProtocolError> {
        Self::read(payload).map_err(malformed(ChunkKind::FerryHashes))
    }

    fn read(payload: &[u8]) -> Result<Self, Defect> {
        let mut reader = Reader::new(payload);
        let (offset, piece_len_bytes) = (reader.u64()?, reader.u32()?);
        if piece_len_bytes == 0 {
            return Err(Defect::Zero);
        }
        if reader.left() == 0 || !reader.left().is_multiple_of(HASH_LEN) {
            return Err(Defect::WrongLength);
        }
        let mut hashes = Vec::with_capacity(reader.left() / HASH_LEN);
        while reader.left() > 0 {
            hashes.push(reader.array()?);
        }
        Ok(Self { offset, piece_len_bytes, hashes })
    }
}

/// Appends a whole `FERRY_HASHES` chunk. `hashes` is not empty and has at most [`MAX_FERRY_HASHES`] elements.
pub fn put_ferry_hashes_chunk(
    out: &mut Vec<u8>,
    cookie: u64,
    flags: ReplyFlags,
    offset: u64,
    piece_len_bytes: u32,
    hashes: &[[u8; 32]],
) {
    debug_assert!(!hashes.is_empty() && hashes.len() <= MAX_FERRY_HASHES);
    let len = FERRY_HASHES_HEAD_LEN + HASH_LEN * hashes.len();
    put_chunk_header(out, cookie, flags, ChunkKind::FerryHashes, len as u32);
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&piece_len_bytes.to_be_bytes());
    out.extend_from_slice(hashes.as_flattened());
}

/// Appends a whole `FERRY_TOLD` chunk, which ends its reply.
pub fn put_ferry_told_chunk(out: &mut Vec<u8>, cookie: u64, told: &Told) {
    let message = told.encode();
    debug_assert!(message.len() <= MAX_HANDOFF_LEN);
    put_chunk_header(out, cookie, ReplyFlags::DONE, ChunkKind::FerryTold, message.len() as u32);
    out.extend_from_slice(&message);
}
