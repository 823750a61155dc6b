//! What a file is by what lies beside it, a cache's metadata or an image's record; and having its disk back.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::DaemonError;
use crate::cache::{self, CacheState, ReclaimError, Superblock, default_metadata_path, forget_given, is_held, peek};
use crate::export::{self, Reclaimed, Record};

/// Was it somebody's image before it was to be a cache?
pub(super) fn is_image(cache: &Path) -> bool {
    Record::path_of(cache).exists()
}

/// Is it somebody's image, whose disk is elsewhere?
pub(super) fn is_given_away(cache: &Path) -> bool {
    // A record that cannot be read is told of when it matters.
    Record::read(&Record::path_of(cache)).is_ok_and(|record| record.is_some_and(|record| !record.deed.is_here()))
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The disk, or what a record says was the disk.
    Image,
    /// A device's, which never completed it: zeros may stand where its blocks should be.
    Cache,
    /// A device's, which gave its disk away.
    Away,
    /// An image whose disk is away. It was a cache until then, and death came before its metadata went.
    Became,
}

fn kind_of(superblock: Option<&Superblock>, record: Option<&Record>) -> Kind {
    let Some(superblock) = superblock else { return Kind::Image };
    match superblock.state {
        CacheState::Complete => Kind::Image,
        // Nothing came home yet.
        CacheState::Standby | CacheState::Declined if record.is_some() => Kind::Image,
        // Any other record is of an image that was at this place before.
        CacheState::Away if record.is_some_and(|record| record.deed.disk == superblock.uuid) => Kind::Became,
        CacheState::Away => Kind::Away,
        _ => Kind::Cache,
    }
}

/// What was found, or done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Back {
    /// Nothing says that it was ever given away.
    Never,
    /// The disk is here.
    Here,
    /// An image's disk was taken back from this one.
    Image(String),
    /// A cache's was.
    Cache(Uuid),
}

/// Takes the disk of an image, or of a cache, back from whoever has it. Without `force` it only clears up after a handoff
/// that was called off.
pub fn reclaim(file: &Path, metadata: Option<&Path>, force: bool) -> Result<Back, DaemonError> {
    if let Some(named) = metadata.filter(|path| !path.exists()) {
        return Err(ReclaimError::NoMetadata(named.into()).into());
    }
    let metadata: PathBuf = metadata.map_or_else(|| default_metadata_path(file), Path::to_owned);
    let superblock = peek(&metadata)?;
    let record = Record::read(&Record::path_of(file))?;
    let is_known = superblock.is_some() || record.is_some();
    match kind_of(superblock.as_ref(), record.as_ref()) {
        Kind::Away => return Ok(cache::reclaim(file, &metadata, force)?.map_or(Back::Here, Back::Cache)),
        // Of any other its device knows what to do.
        Kind::Cache => return Err(DaemonError::NoImage(file.into())),
        // Or the next device would take the metadata for the later word.
        Kind::Became if force => forget_given(file, &metadata)?,
        Kind::Image if record.is_none() && superblock.is_some() && is_held(file)? => {
            return Err(DaemonError::Running(file.into()));
        }
        Kind::Became | Kind::Image => {}
    }
    Ok(match export::reclaim(file, force)? {
        Reclaimed::From(to) => Back::Image(to),
        Reclaimed::WasHere if is_known => Back::Here,
        Reclaimed::WasHere => Back::Never,
    })
}

/// A file that a device was made of and never completed holds zeros where its blocks should be, and one that was given
/// away is somebody else's: neither is an image that can be served. One that has a record of who has it says so itself.
pub fn refuse_cache(image: &Path) -> Result<(), DaemonError> {
    let superblock = peek(&default_metadata_path(image))?;
    let record = if superblock.is_some() { Record::read(&Record::path_of(image))? } else { None };
    match kind_of(superblock.as_ref(), record.as_ref()) {
        Kind::Image | Kind::Became => Ok(()),
        Kind::Cache | Kind::Away => Err(DaemonError::NoImage(image.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handoff::Deed;

    fn superblock(state: CacheState) -> Superblock {
        let uuid = Uuid::from_u128(1);
        Superblock {
            uuid,
            epoch: 3,
            size_bytes: 1 << 20,
            block_bytes: 4096,
            source: "nbd://a/".into(),
            source_identity: String::new(),
            state,
            dirty_exact: true,
            clean: true,
            boot_id: String::new(),
            gift: None,
            floor: 0,
            given_to: None,
            released: false,
        }
    }

    #[test]
    fn a_file_is_what_the_later_word_says() {
        let record = |disk, given_to: Option<u128>| {
            let mut record = Record::of_new_disk();
            record.deed = Deed { disk: Uuid::from_u128(disk), epoch: 3, given_to: given_to.map(Uuid::from_u128) };
            record
        };
        let (own, own_back) = (record(1, Some(2)), record(1, None));
        let (other, other_here) = (record(7, Some(8)), record(7, None));
        use CacheState::{Active, Away, Complete, Declined, Standby};
        for (state, without, beside_own, beside_other) in [
            (Complete, Kind::Image, Kind::Image, Kind::Image),
            (Standby, Kind::Cache, Kind::Image, Kind::Image),
            (Declined, Kind::Cache, Kind::Image, Kind::Image),
            (Active, Kind::Cache, Kind::Cache, Kind::Cache),
            (Away, Kind::Away, Kind::Became, Kind::Away),
        ] {
            let superblock = superblock(state);
            let kind = |record| kind_of(Some(&superblock), record);
            assert_eq!(kind(None), without, "{state:?}");
            assert_eq!((kind(Some(&own)), kind(Some(&own_back))), (beside_own, beside_own), "{state:?}");
            assert_eq!((kind(Some(&other)), kind(Some(&other_here))), (beside_other, beside_other), "{state:?}");
        }
        assert_eq!(kind_of(None, None), Kind::Image);
        assert_eq!(kind_of(None, Some(&own)), Kind::Image);
    }
}
