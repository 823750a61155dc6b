//! What a source under the test's control answers: the truth, or a lie of a chosen kind.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use blkferry::nbd::chunk::{
    Extent, Hole, put_block_status_chunk, put_data_chunk_head, put_error_chunk, put_none_chunk,
};
use blkferry::nbd::{ChunkKind, NbdError, ReplyFlags, StateFlags, put_chunk_header, put_simple_reply};

use super::manners::Manners;

/// Granule of zeros.
const GRANULE: usize = 4096;

/// A broken promise. All but the refusals make the rest of the connection worthless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// The cookie of a request that was never made.
    WrongCookie,
    /// The answer, and then the same answer again.
    Twice,
    /// Only the first half is covered, and that is said to be all.
    HalfCovered,
    /// Nothing is covered, and that is said to be all.
    NothingCovered,
    /// Two chunks that overlap.
    Overlap,
    /// Data for a place that was not asked for.
    Elsewhere,
    /// More data than was asked for.
    TooMuch,
    /// A hole that reaches beyond what was asked for.
    HoleTooLong,
    /// A chunk with a length that nobody may send.
    HugeChunk,
    /// A chunk of a type that was not negotiated.
    UnknownChunk,
    /// A chunk that belongs to another kind of request.
    StatusForRead,
    /// Bytes that are no reply.
    Garbage,
    /// A whole header, half of the data, and the connection closed.
    CutInData,
    /// Half a header, and the connection closed.
    CutInHeader,
    /// A whole header, half of the data, and then nothing.
    Stuck,
    /// The connection closed instead of an answer.
    Closed,
    /// An honest refusal.
    Refusal(NbdError),
    /// Data (which is wrong), and then a refusal of the same request.
    DataThenRefusal,
}

impl Lie {
    /// Those after which a device has to ask again on another connection.
    pub const BREAKING: [Self; 15] = [
        Self::WrongCookie,
        Self::Twice,
        Self::HalfCovered,
        Self::NothingCovered,
        Self::Overlap,
        Self::Elsewhere,
        Self::TooMuch,
        Self::HoleTooLong,
        Self::HugeChunk,
        Self::UnknownChunk,
        Self::StatusForRead,
        Self::Garbage,
        Self::CutInData,
        Self::CutInHeader,
        Self::Closed,
    ];
}

/// Bytes that are nowhere in an image: whoever finds them has believed a lie.
pub const WRONG: u8 = 0xbb;

/// The reply to a read, and whether to hang up after it.
pub fn read_reply(
    image: &[u8],
    manners: &Manners,
    cookie: u64,
    offset: u64,
    len: u32,
    lie: Option<Lie>,
) -> (Vec<u8>, bool) {
    match lie {
        None => (honest(image, manners, cookie, offset, len), false),
        Some(lie) => {
            let hang_up = matches!(lie, Lie::CutInData | Lie::CutInHeader | Lie::Closed);
            (dishonest(image, manners, cookie, offset, len, lie), hang_up)
        }
    }
}

fn honest(image: &[u8], manners: &Manners, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let data = &image[offset as usize..offset as usize + len as usize];
    let mut out = Vec::new();
    if !manners.structured {
        put_simple_reply(&mut out, cookie, None);
        out.extend_from_slice(data);
    } else if manners.pieces {
        for (index, piece) in data.chunks(GRANULE).enumerate().rev() {
            let at = offset + (index * GRANULE) as u64;
            if piece.iter().all(|byte| *byte == 0) {
                Hole { offset: at, len: piece.len() as u32 }.put(&mut out, cookie, ReplyFlags::empty());
            } else {
                put_data(&mut out, cookie, ReplyFlags::empty(), at, piece);
            }
        }
        put_none_chunk(&mut out, cookie);
    } else {
        put_data(&mut out, cookie, ReplyFlags::DONE, offset, data);
    }
    out
}

fn put_data(out: &mut Vec<u8>, cookie: u64, flags: ReplyFlags, offset: u64, data: &[u8]) {
    put_data_chunk_head(out, cookie, flags, offset, data.len() as u32);
    out.extend_from_slice(data);
}

fn dishonest(image: &[u8], manners: &Manners, cookie: u64, offset: u64, len: u32, lie: Lie) -> Vec<u8> {
    let wrong = vec![WRONG; len as usize];
    let half = wrong.len() / 2;
    let (more, done) = (ReplyFlags::empty(), ReplyFlags::DONE);
    let mut out = Vec::new();
    match lie {
        Lie::WrongCookie => put_data(&mut out, cookie ^ 0xdead_0000, done, offset, &wrong),
        Lie::Twice => {
            out = honest(image, manners, cookie, offset, len);
            put_data(&mut out, cookie, done, offset, &wrong);
        }
        Lie::HalfCovered => put_data(&mut out, cookie, done, offset, &wrong[..half]),
        Lie::NothingCovered => put_none_chunk(&mut out, cookie),
        Lie::Overlap => {
            put_data(&mut out, cookie, more, offset, &wrong[..half + 512]);
            put_data(&mut out, cookie, done, offset + half as u64, &wrong[half..]);
        }
        Lie::Elsewhere => put_data(&mut out, cookie, done, offset ^ (1 << 20), &wrong),
        Lie::TooMuch => put_data(&mut out, cookie, done, offset, &vec![WRONG; wrong.len() + 512]),
        Lie::HoleTooLong => Hole { offset, len: len + 4096 }.put(&mut out, cookie, done),
        Lie::HugeChunk => put_chunk_header(&mut out, cookie, done, ChunkKind::OffsetData, u32::MAX),
        Lie::UnknownChunk => put_chunk_header(&mut out, cookie, done, ChunkKind::Unknown(0x7777), 0),
        Lie::StatusForRead => {
            put_block_status_chunk(&mut out, cookie, done, 7, &[Extent { len, flags: StateFlags::ZERO }]);
        }
        Lie::Garbage => out = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n".to_vec(),
        Lie::CutInData | Lie::Stuck => {
            put_data_chunk_head(&mut out, cookie, done, offset, len);
            out.extend_from_slice(&wrong[..half]);
        }
        Lie::CutInHeader => {
            put_data_chunk_head(&mut out, cookie, done, offset, len);
            out.truncate(11);
        }
        Lie::Closed => {}
        Lie::Refusal(error) if manners.structured => {
            put_error_chunk(&mut out, cookie, done, error, "a test says no", None);
        }
        Lie::Refusal(error) => put_simple_reply(&mut out, cookie, Some(error)),
        Lie::DataThenRefusal => {
            put_data(&mut out, cookie, more, offset, &wrong);
            put_error_chunk(&mut out, cookie, done, NbdError::Io, "the disk failed after all", Some(offset));
        }
    }
    out
}

/// The reply to a block status: runs of zeros in units of 4 KiB.
pub fn extents_reply(cookie: u64, image: &[u8], offset: u64, len: u32) -> Vec<u8> {
    let mut extents: Vec<Extent> = Vec::new();
    for piece in image[offset as usize..offset as usize + len as usize].chunks(GRANULE) {
        let zero = piece.iter().all(|byte| *byte == 0);
        let flags = if zero { StateFlags::HOLE | StateFlags::ZERO } else { StateFlags::empty() };
        match extents.last_mut() {
            Some(last) if last.flags == flags => last.len += piece.len() as u32,
            _ => extents.push(Extent { len: piece.len() as u32, flags }),
        }
    }
    let mut out = Vec::new();
    put_block_status_chunk(&mut out, cookie, ReplyFlags::DONE, 7, &extents);
    out
}
