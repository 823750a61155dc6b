//! The data of one read, put together from the chunks of its reply.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::engine::ByteRange;
use crate::nbd::FerryHashes;
use crate::uring::{Buffer, Part};

/// Blocks as they came from the source: bytes, and where zeros crossed as holes.
#[derive(Clone, Debug)]
pub struct FetchedData {
    range: ByteRange,
    /// Empty if all of it is a hole.
    bytes: Arc<Buffer>,
    /// Holes, as ranges relative to the start, in order.
    holes: Arc<Vec<Range<usize>>>,
}

impl FetchedData {
    /// One piece of data out of several that follow each other and make up `range`.
    pub(super) fn join(range: ByteRange, pieces: &[Self]) -> Self {
        let mut bytes = Vec::with_capacity(range.len() as usize);
        let mut holes = Vec::new();
        for part in pieces.iter().flat_map(|piece| piece.pieces(piece.range)) {
            if let Part::Zeros(len) = part {
                holes.push(bytes.len()..bytes.len() + len);
            }
            part.append_to(&mut bytes);
        }
        debug_assert_eq!(bytes.len() as u64, range.len());
        Self { range, bytes: Arc::new(bytes.into()), holes: Arc::new(holes) }
    }

    /// The pieces of a part of it; holes are [`Part::Zeros`].
    pub fn pieces(&self, part: ByteRange) -> Vec<Part> {
        debug_assert!(part.start >= self.range.start && part.end <= self.range.end);
        let (start, end) = ((part.start - self.range.start) as usize, (part.end - self.range.start) as usize);
        let mut pieces = Vec::new();
        let mut at = start;
        let data = |range: Range<usize>| Part::Shared { bytes: self.bytes.clone(), range };
        for hole in self.holes.iter().filter(|h| h.end > start && h.start < end) {
            let (from, to) = (hole.start.max(at), hole.end.min(end));
            if from > at {
                pieces.push(data(at..from));
            }
            pieces.push(Part::Zeros(to - from));
            at = to;
        }
        if at < end {
            pieces.push(data(at..end));
        }
        pieces
    }
}

/// Pieces that the answer to a read may come in: a read of the largest size, sector by sector.
const MAX_PIECES: usize = 64 << 10;
/// Shortest piece that a hash may stand for: their number is bounded by that.
const MIN_HASHED_BYTES: u64 = 512;

/// A reply that violates the protocol: pieces that overlap, lie outside, or do not cover the request; or too many.
#[derive(Debug, thiserror::Error)]
#[error("the source answered with pieces that do not make up what was asked for")]
pub(super) struct BadCover;

/// A read while its reply arrives.
#[derive(Debug)]
pub(super) struct ReadAssembly {
    range: ByteRange,
    /// Empty until the first data comes. What has not arrived in it is no part of the answer.
    bytes: Buffer,
    /// What has arrived, by its start: end and "hole".
    arrived: BTreeMap<usize, (usize, bool)>,
}

impl ReadAssembly {
    pub(super) fn new(range: ByteRange) -> Self {
        Self { range, bytes: Buffer::default(), arrived: BTreeMap::new() }
    }

    /// Announces a chunk at an absolute offset; gives its place in the buffer.
    pub(super) fn place(&mut self, offset_bytes: u64, len_bytes: u64, hole: bool) -> Result<Range<usize>, BadCover> {
        let end = offset_bytes.checked_add(len_bytes).ok_or(BadCover)?;
        if offset_bytes < self.range.start || end > self.range.end {
            return Err(BadCover);
        }
        let start = (offset_bytes - self.range.start) as usize;
        let place = start..start + len_bytes as usize;
        // None of those that are here overlap: the last one that begins before the end of this one tells.
        let before = self.arrived.range(..place.end).next_back();
        let overlaps = before.is_some_and(|(_, (old_end, _))| *old_end > place.start);
        if overlaps || place.is_empty() || self.arrived.len() == MAX_PIECES {
            return Err(BadCover);
        }
        self.arrived.insert(place.start, (place.end, hole));
        Ok(place)
    }

    /// The buffer to receive into, to be given back.
    pub(super) fn take_buffer(&mut self) -> Buffer {
        let mut bytes = std::mem::take(&mut self.bytes);
        if bytes.is_empty() {
            bytes = Buffer::to_fill(self.range.len() as usize);
        }
        bytes
    }

    pub(super) fn give_buffer(&mut self, bytes: Buffer) {
        self.bytes = bytes;
    }

    pub(super) fn range(&self) -> ByteRange {
        self.range
    }

    /// All of it, if all of it has arrived.
    pub(super) fn finish(self) -> Result<FetchedData, BadCover> {
        let covered: usize = self.arrived.iter().map(|(start, (end, _))| end - start).sum();
        if covered as u64 != self.range.len() {
            return Err(BadCover);
        }
        let holes =
            self.arrived.into_iter().filter(|(_, (_, hole))| *hole).map(|(start, (end, _))| start..end).collect();
        Ok(FetchedData { range: self.range, bytes: Arc::new(self.bytes), holes: Arc::new(holes) })
    }
}

/// The hashes of a range while the reply arrives.
#[derive(Debug)]
pub(super) struct HashAssembly {
    /// What is not hashed yet.
    left: ByteRange,
    hashes: Vec<[u8; 32]>,
}

impl HashAssembly {
    pub(super) fn new(range: ByteRange) -> Self {
        Self { left: range, hashes: Vec::new() }
    }

    /// Takes the hashes of the next pieces.
    pub(super) fn add(&mut self, chunk: FerryHashes) -> Result<(), BadCover> {
        let piece_bytes = u64::from(chunk.piece_len_bytes);
        let pieces_left = self.left.len().div_ceil(piece_bytes);
        let too_many = piece_bytes < MIN_HASHED_BYTES || chunk.hashes.len() as u64 > pieces_left;
        if too_many || chunk.offset != self.left.start {
            return Err(BadCover);
        }
        self.left.start = self.left.end.min(chunk.offset + piece_bytes * chunk.hashes.len() as u64);
        self.hashes.extend(chunk.hashes);
        Ok(())
    }

    /// All that came; whether it is enough, its user sees.
    pub(super) fn finish(self) -> Vec<[u8; 32]> {
        self.hashes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_out_as_they_came_in() {
        let mut read = ReadAssembly::new(ByteRange { start: 1000, end: 2000 });
        read.place(1500, 500, true).unwrap();
        let place = read.place(1000, 500, false).unwrap();
        let mut bytes = read.take_buffer();
        bytes[place].fill(3);
        read.give_buffer(bytes);
        let data = read.finish().unwrap();
        let shape = |part| -> Vec<(bool, u64)> {
            data.pieces(part).iter().map(|p| (matches!(p, Part::Zeros(_)), p.len() as u64)).collect()
        };
        assert_eq!(shape(ByteRange { start: 1000, end: 2000 }), [(false, 500), (true, 500)]);
        assert_eq!(shape(ByteRange { start: 1400, end: 1600 }), [(false, 100), (true, 100)]);
        assert_eq!(shape(ByteRange { start: 1600, end: 1700 }), [(true, 100)]);
    }

    #[test]
    fn what_came_in_pieces_is_one() {
        let piece = |start: u64, hole: bool, fill: u8| {
            let mut read = ReadAssembly::new(ByteRange { start, end: start + 100 });
            let place = read.place(start, 100, hole).unwrap();
            if !hole {
                let mut bytes = read.take_buffer();
                bytes[place].fill(fill);
                read.give_buffer(bytes);
            }
            read.finish().unwrap()
        };
        let range = ByteRange { start: 500, end: 800 };
        let joined = FetchedData::join(range, &[piece(500, false, 1), piece(600, true, 0), piece(700, false, 2)]);
        let mut flat = Vec::new();
        joined.pieces(ByteRange { start: 550, end: 750 }).iter().for_each(|part| part.append_to(&mut flat));
        assert_eq!(flat, [vec![1; 50], vec![0; 100], vec![2; 50]].concat());
        assert!(matches!(joined.pieces(range)[1], Part::Zeros(100)));
    }

    #[test]
    fn gaps_overlaps_and_strays_are_refused() {
        let range = ByteRange { start: 1000, end: 2000 };
        let mut read = ReadAssembly::new(range);
        assert!(read.place(999, 10, false).is_err());
        assert!(read.place(1990, 11, false).is_err());
        assert!(read.place(u64::MAX, 2, false).is_err());
        read.place(1500, 100, false).unwrap();
        assert!(read.place(1400, 101, true).is_err());
        assert!(read.place(1599, 1, true).is_err());
        assert!(read.place(1700, 0, true).is_err());
        assert!(read.finish().is_err());
    }

    #[test]
    fn an_answer_in_crumbs_costs_neither_memory_nor_time() {
        let range = ByteRange { start: 0, end: 32 << 20 };
        let mut read = ReadAssembly::new(range);
        // Backwards: each one before all others.
        let taken = (0..range.end).rev().take_while(|&at| read.place(at, 1, true).is_ok()).count();
        assert_eq!(taken, MAX_PIECES);
    }

    #[test]
    fn hashes_are_taken_in_order_and_no_more_than_there_are_pieces() {
        let chunk =
            |offset, piece_len_bytes, count| FerryHashes { offset, piece_len_bytes, hashes: vec![[1; 32]; count] };
        let mut hashes = HashAssembly::new(ByteRange { start: 1000, end: 1000 + 3 * 4096 + 1 });
        assert!(hashes.add(chunk(0, 4096, 1)).is_err());
        assert!(hashes.add(chunk(1000, 4096, 5)).is_err());
        assert!(hashes.add(chunk(1000, 1, 1)).is_err());
        hashes.add(chunk(1000, 4096, 1)).unwrap();
        assert!(hashes.add(chunk(1000, 4096, 1)).is_err(), "once more");
        hashes.add(chunk(1000 + 4096, 4096, 3)).unwrap();
        assert!(hashes.add(chunk(1000 + 4 * 4096, 4096, 1)).is_err());
        assert_eq!(hashes.finish().len(), 4);
    }
}
