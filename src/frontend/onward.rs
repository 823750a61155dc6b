//! The device as a source for the next host: read-only, and able to give the disk away.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::Sender;
use futures_channel::oneshot;

use super::FrontendError;
use crate::device::{Core, Queue};
use crate::engine::{BlockRun, ByteRange, Errno};
use crate::handoff::differs_from_base;
use crate::nbd::{Ask, DEFAULT_MAX_PAYLOAD, ExportInfo, NbdError, Standing, Told, TransmissionFlags};
use crate::server::{Disk, DiskExtent, ServeStats, Server, hash_by_reading, without_zeros};
use crate::uring::{FileIo, Listener, Mailbox, Part, Reactor, Residency, spawn};

/// How long replies under way may take when it stops.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// Who decides about the disk. The calls may block.
pub trait Owner: Send + Sync + 'static {
    /// How the disk stands; `None`: it is not ours to give.
    fn standing(&self) -> Option<Standing>;
    /// What its contents are known by.
    fn identity(&self) -> String;
    /// A step of a handoff.
    fn hand_off(&self, ask: &Ask) -> Result<Told, NbdError>;
}

enum Order {
    Listen(Listener),
    Close(Sender<()>),
    End,
}

/// The thread that serves the device to the next host, whether it listens or not: what was asked of the engine has to be
/// heard to its end.
pub struct Onward {
    handle: JoinHandle<()>,
    orders: Mailbox<Order>,
}

impl Onward {
    /// Starts the thread, on a queue of its own. It does not listen yet.
    pub fn start(
        core: Arc<Core>,
        queue: u16,
        cache: FileIo,
        name: String,
        owner: Arc<dyn Owner>,
    ) -> Result<Self, FrontendError> {
        let orders = Mailbox::default();
        let (said, ready) = crossbeam::channel::bounded::<Result<(), FrontendError>>(1);
        let heard = orders.clone();
        let run = move || {
            let reactor = match Reactor::new() {
                Ok(reactor) => reactor,
                Err(e) => return drop(said.send(Err(e.into()))),
            };
            // The other side waits for this one word.
            let _ = said.send(Ok(()));
            let serve = async move {
                let queue = Queue::new(core, queue, cache.clone());
                let _worker = spawn(queue.clone().run());
                serve(
                    Rc::new(OnwardDisk { queue, cache, name, owner, handing_off: async_lock::Mutex::new(()) }),
                    heard,
                )
                .await;
            };
            reactor.block_on(serve).expect("a ring that worked goes on working");
        };
        let handle = std::thread::Builder::new().name("onward".into()).spawn(run)?;
        ready.recv().unwrap_or_else(|_| Err(io::Error::other("it ended at once").into()))?;
        Ok(Self { handle, orders })
    }

    /// Listens there, and nowhere else any more.
    pub fn listen(&self, listener: Listener) {
        self.orders.send(Order::Listen(listener));
    }

    /// Hangs up, and does not listen any more.
    pub fn close(&self) {
        let (closed, done) = crossbeam::channel::bounded(1);
        self.orders.send(Order::Close(closed));
        // An error: it has ended, which is as good.
        let _ = done.recv();
    }

    /// Ends the thread.
    pub fn stop(self) {
        self.orders.send(Order::End);
        // A panic there has ended the process.
        let _ = self.handle.join();
    }
}

async fn serve(disk: Rc<OnwardDisk>, orders: Mailbox<Order>) {
    let mut running: Option<Server> = None;
    loop {
        let order = orders.recv().await;
        if let Some(server) = running.take() {
            server.stop(STOP_PATIENCE).await;
        }
        match order {
            Order::Listen(listener) => running = Some(Server::start(listener, disk.clone(), ServeStats::default())),
            // Whoever asked waits for this.
            Order::Close(closed) => drop(closed.send(())),
            Order::End => return,
        }
    }
}

struct OnwardDisk {
    queue: Rc<Queue>,
    cache: FileIo,
    name: String,
    owner: Arc<dyn Owner>,
    /// One step at a time, however many are asked for: each has a thread.
    handing_off: async_lock::Mutex<()>,
}

fn nbd_error(errno: Errno) -> NbdError {
    NbdError::from_errno(errno.0)
}

impl Disk for OnwardDisk {
    fn export(&self) -> ExportInfo {
        let geometry = self.queue.core().geometry();
        let flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::READ_ONLY
            | TransmissionFlags::SEND_DF
            | TransmissionFlags::CAN_MULTI_CONN
            | TransmissionFlags::SEND_CACHE;
        ExportInfo {
            min_block: 1,
            preferred_block: geometry.block_bytes() as u32,
            max_block: DEFAULT_MAX_PAYLOAD,
            identity: Some(self.owner.identity()),
            standing: self.owner.standing(),
            tells_hot: self.cache.tells_residency(),
            ..ExportInfo::new(self.name.clone(), geometry.size_bytes(), flags)
        }
    }

    fn reads_at_once(&self, range: ByteRange) -> bool {
        self.queue.core().is_hit(range)
    }

    async fn read(&self, range: ByteRange) -> Result<Vec<Part>, NbdError> {
        let mut at = range.start;
        let mut parts = Vec::new();
        for part in self.queue.read(range).await.map_err(nbd_error)? {
            let len = part.len() as u64;
            match part {
                Part::Owned(bytes) => parts.extend(without_zeros(at, bytes)),
                part => parts.push(part),
            }
            at += len;
        }
        Ok(parts)
    }

    async fn prefetch(&self, range: ByteRange) -> Result<(), NbdError> {
        self.queue.prefetch(range).await.map_err(nbd_error)
    }

    async fn extents(&self, range: ByteRange, max: usize) -> Result<Vec<DiskExtent>, NbdError> {
        let extents = self.queue.extents(range, max).await;
        Ok(extents.into_iter().map(|e| DiskExtent { len_bytes: e.len_bytes, hole: e.hole, zero: e.hole }).collect())
    }

    async fn hot(&self, range: ByteRange, max: usize) -> Result<Vec<(u64, Residency)>, NbdError> {
        self.cache.residency(range.start..range.end, max).await.map_err(|_| NbdError::Io)
    }

    async fn hashes(&self, range: ByteRange, piece_bytes: u32) -> Result<Vec<[u8; 32]>, NbdError> {
        hash_by_reading(self, range, piece_bytes).await
    }

    async fn hand_off(&self, ask: Ask) -> Result<Told, NbdError> {
        let _turn = self.handing_off.lock().await;
        // It may wait for the guest's requests and for the disk.
        let (answer, told) = oneshot::channel();
        let owner = self.owner.clone();
        let work = move || drop(answer.send(owner.hand_off(&ask)));
        std::thread::Builder::new().name("handoff".into()).spawn(work).map_err(|_| NbdError::NoMem)?;
        told.await.unwrap_or(Err(NbdError::Io))
    }

    async fn changed(&self, range: ByteRange, max: usize) -> Result<Vec<(u64, bool)>, NbdError> {
        // Who asks in the same breath as for the disk wants to know how it is after that.
        let _turn = self.handing_off.lock().await;
        let (maps, geometry) = (self.queue.core().maps(), self.queue.core().geometry());
        let blocks = geometry.covering(range);
        let mut stretches: Vec<(u64, bool)> = Vec::new();
        let mut at = blocks.start;
        while at < blocks.end {
            let ((dirty, end), present) = (maps.dirty_stretch(at, blocks.end), maps.is_present(at));
            let end = match (dirty, present) {
                (false, _) => end,
                (true, true) => maps.present_until(at, end),
                (true, false) => maps.absent_until(at, end),
            };
            let (len, differs) =
                (range.clip(geometry.bytes_of(BlockRun::new(at, end))).len(), differs_from_base(present, dirty));
            let is_full = stretches.len() == max;
            match stretches.last_mut() {
                Some((before, same)) if *same == differs => *before += len,
                _ if is_full => break,
                _ => stretches.push((len, differs)),
            }
            at = end;
        }
        Ok(stretches)
    }
}
