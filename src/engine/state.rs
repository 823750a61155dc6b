//! The engine itself: the only mutator of maps and table.
//!
//! A request is cut into segments at the borders of what is present, absent or in flight. Each segment
//! either starts local I/O or waits for exactly one thing, and is dispatched again when that has ended.

mod fetches;

use std::collections::HashMap;

use super::ahead::{Readahead, Wanted};
use super::event::{Action, Errno, Event, FetchError, Lane, OpId, OpKind};
use super::geometry::{BlockRun, ByteRange};
use super::hydrate::{Next, Planner};
use super::inflight::{FetchId, Inflight, IoId, Owner};
use super::maps::Maps;
use super::ops::{Ended, Ops, Segment};
use super::survey::Questions;

/// What the engine must know of its surroundings.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Most bytes that one fetch asks for.
    pub max_fetch_bytes: u64,
    /// How the source is asked about its holes, if it tells them.
    pub questions: Option<Questions>,
    /// Does it send zeros as holes when they are read, at next to no cost?
    pub compact: bool,
    /// Most bytes of zeros that are stored at once in the background: requests for blocks among them wait meanwhile. Where
    /// the cache takes a hole for nothing it is [`u64::MAX`].
    pub max_zero_bytes: u64,
}

/// A fault planted on purpose, to prove that the tests would see it.
#[cfg(feature = "planted-faults")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlantedFault {
    /// Blocks on their way are taken for absent.
    InflightIgnored,
    /// The present bit is set when the data arrives, before it stands in the cache.
    BitBeforeData,
    /// A fetch writes all of its blocks, also those that the guest wrote meanwhile.
    FetchOverwrites,
    /// The present bit is set when a write of the guest begins, not when it has ended.
    PresentOnSubmit,
    /// A request that joins a fetch is forgotten.
    WaiterDropped,
}

struct Fetch {
    run: BlockRun,
    lane: Lane,
    /// Reads that are answered from the network buffer.
    readers: Vec<Segment>,
    /// What is dispatched again when the blocks are present (or are not going to be).
    after: Vec<Segment>,
    stores: usize,
    store_error: Option<Errno>,
}

impl Fetch {
    /// Everybody who waits for it.
    fn waiting(self) -> impl Iterator<Item = Segment> {
        self.readers.into_iter().chain(self.after)
    }
}

struct LocalIo {
    op: OpId,
    /// Blocks that become present when this is done, and who waits for that.
    overwrites: Option<(BlockRun, Vec<Segment>)>,
}

/// See the module's page.
pub struct Engine {
    maps: Maps,
    config: EngineConfig,
    inflight: Inflight,
    ops: Ops,
    fetches: HashMap<FetchId, Fetch>,
    ios: HashMap<IoId, LocalIo>,
    planner: Planner,
    readahead: Readahead,
    /// Blocks of fetches under way in [`Lane::Ahead`].
    ahead_blocks: u64,
    next_id: u64,
    commit_runs: bool,
    /// Requests that the running commit will answer, and those that need the one after it.
    flushing: Vec<OpId>,
    flush_next: Vec<OpId>,
    failed: Option<Errno>,
    #[cfg(feature = "planted-faults")]
    fault: Option<PlantedFault>,
}

impl Engine {
    /// An engine on these maps, with nothing in flight.
    pub fn new(maps: Maps, config: EngineConfig) -> Self {
        Self {
            planner: Planner::new(config.questions, config.compact, maps.geometry().blocks_in(config.max_zero_bytes)),
            readahead: Readahead::default(),
            ahead_blocks: 0,
            maps,
            config,
            inflight: Inflight::default(),
            ops: Ops::default(),
            fetches: HashMap::new(),
            ios: HashMap::new(),
            next_id: 0,
            commit_runs: false,
            flushing: Vec::new(),
            flush_next: Vec::new(),
            failed: None,
            #[cfg(feature = "planted-faults")]
            fault: None,
        }
    }

    /// Breaks the engine, for the tests of the tests.
    #[cfg(feature = "planted-faults")]
    pub fn plant(&mut self, fault: PlantedFault) {
        self.fault = Some(fault);
    }

    /// Blocks that are in the cache without having been fetched: it is an older copy of the disk. Before anything else
    /// happens to them.
    pub fn adopt(&mut self, run: BlockRun) {
        self.maps.mark_present(run);
    }

    /// The maps that it works on.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Requests that are not answered yet.
    pub fn open_requests(&self) -> usize {
        self.ops.len() + self.flushing.len() + self.flush_next.len()
    }

    /// Has a failed commit stopped the device?
    pub fn failed(&self) -> Option<Errno> {
        self.failed
    }

    /// Takes one event and appends what is to be done. The number of actions is bounded by the blocks
    /// that the event is about and the requests that waited for it.
    pub fn apply(&mut self, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Submit { op, kind, range } => self.submit(op, kind, range, out),
            Event::Flush { op } => self.flush(op, out),
            Event::LocalDone { io, result } => self.local_done(io, result, out),
            Event::Fetched { fetch, result: Ok(()) } => self.fetched(fetch, out),
            Event::Fetched { fetch, result: Err(error) } => self.fetch_failed(fetch, error, out),
            Event::Stored { fetch, run, result } => self.stored(fetch, run, result, out),
            Event::Ahead { range } => self.read_ahead(range, out),
            Event::Hydrate => self.hydrate(out),
            Event::Extents { run, extents } => self.planner.answer(self.maps.geometry(), run, &extents),
            Event::Hot { ranges } => self.planner.prefer(self.maps.geometry(), &ranges),
            Event::Committed { result } => self.committed(result, out),
            Event::CommitDue => {
                if !self.commit_runs && self.failed.is_none() && self.maps.has_uncommitted() {
                    self.start_commit(out);
                }
            }
        }
    }

    fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    // ---- guest requests ----------------------------------------------------------------------------

    fn submit(&mut self, op: OpId, kind: OpKind, range: ByteRange, out: &mut Vec<Action>) {
        debug_assert!(!range.is_empty() && range.end <= self.maps.geometry().size_bytes());
        if self.failed.is_some() {
            out.push(Action::Complete { op, result: Err(Errno::EIO) });
            return;
        }
        self.ops.open(op, kind);
        match kind {
            OpKind::Trim { .. } => {
                // Advisory: the parts of blocks at its ends stay as they are (NBD, "NBD_CMD_TRIM").
                let geometry = self.maps.geometry();
                let whole = geometry.bytes_of(geometry.inside(range));
                self.start(Segment { op, kind, range: whole }, out);
            }
            OpKind::Zero { fast_only: true, .. } if self.needs_the_source(range) => {
                self.end_part(op, Err(Errno::ENOTSUP), out);
            }
            _ => self.start(Segment { op, kind, range }, out),
        }
    }

    /// Would a change of this range have to fetch (a part of an absent block)?
    fn needs_the_source(&self, range: ByteRange) -> bool {
        let geometry = self.maps.geometry();
        let (all, inside) = (geometry.covering(range), geometry.inside(range));
        let is_edge = |block| !inside.contains(block) && !self.maps.is_present(block);
        !all.is_empty() && (is_edge(all.start) || is_edge(all.end - 1))
    }

    /// Cuts a segment where the state of its blocks changes, starts or parks each piece, and ends it.
    fn start(&mut self, segment: Segment, out: &mut Vec<Action>) {
        let geometry = self.maps.geometry();
        let blocks = geometry.covering(segment.range);
        let inside = geometry.inside(segment.range);
        let mut at = blocks.start;
        while at < blocks.end {
            let (owner, until) = self.look(at, blocks.end);
            // Whole blocks and parts of blocks go different ways when changed.
            let whole = inside.contains(at);
            let until = match (segment.kind.is_change(), whole) {
                (true, true) => until.min(inside.end),
                (true, false) => at + 1,
                (false, _) => until,
            };
            let run = BlockRun::new(at, until);
            let piece = Segment { range: segment.range.clip(geometry.bytes_of(run)), ..segment };
            self.ops.add_part(segment.op);
            self.start_piece(piece, run, owner, whole, out);
            at = until;
        }
        self.end_part(segment.op, Ok(()), out);
    }

    /// State of the block and how far it reaches: (present?, owner).
    fn look(&self, block: u64, limit: u64) -> (State, u64) {
        if self.maps.is_present(block) {
            return (State::Present, self.maps.present_until(block, limit));
        }
        let (owner, until) = self.inflight.look(block);
        let until = self.maps.absent_until(block, until.min(limit));
        #[cfg(feature = "planted-faults")]
        if self.fault == Some(PlantedFault::InflightIgnored) && matches!(owner, Some(Owner::Wire(_))) {
            return (State::Absent, until);
        }
        (owner.map_or(State::Absent, State::Owned), until)
    }

    fn start_piece(&mut self, piece: Segment, run: BlockRun, state: State, whole: bool, out: &mut Vec<Action>) {
        let change = piece.kind.is_change();
        match state {
            State::Present => self.start_local(piece, run, None, out),
            State::Absent | State::Owned(Owner::Wire(_)) if change && whole => {
                self.start_local(piece, run, Some(run), out);
            }
            State::Absent => {
                let max = self.maps.geometry().blocks_in(self.config.max_fetch_bytes);
                // One part was counted for the whole piece; each fetch carries one of its own.
                for part in run.pieces(max) {
                    let range = piece.range.clip(self.maps.geometry().bytes_of(part));
                    self.ops.add_part(piece.op);
                    let fetch = self.start_fetch(part, Lane::Demand, out);
                    self.wait_for_wire(fetch, Segment { range, ..piece });
                }
                self.end_part(piece.op, Ok(()), out);
            }
            #[cfg(feature = "planted-faults")]
            State::Owned(Owner::Wire(_)) if self.fault == Some(PlantedFault::WaiterDropped) => {}
            State::Owned(Owner::Wire(fetch)) => self.wait_for_wire(fetch, piece),
            State::Owned(Owner::Storing(fetch)) => {
                self.fetches.get_mut(&fetch).expect("an owner exists").after.push(piece);
            }
            State::Owned(Owner::Overwriting(io)) => {
                let io = self.ios.get_mut(&io).expect("an owner exists");
                let (_, after) = io.overwrites.as_mut().expect("it owns blocks");
                after.push(piece);
            }
        }
    }

    fn wait_for_wire(&mut self, fetch: FetchId, piece: Segment) {
        let fetch = self.fetches.get_mut(&fetch).expect("an owner exists");
        match piece.kind {
            OpKind::Read => fetch.readers.push(piece),
            _ => fetch.after.push(piece),
        }
    }

    fn start_local(&mut self, piece: Segment, run: BlockRun, overwrites: Option<BlockRun>, out: &mut Vec<Action>) {
        let Segment { op, kind, range } = piece;
        if kind == OpKind::Prefetch {
            self.end_part(op, Ok(()), out);
            return;
        }
        let io = IoId(self.fresh_id());
        let dsync = if kind.is_change() {
            // Before the write starts: the dirty map may say too much, never too little.
            self.maps.mark_dirty(run);
            let committed = overwrites.is_none() && self.maps.is_committed(run);
            let plain_write = matches!(kind, OpKind::Write { .. });
            if !(committed && plain_write) {
                self.ops.needs_commit(op);
            }
            kind.wants_fua() && committed && plain_write
        } else {
            false
        };
        if let Some(run) = overwrites {
            self.inflight.give(run, Owner::Overwriting(io));
            #[cfg(feature = "planted-faults")]
            if self.fault == Some(PlantedFault::PresentOnSubmit) {
                self.maps.mark_present(run);
            }
        }
        self.ios.insert(io, LocalIo { op, overwrites: overwrites.map(|run| (run, Vec::new())) });
        out.push(match kind {
            OpKind::Read | OpKind::Prefetch => Action::ReadLocal { io, op, range },
            OpKind::Write { .. } => Action::WriteLocal { io, op, range, dsync },
            OpKind::Zero { keep_allocated, .. } => Action::ZeroLocal { io, op, range, keep_allocated },
            OpKind::Trim { .. } => Action::ZeroLocal { io, op, range, keep_allocated: false },
        });
    }

    fn local_done(&mut self, io: IoId, result: Result<(), Errno>, out: &mut Vec<Action>) {
        let done = self.ios.remove(&io).expect("local I/O ends once");
        if let Some((run, after)) = done.overwrites {
            self.inflight.free(run);
            if result.is_ok() {
                self.maps.mark_present(run);
            }
            self.end_part(done.op, result, out);
            after.into_iter().for_each(|segment| self.start(segment, out));
        } else {
            self.end_part(done.op, result, out);
        }
    }

    fn end_part(&mut self, op: OpId, result: Result<(), Errno>, out: &mut Vec<Action>) {
        match self.ops.end_part(op, result) {
            Ended::Not => {}
            Ended::Complete(result) => out.push(Action::Complete { op, result }),
            // The sync that failed may have dropped what this write had written before its own sync (I11).
            Ended::Durable if self.failed.is_some() => out.push(Action::Complete { op, result: Err(Errno::EIO) }),
            Ended::Durable => out.push(Action::Complete { op, result: Ok(()) }),
            Ended::AfterCommit => self.flush(op, out),
        }
    }

    /// Can this only be done once its blocks are in the cache?
    fn needs_presence(&self, segment: Segment) -> bool {
        let geometry = self.maps.geometry();
        match segment.kind {
            OpKind::Read => false,
            OpKind::Prefetch => true,
            _ => geometry.inside(segment.range) != geometry.covering(segment.range),
        }
    }

    /// After a failure: a segment whose blocks have come in another way goes on, any other fails.
    fn fail_or_start(&mut self, segment: Segment, errno: Errno, out: &mut Vec<Action>) {
        let blocks = self.maps.geometry().covering(segment.range);
        if (blocks.start..blocks.end).all(|b| self.maps.is_present(b) || self.inflight.look(b).0.is_some()) {
            self.start(segment, out);
        } else {
            self.end_part(segment.op, Err(errno), out);
        }
    }

    // ---- durability --------------------------------------------------------------------------------

    fn flush(&mut self, op: OpId, out: &mut Vec<Action>) {
        if self.failed.is_some() {
            out.push(Action::Complete { op, result: Err(Errno::EIO) });
            return;
        }
        self.flush_next.push(op);
        if !self.commit_runs {
            self.start_commit(out);
        }
    }

    /// One commit runs, one may be pending: whoever comes while one runs may have acknowledged writes
    /// that it did not take, and waits for the next.
    fn start_commit(&mut self, out: &mut Vec<Action>) {
        self.commit_runs = true;
        self.flushing = std::mem::take(&mut self.flush_next);
        out.push(Action::Commit);
    }

    fn committed(&mut self, result: Result<(), Errno>, out: &mut Vec<Action>) {
        self.commit_runs = false;
        let mut answered = std::mem::take(&mut self.flushing);
        if let Err(errno) = result {
            // The kernel may have dropped what it could not write: nothing later can be trusted (I11).
            self.failed = Some(errno);
            answered.append(&mut self.flush_next);
        }
        out.extend(answered.into_iter().map(|op| Action::Complete { op, result: result.map_err(|_| Errno::EIO) }));
        if !self.flush_next.is_empty() {
            self.start_commit(out);
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum State {
    Present,
    Absent,
    Owned(Owner),
}
