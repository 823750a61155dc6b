//! From answers to bytes on the wire.

use crate::nbd::chunk::{
    Extent, Hole, put_block_status_chunk, put_data_chunk_head, put_error_chunk, put_ferry_hashes_chunk,
    put_ferry_told_chunk, put_none_chunk,
};
use crate::nbd::{
    FERRY_CHANGED, FERRY_CHANGED_ID, FERRY_IS_HOT, FERRY_WAS_USED, NbdError, ReplyFlags, StateFlags, Told,
    put_simple_reply,
};
use crate::uring::{Part, Residency};

use super::disk::DiskExtent;

/// A reply without data.
pub(super) fn done(structured: bool, cookie: u64, result: Result<(), NbdError>) -> Vec<Part> {
    let mut head = Vec::new();
    match result {
        Err(error) if structured => {
            put_error_chunk(&mut head, cookie, ReplyFlags::DONE, error, &error.to_string(), None)
        }
        Ok(()) if structured => put_none_chunk(&mut head, cookie),
        result => put_simple_reply(&mut head, cookie, result.err()),
    }
    vec![Part::Owned(head.into())]
}

/// The data of a read. Structured: a chunk a piece, holes as holes; with `single` (DF) all in one chunk.
pub(super) fn data(structured: bool, single: bool, cookie: u64, offset: u64, pieces: Vec<Part>) -> Vec<Part> {
    let mut parts = Vec::with_capacity(1 + 2 * pieces.len());
    let mut head = Vec::new();
    if !structured {
        put_simple_reply(&mut head, cookie, None);
        parts.push(Part::Owned(head.into()));
        parts.extend(pieces);
        return parts;
    }
    if single {
        let len: usize = pieces.iter().map(Part::len).sum();
        put_data_chunk_head(&mut head, cookie, ReplyFlags::DONE, offset, len as u32);
        parts.push(Part::Owned(head.into()));
        parts.extend(pieces);
        return parts;
    }
    let mut at = offset;
    let last = pieces.len() - 1;
    for (index, piece) in pieces.into_iter().enumerate() {
        let flags = if index == last { ReplyFlags::DONE } else { ReplyFlags::empty() };
        let len = piece.len();
        match piece {
            Part::Zeros(_) => Hole { offset: at, len: len as u32 }.put(&mut head, cookie, flags),
            part => {
                put_data_chunk_head(&mut head, cookie, flags, at, len as u32);
                parts.push(Part::Owned(std::mem::take(&mut head).into()));
                parts.push(part);
            }
        }
        at += len as u64;
    }
    parts.push(Part::Owned(head.into()));
    parts
}

/// The answer to BLOCK_STATUS: the extents of each context, by its id. At least one.
pub(super) fn block_status(cookie: u64, contexts: &[(u32, Vec<Extent>)]) -> Vec<Part> {
    let mut chunks = Vec::new();
    let last = contexts.len() - 1;
    for (index, (id, extents)) in contexts.iter().enumerate() {
        let flags = if index == last { ReplyFlags::DONE } else { ReplyFlags::empty() };
        put_block_status_chunk(&mut chunks, cookie, flags, *id, extents);
    }
    vec![Part::Owned(chunks.into())]
}

/// Extents of `base:allocation`.
pub(super) fn allocation(extents: &[DiskExtent]) -> Vec<Extent> {
    let to_wire = |extent: &DiskExtent| {
        let mut flags = StateFlags::empty();
        flags.set(StateFlags::HOLE, extent.hole);
        flags.set(StateFlags::ZERO, extent.zero);
        Extent { len: in_request(extent.len_bytes), flags }
    };
    extents.iter().map(to_wire).collect()
}

/// Extents of `blkferry:hot`.
pub(super) fn hot(stretches: &[(u64, Residency)]) -> Vec<Extent> {
    marked(stretches, |residency| match residency {
        Residency::Absent => 0,
        Residency::Cached => FERRY_IS_HOT,
        Residency::Used => FERRY_IS_HOT | FERRY_WAS_USED,
    })
}

/// Extents of a context of our own.
fn marked<T: Copy>(stretches: &[(u64, T)], bits: impl Fn(T) -> u32) -> Vec<Extent> {
    let to_wire = |&(len_bytes, state): &(u64, T)| Extent {
        len: in_request(len_bytes),
        flags: StateFlags::from_bits_retain(bits(state)),
    };
    stretches.iter().map(to_wire).collect()
}

fn in_request(len_bytes: u64) -> u32 {
    u32::try_from(len_bytes).expect("stretches lie in a request, which is shorter than 4 GiB")
}

/// The answer to a request for hashes.
pub(super) fn hashes(cookie: u64, offset: u64, piece_bytes: u32, hashes: &[[u8; 32]]) -> Vec<Part> {
    let mut head = Vec::new();
    put_ferry_hashes_chunk(&mut head, cookie, ReplyFlags::DONE, offset, piece_bytes, hashes);
    vec![Part::Owned(head.into())]
}

/// The answer to a step of a handoff.
pub(super) fn told(cookie: u64, told: &Told) -> Vec<Part> {
    let mut chunk = Vec::new();
    put_ferry_told_chunk(&mut chunk, cookie, told);
    vec![Part::Owned(chunk.into())]
}

/// The answer to the question what was written since.
pub(super) fn changed(cookie: u64, stretches: &[(u64, bool)]) -> Vec<Part> {
    let written = |written| if written { FERRY_CHANGED } else { 0 };
    block_status(cookie, &[(FERRY_CHANGED_ID, marked(stretches, written))])
}
