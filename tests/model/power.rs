//! The end of a process or of a machine, and the start of the next.
//!
//! After a *kill* the page cache and the live maps are still there (the maps lie on tmpfs). After a *power
//! cut* there is the platter, and those map pages that were durable; pages that were written but not synced
//! may be there or not, each by itself.

use blkferry::engine::BlockRun;

use crate::check::{Checked, ensure};
use crate::disk::Survives;
use crate::rng::Rng;
use crate::world::{World, fresh_words, new_engine};

impl World {
    /// SIGKILL, and a new process that takes over.
    pub fn kill(&mut self) {
        self.note(|| "#### the process is killed; a new one takes over".into());
        let now = self.tick();
        self.stats.kills += 1;
        self.history.kill(now);
        self.attach();
    }

    /// The power is cut, and comes back.
    pub fn cut_power(&mut self, survives: Survives, rng: &mut Rng) -> Checked {
        self.note(|| format!("#### the power is cut; of what was not synced survives: {survives:?}"));
        let now = self.tick();
        self.stats.power_cuts += 1;
        self.disk.lose_power(survives, rng);
        let kept = |rng: &mut Rng| match survives {
            Survives::None => false,
            Survives::All => true,
            Survives::Percent(_) => rng.percent(50),
        };
        for page in std::mem::take(&mut self.written_pages) {
            if kept(rng) {
                self.durable_pages.push(page);
            }
        }
        self.words = fresh_words(&self.setup, &self.durable_pages);
        self.attach();
        self.check_promised_bits()?;
        self.history.lose_power(now);
        // I1: what is present is read from the platter.
        self.look_at_present_blocks()
    }

    /// A new engine on the words as they are. Nothing is in flight, nobody waits.
    fn attach(&mut self) {
        self.engine = new_engine(&self.setup, &self.words, self.options);
        self.tasks.clear();
        self.open.clear();
        self.fetches.clear();
        self.crossed.fill(0);
        self.told_zero.fill(false);
        self.injected = false;
        self.hydrated = false;
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
