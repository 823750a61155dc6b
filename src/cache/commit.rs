//! The commit protocol: when may a guest be told that its data is durable.

use std::collections::VecDeque;
use std::io;

use super::metadata::{MetadataFile, encode_map};
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

enum Todo {
    SyncData,
    /// This copy of this page becomes blank.
    Blank(u64, u64),
    /// The page of this index.
    Write(usize),
    SyncMetadata,
}

/// A commit that has begun: the pages that it took, and what is still to be done, in order.
pub struct Commit {
    pages: Vec<PageImage>,
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
            damaged: recovered.damaged.clone(),
            superblock_damaged: recovered.superblock_damaged,
            #[cfg(feature = "planted-faults")]
            fault: None,
        }
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
        let result = self.carry_on(&mut commit, disk);
        match &result {
            Ok(_) => maps.committed(),
            Err(_) => maps.commit_failed(),
        }
        result
    }

    fn carry_on(&mut self, commit: &mut Commit, disk: &mut impl Durable) -> io::Result<CommitReport> {
        while let Some(step) = self.next_step(commit) {
            step.carry_out(disk)?;
        }
        Ok(CommitReport { pages: commit.pages.len() as u64 })
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
    /// An error anywhere is final for the device: after a failed fdatasync the kernel may have dropped
    /// what it could not write, and a retry would succeed without it.
    pub fn begin(&mut self, maps: &Maps) -> Commit {
        let pages = maps.take_changed();
        let mut todo = VecDeque::from([Todo::SyncData]);
        if !pages.is_empty() {
            if !self.found_is_durable {
                todo.push_back(Todo::SyncMetadata);
            }
            if !self.damaged.is_empty() {
                todo.extend(self.damaged.iter().map(|&(page, copy)| Todo::Blank(page, copy)));
                todo.push_back(Todo::SyncMetadata);
            }
            todo.extend((0..pages.len()).map(Todo::Write));
            todo.push_back(Todo::SyncMetadata);
        }
        #[cfg(feature = "planted-faults")]
        match self.fault {
            Some(PlantedFault::DataNotSynced) => drop(todo.pop_front()),
            Some(PlantedFault::MapBeforeData) => todo.rotate_left(1),
            Some(PlantedFault::FoundNotSynced) | None => {}
        }
        Commit { pages, todo }
    }

    /// What the commit needs next, after what it needed before was done without an error. None: that was all.
    pub fn next_step(&mut self, commit: &mut Commit) -> Option<Step> {
        Some(match commit.todo.pop_front()? {
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
