//! The commit that runs: the real committer, step by step, with anything in between.

use blkferry::cache::{Commit, Step};
use blkferry::engine::{Errno, Event, Maps};

use crate::check::{Checked, ensure};
use crate::disk::{Opening, Survives};
use crate::guest::Wish;
use crate::metadata::{Disks, sectors_of_copy};
use crate::rng::Rng;
use crate::task::{Stage, What};
use crate::world::World;

/// A commit of the real committer, and the step that it is at.
pub struct Running {
    commit: Commit,
    step: Option<Step>,
}

impl World {
    /// The commit goes one step on.
    pub fn commit_step(&mut self, at: usize) -> Checked {
        let stage = self.stage(at);
        self.note(|| format!("   . commit: {}", stage.name()));
        let next = match stage {
            Stage::Begin => {
                let maps = self.maps().clone();
                self.commit = Some(Running { commit: self.committer.begin(&maps), step: None });
                self.next_step()
            }
            Stage::SyncData => Stage::DataSynced(self.disk.mark()),
            Stage::DataSynced(_) if self.disk.tell_error(Opening::Commits) => {
                self.stats.untold_errors += 1;
                // What was dropped is gone already: of all the rest this sync has made everything durable.
                return self.commit_fails(at, Survives::All, &mut Rng::new(0, 0));
            }
            Stage::DataSynced(mark) => {
                self.carry_out_step(mark);
                self.next_step()
            }
            Stage::WriteMap | Stage::SyncMetadata => {
                self.carry_out_step(0);
                self.next_step()
            }
            Stage::Tell => return self.tell(at),
        };
        self.tasks[at].what = What::Commit(next);
        Ok(())
    }

    fn stage(&self, at: usize) -> Stage {
        let What::Commit(stage) = self.tasks[at].what else {
            unreachable!("only commits go in stages");
        };
        stage
    }

    fn next_step(&mut self) -> Stage {
        let maps = self.maps().clone();
        let running = self.commit.as_mut().expect("it has begun");
        running.step = self.committer.next_step(&mut running.commit, &maps);
        match &running.step {
            Some(Step::SyncData) => Stage::SyncData,
            Some(Step::WriteMap { .. }) => Stage::WriteMap,
            Some(Step::SyncMetadata) => Stage::SyncMetadata,
            None => Stage::Tell,
        }
    }

    fn carry_out_step(&mut self, mark: u64) {
        let map_pages = Maps::pages(self.setup.geometry);
        let step = self.commit.as_ref().and_then(|running| running.step.as_ref()).expect("it is at a step");
        let mut disks = Disks { data: &mut self.disk, mark, metadata: &mut self.metadata, map_pages };
        step.carry_out(&mut disks).expect("what fails goes another way");
    }

    fn tell(&mut self, at: usize) -> Checked {
        self.tasks.swap_remove(at);
        self.commit = None;
        self.stats.commits += 1;
        self.maps().committed();
        let began = self.commit_began;
        self.feed(Event::Committed { result: Ok(()) })?;
        let waits = self.open.iter().find(|guest| guest.wish == Wish::Flush && guest.begin <= began);
        ensure!(waits.is_none(), "group commit", "{:?} came before and still waits", waits.map(|g| g.op));
        Ok(())
    }

    /// The step at which the commit stands fails, after some of it was done. The device has failed with it, for good.
    pub fn commit_fails(&mut self, at: usize, survives: Survives, rng: &mut Rng) -> Checked {
        let stage = self.stage(at);
        self.note(|| format!("   . commit fails at: {}; of that step survives: {survives:?}", stage.name()));
        match stage {
            Stage::SyncData => self.disk.sync_fails(self.disk.mark(), survives, rng),
            Stage::DataSynced(mark) => self.disk.sync_fails(mark, survives, rng),
            Stage::WriteMap => self.write_fails(survives, rng),
            Stage::SyncMetadata => self.metadata.sync_fails(self.metadata.mark(), survives, rng),
            Stage::Begin | Stage::Tell => unreachable!("nothing is done here that could fail"),
        }
        self.tasks.swap_remove(at);
        self.commit = None;
        self.injected = true;
        self.stats.failed_commits += 1;
        self.maps().commit_failed();
        self.open.iter_mut().filter(|guest| guest.wish == Wish::Flush).for_each(|guest| guest.must_fail = true);
        self.feed(Event::Committed { result: Err(Errno::EIO) })?;
        ensure!(self.engine.failed().is_some(), "I11", "a commit has failed, and the device goes on");
        Ok(())
    }

    /// Some sectors of a map page are written, and the rest is not.
    fn write_fails(&mut self, survives: Survives, rng: &mut Rng) {
        let Some(Running { step: Some(Step::WriteMap { page, copy, bytes }), .. }) = &self.commit else {
            unreachable!("it is at such a step");
        };
        for (sector, bytes) in sectors_of_copy(Maps::pages(self.setup.geometry), *page, *copy, bytes) {
            if survives.throw(rng) {
                self.metadata.write(sector, bytes);
            }
        }
    }
}
