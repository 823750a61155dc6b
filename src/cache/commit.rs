//! The commit protocol: when may a guest be told that its data is durable.

use std::io;

use super::metadata::{MetadataFile, Newest, Recovered, encode_map};
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

/// What a commit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommitReport {
    /// Map pages written.
    pub pages: u64,
}

/// Runs the commits of one cache, one at a time.
#[derive(Debug)]
pub struct Committer {
    superblock: Superblock,
    superblock_newest: Newest,
    newest: Vec<Newest>,
}

impl Committer {
    /// For a cache as it was found.
    pub fn new(recovered: &Recovered) -> Self {
        Self {
            superblock: recovered.superblock.clone(),
            superblock_newest: recovered.superblock_newest,
            newest: recovered.newest.clone(),
        }
    }

    /// Makes everything acknowledged before this call durable: data, and the bits that say so (I1, I2).
    ///
    /// The order is the protocol:
    /// 1. Take the changed pages *first*. A bit that is set later may belong to data that step 2 does
    ///    not cover; it is left for the next commit.
    /// 2. Sync the data. Every bit that was taken was set after its data was written, so all of that
    ///    data is durable now. Only then may a bit that says so reach the disk.
    /// 3. Write each page over its *older* copy, so that a cut leaves the newest committed copy whole.
    /// 4. Sync the metadata. Only after that is a flush answered.
    ///
    /// An error anywhere is final for the device: after a failed fdatasync the kernel may have dropped
    /// what it could not write, and a retry would succeed without it.
    pub fn commit(&mut self, maps: &Maps, disk: &mut impl Durable) -> io::Result<CommitReport> {
        let pages = maps.take_changed();
        let result = self.write_out(&pages, disk);
        match &result {
            Ok(_) => maps.committed(),
            Err(_) => maps.commit_failed(),
        }
        result
    }

    fn write_out(&mut self, pages: &[PageImage], disk: &mut impl Durable) -> io::Result<CommitReport> {
        disk.sync_data()?;
        for image in pages {
            let newest = &mut self.newest[image.page as usize];
            let next = newest.next();
            let bytes = encode_map(self.superblock.uuid, self.superblock.epoch, next.sequence, image);
            disk.write_map(image.page, next.copy, &bytes)?;
            *newest = next;
        }
        if !pages.is_empty() {
            disk.sync_metadata()?;
        }
        Ok(CommitReport { pages: pages.len() as u64 })
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
            self.superblock_newest = file.write_superblock(&next, self.superblock_newest)?;
            self.superblock = next;
        }
        Ok(())
    }
}
