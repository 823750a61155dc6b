//! What the threads of a device share.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;

use super::gate::Gate;
use super::hydration::Hydration;
use super::messages::{CommitRequest, FetchRequest, QueueMessage};
use crate::cache::Superblock;
use crate::engine::{Action, BlockRun, ByteRange, Engine, Event, Geometry, Maps, OpId};
use crate::remote::FetchedData;
use crate::uring::{Mailbox, now};

/// Bits of an [`OpId`] that count; those above name the queue.
const OP_BITS: u32 = 48;

/// Requests and bytes of the guest, since the daemon started.
#[derive(Debug, Default)]
pub struct Counters {
    /// Reads answered from the cache alone.
    pub read_hits: AtomicU64,
    /// Reads that had to wait for the source.
    pub read_misses: AtomicU64,
    /// Bytes read by the guest.
    pub read_bytes: AtomicU64,
    /// Writes, trims and zeroings.
    pub writes: AtomicU64,
    /// Bytes written by the guest (trims and zeroings not counted).
    pub written_bytes: AtomicU64,
    /// Requests of the guest that wait for the source now.
    pub waiting: AtomicU64,
    /// Commits done.
    pub commits: AtomicU64,
}

/// What is wrong at the moment, if anything.
#[derive(Debug, Default)]
pub struct Health {
    lost: Mutex<Option<(Instant, String)>>,
    failed: Mutex<Option<String>>,
    has_failed: AtomicBool,
    doubts_dsync: AtomicBool,
    complete: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked with the lock held has aborted the daemon; see `FetchThread` and the others.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Health {
    /// The source is gone.
    pub fn set_lost(&self, reason: String) {
        let mut lost = lock(&self.lost);
        let since = lost.take().map_or_else(now, |(since, _)| since);
        *lost = Some((since, reason));
    }

    /// The source is back.
    pub fn set_found(&self) {
        *lock(&self.lost) = None;
    }

    /// For how long the source has been gone, and why.
    pub fn lost(&self) -> Option<(Duration, String)> {
        lock(&self.lost).as_ref().map(|(since, reason)| (now().duration_since(*since), reason.clone()))
    }

    /// The device has stopped for good.
    pub(super) fn set_failed(&self, reason: String) {
        lock(&self.failed).get_or_insert(reason);
        self.has_failed.store(true, Ordering::SeqCst);
    }

    /// Has it stopped for good?
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::SeqCst)
    }

    /// A write with RWF_DSYNC has failed: see [`Queue::after_dsync`](super::queue::Queue).
    pub(super) fn doubt_dsync(&self) {
        self.doubts_dsync.store(true, Ordering::SeqCst);
    }

    /// Is the word of such a write not enough any more?
    pub(super) fn doubts_dsync(&self) -> bool {
        self.doubts_dsync.load(Ordering::SeqCst)
    }

    /// Why it has stopped for good.
    pub fn failed(&self) -> Option<String> {
        lock(&self.failed).clone()
    }

    /// All blocks are present, and durably known to be.
    pub fn set_complete(&self) {
        self.complete.store(true, Ordering::SeqCst);
    }

    /// Is the source no longer needed?
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::SeqCst)
    }
}

/// See the module's page.
pub struct Core {
    maps: Maps,
    engine: Mutex<Engine>,
    queues: Vec<Mailbox<QueueMessage>>,
    pub(super) fetcher: Mailbox<FetchRequest>,
    commits: Sender<CommitRequest>,
    /// Rung with each of them, for a commit task that cannot wait for a channel.
    #[cfg(feature = "simulation")]
    pub(super) commit_asked: event_listener::Event,
    /// What the guest did.
    pub counters: Counters,
    /// What is wrong.
    pub health: Health,
    /// Background fetching.
    pub hydration: Hydration,
    /// Who may change the disk.
    pub gate: Gate,
}

impl Core {
    /// A device with that many frontend queues. The receiving ends belong to [`super::CommitThread`] and the others.
    pub(crate) fn new(
        engine: Engine,
        queues: usize,
        fetcher: Mailbox<FetchRequest>,
        commits: Sender<CommitRequest>,
        hydration: Hydration,
        gate: Gate,
    ) -> Self {
        Self {
            maps: engine.maps().clone(),
            engine: Mutex::new(engine),
            queues: (0..queues).map(|_| Mailbox::default()).collect(),
            fetcher,
            commits,
            #[cfg(feature = "simulation")]
            commit_asked: event_listener::Event::new(),
            counters: Counters::default(),
            health: Health::default(),
            hydration,
            gate,
        }
    }

    /// The maps; reading them takes no lock.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Sizes.
    pub fn geometry(&self) -> Geometry {
        self.maps.geometry()
    }

    /// Guest requests that the engine has not answered.
    pub fn open_requests(&self) -> usize {
        lock(&self.engine).open_requests()
    }

    /// The queue beside those of the frontend.
    pub fn last_queue(&self) -> u16 {
        self.queues.len() as u16 - 1
    }

    pub(super) fn queue(&self, index: u16) -> &Mailbox<QueueMessage> {
        &self.queues[usize::from(index)]
    }

    pub(super) fn op_id(queue: u16, number: u64) -> OpId {
        OpId(u64::from(queue) << OP_BITS | (number & ((1 << OP_BITS) - 1)))
    }

    /// Tells the engine and hands what it wants done to the threads that do it.
    pub(super) fn apply(&self, event: Event) {
        let mut actions = Vec::new();
        self.apply_into(event, &mut actions);
        self.route(actions, None);
    }

    /// Tells the engine; the caller routes the actions.
    pub(super) fn apply_into(&self, event: Event, actions: &mut Vec<Action>) {
        lock(&self.engine).apply(event, actions);
    }

    /// It stops for good: who waits to change the disk is told.
    pub fn fail(&self, reason: String) {
        self.health.set_failed(reason);
        self.gate.wake();
    }

    /// Hands actions to the threads that carry them out. `data` is that of the fetch that just ended.
    pub(super) fn route(&self, actions: Vec<Action>, data: Option<&FetchedData>) {
        for action in actions {
            match action {
                Action::ReadLocal { io, op, range } => self.to_queue(op, QueueMessage::Read { io, op, range }),
                Action::WriteLocal { io, op, range, dsync } => {
                    self.to_queue(op, QueueMessage::Write { io, op, range, dsync });
                }
                Action::ZeroLocal { io, op, range, keep_allocated } => {
                    self.to_queue(op, QueueMessage::Zero { io, range, keep_allocated });
                }
                Action::Deliver { io, op, range, .. } => {
                    let pieces = data.expect("only a fetch that just ended delivers").pieces(range);
                    self.to_queue(op, QueueMessage::Deliver { io, op, range, pieces });
                }
                Action::Complete { op, result } => self.to_queue(op, QueueMessage::Complete { op, result }),
                Action::Fetch { fetch, run, lane } => self.fetcher.send(FetchRequest::Fetch { fetch, run, lane }),
                Action::Store { fetch, run } => self.fetcher.send(FetchRequest::Store { fetch, run }),
                Action::Release { fetch } => self.fetcher.send(FetchRequest::Release { fetch }),
                Action::Commit => self.request_commit(CommitRequest::Commit),
                Action::StoreZero { .. }
                | Action::QueryExtents { .. }
                | Action::HydrationWaits
                | Action::HydrationRests
                | Action::HydrationDone => unreachable!("hydration carries out its steps itself"),
            }
        }
    }

    fn to_queue(&self, op: OpId, message: QueueMessage) {
        self.queues[(op.0 >> OP_BITS) as usize].send(message);
    }

    pub(super) fn request_commit(&self, request: CommitRequest) {
        // The commit thread outlives the others; after it there is nobody left to tell.
        let _ = self.commits.send(request);
        #[cfg(feature = "simulation")]
        self.commit_asked.notify(usize::MAX);
    }

    /// Blocks that are in the cache without having been fetched; in standby, before the gate opens.
    pub fn adopt(&self, runs: &[BlockRun]) {
        let mut engine = lock(&self.engine);
        runs.iter().for_each(|run| engine.adopt(*run));
    }

    /// Commits, then changes the superblock; both are durable when it returns. Blocks.
    pub fn record(&self, change: impl FnOnce(&mut Superblock) + Send + 'static) -> io::Result<()> {
        let (answer, done) = crossbeam::channel::bounded(1);
        self.request_commit(CommitRequest::Record { change: Box::new(change), answer });
        done.recv().unwrap_or_else(|_| Err(io::Error::other("the commit thread has ended")))
    }

    /// Are all blocks of a range in the cache?
    pub fn is_hit(&self, range: ByteRange) -> bool {
        self.maps.all_present(self.geometry().covering(range))
    }
}
