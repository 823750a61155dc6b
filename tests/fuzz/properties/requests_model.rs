//! A disk in memory, and what a server must answer for it: byte by byte, from the encoders.

use std::cell::RefCell;
use std::rc::Rc;

use blkferry::engine::ByteRange;
use blkferry::nbd::chunk::{
    Extent, Hole, put_block_status_chunk, put_data_chunk_head, put_error_chunk, put_ferry_hashes_chunk,
    put_ferry_told_chunk, put_none_chunk,
};
use blkferry::nbd::{
    Ask, Command, CommandFlags, ExportInfo, FERRY_CHANGED, FERRY_CHANGED_ID, HANDOFF_VERSION, Limits, NbdError,
    ReplyFlags, Request, Session, Standing, StateFlags, Told, TransmissionFlags, put_simple_reply,
};
use blkferry::server::{Disk, DiskExtent, HASH_PIECE_BYTES};
use blkferry::uring::{Buffer, Part};
use uuid::Uuid;

pub const SIZE: usize = 128 << 10;
/// Largest read or write.
pub const MAX_PAYLOAD: u32 = 16 << 10;
const GRANULE: usize = 4096;

/// The contents, shared by those who look at them afterwards.
#[derive(Clone)]
pub struct Ram {
    pub bytes: Rc<RefCell<Vec<u8>>>,
    pub min_block: u32,
}

fn told(ask: &Ask) -> Told {
    match ask {
        Ask::Take { epoch, .. } => Told::Given { epoch: *epoch, identity: "image:0".into() },
        Ask::GiveBack { epoch, .. } => Told::Back { epoch: *epoch },
        Ask::Done { .. } => Told::Noted,
    }
}

pub fn fresh() -> Vec<u8> {
    // Every other granule is zeros.
    (0..SIZE).map(|at| if (at / GRANULE).is_multiple_of(2) { (at / 7) as u8 | 1 } else { 0 }).collect()
}

/// Runs of granules that are zeros, or are not.
fn runs(bytes: &[u8], range: ByteRange) -> Vec<(bool, usize)> {
    let mut runs: Vec<(bool, usize)> = Vec::new();
    let (mut at, end) = (range.start as usize, range.end as usize);
    while at < end {
        let stop = end.min((at / GRANULE + 1) * GRANULE);
        let zero = bytes[at..stop].iter().all(|byte| *byte == 0);
        match runs.last_mut() {
            Some((last, len)) if *last == zero => *len += stop - at,
            _ => runs.push((zero, stop - at)),
        }
        at = stop;
    }
    runs
}

fn hashes_of(bytes: &[u8], range: ByteRange) -> Vec<[u8; 32]> {
    let pieces = bytes[range.start as usize..range.end as usize].chunks(HASH_PIECE_BYTES as usize);
    pieces.map(|piece| *blake3::hash(piece).as_bytes()).collect()
}

impl Ram {
    pub fn new(min_block: u32) -> Self {
        Self { bytes: Rc::new(RefCell::new(fresh())), min_block }
    }

    /// Whoever serves a disk has promised to ask for nothing else.
    fn check(&self, range: ByteRange, max: u64) {
        assert!(!range.is_empty() && range.len() <= max, "{range:?}");
        assert!(range.end <= SIZE as u64, "{range:?}");
        assert!(range.start.is_multiple_of(self.min_block.into()) && range.end.is_multiple_of(self.min_block.into()));
    }
}

impl Disk for Ram {
    fn export(&self) -> ExportInfo {
        let mut export = ExportInfo::new("disk", SIZE as u64, TransmissionFlags::all() - TransmissionFlags::READ_ONLY);
        export.min_block = self.min_block;
        export.max_block = MAX_PAYLOAD;
        export.identity = Some("image:0".into());
        export.standing = Some(Standing {
            version: HANDOFF_VERSION,
            disk: Uuid::nil(),
            epoch: 1,
            given_to: None,
            base: None,
            complete: false,
        });
        export
    }

    async fn read(&self, range: ByteRange) -> Result<Vec<Part>, NbdError> {
        self.check(range, MAX_PAYLOAD.into());
        let (bytes, mut at) = (self.bytes.borrow(), range.start as usize);
        let mut parts = Vec::new();
        for (zero, len) in runs(&bytes, range) {
            parts.push(if zero { Part::Zeros(len) } else { Part::Owned(bytes[at..at + len].to_vec().into()) });
            at += len;
        }
        Ok(parts)
    }

    async fn write(&self, offset_bytes: u64, data: Buffer, _fua: bool) -> Result<(), NbdError> {
        self.check(ByteRange::new(offset_bytes, data.len() as u64), MAX_PAYLOAD.into());
        self.bytes.borrow_mut()[offset_bytes as usize..][..data.len()].copy_from_slice(&data);
        Ok(())
    }

    async fn zero(&self, range: ByteRange, _fua: bool, _keep: bool, fast_only: bool) -> Result<(), NbdError> {
        self.check(range, SIZE as u64);
        if fast_only {
            return Err(NbdError::NotSup);
        }
        self.bytes.borrow_mut()[range.start as usize..range.end as usize].fill(0);
        Ok(())
    }

    async fn trim(&self, range: ByteRange, _fua: bool) -> Result<(), NbdError> {
        self.zero(range, false, false, false).await
    }

    async fn hand_off(&self, ask: Ask) -> Result<Told, NbdError> {
        Ok(told(&ask))
    }

    async fn changed(&self, range: ByteRange, _: usize) -> Result<Vec<(u64, bool)>, NbdError> {
        self.check(range, SIZE as u64);
        Ok(vec![(range.len(), true)])
    }

    async fn prefetch(&self, range: ByteRange) -> Result<(), NbdError> {
        self.check(range, SIZE as u64);
        Ok(())
    }

    async fn extents(&self, range: ByteRange, max: usize) -> Result<Vec<DiskExtent>, NbdError> {
        self.check(range, SIZE as u64);
        let extent = |(zero, len): (bool, usize)| DiskExtent { len_bytes: len as u64, hole: zero, zero };
        Ok(runs(&self.bytes.borrow(), range).into_iter().take(max).map(extent).collect())
    }

    async fn hashes(&self, range: ByteRange, piece_bytes: u32) -> Result<Vec<[u8; 32]>, NbdError> {
        self.check(range, SIZE as u64);
        assert_eq!(piece_bytes, HASH_PIECE_BYTES);
        Ok(hashes_of(&self.bytes.borrow(), range))
    }
}

/// The naive server: one request after the other, each answered at once.
pub struct Model {
    pub bytes: Vec<u8>,
    pub limits: Limits,
    pub session: Session,
    pub replies: Vec<u8>,
}

impl Model {
    /// Goes over a stream of requests. True: the client left in order, and gets all its answers.
    pub fn serve(&mut self, mut stream: &[u8]) -> bool {
        loop {
            let Some((header, rest)) = stream.split_first_chunk::<{ Request::LEN }>() else { return stream.is_empty() };
            let Ok(request) = Request::decode(header) else { return false };
            assert_eq!(&request.encode(), header, "what was read is written in the same way");
            if request.command == Command::Disc {
                return true;
            }
            let len = request.payload_len();
            if len > 2 * MAX_PAYLOAD {
                return false;
            }
            let Some((payload, rest)) = rest.split_at_checked(len as usize) else { return false };
            stream = rest;
            match request.validate(&self.limits).and_then(|()| self.perform(&request, payload)) {
                Ok(true) => {}
                Ok(false) if self.session.structured => put_none_chunk(&mut self.replies, request.cookie),
                Ok(false) => put_simple_reply(&mut self.replies, request.cookie, None),
                Err(error) if self.session.structured => {
                    let text = error.to_string();
                    put_error_chunk(&mut self.replies, request.cookie, ReplyFlags::DONE, error, &text, None);
                }
                Err(error) => put_simple_reply(&mut self.replies, request.cookie, Some(error)),
            }
        }
    }

    /// True: the answer is written.
    fn perform(&mut self, request: &Request, payload: &[u8]) -> Result<bool, NbdError> {
        let range = ByteRange::new(request.offset, request.len.into());
        match request.command {
            Command::Read => self.answer_read(request, range),
            Command::Write => self.bytes[range.start as usize..range.end as usize].copy_from_slice(payload),
            Command::Trim => self.bytes[range.start as usize..range.end as usize].fill(0),
            Command::WriteZeroes if request.flags.contains(CommandFlags::FAST_ZERO) => return Err(NbdError::NotSup),
            Command::WriteZeroes => self.bytes[range.start as usize..range.end as usize].fill(0),
            Command::BlockStatus => self.answer_extents(request, range),
            Command::FerryHash => {
                let hashes = hashes_of(&self.bytes, range);
                let done = ReplyFlags::DONE;
                put_ferry_hashes_chunk(&mut self.replies, request.cookie, done, range.start, HASH_PIECE_BYTES, &hashes);
            }
            Command::FerryHandoff => {
                let ask = Ask::decode(payload).map_err(|_| NbdError::Inval)?;
                put_ferry_told_chunk(&mut self.replies, request.cookie, &told(&ask));
            }
            Command::FerryChanged => {
                let all = [Extent { len: request.len, flags: StateFlags::from_bits_retain(FERRY_CHANGED) }];
                let done = ReplyFlags::DONE;
                put_block_status_chunk(&mut self.replies, request.cookie, done, FERRY_CHANGED_ID, &all);
            }
            Command::Flush | Command::Cache | Command::Disc | Command::Unknown(_) => {}
        }
        use Command::{BlockStatus, FerryChanged, FerryHandoff, FerryHash, Read};
        Ok(matches!(request.command, Read | BlockStatus | FerryHash | FerryHandoff | FerryChanged))
    }

    fn answer_read(&mut self, request: &Request, range: ByteRange) {
        let (out, data) = (&mut self.replies, &self.bytes[range.start as usize..range.end as usize]);
        if !self.session.structured {
            put_simple_reply(out, request.cookie, None);
            out.extend_from_slice(data);
            return;
        }
        let runs = runs(&self.bytes, range);
        if request.flags.contains(CommandFlags::DF) {
            put_data_chunk_head(out, request.cookie, ReplyFlags::DONE, range.start, request.len);
            out.extend_from_slice(data);
            return;
        }
        let mut at = 0;
        for (index, &(zero, len)) in runs.iter().enumerate() {
            let flags = if index + 1 == runs.len() { ReplyFlags::DONE } else { ReplyFlags::empty() };
            let offset = range.start + at as u64;
            if zero {
                Hole { offset, len: len as u32 }.put(out, request.cookie, flags);
            } else {
                put_data_chunk_head(out, request.cookie, flags, offset, len as u32);
                out.extend_from_slice(&data[at..at + len]);
            }
            at += len;
        }
    }

    fn answer_extents(&mut self, request: &Request, range: ByteRange) {
        let max = if request.flags.contains(CommandFlags::REQ_ONE) { 1 } else { usize::MAX };
        let flags = |zero| if zero { StateFlags::HOLE | StateFlags::ZERO } else { StateFlags::empty() };
        let extent = |(zero, len)| Extent { len: len as u32, flags: flags(zero) };
        let runs = runs(&self.bytes, range);
        let extents: Vec<Extent> = runs.into_iter().take(max).map(|(zero, len)| extent((zero, len))).collect();
        let id = self.session.base_allocation.expect("refused otherwise");
        put_block_status_chunk(&mut self.replies, request.cookie, ReplyFlags::DONE, id, &extents);
    }
}
