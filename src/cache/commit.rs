//! The commit protocol: when may a guest be told that its data is durable.

use std::collections::VecDeque;
use std::io;

use super::layout::encode_map;
use super::metadata::MetadataFile;
use super::page::PAGE_BYTES;
use super::recover::{Newest, Recovered};
use super::superblock::Superblock;
use crate::engine::{Maps, PageImage};

/// What a commit writes to and syncs. The daemon's is the real disk; a test's may lose what was not synced.
pub trait Durable {
    /// Makes all completed writes to the cache's data durable (fdatasync(2)).
    fn sync_data(&mut self) -> io::Result<()>;
    /// Writes one copy of a map page.
    fn write_map(&mut self, page: u64, copy: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes all written map pages durable (fdatasync(2)).
    fn sync_metadata(&mut self) -> io::Result<()>;
}

/// The next thing that a commit needs done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// See [`Durable::sync_data`].
    SyncData,
    /// See [`Durable::write_map`].
    WriteMap {
        /// Which page.
        page: u64,
        /// Over which of its copies.
        copy: u64,
        /// As it goes to disk.
        bytes: Vec<u8>,
    },
    /// See [`Durable::sync_metadata`].
    SyncMetadata,
}

impl Step {
    /// Does it.
    pub fn carry_out(&self, disk: &mut impl Durable) -> io::Result<()> {
        match self {
            Self::SyncData => disk.sync_data(),
            Self::WriteMap { page, copy, bytes } => disk.write_map(*page, *copy, bytes),
            Self::SyncMetadata => disk.sync_metadata(),
        }
    }
}

/// Map pages that a commit holds in memory at a time: 2 MiB. On a disk of terabytes a second can change many more.
const BATCH_PAGES: usize = 512;

enum Todo {
    SyncData,
    /// This copy of this page becomes blank.
    Blank(u64, u64),
    /// The page of this index.
    Write(usize),
    /// Take the next pages.
    TakeMore,
    SyncMetadata,
}

/// A commit that has begun: the pages that it took last, and what is still to be done, in order.
pub struct Commit {
    pages: Vec<PageImage>,
    /// Where the pages begin that it has not looked at.
    next_page: u64,
    /// How many it took so far.
    taken: u64,
    todo: VecDeque<Todo>,
}

/// What a commit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommitReport {
    /// Map pages written.
    pub pages: u64,
}

/// A fault planted on purpose, to prove that the tests would see it.
#[cfg(feature = "planted-faults")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlantedFault {
    /// The data is not synced before the map is written.
    DataNotSynced,
    /// The map is written and synced first, the data after it.
    MapBeforeData,
    /// What the process found is not made durable before something is written over.
    FoundNotSynced,
}

/// Runs the commits of one cache, one at a time.
#[derive(Clone, Debug)]
pub struct Committer {
    superblock: Superblock,
    superblock_newest: Newest,
    newest: Vec<Newest>,
    /// Is the newest copy of each page, as it was found, durable? A daemon that was killed may have written it
    /// and not synced it: this process reads it, but a power cut would leave the older copy, perhaps torn.
    found_is_durable: bool,
    batch_pages: usize,
    /// Copies that were found damaged, and not needed: page and copy. Nothing is written over them but zeros.
    damaged: Vec<(u64, u64)>,
    superblock_damaged: bool,
    #[cfg(feature = "planted-faults")]
    fault: Option<PlantedFault>,
}

impl Committer {
    /// For a cache as it was found.
    pub fn new(recovered: &Recovered) -> Self {
        Self {
            superblock: recovered.superblock.clone(),
            superblock_newest: recovered.superblock_newest,
            newest: recovered.newest.clone(),
            found_is_durable: false,
            batch_pages: BATCH_PAGES,
            damaged: recovered.damaged.clone(),
            superblock_damaged: recovered.superblock_damaged,
            #[cfg(feature = "planted-faults")]
            fault: None,
        }
    }

    /// Takes so many pages at a time from now on. For tests, whose disks have few.
    pub fn set_batch_pages(&mut self, pages: usize) {
        self.batch_pages = pages.max(1);
    }

    /// Breaks it, for the tests of the tests.
    #[cfg(feature = "planted-faults")]
    pub fn plant(&mut self, fault: PlantedFault) {
        self.fault = Some(fault);
        self.found_is_durable |= fault == PlantedFault::FoundNotSynced;
    }

    /// Makes everything acknowledged before this call durable: data, and the bits that say so (I1, I2).
    pub fn commit(&mut self, maps: &Maps, disk: &mut impl Durable) -> io::Result<CommitReport> {
        let mut commit = self.begin(maps);
        let result = self.carry_on(&mut commit, maps, disk);
        match &result {
            Ok(_) => maps.committed(),
            Err(_) => maps.commit_failed(),
        }
        result
    }

    fn carry_on(&mut self, commit: &mut Commit, maps: &Maps, disk: &mut impl Durable) -> io::Result<CommitReport> {
        while let Some(step) = self.next_step(commit, maps) {
            step.carry_out(disk)?;
        }
        Ok(CommitReport { pages: commit.taken })
    }

    /// Begins a commit, for whoever carries out its steps one by one. The order of the steps is the protocol:
    ///
    /// 1. Take the changed pages *first*. A bit that is set later may belong to data that step 2 does
    ///    not cover; it is left for the next commit.
    /// 2. Sync the data. Every bit that was taken was set after its data was written, so all of that
    ///    data is durable now. Only then may a bit that says so reach the disk.
    /// 3. Write each page over its *older* copy, so that a cut leaves the newest committed copy whole. (The first
    ///    commit of a process syncs the metadata before: what it found may not be on the disk yet. After that it makes
    ///    copies blank that it found damaged: a write over one of them, cut off in the middle, would leave sectors that
    ///    are damaged beside newer ones, and look like damage to what was promised.)
    /// 4. Sync the metadata. Only after that is a flush answered.
    ///
    /// If many pages have changed, steps 1 to 3 are done for some of them after the other, in ascending order, so that
    /// memory stays bounded (I10): each batch is taken before the sync of the data that is to cover it.
    ///
    /// An error anywhere is final for the device: after a failed fdatasync the kernel may have dropped
    /// what it could not write, and a retry would succeed without it.
    pub fn begin(&mut self, maps: &Maps) -> Commit {
        let mut commit = Commit { pages: Vec::new(), next_page: 0, taken: 0, todo: VecDeque::new() };
        self.take(&mut commit, maps);
        if commit.taken == 0 {
            commit.todo = VecDeque::from([Todo::SyncData]);
        }
        #[cfg(feature = "planted-faults")]
        match self.fault {
            Some(PlantedFault::DataNotSynced) => drop(commit.todo.pop_front()),
            Some(PlantedFault::MapBeforeData) => commit.todo.rotate_left(1),
            Some(PlantedFault::FoundNotSynced) | None => {}
        }
        commit
    }

    /// Takes the next batch of changed pages, and notes what has to be done for it. The last one ends the commit.
    fn take(&self, commit: &mut Commit, maps: &Maps) {
        commit.pages = maps.take_changed(commit.next_page, self.batch_pages);
        commit.taken += commit.pages.len() as u64;
        if let Some(last) = commit.pages.last() {
            commit.next_page = last.page + 1;
            commit.todo.push_back(Todo::SyncData);
            if !self.found_is_durable {
                commit.todo.push_back(Todo::SyncMetadata);
            }
            if !self.damaged.is_empty() {
                commit.todo.extend(self.damaged.iter().map(|&(page, copy)| Todo::Blank(page, copy)));
                commit.todo.push_back(Todo::SyncMetadata);
            }
            commit.todo.extend((0..commit.pages.len()).map(Todo::Write));
        }
        let full = commit.pages.len() == self.batch_pages;
        commit.todo.push_back(if full { Todo::TakeMore } else { Todo::SyncMetadata });
    }

    /// What the commit needs next, after what it needed before was done without an error. None: that was all.
    pub fn next_step(&mut self, commit: &mut Commit, maps: &Maps) -> Option<Step> {
        Some(match commit.todo.pop_front()? {
            Todo::TakeMore => {
                self.take(commit, maps);
                return self.next_step(commit, maps);
            }
            Todo::SyncData => Step::SyncData,
            Todo::Blank(page, copy) => {
                self.found_is_durable = true;
                Step::WriteMap { page, copy, bytes: vec![0; PAGE_BYTES] }
            }
            Todo::Write(index) => {
                // No page is written before the first sync of the metadata has gone well, and the one after blanks.
                self.found_is_durable = true;
                self.damaged.clear();
                let image = &commit.pages[index];
                let newest = &mut self.newest[image.page as usize];
                *newest = newest.next();
                let bytes = encode_map(self.superblock.uuid, self.superblock.epoch, newest.sequence, image);
                Step::WriteMap { page: image.page, copy: newest.copy, bytes }
            }
            Todo::SyncMetadata => Step::SyncMetadata,
        })
    }

    /// The superblock as last written.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Changes the superblock, durably.
    pub fn update(&mut self, file: &MetadataFile, change: impl FnOnce(&mut Superblock)) -> io::Result<()> {
        let mut next = self.superblock.clone();
        change(&mut next);
        if next != self.superblock {
            if !self.found_is_durable {
                file.sync()?;
                self.found_is_durable = true;
            }
            if self.superblock_damaged {
                file.blank_superblock(self.superblock_newest)?;
                self.superblock_damaged = false;
            }
            self.superblock_newest = file.write_superblock(&next, self.superblock_newest)?;
            self.superblock = next;
        }
        Ok(())
    }
}
