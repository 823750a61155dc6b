//! The users of the device: each does one thing after the other, at random, and checks what it is told.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use blkferry::device::simulation::Simulated;
use blkferry::engine::{ByteRange, Errno};
use blkferry::uring::Part;
use blkferry::uring::simulation::{ProcessId, World};
use blkferry::uring::sleep;
use futures_channel::oneshot;

use crate::judge::Judge;
use crate::machine::Machine;
use crate::rng::Rng;
use crate::setup::{Setup, put};
use crate::stamp::{SECTOR, Stamp};

/// Longest request.
const MAX_SECTORS: u64 = 128;

/// What all of them share.
pub struct Guests {
    pub world: World,
    pub setup: Rc<Setup>,
    pub machine: Rc<Machine>,
    pub judge: Rc<Judge>,
    pub stopped: Cell<bool>,
    pub paused: Cell<bool>,
    /// Reads and writes are near to this part of the disk, in thousandths, if that is said.
    pub near: Cell<Option<u64>>,
    next: Cell<u64>,
}

impl Guests {
    pub fn new(world: World, setup: Rc<Setup>, machine: Rc<Machine>, judge: Rc<Judge>) -> Rc<Self> {
        let (stopped, paused, near, next) = (Cell::default(), Cell::default(), Cell::default(), Cell::default());
        Rc::new(Self { world, setup, machine, judge, stopped, paused, near, next })
    }

    /// One of them, until all are stopped.
    pub async fn live(self: Rc<Self>, number: u64) {
        let mut rng = Rng::new(self.setup.seed, u64::MAX - 100 - number);
        while !self.stopped.get() && !self.judge.is_over() {
            sleep(Duration::from_micros(rng.between(0, self.setup.think_ms * 2000))).await;
            if self.stopped.get() {
                return;
            }
            if !self.paused.get() {
                self.step(&mut rng).await;
            }
        }
    }

    async fn step(&self, rng: &mut Rng) {
        let (Some(device), Some(process)) = (self.machine.device(), self.machine.process()) else { return };
        let range = self.range(rng);
        if rng.percent(self.setup.writes) {
            self.write(device, process, range, rng.percent(20)).await;
        } else if rng.percent(5) {
            self.flush(device, process).await;
        } else {
            self.read(device, process, range).await;
        }
    }

    /// Whole blocks, or any sectors.
    fn range(&self, rng: &mut Rng) -> ByteRange {
        let sectors = self.setup.size_bytes() / SECTOR;
        let len = rng.one_of(&[1, 3, 8, 8, 8, 24, MAX_SECTORS]).min(sectors);
        let room = sectors - len;
        let start = match self.near.get() {
            None => rng.below(room + 1),
            Some(place) => (sectors * place / 1000 + rng.below(sectors / 50 + 1)).min(room),
        };
        let start = if rng.percent(50) { start / 8 * 8 } else { start };
        ByteRange::new(start * SECTOR, len * SECTOR)
    }

    fn fresh(&self) -> u64 {
        self.next.set(self.next.get() + 1);
        self.next.get()
    }

    /// Does something in the process of the device. `None`: that was killed.
    async fn there<T: 'static>(&self, process: ProcessId, what: impl Future<Output = T> + 'static) -> Option<T> {
        let (sender, answer) = oneshot::channel();
        self.world.spawn_in(process, async move { drop(sender.send(what.await)) }).detach();
        answer.await.ok()
    }

    /// Reads, and compares. `None`: the device was killed.
    pub async fn read(&self, device: Rc<Simulated>, process: ProcessId, range: ByteRange) -> Option<Result<(), Errno>> {
        let (op, begin, judge) = (self.fresh(), self.judge.tick(), &self.judge);
        judge.begins(op, device.queue.is_hit(range));
        judge.note(|| format!("op {op} reads {} bytes at {}", range.len(), range.start));
        judge.count(|stats| stats.reads += 1);
        if !device.queue.is_hit(range) {
            judge.count(|stats| stats.misses += 1);
        }
        let queue = device.queue.clone();
        drop(device);
        let outcome = self.there(process, async move { queue.read(range).await }).await;
        let open = judge.ends(op);
        match outcome {
            None => judge.count(|stats| stats.unknown += 1),
            Some(Err(errno)) => judge.failed(open, &|| format!("op {op}, a read of {range:?}: {errno}")),
            Some(Ok(ref parts)) => self.compare(op, range, parts, begin),
        }
        judge.note(|| format!("op {op} has ended"));
        outcome.map(|result| result.map(drop))
    }

    fn compare(&self, op: u64, range: ByteRange, parts: &[Part], begin: u64) {
        let (end, judge) = (self.judge.tick(), &self.judge);
        let mut bytes = Vec::new();
        parts.iter().for_each(|part| part.append_to(&mut bytes));
        if bytes.len() as u64 != range.len() {
            return judge.broken("data", format!("op {op} read {} bytes, not {}", bytes.len(), range.len()));
        }
        for (sector, bytes) in (range.start / SECTOR..).zip(bytes.chunks(SECTOR as usize)) {
            match self.setup.stamp_of(sector, bytes) {
                Ok(stamp) => judge.check(judge.history.borrow_mut().read(sector, stamp, begin, end)),
                Err(what) => judge.broken("data", format!("op {op}: {what}")),
            }
        }
    }

    async fn write(&self, device: Rc<Simulated>, process: ProcessId, range: ByteRange, fua: bool) {
        let (op, judge) = (self.fresh(), &self.judge);
        let (stamp, sectors) = (Stamp::write(op), range.start / SECTOR..range.end / SECTOR);
        let is_whole = |at: u64| at.is_multiple_of(self.setup.block_bytes);
        let local = (is_whole(range.start) && is_whole(range.end)) || device.queue.is_hit(range);
        judge.begins(op, local);
        judge.note(|| format!("op {op} writes {} bytes at {}", range.len(), range.start));
        judge.count(|stats| stats.writes += 1);
        judge.history.borrow_mut().begin_write(sectors.clone(), stamp, judge.tick());
        let mut data = Vec::new();
        sectors.clone().for_each(|_| put(stamp, &mut data));
        let queue = device.queue.clone();
        drop(device);
        let outcome = self.there(process, async move { queue.write(range.start, data.into(), fua).await }).await;
        let (acked, open) = (outcome == Some(Ok(())), judge.ends(op));
        judge.check(judge.history.borrow_mut().end_write(sectors, stamp, judge.tick(), acked, false));
        match outcome {
            None => judge.count(|stats| stats.unknown += 1),
            Some(Err(errno)) => judge.failed(open, &|| format!("op {op}, a write of {range:?}: {errno}")),
            Some(Ok(())) => {}
        }
        judge.note(|| format!("op {op} has ended"));
    }

    async fn flush(&self, device: Rc<Simulated>, process: ProcessId) {
        let (op, judge) = (self.fresh(), &self.judge);
        judge.begins(op, true);
        judge.count(|stats| stats.flushes += 1);
        let queue = device.queue.clone();
        drop(device);
        let outcome = self.there(process, async move { queue.flush().await }).await;
        judge.ends(op);
        if let Some(Err(errno)) = outcome {
            // It waits for nothing but the disk, which is good.
            judge.broken("flush", format!("op {op}, a flush: {errno}"));
        }
    }
}
