//! The source: the real server on the simulated network, and a disk in memory that may be in a bad mood.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use blkferry::engine::ByteRange;
use blkferry::nbd::{DEFAULT_MAX_PAYLOAD, ExportInfo, NbdError, TransmissionFlags};
use blkferry::server::{Disk, DiskExtent, ServeStats, Server, without_zeros};
use blkferry::uring::simulation::{ProcessId, World};
use blkferry::uring::{Listener, Part, Residency, sleep};
use event_listener::Event;

use crate::setup::Setup;
use crate::stamp::SECTOR;
use crate::weather::Weather;

pub const HOST: &str = "source";
pub const PORT: u16 = 10_809;

/// What the disk of the source does at the moment.
#[derive(Default)]
pub struct Mood {
    /// It says that it is going away.
    pub shuts_down: Cell<bool>,
    /// These bytes cannot be read.
    pub bad: Cell<Option<(u64, u64)>>,
    /// Reads take so much longer.
    pub dawdles: Cell<Duration>,
    /// Reads of more than a sector take so much longer.
    pub drags: Cell<Duration>,
    /// Questions about holes take so much longer.
    pub ponders: Cell<Duration>,
}

struct MemoryDisk {
    setup: Rc<Setup>,
    weather: Rc<Weather>,
    mood: Rc<Mood>,
    other: bool,
}

impl Disk for MemoryDisk {
    fn export(&self) -> ExportInfo {
        let mut flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY | TransmissionFlags::SEND_DF;
        flags.set(TransmissionFlags::CAN_MULTI_CONN, !self.setup.single);
        let mut info = ExportInfo::new("", self.setup.size_bytes(), flags);
        info.max_block = DEFAULT_MAX_PAYLOAD;
        info.tells_hot = self.setup.tells_hot;
        info.identity = Some(if self.other { "another disk" } else { "the disk" }.into());
        info
    }

    async fn read(&self, range: ByteRange) -> Result<Vec<Part>, NbdError> {
        sleep(self.weather.draw(self.setup.source_us) + self.mood.dawdles.get()).await;
        // Seeds mean what they meant before it could.
        if range.len() > SECTOR && !self.mood.drags.get().is_zero() {
            sleep(self.mood.drags.get()).await;
        }
        if self.mood.shuts_down.get() {
            return Err(NbdError::Shutdown);
        }
        if self.mood.bad.get().is_some_and(|(start, end)| range.start < end && start < range.end) {
            return Err(NbdError::Io);
        }
        let mut bytes = Vec::with_capacity(range.len() as usize);
        let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
        let first = sectors.start * SECTOR;
        sectors.for_each(|sector| self.setup.put_source(sector, self.other, &mut bytes));
        bytes.truncate((range.end - first) as usize);
        bytes.drain(..(range.start - first) as usize);
        Ok(without_zeros(range.start, bytes.into()))
    }

    async fn prefetch(&self, _range: ByteRange) -> Result<(), NbdError> {
        Ok(())
    }

    /// Every third stretch of some sectors.
    async fn hot(&self, range: ByteRange, max: usize) -> Result<Vec<(u64, Residency)>, NbdError> {
        let starts = (range.start..range.end).step_by(24 * SECTOR as usize).take(max);
        let is_hot = |at: u64| at / (24 * SECTOR) % 3 == 1;
        let residency = |at| if is_hot(at) { Residency::Cached } else { Residency::Absent };
        Ok(starts.map(|at| ((range.end - at).min(24 * SECTOR), residency(at))).collect())
    }

    async fn extents(&self, range: ByteRange, max: usize) -> Result<Vec<DiskExtent>, NbdError> {
        // Seeds mean what they meant before it could.
        if !self.mood.ponders.get().is_zero() {
            sleep(self.mood.ponders.get()).await;
        }
        let mut extents: Vec<DiskExtent> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let hole = !self.other && self.setup.is_hole(at / SECTOR);
            let end = ((at / SECTOR + 1) * SECTOR).min(range.end);
            let is_full = extents.len() == max;
            match extents.last_mut() {
                Some(last) if last.hole == hole => last.len_bytes += end - at,
                _ if is_full => break,
                _ => extents.push(DiskExtent { len_bytes: end - at, hole, zero: hole }),
            }
            at = end;
        }
        Ok(extents)
    }
}

/// The host of the source.
pub struct Source {
    setup: Rc<Setup>,
    weather: Rc<Weather>,
    pub mood: Rc<Mood>,
    running: RefCell<Option<ProcessId>>,
}

impl Source {
    pub fn new(setup: Rc<Setup>, weather: Rc<Weather>) -> Rc<Self> {
        Rc::new(Self { setup, weather, mood: Rc::default(), running: RefCell::default() })
    }

    /// Starts the export, of the disk or of another one.
    pub fn start(&self, world: &World, other: bool) {
        let (setup, weather, mood) = (self.setup.clone(), self.weather.clone(), self.mood.clone());
        let (process, task) = world.start_process(async move {
            let listener = Listener::tcp(HOST, PORT).expect("nobody else listens there");
            let disk = Rc::new(MemoryDisk { setup, weather, mood, other });
            let _server = Server::start(listener, disk, ServeStats::default());
            // Not `pending`: a task whose waker nobody has is never dropped, nor the world that it holds.
            Event::new().listen().await;
        });
        task.detach();
        *self.running.borrow_mut() = Some(process);
    }

    /// Kills it.
    pub fn kill(&self, world: &World) {
        if let Some(process) = self.running.borrow_mut().take() {
            world.kill(process);
        }
    }

    /// Tasks of its process.
    pub fn tasks(&self, world: &World) -> usize {
        self.running.borrow().map_or(0, |process| world.tasks_of(process))
    }
}
