//! How things come to rest, and what must hold then.

use blkferry::engine::{BlockRun, ByteRange, Errno, Event, OpKind};

use crate::check::{Checked, ensure};
use crate::rng::Rng;
use crate::task::What;
use crate::world::World;

/// No device of these tests needs more steps to come to rest.
const MANY: usize = 100_000;

impl World {
    /// Carries out one task to its end, without failures of its own; a commit makes one step.
    pub fn carry_out(&mut self, at: usize) -> Checked {
        match &self.tasks[at].what {
            What::Commit(_) => self.commit_step(at),
            What::Query(run) => {
                let mut extents = crate::random::honest_extents(&self.setup, *run);
                extents.retain(|_| !self.source_is_mute);
                self.answer(at, extents)
            }
            What::Store(..) if self.cache_is_full => self.finish(at, Err(Errno::ENOSPC)),
            _ => {
                self.progress(at, u64::MAX, true)?;
                self.finish(at, Ok(()))
            }
        }
    }

    /// The source falls silent, and everything that does not need it comes to an end (I8, I9).
    pub fn silence(&mut self, rng: &mut Rng) -> Checked {
        self.note(|| "#### the source is silent until all local work is done".into());
        self.stats.silences += 1;
        self.stats.waiting_in_silence += self.open.len() as u64;
        self.settle(rng, false)?;
        match self.open.iter().find(|guest| guest.is_local) {
            None => Ok(()),
            Some(guest) => Err(crate::check::Violation {
                rule: "I8/I9",
                what: format!("{:?} {:?} waits for the source", guest.op, guest.wish),
            }),
        }
    }

    /// Carries out everything, in any order, until there is nothing to do.
    pub fn drain(&mut self, rng: &mut Rng) -> Checked {
        self.settle(rng, true)?;
        let open: Vec<_> = self.open.iter().map(|guest| (guest.op, guest.wish)).collect();
        ensure!(open.is_empty(), "I10", "never answered: {open:?}");
        ensure!(self.engine.open_requests() == 0, "I10", "the engine holds {} requests", self.engine.open_requests());
        ensure!(self.fetches.is_empty(), "I10", "never released: {:?}", self.fetches[0].id);
        Ok(())
    }

    fn settle(&mut self, rng: &mut Rng, with_source: bool) -> Checked {
        for _ in 0..MANY {
            let ready: Vec<usize> =
                (0..self.tasks.len()).filter(|&at| with_source || self.tasks[at].is_local()).collect();
            if ready.is_empty() {
                return Ok(());
            }
            self.carry_out(rng.one_of(&ready))?;
        }
        Err(crate::check::Violation { rule: "I10", what: "it never comes to rest".into() })
    }

    /// From any state of a healthy engine to a complete device: all is fetched, and all is right.
    /// (If the cache was full, it is so until everybody was answered: nobody may try for ever.)
    pub fn complete_the_device(&mut self, rng: &mut Rng) -> Checked {
        self.note(|| "#### no more requests; hydration runs to its end".into());
        self.drain(rng)?;
        self.cache_is_full = false;
        let most = 4 * self.setup.blocks.len() + 10;
        for _ in 0..most {
            if self.hydrated {
                break;
            }
            self.feed(Event::Hydrate)?;
            self.drain(rng)?;
        }
        ensure!(self.hydrated, "hydration", "not done after {most} steps without a failure");
        self.look_at_present_blocks()?;
        self.check_dirty_map()?;
        // The same through the engine.
        self.submit(OpKind::Read, ByteRange::new(0, self.setup.geometry.size_bytes()))?;
        self.drain(rng)
    }

    /// Nothing is dirty that the guest never asked to change. (That nothing else is clean is checked at each write.)
    fn check_dirty_map(&self) -> Checked {
        for (block, touched) in self.touched.iter().enumerate() {
            let dirty = self.maps().any_dirty(BlockRun::new(block as u64, block as u64 + 1));
            ensure!(*touched || !dirty, "dirty map", "block {block} is dirty, though the guest never changed it");
        }
        Ok(())
    }

    /// Flushes, cuts the power, loses all that may be lost: the device is complete and right all the same.
    pub fn prove_durability(&mut self, rng: &mut Rng) -> Checked {
        self.flush()?;
        self.drain(rng)?;
        self.cut_power(crate::disk::Survives::None, rng)?;
        ensure!(self.maps().absent_count() == 0, "I2", "after a flush and a power cut blocks are absent");
        Ok(())
    }
}
