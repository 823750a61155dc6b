//! The device as an NBD export, read-write, on a unix socket.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::FrontendError;
use crate::device::{Core, Queue};
use crate::engine::{ByteRange, Errno};
use crate::nbd::{DEFAULT_MAX_PAYLOAD, ExportInfo, NbdError, TransmissionFlags};
use crate::server::{Disk, DiskExtent, ServeStats, Server};
use crate::uring::{Buffer, FileIo, Listener, Mailbox, Part, Reactor, spawn};

/// How long requests under way may take when the daemon stops; those that wait for a lost source are let go.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// How the device shows itself.
#[derive(Clone, Debug)]
pub struct Presentation {
    /// Name of the export; it is the default export too.
    pub name: String,
    /// Can the cache turn ranges into zeros without writing them?
    pub fast_zero: bool,
}

/// The running frontend.
pub struct NbdFrontend {
    handle: JoinHandle<()>,
    stop: Mailbox<()>,
    stats: ServeStats,
}

impl NbdFrontend {
    /// Serves the device to whoever connects to `listener`, on queue 0.
    pub fn start(
        core: Arc<Core>,
        cache: FileIo,
        listener: Listener,
        presentation: Presentation,
    ) -> Result<Self, FrontendError> {
        let stop = Mailbox::default();
        let stats = ServeStats::default();
        let (said, ready) = crossbeam::channel::bounded::<Result<(), FrontendError>>(1);
        let (stop_inside, stats_inside) = (stop.clone(), stats.clone());
        let run = move || {
            let reactor = match Reactor::watchful() {
                Ok(reactor) => reactor,
                Err(e) => return drop(said.send(Err(e.into()))),
            };
            // The other side waits for this one word.
            let _ = said.send(Ok(()));
            let serve = async move {
                let queue = Queue::new(core, 0, cache);
                let _worker = spawn(queue.clone().run());
                let server = Server::start(listener, Rc::new(DeviceDisk { queue, presentation }), stats_inside);
                stop_inside.recv().await;
                server.stop(STOP_PATIENCE).await;
            };
            reactor.block_on(serve).expect("a ring that worked goes on working");
        };
        let handle = std::thread::Builder::new().name("nbd".into()).spawn(run)?;
        ready.recv().unwrap_or_else(|_| Err(io::Error::other("it ended at once").into()))?;
        Ok(Self { handle, stop, stats })
    }

    /// What went through it.
    pub fn stats(&self) -> &ServeStats {
        &self.stats
    }

    /// Finishes what is under way, if that takes no longer than a few seconds, and hangs up.
    pub fn stop(self) {
        self.stop.send(());
        // A panic there has ended the process.
        let _ = self.handle.join();
    }
}

struct DeviceDisk {
    queue: Rc<Queue>,
    presentation: Presentation,
}

fn nbd_error(errno: Errno) -> NbdError {
    NbdError::from_errno(errno.0)
}

impl Disk for DeviceDisk {
    fn export(&self) -> ExportInfo {
        let geometry = self.queue.core().geometry();
        let mut flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_DF
            | TransmissionFlags::CAN_MULTI_CONN
            | TransmissionFlags::SEND_CACHE;
        flags.set(TransmissionFlags::SEND_FAST_ZERO, self.presentation.fast_zero);
        ExportInfo {
            description: Some("ferried by blkferry".into()),
            min_block: 1,
            preferred_block: geometry.block_bytes() as u32,
            max_block: DEFAULT_MAX_PAYLOAD,
            ..ExportInfo::new(self.presentation.name.clone(), geometry.size_bytes(), flags)
        }
    }

    fn reads_at_once(&self, range: ByteRange) -> bool {
        self.queue.core().is_hit(range)
    }

    async fn read(&self, range: ByteRange) -> Result<Vec<Part>, NbdError> {
        self.queue.read(range).await.map_err(nbd_error)
    }

    async fn write(&self, offset_bytes: u64, data: Buffer, fua: bool) -> Result<(), NbdError> {
        self.queue.write(offset_bytes, data, fua).await.map_err(nbd_error)
    }

    async fn zero(&self, range: ByteRange, fua: bool, keep: bool, fast_only: bool) -> Result<(), NbdError> {
        self.queue.zero(range, fua, keep, fast_only).await.map_err(nbd_error)
    }

    async fn trim(&self, range: ByteRange, fua: bool) -> Result<(), NbdError> {
        self.queue.trim(range, fua).await.map_err(nbd_error)
    }

    async fn flush(&self) -> Result<(), NbdError> {
        self.queue.flush().await.map_err(nbd_error)
    }

    async fn prefetch(&self, range: ByteRange) -> Result<(), NbdError> {
        self.queue.prefetch(range).await.map_err(nbd_error)
    }

    async fn extents(&self, range: ByteRange, max: usize) -> Result<Vec<DiskExtent>, NbdError> {
        let extents = self.queue.extents(range, max).await;
        Ok(extents.into_iter().map(|e| DiskExtent { len_bytes: e.len_bytes, hole: e.hole, zero: e.hole }).collect())
    }
}
