//! Tasks are carried out: piece by piece, and their outcome is told to the engine.

use blkferry::engine::{Errno, Event, Extent, FetchError, Lane, OpId};

use crate::check::{Checked, ensure};
use crate::disk::Opening;
use crate::stamp::{SECTOR, Stamp};
use crate::task::{Act, Task, What};
use crate::world::World;

impl World {
    /// Handles some of a task's sectors, from its lower or its upper end.
    pub fn progress(&mut self, at: usize, sectors: u64, from_below: bool) -> Checked {
        let task = &mut self.tasks[at];
        let count = sectors.min(task.left());
        let piece = if from_below {
            let start = task.left.start;
            task.left.start += count;
            start..start + count
        } else {
            task.left.end -= count;
            task.left.end..task.left.end + count
        };
        let what = task.what.clone();
        self.note(|| format!("   . {what:?} on sectors {piece:?}"));
        match what {
            What::Local(_, op, act) | What::Hit(op, act) => piece.into_iter().try_for_each(|s| self.touch(op, act, s)),
            What::Store(..) => {
                piece.for_each(|sector| self.disk.write(sector, Stamp::source(sector)));
                Ok(())
            }
            What::Wire(_) | What::Query(_) | What::Commit(_) => Ok(()),
        }
    }

    /// Reads or writes one sector for a guest.
    fn touch(&mut self, op: OpId, act: Act, sector: u64) -> Checked {
        if act.is_change() {
            let block = self.setup.geometry.block_of(sector * SECTOR);
            let run = blkferry::engine::BlockRun::new(block, block + 1);
            ensure!(self.maps().any_dirty(run), "dirty map", "the guest changes block {block}, which is not dirty");
            let stamp = self.guest(op)?.stamp().expect("a change has a stamp");
            self.disk.write(sector, stamp);
            self.guest(op)?.fill(sector, stamp);
            return Ok(());
        }
        let found = if act == Act::Deliver { Stamp::source(sector) } else { self.disk.read(sector) };
        self.guest(op)?.fill(sector, found);
        Ok(())
    }

    /// The task has ended, after all of its sectors or with an error, and the engine is told.
    pub fn finish(&mut self, at: usize, result: Result<(), Errno>) -> Checked {
        let task = self.tasks.swap_remove(at);
        let result = self.told(&task.what, result);
        self.injected |= result.is_err();
        match task.what {
            What::Local(io, op, act) => {
                self.local_ended(op, act, &task, result)?;
                self.feed(Event::LocalDone { io, result })?;
            }
            What::Hit(op, act) => {
                self.local_ended(op, act, &task, result)?;
                let dsync = act == Act::Write { dsync: true };
                // After a failed commit the frontend promises nothing.
                let result = if dsync && self.engine.failed().is_some() { Err(Errno::EIO) } else { result };
                // FUA on bits that were not durable: the frontend's write is done, a flush makes it so.
                let needs_flush = self.guest(op)?.is_fua() && !dsync;
                if needs_flush && result.is_ok() {
                    self.feed(Event::Flush { op })?;
                } else {
                    self.note(|| format!("   . hit {op:?} ends with {result:?}"));
                    self.complete(op, result)?;
                }
            }
            What::Store(fetch, run) => drop(self.feed(Event::Stored { fetch, run, result })?),
            What::Wire(id) => {
                let fetch = self.fetches.iter_mut().find(|f| f.id == id);
                let fetch = fetch.expect("no fetch is released while it is on the wire");
                fetch.arrived = result.is_ok();
                let result = result.map_err(|errno| match (errno, fetch.lane) {
                    (Errno::ENOSPC, Lane::Bulk | Lane::Ahead) => FetchError::NoRoom,
                    (Errno::ENOSPC, Lane::Demand) => FetchError::Unreachable,
                    (errno, _) => FetchError::Refused(errno),
                });
                self.feed(Event::Fetched { fetch: id, result })?;
            }
            What::Query(_) | What::Commit(_) => unreachable!("these end in their own ways"),
        }
        Ok(())
    }

    /// What a write with RWF_DSYNC hears: of an error of the past, once. From then on it is worth as much as the commit
    /// that the shell asks for, which is told as well.
    fn told(&mut self, what: &What, result: Result<(), Errno>) -> Result<(), Errno> {
        let dsync = Act::Write { dsync: true };
        let is_dsync = matches!(what, What::Local(_, _, act) | What::Hit(_, act) if *act == dsync);
        if !is_dsync {
            return result;
        }
        self.disk.doubts_dsync |= self.disk.tell_error(Opening::Writes) || result.is_err();
        if self.disk.doubts_dsync && self.disk.has_untold_error() { Err(Errno::EIO) } else { result }
    }

    fn local_ended(&mut self, op: OpId, act: Act, task: &Task, result: Result<(), Errno>) -> Checked {
        let guest = self.guest(op)?;
        guest.must_fail |= result.is_err();
        if result.is_ok() && act == (Act::Write { dsync: true }) {
            let stamp = guest.stamp().expect("a write has a stamp");
            self.disk.sync_write(task.sectors.clone(), stamp);
            self.stats.dsync_writes += 1;
        }
        Ok(())
    }

    /// The source describes itself. The answer may be short or empty; it may call zeros data, never data zeros.
    pub fn answer(&mut self, at: usize, extents: Vec<Extent>) -> Checked {
        let What::Query(asked) = self.tasks.swap_remove(at).what else {
            unreachable!("only queries are answered");
        };
        self.told_zero[asked.start as usize..asked.end as usize].fill(false);
        let mut sector = asked.start * self.setup.geometry.block_bytes() / SECTOR;
        let mut zeros = vec![false; self.setup.source_zero.len()];
        for extent in &extents {
            let end = (sector + extent.len_bytes / SECTOR).min(zeros.len() as u64);
            zeros[sector as usize..end as usize].fill(extent.zero);
            sector = end;
        }
        for block in asked.start..asked.end {
            let sectors = self.setup.sectors_in(blkferry::engine::BlockRun::new(block, block + 1));
            self.told_zero[block as usize] = zeros[sectors.start as usize..sectors.end as usize].iter().all(|&z| z);
        }
        self.feed(Event::Extents { run: asked, extents }).map(drop)
    }
}
