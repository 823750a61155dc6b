//! A cache whose disk was given to a host that is gone for good.

use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::commit::Committer;
use super::open::OpenError;
use super::superblock::CacheState;
use super::whole::Held;

/// Why it cannot be had back.
#[derive(Debug, thiserror::Error)]
pub enum ReclaimError {
    /// It cannot be opened, or a daemon has it.
    #[error(transparent)]
    Cache(#[from] OpenError),
    /// Without force.
    #[error(
        "the disk of cache {cache} was given to {to} in epoch {epoch}, and lives there. If that host is gone for good, or \
         what it has written may be lost, and its device will never be used again, take it back with --force"
    )]
    Away {
        /// The cache.
        cache: PathBuf,
        /// Who has the disk.
        to: Uuid,
        /// In which epoch.
        epoch: u64,
    },
    /// It was named.
    #[error("there is no metadata at {0}: name the file that `attach` was given with --metadata")]
    NoMetadata(PathBuf),
    /// It cannot be recorded.
    #[error("metadata {0} cannot be written: {1}")]
    Io(PathBuf, #[source] io::Error),
}

/// Makes the disk this cache's again, as it was when it was given away, in an epoch of its own: whoever has it is refused
/// from then on. Durable on return. Who had it; `None`: it is here, and nothing was done.
pub fn reclaim(data: &Path, metadata: &Path, force: bool) -> Result<Option<Uuid>, ReclaimError> {
    let held = Held::open(data, metadata)?;
    let superblock = &held.recovered.superblock;
    let (CacheState::Away, Some(to)) = (superblock.state, superblock.given_to) else { return Ok(None) };
    if !force {
        return Err(ReclaimError::Away { cache: data.into(), to, epoch: superblock.epoch });
    }
    let state = if held.is_whole() { CacheState::Complete } else { CacheState::Active };
    let recorded = Committer::new(&held.recovered).update(&held.metadata, |s| {
        (s.state, s.epoch, s.given_to, s.released) = (state, s.epoch + 1, None, false);
        // Nothing was in the air since it was given away.
        s.clean = true;
    });
    recorded.map_err(|e| ReclaimError::Io(metadata.into(), e))?;
    Ok(Some(to))
}
