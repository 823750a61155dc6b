//! A cache that was given away and holds all of the disk: nothing but an image any more.

use std::io;
use std::path::{Path, PathBuf};

use super::data::{CacheError, DataFile};
use super::live::LiveMap;
use super::metadata::MetadataFile;
use super::open::OpenError;
use super::recover::{MetadataError, Recovered};
use super::superblock::CacheState;
use crate::beside::sync_dir_of;
use crate::engine::{Geometry, PageImage};

/// Removes the metadata of a cache that became an image already: the record beside it is the later word. For whoever finds
/// both; a daemon may not have it.
pub fn forget_given(data: &Path, metadata: &Path) -> Result<(), OpenError> {
    // Read-only: the image may be fenced.
    let _held = DataFile::keep_daemons_out(data)?;
    let removed = std::fs::remove_file(metadata).and_then(|()| sync_dir_of(metadata));
    Ok(removed.map_err(|source| MetadataError::Io { path: metadata.into(), action: "remove", source })?)
}

/// Has a daemon this cache?
pub fn is_held(data: &Path) -> Result<bool, OpenError> {
    match DataFile::keep_daemons_out(data) {
        Err(CacheError::InUse(_)) => Ok(true),
        other => Ok(other.map(|_| false)?),
    }
}

/// A cache that no daemon has, and none can have while this is held.
pub(super) struct Held {
    data: DataFile,
    pub(super) metadata: MetadataFile,
    pub(super) recovered: Recovered,
    blocks: u64,
    present: u64,
}

impl Held {
    pub(super) fn open(data: &Path, metadata: &Path) -> Result<Self, OpenError> {
        let superblock = MetadataFile::peek(metadata)?;
        let data = DataFile::open(data, metadata, superblock.size_bytes, false)?;
        // Read again, now under the lock.
        let mut present = 0;
        let count = &mut |page: PageImage| {
            present += page.present.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        };
        let (metadata, recovered) = MetadataFile::open_into(metadata, count)?;
        let superblock = &recovered.superblock;
        let blocks = Geometry::new(superblock.size_bytes, superblock.block_bytes)?.blocks();
        Ok(Self { data, metadata, recovered, blocks, present })
    }

    /// Are all blocks durably present?
    pub(super) fn is_whole(&self) -> bool {
        self.present == self.blocks
    }
}

/// See the module's page. No daemon has it while this is held.
pub struct Whole {
    _data: DataFile,
    metadata: PathBuf,
    live: PathBuf,
}

impl Whole {
    /// The cache, if all of its blocks are durably present and it was given away; `None`: they are not, or it was not.
    pub fn of(data: &Path, metadata: &Path, live_dir: &Path) -> Result<Option<Self>, OpenError> {
        let held = Held::open(data, metadata)?;
        let superblock = &held.recovered.superblock;
        let live = live_dir.join(format!("{}.live", superblock.uuid));
        let is_given = superblock.state == CacheState::Away && held.is_whole();
        Ok(is_given.then(|| Self { _data: held.data, metadata: metadata.into(), live }))
    }

    /// Removes what makes it a cache; what it was is on record elsewhere.
    pub fn forget(self) -> io::Result<()> {
        std::fs::remove_file(&self.metadata)?;
        sync_dir_of(&self.metadata)?;
        LiveMap::discard(&self.live)
    }
}
