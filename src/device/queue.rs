//! One frontend thread's side of the device: guest requests in, answers out.
//!
//! A request whose blocks are all present goes straight to the cache. Any other goes through the engine,
//! which sends the parts of the work back here, to the thread that owns the request's memory.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_channel::oneshot;
use futures_util::FutureExt;
use futures_util::future::{Either, select};

use super::core::Core;
use super::gate::{Pass, Phase};
use super::hydration::Mode;
use super::messages::{FetchRequest, QueueMessage};
use crate::engine::{ByteRange, Errno, Event, Extent, OpId, OpKind};
use crate::uring::{Buffer, FileExtent, FileIo, Part, ZeroMode, sleep, spawn};

/// Piece in which a prefetch is asked for, so that a request for gigabytes stays bounded.
const PREFETCH_PIECE_BYTES: u64 = 1 << 20;
/// Where holes are is good to know, and nothing to wait for: a source that is lost may never come back, as one to which
/// the disk has come home. Whoever is told of no holes reads zeros.
const HOLES_PATIENCE: Duration = Duration::from_secs(2);
/// Pieces of one prefetch under way at a time.
const PREFETCH_PIECES: usize = 8;

/// The parts of an answer with their offsets, in no order.
type Pieces = Vec<(u64, Part)>;
/// How a request ended, and what it read.
type Answer = (Result<(), Errno>, Pieces);

struct Open {
    start: u64,
    payload: Arc<Buffer>,
    pieces: Pieces,
    done: oneshot::Sender<Answer>,
}

/// See the module's page. Lives on one thread.
pub struct Queue {
    pub(super) core: Arc<Core>,
    index: u16,
    pub(super) cache: FileIo,
    open: RefCell<HashMap<OpId, Open>>,
    next: Cell<u64>,
}

impl Queue {
    /// Queue `index` of a device, on this thread. [`Queue::run`] must run beside it.
    pub fn new(core: Arc<Core>, index: u16, cache: FileIo) -> Rc<Self> {
        Rc::new(Self { core, index, cache, open: RefCell::default(), next: Cell::new(0) })
    }

    /// The device.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// Reads a range. Zeros that crossed as holes come as [`Part::Zeros`].
    pub async fn read(&self, range: ByteRange) -> Result<Vec<Part>, Errno> {
        if self.is_hit(range) {
            let (result, bytes) = self.read_hit(range, Buffer::to_fill(range.len() as usize)).await;
            return result.map(|()| vec![Part::Owned(bytes)]);
        }
        if self.core.gate.phase() == Phase::Standby {
            return self.read_through(range).await;
        }
        let counters = &self.core.counters;
        counters.read_bytes.fetch_add(range.len(), Ordering::Relaxed);
        counters.read_misses.fetch_add(1, Ordering::Relaxed);
        let (result, mut pieces) = self.submit(OpKind::Read, range, Buffer::default()).await;
        result?;
        pieces.sort_by_key(|(start, _)| *start);
        Ok(pieces.into_iter().map(|(_, part)| part).collect())
    }

    /// Writes `data` from `offset_bytes`.
    pub async fn write(&self, offset_bytes: u64, data: Buffer, fua: bool) -> Result<(), Errno> {
        let range = ByteRange::new(offset_bytes, data.len() as u64);
        if self.is_hit(range) {
            return self.write_hit(range, data, fua).await.0;
        }
        let _pass = self.pass().await?;
        self.count_write(range);
        self.submit(OpKind::Write { fua }, range, data).await.0
    }

    /// Makes a range read as zeros.
    pub async fn zero(&self, range: ByteRange, fua: bool, keep_allocated: bool, fast_only: bool) -> Result<(), Errno> {
        let _pass = self.pass().await?;
        self.core.counters.writes.fetch_add(1, Ordering::Relaxed);
        if !self.core.is_hit(range) {
            return self.submit(OpKind::Zero { fua, keep_allocated, fast_only }, range, Buffer::default()).await.0;
        }
        self.check_health()?;
        self.prepare_change(range, false);
        self.zero_cache(range, keep_allocated, fast_only).await?;
        self.finish_change(fua).await
    }

    /// Gives up the whole blocks of a range.
    pub async fn trim(&self, range: ByteRange, fua: bool) -> Result<(), Errno> {
        let _pass = self.pass().await?;
        self.core.counters.writes.fetch_add(1, Ordering::Relaxed);
        self.submit(OpKind::Trim { fua }, range, Buffer::default()).await.0
    }

    /// Makes all acknowledged writes durable.
    pub async fn flush(&self) -> Result<(), Errno> {
        let (op, answer) = self.register(0, Buffer::default());
        self.core.apply(Event::Flush { op });
        answer.await.map_or(Err(Errno::EIO), |(result, _)| result)
    }

    /// Fetches what is absent in a range.
    pub async fn prefetch(&self, range: ByteRange) -> Result<(), Errno> {
        if self.core.gate.phase() == Phase::Standby {
            return Ok(());
        }
        let starts: Vec<u64> = (range.start..range.end).step_by(PREFETCH_PIECE_BYTES as usize).collect();
        for batch in starts.chunks(PREFETCH_PIECES) {
            let pieces = batch.iter().map(|&start| {
                let piece = ByteRange { start, end: range.end.min(start + PREFETCH_PIECE_BYTES) };
                self.submit(OpKind::Prefetch, piece, Buffer::default())
            });
            for (result, _) in futures_util::future::join_all(pieces).await {
                result?;
            }
        }
        Ok(())
    }

    /// Data and holes from the start of a range, at most `max` stretches: the cache's where blocks are
    /// present, the source's where they are absent.
    pub async fn extents(&self, range: ByteRange, max: usize) -> Vec<FileExtent> {
        let (maps, geometry) = (self.core.maps(), self.core.geometry());
        let blocks = geometry.covering(range);
        let mut extents: Vec<FileExtent> = Vec::new();
        let mut at = blocks.start;
        while at < blocks.end && extents.len() < max {
            let present = maps.is_present(at);
            let end = if present { maps.present_until(at, blocks.end) } else { maps.absent_until(at, blocks.end) };
            let part = range.clip(geometry.bytes_of(crate::engine::BlockRun::new(at, end)));
            let found = if present {
                self.cache.extents(part.start..part.end, max - extents.len())
            } else {
                self.source_extents(part).await
            };
            let covered: u64 = found.iter().map(|e| e.len_bytes).sum();
            found.into_iter().for_each(|extent| push_merged(&mut extents, extent));
            if covered < part.len() {
                break;
            }
            at = end;
        }
        extents.truncate(max);
        extents
    }

    /// Asks the gate for leave to change the disk.
    pub(super) async fn pass(&self) -> Result<Pass<'_>, Errno> {
        loop {
            if let Some(pass) = self.core.gate.enter(self.index) {
                return Ok(pass);
            }
            self.core.gate.wait(|| self.core.health.has_failed()).await?;
        }
    }

    /// In standby: what the source has, not kept (I7).
    async fn read_through(&self, range: ByteRange) -> Result<Vec<Part>, Errno> {
        let counters = &self.core.counters;
        counters.read_bytes.fetch_add(range.len(), Ordering::Relaxed);
        counters.read_misses.fetch_add(1, Ordering::Relaxed);
        counters.waiting.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.core.fetcher.send(FetchRequest::ReadThrough { range, answer: sender });
        let result = answer.await.unwrap_or(Err(Errno::EIO));
        counters.waiting.fetch_sub(1, Ordering::Relaxed);
        result
    }

    async fn source_extents(&self, range: ByteRange) -> Vec<FileExtent> {
        let (sender, answer) = oneshot::channel();
        self.core.fetcher.send(FetchRequest::Extents { range, answer: sender });
        let told: Vec<Extent> = if self.core.health.lost().is_some() {
            Vec::new()
        } else {
            match select(answer, sleep(HOLES_PATIENCE).boxed_local()).await {
                Either::Left((told, _)) => told.unwrap_or_default(),
                Either::Right(_) => Vec::new(),
            }
        };
        let mut left = range.len();
        let mut extents = Vec::new();
        for extent in told {
            let len_bytes = extent.len_bytes.min(left);
            left -= len_bytes;
            if len_bytes > 0 {
                extents.push(FileExtent { len_bytes, hole: extent.zero });
            }
        }
        if extents.is_empty() {
            extents.push(FileExtent { len_bytes: range.len(), hole: false });
        }
        extents
    }

    // ---- through the engine ------------------------------------------------------------------------

    fn register(&self, start: u64, payload: Buffer) -> (OpId, oneshot::Receiver<Answer>) {
        let op = Core::op_id(self.index, self.next.get());
        self.next.set(self.next.get() + 1);
        let (done, answer) = oneshot::channel();
        let open = Open { start, payload: Arc::new(payload), pieces: Vec::new(), done };
        self.open.borrow_mut().insert(op, open);
        (op, answer)
    }

    async fn submit(&self, kind: OpKind, range: ByteRange, payload: Buffer) -> Answer {
        let (op, answer) = self.register(range.start, payload);
        self.core.counters.waiting.fetch_add(1, Ordering::Relaxed);
        self.core.apply(Event::Submit { op, kind, range });
        // After it: what somebody waits for goes first.
        if kind == OpKind::Read && self.core.hydration.mode() != Mode::Off {
            self.core.apply(Event::Ahead { range });
        }
        let answer = answer.await.unwrap_or((Err(Errno::EIO), Vec::new()));
        self.core.counters.waiting.fetch_sub(1, Ordering::Relaxed);
        answer
    }

    /// Carries out what the engine sends, for ever.
    pub async fn run(self: Rc<Self>) {
        let mailbox = self.core.queue(self.index).clone();
        loop {
            match mailbox.recv().await {
                QueueMessage::Complete { op, result } => {
                    let open = self.open.borrow_mut().remove(&op).expect("the engine completes an open request once");
                    // Whoever asked may have gone away with its connection.
                    let _ = open.done.send((result, open.pieces));
                }
                QueueMessage::Deliver { io, op, range, pieces } => {
                    self.add_pieces(op, range.start, pieces);
                    self.core.apply(Event::LocalDone { io, result: Ok(()) });
                }
                QueueMessage::Read { io, op, range } => {
                    let this = self.clone();
                    spawn(async move {
                        let result = this.read_cache(range).await;
                        let result = result.map(|bytes| this.add_pieces(op, range.start, vec![Part::Owned(bytes)]));
                        this.core.apply(Event::LocalDone { io, result });
                    })
                    .detach();
                }
                QueueMessage::Write { io, op, range, dsync } => {
                    let this = self.clone();
                    spawn(async move {
                        let result = this.cache.write_all_at(this.payload(op, range), range.start, dsync).await;
                        let mut result = result.map_err(|e| this.io_error("write", &e));
                        if dsync {
                            result = this.after_dsync(result).await;
                        }
                        this.core.apply(Event::LocalDone { io, result });
                    })
                    .detach();
                }
                QueueMessage::Zero { io, range, keep_allocated } => {
                    let this = self.clone();
                    spawn(async move {
                        let result = this.zero_cache(range, keep_allocated, false).await;
                        this.core.apply(Event::LocalDone { io, result });
                    })
                    .detach();
                }
            }
        }
    }

    fn add_pieces(&self, op: OpId, start: u64, pieces: Vec<Part>) {
        let mut open = self.open.borrow_mut();
        let open = open.get_mut(&op).expect("a request is open until it is complete");
        let mut at = start;
        for piece in pieces {
            let len = piece.len() as u64;
            open.pieces.push((at, piece));
            at += len;
        }
    }

    fn payload(&self, op: OpId, range: ByteRange) -> Part {
        let open = self.open.borrow();
        let open = open.get(&op).expect("a request is open until it is complete");
        let start = (range.start - open.start) as usize;
        Part::Shared { bytes: open.payload.clone(), range: start..start + range.len() as usize }
    }

    async fn read_cache(&self, range: ByteRange) -> Result<Buffer, Errno> {
        let len = range.len() as usize;
        let (result, bytes) = self.cache.read_exact_at(Buffer::to_fill(len), 0..len, range.start).await;
        result.map(|()| bytes).map_err(|e| self.io_error("read", &e))
    }

    async fn zero_cache(&self, range: ByteRange, keep_allocated: bool, fast_only: bool) -> Result<(), Errno> {
        let mode = if keep_allocated { ZeroMode::KeepAllocated } else { ZeroMode::Punch };
        match self.cache.zero_at(range.start, range.len(), mode, fast_only).await {
            Err(e) if fast_only && e.raw_os_error() == Some(Errno::ENOTSUP.0) => Err(Errno::ENOTSUP),
            result => result.map_err(|e| self.io_error("zero", &e)),
        }
    }

    pub(super) fn io_error(&self, what: &str, error: &io::Error) -> Errno {
        log::error!("cache: {what}: {error}");
        Errno::from(error)
    }
}

fn push_merged(extents: &mut Vec<FileExtent>, extent: FileExtent) {
    match extents.last_mut() {
        Some(last) if last.hole == extent.hole => last.len_bytes += extent.len_bytes,
        _ => extents.push(extent),
    }
}
