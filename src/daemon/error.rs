//! Why a device did not come up, or did not go down in order: each a line that says what, where, and what to do.

use std::io;
use std::path::PathBuf;

use super::SignalError;
use crate::cache::{MetadataError, OpenError, ReclaimError};
use crate::control::{NameError, RunDirError};
use crate::device::FetchThreadError;
use crate::export::{GiverError, HomeError, RecordError};
use crate::frontend::{FrontendError, ShapeError};
use crate::nbd::Uri;
use crate::remote::DialError;
use crate::ublk::UblkError;
use crate::uring::{BindError, UringError};

/// Why a device did not come up, or did not go down in order.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// No ring.
    #[error(transparent)]
    Uring(#[from] UringError),
    /// No run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// No name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// No source.
    #[error(transparent)]
    Fetch(#[from] FetchThreadError),
    /// No cache.
    #[error(transparent)]
    Cache(#[from] OpenError),
    /// Metadata that cannot be read.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// No frontend.
    #[error(transparent)]
    Frontend(#[from] FrontendError),
    /// No block device.
    #[error(transparent)]
    Ublk(#[from] UblkError),
    /// Not the shape of a block device.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// There is a device that waits for its daemon.
    #[error(
        "{name} is /dev/ublkb{id}, whose daemon was killed and which waits for another: take it over (`blkferry \
         recover {name}`), or give it up (`blkferry detach --force {name}`)"
    )]
    Orphan {
        /// Its name.
        name: String,
        /// The N of /dev/ublkbN.
        id: u32,
    },
    /// An orphan cannot be removed.
    #[error("/dev/ublkb{id} cannot be removed: {source}; is it still mounted or open? It goes away when it is not")]
    Orphaned {
        /// The N of /dev/ublkbN.
        id: u32,
        /// What the driver said.
        source: UblkError,
    },
    /// Only ublk devices survive their daemon.
    #[error("there is no dead ublk device named {0}; see `blkferry list`, or attach the cache again")]
    NothingToRecover(String),
    /// Its daemon is there.
    #[error("the daemon of {0} is alive: there is nothing to recover")]
    Alive(String),
    /// The run directory's entry makes no sense.
    #[error("what is written down about {name} cannot be used: {what}")]
    Entry {
        /// Name of the device.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// No socket, for the guest or for control.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The source's own block size is larger than a block.
    #[error(
        "source {uri} takes requests in units of {unit} bytes only, which is more than a block ({used}); \
         make a new cache with --block-size {unit}"
    )]
    Unit {
        /// The source.
        uri: Uri,
        /// Its unit in bytes.
        unit: u64,
        /// The block size in bytes.
        used: u64,
    },
    /// A thread or a file of the daemon's own.
    #[error("{0}: {1}")]
    Io(&'static str, #[source] io::Error),
    /// The last commit failed.
    #[error("the cache was not left in order: {0}; what was not flushed before may be lost")]
    Unclean(#[source] io::Error),
    /// A blkferry export that gives nothing away.
    #[error(
        "source {0} is a blkferry export that does not let its disk change hosts, so that there is nothing to stand by \
         for; start it with `export --handoff`, or leave --standby out"
    )]
    NoHandoff(Uri),
    /// Not an image that this disk can come home to.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The source did not give its disk.
    #[error("{0}")]
    Kept(String),
    /// Taken back at the source.
    #[error(
        "the source's disk was given to this cache in epoch {then}, and was taken back there since (its epoch is {now}): \
         what this cache and the source hold is not one disk any more"
    )]
    TakenBack {
        /// The epoch in which it was given.
        then: u64,
        /// The source's epoch, if it tells one.
        now: String,
    },
    /// It may not come back.
    #[error(
        "{0}. This cache was given away: if its disk has come home to that source, attach it with --no-source, so that \
         what was written here can be fetched"
    )]
    SourceGone(#[source] DialError),
    /// Absent blocks are there.
    #[error("cache {0} was not given away: what is not in it is at its source only. Leave --no-source out")]
    NeedsSource(PathBuf),
    /// A cache, and not an image.
    #[error(
        "{0} is the cache of a device that is not complete, or was given away: what is in it is not the disk. Attach it, \
         and offer the device (`blkferry attach … --export`)"
    )]
    NoImage(PathBuf),
    /// A cache whose disk cannot be had back.
    #[error(transparent)]
    Reclaim(#[from] ReclaimError),
    /// An image whose disk cannot be had back.
    #[error(transparent)]
    Giver(#[from] GiverError),
    /// A record that cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// It has the disk.
    #[error("{0} is the cache of a device that is running, and has the disk: there is nothing to take back")]
    Running(PathBuf),
    /// Signals cannot be waited for.
    #[error(transparent)]
    Signal(#[from] SignalError),
}
