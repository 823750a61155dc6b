//! The end of a process or of a machine, and the start of the next.
//!
//! After a *kill* the page cache and the live maps are still there (the maps lie on tmpfs). After a *power
//! cut* there are the platters, each with what reached it of the sectors that were not synced. Either way the real
//! recovery reads the metadata as the new process finds it.

use blkferry::engine::BlockRun;

use crate::check::{Checked, ensure};
use crate::disk::Survives;
use crate::metadata::{committer_on, recover};
use crate::rng::Rng;
use crate::world::{LiveWords, World, new_engine};

impl World {
    /// SIGKILL, and a new process that takes over. (After a failed commit none does: the live map is gone.)
    pub fn kill(&mut self) -> Checked {
        ensure!(self.engine.failed().is_none(), "simulator", "a device that has failed is not taken over");
        self.note(|| "#### the process is killed; a new one takes over".into());
        let now = self.tick();
        self.stats.kills += 1;
        self.history.kill(now);
        self.attach()
    }

    /// Between two commits the disk fails, unseen: of what is not synced, some is lost. What was promised is not among it.
    pub fn write_back_fails(&mut self, survives: Survives, rng: &mut Rng) -> Checked {
        self.note(|| {
            format!("#### the kernel cannot write something back; of what was not synced survives: {survives:?}")
        });
        self.disk.write_back_fails(survives, rng);
        Ok(())
    }

    /// The power is cut, and comes back.
    pub fn cut_power(&mut self, survives: Survives, rng: &mut Rng) -> Checked {
        self.note(|| format!("#### the power is cut; of what was not synced survives: {survives:?}"));
        let now = self.tick();
        self.stats.power_cuts += 1;
        self.stats.cuts_in_commits += u64::from(self.commit.is_some());
        self.disk.lose_power(survives, rng);
        self.metadata.lose_power(survives, rng);
        self.words = LiveWords::of(self.setup.geometry, &[]);
        self.attach()?;
        self.check_promised_bits()?;
        self.history.lose_power(now);
        // I1: what is present is read from the platter.
        self.look_at_present_blocks()
    }

    /// A new process: an engine and a committer on the metadata as it is found. Nothing is in flight, nobody waits.
    fn attach(&mut self) -> Checked {
        let recovered = recover(&self.metadata, self.options)?;
        self.stats.torn_pages += recovered.notes.len() as u64;
        self.words.load(&recovered.pages);
        self.committer = committer_on(&recovered, self.options);
        self.commit = None;
        self.engine = new_engine(&self.setup, &self.words, self.options);
        self.tasks.clear();
        self.open.clear();
        self.fetches.clear();
        self.crossed.fill(0);
        self.told_zero.fill(false);
        self.hot.fill(false);
        self.injected = false;
        self.hydrated = false;
        Ok(())
    }

    /// I2: bits of data that was promised are durable; also the dirty bits, or the way back would miss blocks.
    fn check_promised_bits(&self) -> Checked {
        for block in 0..self.setup.blocks.len() as u64 {
            let run = BlockRun::new(block, block + 1);
            let mut sectors = self.setup.sectors_in(run);
            if sectors.any(|sector| self.history.guest_data_is_promised(sector)) {
                ensure!(self.maps().is_present(block), "I2", "block {block} was promised, and is absent");
                ensure!(self.maps().any_dirty(run), "I2", "block {block} was written and promised, and is not dirty");
            }
        }
        Ok(())
    }

    /// Reads all that is present straight from the cache, as one guest would that reads it now.
    pub fn look_at_present_blocks(&mut self) -> Checked {
        let now = self.tick();
        for block in 0..self.setup.blocks.len() as u64 {
            let run = BlockRun::new(block, block + 1);
            if self.maps().is_present(block) {
                for sector in self.setup.sectors_in(run) {
                    self.history.read(sector, self.disk.read(sector), now, now)?;
                }
            }
        }
        Ok(())
    }
}
