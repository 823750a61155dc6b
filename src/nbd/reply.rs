//! Headers of replies (spec: "Simple reply message", "Structured reply chunk message").
//!
//! ```text
//! S: 0x67446698 (4)  error (4)           cookie (8)               [data, READ only]
//! S: 0x668e33ef (4)  flags (2) type (2)  cookie (8)  length (4)   payload…
//! ```
//! Both begin with 16 bytes that have the cookie in the same place. A reader takes those, asks
//! [`ReplyHeader::needs_more`], and decodes. (Extended replies begin in the same way.) What is in a chunk is in
//! [`chunk`].

use super::chunk::{self, ChunkKind};
use super::consts::{ReplyFlags, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};
use super::errno::NbdError;
use super::error::ProtocolError;
use super::wire::Defect;

/// What stands before the data of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// The whole answer. Data follows if the request was a read and there is no error.
    Simple {
        /// Why the request failed; `None` is success.
        error: Option<NbdError>,
        /// The request's cookie.
        cookie: u64,
    },
    /// One piece of an answer, the last one if its flags say `DONE`.
    Chunk {
        /// Unknown bits are dropped.
        flags: ReplyFlags,
        /// What is in the chunk.
        kind: ChunkKind,
        /// The request's cookie.
        cookie: u64,
        /// Bytes of payload that follow. Call [`check`](ReplyHeader::check) before you trust it.
        len: u32,
    },
}

impl ReplyHeader {
    /// Bytes that every reply has: read these first.
    pub const COMMON_LEN: usize = 16;
    /// Bytes of the header of a chunk.
    pub const CHUNK_LEN: usize = 20;

    /// How many bytes of the header follow the first 16: 4 for a chunk, else 0. A wrong magic shows in
    /// [`decode`](Self::decode).
    pub fn needs_more(common: &[u8; Self::COMMON_LEN]) -> usize {
        if common.starts_with(&STRUCTURED_REPLY_MAGIC.to_be_bytes()) { Self::CHUNK_LEN - Self::COMMON_LEN } else { 0 }
    }

    /// Reads a header. `extra` is what [`needs_more`](Self::needs_more) asked for, and is not looked at otherwise.
    /// Fails with [`ProtocolError::BadReplyMagic`], after which nothing that follows makes sense.
    pub fn decode(common: &[u8; Self::COMMON_LEN], extra: [u8; 4]) -> Result<Self, ProtocolError> {
        let [m0, m1, m2, m3, a0, a1, b0, b1, c0, c1, c2, c3, c4, c5, c6, c7] = *common;
        let cookie = u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]);
        match u32::from_be_bytes([m0, m1, m2, m3]) {
            SIMPLE_REPLY_MAGIC => {
                Ok(Self::Simple { error: NbdError::from_wire(u32::from_be_bytes([a0, a1, b0, b1])), cookie })
            }
            STRUCTURED_REPLY_MAGIC => Ok(Self::Chunk {
                flags: ReplyFlags::from_bits_truncate(u16::from_be_bytes([a0, a1])),
                kind: ChunkKind::from_wire(u16::from_be_bytes([b0, b1])),
                cookie,
                len: u32::from_be_bytes(extra),
            }),
            got => Err(ProtocolError::BadReplyMagic { got }),
        }
    }

    /// The request that it answers.
    pub const fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => *cookie,
        }
    }

    /// Whether nothing more comes for this request.
    pub const fn is_last(&self) -> bool {
        match self {
            Self::Simple { .. } => true,
            Self::Chunk { flags, .. } => flags.contains(ReplyFlags::DONE),
        }
    }

    /// Checks that a chunk is of a known type (or an error of any type), that its length is one this type can have,
    /// and that it carries no more than `max_payload` bytes of data. To be called before memory is set aside.
    ///
    /// Fails with [`ProtocolError::UnexpectedChunk`], [`ProtocolError::ChunkTooLong`] or
    /// [`ProtocolError::MalformedChunk`], all of which end the connection.
    pub fn check(&self, max_payload: u32) -> Result<(), ProtocolError> {
        let Self::Chunk { flags, kind, len, .. } = *self else {
            return Ok(());
        };
        if kind == ChunkKind::None && !flags.contains(ReplyFlags::DONE) {
            return Err(ProtocolError::MalformedChunk { kind, defect: Defect::MissingFlag });
        }
        chunk::check_len(kind, len, max_payload)
    }
}

/// Appends a simple reply; `None` is success. Data of a read follows it.
pub fn put_simple_reply(out: &mut Vec<u8>, cookie: u64, error: Option<NbdError>) {
    out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&error.map_or(0, NbdError::to_wire).to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
}

/// Appends the header of a chunk with `len` bytes of payload.
pub fn put_chunk_header(out: &mut Vec<u8>, cookie: u64, flags: ReplyFlags, kind: ChunkKind, len: u32) {
    out.extend_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&flags.bits().to_be_bytes());
    out.extend_from_slice(&kind.to_wire().to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
}

#[cfg(test)]
mod tests;
