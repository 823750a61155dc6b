//! A cache that was given away and holds all of the disk: nothing but an image any more.

use std::io;
use std::path::{Path, PathBuf};

use super::data::DataFile;
use super::live::LiveMap;
use super::metadata::MetadataFile;
use super::open::OpenError;
use super::superblock::CacheState;
use crate::beside::sync_dir_of;
use crate::engine::{Geometry, PageImage};

/// See the module's page. No daemon has it while this is held.
pub struct Whole {
    _data: DataFile,
    metadata: PathBuf,
    live: PathBuf,
}

impl Whole {
    /// The cache, if all of its blocks are durably present and it was given away; `None`: they are not, or it was not.
    pub fn of(data: &Path, metadata: &Path, live_dir: &Path) -> Result<Option<Self>, OpenError> {
        let superblock = MetadataFile::peek(metadata)?;
        let held = DataFile::open(data, metadata, superblock.size_bytes, false)?;
        // Read again, now under the lock.
        let mut present = 0u64;
        let count = &mut |page: PageImage| {
            present += page.present.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        };
        let (_, recovered) = MetadataFile::open_into(metadata, count)?;
        let superblock = recovered.superblock;
        let blocks = Geometry::new(superblock.size_bytes, superblock.block_bytes)?.blocks();
        let live = live_dir.join(format!("{}.live", superblock.uuid));
        let is_whole = superblock.state == CacheState::Away && present == blocks;
        Ok(is_whole.then(|| Self { _data: held, metadata: metadata.into(), live }))
    }

    /// Removes what makes it a cache; what it was is on record elsewhere.
    pub fn forget(self) -> io::Result<()> {
        std::fs::remove_file(&self.metadata)?;
        sync_dir_of(&self.metadata)?;
        LiveMap::discard(&self.live)
    }
}
