//! The device as a block device of this host: /dev/ublkbN.
//!
//! ```text
//!   hardware queue i ── thread i: one ring ── a task a tag ──► device::Queue i ──► cache, or the engine
//! ```
//! A thread ends by itself when the driver has taken back the last of its tags.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender};
use event_listener::Event;
use futures_util::future::{Either, join_all, select};

use super::FrontendError;
use crate::device::{Core, Queue};
use crate::engine::{ByteRange, Errno};
use crate::ublk::{Channel, Device, Next, Operation, Params, Request, RequestFlags, Tag, UblkError};
use crate::uring::{Buffer, FileIo, Mailbox, Part, Reactor, spawn};

/// Preferred size of a request: what a fetch run is not worse at.
const OPTIMAL_IO_BYTES: u64 = 64 << 10;
/// Most that is given up or zeroed at once, where the cache can do that without writing.
const MAX_ZEROES_BYTES: u64 = 1 << 30;
/// The same where zeros have to be written.
const MAX_WRITTEN_ZEROES_BYTES: u64 = 16 << 20;
/// Logical block sizes that the kernel takes.
const SECTOR_BYTES: u64 = 512;
const PAGE_BYTES: u64 = 4096;

/// Why a disk cannot be a block device.
#[derive(Debug, thiserror::Error)]
pub enum ShapeError {
    /// It ends within a sector.
    #[error(
        "the source has {size_bytes} bytes, which is not a multiple of {logical_bytes}: a block device cannot have \
         that size; use --frontend nbd"
    )]
    Size {
        /// Its size.
        size_bytes: u64,
        /// The unit.
        logical_bytes: u64,
    },
    /// What a dead daemon left has another shape.
    #[error("the device has {device_bytes} bytes and the cache {size_bytes}: they do not belong together")]
    Changed {
        /// Size of the device.
        device_bytes: u64,
        /// Size of the cache.
        size_bytes: u64,
    },
}

/// Logical block size for a source that takes requests in units of `unit_bytes`; an error if the size does
/// not fit.
pub fn logical_bytes(size_bytes: u64, unit_bytes: u64) -> Result<u64, ShapeError> {
    let logical_bytes = unit_bytes.next_power_of_two().clamp(SECTOR_BYTES, PAGE_BYTES);
    if size_bytes.is_multiple_of(logical_bytes) {
        return Ok(logical_bytes);
    }
    Err(ShapeError::Size { size_bytes, logical_bytes })
}

/// How the device shows itself.
#[derive(Clone, Copy, Debug)]
pub struct UblkShape {
    /// Logical block size.
    pub logical_bytes: u64,
    /// Can the cache turn ranges into zeros without writing them?
    pub fast_zero: bool,
}

/// The running frontend.
pub struct UblkFrontend {
    device: Device,
    queues: Vec<JoinHandle<()>>,
    let_go: Vec<Mailbox<()>>,
    errors: Receiver<UblkError>,
    stopped_elsewhere: bool,
}

impl UblkFrontend {
    /// Puts a thread to each queue of `device`. Nobody can use it before [`UblkFrontend::go_live`].
    pub fn start(core: &Arc<Core>, cache: &FileIo, device: Device, shape: UblkShape) -> Result<Self, FrontendError> {
        let info = *device.info();
        shape_device(core, &device, shape)?;
        let channel = Channel::open(&info)?;
        let (broken, errors) = crossbeam::channel::unbounded();
        let mut this = Self { device, queues: Vec::new(), let_go: Vec::new(), errors, stopped_elsewhere: false };
        for index in 0..info.queues {
            let let_go = Mailbox::default();
            let worker = Worker {
                index,
                core: core.clone(),
                cache: cache.clone(),
                channel: channel.clone(),
                let_go: let_go.clone(),
                broken: broken.clone(),
            };
            let name = format!("ublk{}-q{index}", info.id);
            this.queues.push(std::thread::Builder::new().name(name).spawn(move || worker.run())?);
            this.let_go.push(let_go);
        }
        Ok(this)
    }

    /// The device appears. The source must be at work: the kernel reads the partition table.
    pub fn go_live(&mut self) -> Result<(), FrontendError> {
        Ok(self.device.start(&self.errors)?)
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Have all queues ended although nobody asked us? Then somebody else has stopped the device (`ublk del`),
    /// and removes it: if we did, that one would not find it.
    pub fn notice_end(&mut self) -> bool {
        self.stopped_elsewhere = self.queues.iter().all(JoinHandle::is_finished);
        self.stopped_elsewhere
    }

    /// Stops the device if nobody uses it. [`UblkFrontend::stop`] must follow.
    pub fn close(&self) -> Result<(), FrontendError> {
        Ok(self.device.close()?)
    }

    /// Stops the device, whoever uses it, and removes it. Requests under way are finished, if that takes no
    /// longer than a few seconds.
    pub fn stop(self) -> Result<(), FrontendError> {
        if self.stopped_elsewhere {
            return Ok(());
        }
        let let_go = || self.let_go.iter().for_each(|mailbox| mailbox.send(()));
        self.device.stop(let_go)?;
        for queue in self.queues {
            // A panic there has ended the process.
            let _ = queue.join();
        }
        let path = self.device.path();
        if let Err(e) = self.device.delete() {
            // Stopped is stopped: whoever opened it meanwhile gets errors, and it goes when that one closes it.
            log::warn!("{}: {e}", path.display());
        }
        Ok(())
    }
}

fn shape_device(core: &Core, device: &Device, shape: UblkShape) -> Result<(), FrontendError> {
    let geometry = core.geometry();
    if device.is_recovered() {
        let (device_bytes, _) = device.sizes()?;
        let size_bytes = geometry.size_bytes();
        if device_bytes != size_bytes {
            return Err(ShapeError::Changed { device_bytes, size_bytes }.into());
        }
        return Ok(());
    }
    device.set_params(&params(geometry.size_bytes(), geometry.block_bytes(), device.info().max_io_bytes, shape))?;
    Ok(())
}

fn params(size_bytes: u64, block_bytes: u64, max_io_bytes: u32, shape: UblkShape) -> Params {
    let max_zeroes_bytes = if shape.fast_zero { MAX_ZEROES_BYTES } else { MAX_WRITTEN_ZEROES_BYTES };
    Params {
        size_bytes,
        logical_bytes: shape.logical_bytes,
        // More than a page is nothing that file systems on all kernels take.
        physical_bytes: block_bytes.clamp(shape.logical_bytes, PAGE_BYTES),
        optimal_bytes: OPTIMAL_IO_BYTES.max(block_bytes),
        max_io_bytes: max_io_bytes.into(),
        discard_granularity_bytes: block_bytes,
        max_discard_bytes: MAX_ZEROES_BYTES,
        max_zeroes_bytes,
    }
}

/// What a queue's thread is given.
struct Worker {
    index: u16,
    core: Arc<Core>,
    cache: FileIo,
    channel: Channel,
    let_go: Mailbox<()>,
    broken: Sender<UblkError>,
}

impl Worker {
    fn run(self) {
        let broken = self.broken.clone();
        let reactor = match Reactor::watchful() {
            Ok(reactor) => reactor,
            // Whoever starts the device listens.
            Err(e) => return drop(broken.send(e.into())),
        };
        let served = reactor.block_on(self.serve()).expect("a ring that worked goes on working");
        if let Err(e) = served {
            let _ = broken.send(e);
        }
    }

    async fn serve(self) -> Result<(), UblkError> {
        let tags = self.channel.tags(self.index)?;
        let queue = Queue::new(self.core, self.index, self.cache);
        let _worker = spawn(queue.clone().run());
        let server = Rc::new(Server { queue, hurried: Cell::new(false), hurry: Event::new() });
        let _hurry = spawn(hurry(server.clone(), self.let_go));
        let tasks: Vec<_> = tags.into_iter().map(|tag| spawn(serve_tag(server.clone(), tag))).collect();
        let ends = join_all(tasks).await;
        let queue = self.index;
        ends.into_iter().collect::<io::Result<()>>().map_err(|source| UblkError::Queue { queue, source })
    }
}

struct Server {
    queue: Rc<Queue>,
    /// The device is being stopped: nothing that waits for the source is waited for.
    hurried: Cell<bool>,
    hurry: Event,
}

async fn hurry(server: Rc<Server>, let_go: Mailbox<()>) {
    let_go.recv().await;
    server.hurried.set(true);
    server.hurry.notify(usize::MAX);
}

async fn serve_tag(server: Rc<Server>, tag: Tag) -> io::Result<()> {
    let mut next = tag.fetch().await;
    loop {
        let (tag, request) = match next {
            Next::Request(tag, request) => (tag, request),
            Next::Stopped => return Ok(()),
            Next::Failed(e) => {
                log::error!("ublk: the driver takes a tag no more: {e}");
                return Err(e);
            }
        };
        let (result, tag) = server.perform(tag, request).await;
        next = tag.commit_and_fetch(result.map_err(|errno| errno.0)).await;
    }
}

impl Server {
    async fn perform(&self, tag: Tag, request: Request) -> (Result<u32, Errno>, Tag) {
        let range = ByteRange::new(request.offset_bytes, request.len_bytes);
        let moves = matches!(request.operation, Operation::Read | Operation::Write);
        if range.end > self.queue.core().geometry().size_bytes() || (moves && request.len_bytes > tag.capacity() as u64)
        {
            return (Err(Errno::EIO), tag);
        }
        if moves && self.queue.is_hit(range) {
            let (result, tag) = self.hit(tag, range, &request).await;
            return (result.map(|()| request.len_bytes as u32), tag);
        }
        self.in_time(tag, range, &request).await
    }

    /// Between the cache and the tag's own buffer, without another copy. The cache always answers: nobody hurries
    /// this.
    async fn hit(&self, tag: Tag, range: ByteRange, request: &Request) -> (Result<(), Errno>, Tag) {
        if request.operation == Operation::Read {
            return self.queue.read_hit(range, tag).await;
        }
        self.queue.write_hit(range, tag, request.flags.contains(RequestFlags::FUA)).await
    }

    /// Does what the kernel wants, unless the device is stopped meanwhile and it does not end.
    async fn in_time(&self, mut tag: Tag, range: ByteRange, request: &Request) -> (Result<u32, Errno>, Tag) {
        let hurry = self.hurry.listen();
        if self.hurried.get() {
            return (Err(Errno::EIO), tag);
        }
        let result = {
            let work = std::pin::pin!(self.work(&mut tag, range, request));
            match select(work, hurry).await {
                Either::Left((result, _)) => result,
                Either::Right(_) => Err(Errno::EIO),
            }
        };
        (result, tag)
    }

    async fn work(&self, tag: &mut Tag, range: ByteRange, request: &Request) -> Result<u32, Errno> {
        let fua = request.flags.contains(RequestFlags::FUA);
        match request.operation {
            Operation::Read => {
                let parts = self.queue.read(range).await?;
                fill(tag.room(), &parts)
            }
            Operation::Write => {
                let mut data = Buffer::to_fill(request.len_bytes as usize);
                data.copy_from_slice(tag.bytes(request.len_bytes as usize));
                self.queue.write(range.start, data, fua).await?;
                Ok(request.len_bytes as u32)
            }
            Operation::Flush => self.queue.flush().await.map(|()| 0),
            Operation::Discard => self.queue.trim(range, fua).await.map(|()| 0),
            Operation::WriteZeroes => {
                let keep = request.flags.contains(RequestFlags::NOUNMAP);
                self.queue.zero(range, fua, keep, false).await.map(|()| 0)
            }
            Operation::Unknown(number) => {
                log::error!("ublk: operation {number} was never offered");
                Err(Errno::ENOTSUP)
            }
        }
    }
}

/// Lays parts side by side; how many bytes they are.
fn fill(room: &mut [u8], parts: &[Part]) -> Result<u32, Errno> {
    let mut at = 0;
    for part in parts {
        let target = room.get_mut(at..at + part.len()).ok_or(Errno::EIO)?;
        match part {
            Part::Owned(bytes) => target.copy_from_slice(bytes),
            Part::Shared { bytes, range } => target.copy_from_slice(&bytes[range.clone()]),
            Part::Zeros(_) => target.fill(0),
        }
        at += part.len();
    }
    Ok(at as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logical_block_is_the_sources_unit_and_the_size_must_fit_it() {
        assert_eq!(logical_bytes(1 << 20, 1).unwrap(), 512);
        assert_eq!(logical_bytes(512 * 3, 512).unwrap(), 512);
        assert_eq!(logical_bytes(1 << 20, 4096).unwrap(), 4096);
        assert_eq!(logical_bytes(1 << 20, 65_536).unwrap(), 4096);
        let error = logical_bytes(1000, 1).unwrap_err().to_string();
        assert!(error.contains("--frontend nbd"), "{error}");
        assert!(logical_bytes(512 * 3, 4096).is_err());
    }

    #[test]
    fn large_blocks_are_told_as_optimum_and_granularity() {
        let shape = UblkShape { logical_bytes: 512, fast_zero: false };
        let p = params(1 << 30, 1 << 20, 1 << 19, shape);
        assert_eq!((p.physical_bytes, p.optimal_bytes, p.discard_granularity_bytes), (4096, 1 << 20, 1 << 20));
        assert_eq!((p.max_io_bytes, p.max_zeroes_bytes), (1 << 19, 16 << 20));
    }

    #[test]
    fn parts_are_laid_side_by_side() {
        let mut room = [9; 8];
        let shared = Part::Shared { bytes: Arc::new(vec![1, 2, 3, 4].into()), range: 1..3 };
        assert_eq!(fill(&mut room, &[Part::Owned(vec![7].into()), shared, Part::Zeros(2)]).unwrap(), 5);
        assert_eq!(room, [7, 2, 3, 0, 0, 9, 9, 9]);
        assert!(fill(&mut room, &[Part::Zeros(9)]).is_err());
    }
}
