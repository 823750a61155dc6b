//! What the engine orders, checked against the rules on single actions, becomes a task.
//!
//! The history (see [`crate::history`]) finds what a guest could notice. The rules here are stricter: they
//! also find what a guest would notice only in another order of events, and what costs and does not harm.

use blkferry::engine::{Action, BlockRun, ByteRange, FetchId, Lane, OpId};

use crate::check::{Checked, ensure};
use crate::setup::sectors_of;
use crate::task::{Act, Stage, Task, What};
use crate::world::{Fetch, World};

impl World {
    /// Takes one action of the engine.
    pub fn take(&mut self, action: Action, beside: Option<Lane>) -> Checked {
        match action {
            Action::ReadLocal { io, op, range } => self.take_local(op, range, What::Local(io, op, Act::Read)),
            Action::WriteLocal { io, op, range, dsync } => {
                self.take_local(op, range, What::Local(io, op, Act::Write { dsync }))
            }
            Action::ZeroLocal { io, op, range, .. } => self.take_local(op, range, What::Local(io, op, Act::Zero)),
            Action::Deliver { io, op, fetch, range } => {
                let blocks = self.setup.touched(range);
                self.check_buffer(fetch, BlockRun::new(blocks.start, blocks.end))?;
                self.take_local(op, range, What::Local(io, op, Act::Deliver))
            }
            Action::Fetch { fetch, run, lane } => self.take_fetch(fetch, run, lane, beside),
            Action::Store { fetch, run } => {
                self.check_buffer(fetch, run)?;
                self.take_store(fetch, run)
            }
            Action::StoreZero { fetch, run } => {
                ensure!(self.setup.is_zero(run), "I4/I6", "{run} is not all zeros at the source");
                self.cross(run)?;
                self.fetches.push(Fetch { id: fetch, run, lane: Lane::Bulk, arrived: true });
                self.stats.zero_stores += 1;
                self.take_store(fetch, run)
            }
            Action::Release { fetch } => self.take_release(fetch),
            Action::QueryExtents { run } => {
                let asked =
                    self.tasks.iter().filter_map(|t| if let What::Query(run) = t.what { Some(run) } else { None });
                let asked: Vec<BlockRun> = asked.collect();
                let most = self.setup.config.questions.map_or(0, |questions| questions.at_once);
                ensure!(asked.len() < most, "I10", "one question more than {most}");
                let twice = asked.iter().find(|asked| !asked.clip(run).is_empty());
                ensure!(twice.is_none(), "I10", "asked about {run} while asked about {twice:?}");
                let absent = !run.is_empty() && !self.maps().is_present(run.start);
                ensure!(absent, "I10", "asked about {run}, the first block of which is here");
                self.tasks.push(Task::new(What::Query(run)));
                Ok(())
            }
            Action::HydrationWaits => {
                let on_its_way = |t: &Task| matches!(t.what, What::Wire(_) | What::Query(_) | What::Store(..));
                let busy = self.tasks.iter().any(|t| on_its_way(t) || t.is_guest_change());
                ensure!(busy, "I10", "hydration waits for nothing: a block is lost in the table");
                Ok(())
            }
            Action::HydrationRests => {
                ensure!(self.lenient(self.injected), "hydration", "it rests, though nothing failed");
                Ok(())
            }
            Action::HydrationDone => {
                self.hydrated = true;
                let all = self.setup.geometry.all();
                ensure!(self.maps().all_present(all), "hydration", "done, though blocks are absent");
                Ok(())
            }
            Action::Commit => {
                let running = self.tasks.iter().any(|t| matches!(t.what, What::Commit(_)));
                ensure!(!running, "I10", "two commits at a time");
                self.commit_began = self.now;
                self.tasks.push(Task::new(What::Commit(Stage::Begin)));
                Ok(())
            }
            Action::Complete { op, result } => self.complete(op, result),
        }
    }

    fn take_local(&mut self, op: OpId, range: ByteRange, what: What) -> Checked {
        self.guest(op)?.claim(range)?;
        let task = Task::on(sectors_of(range), what);
        let mut overwrites = false;
        if !matches!(task.what, What::Local(_, _, Act::Deliver)) {
            let mut absent = self.setup.touched(range).filter(|&block| !self.maps().is_present(block)).peekable();
            overwrites = absent.peek().is_some();
            let wrong = absent.find(|&block| !task.is_guest_change() || !self.setup.covers(range, block));
            ensure!(self.lenient(wrong.is_none()), "I5", "{:?} needs absent block {wrong:?}", task.what);
            let stores = self.tasks.iter().any(|t| matches!(t.what, What::Store(..)) && t.meets(&task.sectors));
            ensure!(self.lenient(!stores), "I3", "{:?} {range:?} while fetched data is stored there", task.what);
        } else {
            self.stats.deliveries += 1;
        }
        self.stats.overwrites += u64::from(overwrites);
        self.tasks.push(task);
        Ok(())
    }

    fn take_fetch(&mut self, id: FetchId, run: BlockRun, lane: Lane, beside: Option<Lane>) -> Checked {
        let most = (self.setup.config.max_fetch_bytes / self.setup.geometry.block_bytes()).max(1);
        ensure!(!run.is_empty() && run.len() <= most, "I10", "a fetch of {run}, {most} are the most");
        let in_lane = if self.hydrating { lane == Lane::Bulk } else { lane == Lane::Demand || Some(lane) == beside };
        ensure!(in_lane, "I8", "a fetch of {run} in the wrong lane {lane:?}");
        self.cross(run)?;
        if let Some(range) = self.changing {
            let whole = (run.start..run.end).find(|&block| self.setup.covers(range, block));
            ensure!(self.lenient(whole.is_none()), "I9", "{whole:?} is fetched to be overwritten");
        }
        if self.hydrating {
            // It has forgotten, and asks again: until it is told, zeros that cross as holes may be fetched.
            let asks = |block| self.tasks.iter().any(|t| matches!(t.what, What::Query(run) if run.contains(block)));
            // So may what is said to be hot.
            let forgot = |block| self.setup.config.compact && (asks(block) || self.hot[block as usize]);
            let told = (run.start..run.end).find(|&block| self.told_zero[block as usize] && !forgot(block));
            ensure!(told.is_none(), "I6", "block {told:?} is known to be zeros, and is fetched");
        }
        self.fetches.push(Fetch { id, run, lane, arrived: false });
        self.tasks.push(Task::new(What::Wire(id)));
        self.stats.fetches += 1;
        Ok(())
    }

    /// Blocks begin to cross the wire, as data or as zeros: none that is here or on its way already.
    fn cross(&mut self, run: BlockRun) -> Checked {
        let sectors = self.setup.sectors_in(run);
        let busy =
            self.tasks.iter().find(|t| t.meets(&sectors) && (t.is_guest_change() || matches!(t.what, What::Store(..))));
        ensure!(self.lenient(busy.is_none()), "I6", "{run} is fetched during {:?}", busy.map(|t| &t.what));
        for block in run.start..run.end {
            let present = self.maps().is_present(block);
            ensure!(self.lenient(!present), "I6", "block {block} is present, and is fetched");
            self.crossed[block as usize] += 1;
            let once = self.injected || self.crossed[block as usize] == 1;
            ensure!(self.lenient(once), "I6", "block {block} crosses a second time");
        }
        Ok(())
    }

    fn take_store(&mut self, fetch: FetchId, run: BlockRun) -> Checked {
        let task = Task::on(self.setup.sectors_in(run), What::Store(fetch, run));
        let guest = self.tasks.iter().any(|t| t.is_guest_change() && t.meets(&task.sectors));
        ensure!(self.lenient(!guest), "I3", "{run} is stored while the guest writes there");
        let mut blocks = run.start..run.end;
        let present = blocks.find(|&block| self.maps().is_present(block));
        ensure!(self.lenient(present.is_none()), "I3", "present block {present:?} is stored");
        self.tasks.push(task);
        Ok(())
    }

    /// The data of these blocks must be in the buffer of this fetch.
    fn check_buffer(&self, id: FetchId, run: BlockRun) -> Checked {
        let fetch = self.fetches.iter().find(|f| f.id == id);
        let there = fetch.is_some_and(|f| f.arrived && f.run.clip(run) == run);
        ensure!(there, "I3", "{id:?} has no data of {run}");
        Ok(())
    }

    fn take_release(&mut self, id: FetchId) -> Checked {
        let at = self.fetches.iter().position(|f| f.id == id);
        ensure!(at.is_some(), "I10", "{id:?} is released, but is not there");
        let busy = self.tasks.iter().any(|t| match t.what {
            What::Store(fetch, _) | What::Wire(fetch) => fetch == id,
            _ => false,
        });
        ensure!(!busy, "I10", "{id:?} is released while it is in use");
        self.fetches.swap_remove(at.expect("checked above"));
        Ok(())
    }
}
