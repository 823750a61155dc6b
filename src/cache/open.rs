//! Opening a cache: make a new one, or go on with the one that is there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::commit::{CommitReport, Committer, Durable};
use super::data::{CacheError, DataFile};
use super::layout::fits;
use super::live::{LiveError, LiveMap, boot_id};
use super::metadata::MetadataFile;
use super::recover::MetadataError;
use super::recover::Recovered;
use super::superblock::{CacheState, Gift, Superblock};
use crate::beside::{beside, make_device_dir, sync_dir_of};
use crate::engine::{Geometry, GeometryError, Maps, Words, load_page};

/// Block size of a new cache, where the user names none.
pub const DEFAULT_BLOCK_BYTES: u64 = 4096;

/// What the source is, as far as the cache must know it.
#[derive(Clone, Debug)]
pub struct SourceFacts {
    /// Its NBD URI.
    pub uri: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What its contents are known by.
    pub identity: String,
    /// Its disk, if it can give it away: a new cache begins in standby then.
    pub disk: Option<Uuid>,
}

/// Where a cache lies and how it is opened.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// The file or device with the data.
    pub data: PathBuf,
    /// The metadata file.
    pub metadata: PathBuf,
    /// Directory on tmpfs for the live map.
    pub live_dir: PathBuf,
    /// Block size in bytes: of a new cache, or what an existing one must have.
    pub block_bytes: Option<u64>,
    /// Go on although the live map of a killed daemon is gone.
    pub forget_unflushed: bool,
    /// Make a new cache of a block device although something is on it.
    pub overwrite: bool,
    /// A new cache begins in standby, whatever the source is.
    pub standby: bool,
    /// The data is an older copy of the disk, which comes home: it is not opened for writing yet.
    pub home: bool,
}

/// Why a cache could not be opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The data file or device.
    #[error(transparent)]
    Data(#[from] CacheError),
    /// The metadata file.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The live map.
    #[error(transparent)]
    Live(#[from] LiveError),
    /// The default place for metadata cannot be made.
    #[error("cannot make the directory of {path} for the metadata: {source}; name another place with --metadata")]
    MetadataDir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// One file for two things.
    #[error("cache {0} cannot be its own metadata; name another file with --metadata")]
    SameFile(PathBuf),
    /// Size or block size.
    #[error("{0}")]
    Geometry(#[from] GeometryError),
    /// The source is not the size that it was.
    #[error(
        "the source {verb} since this cache was made: {now} bytes now, {then} then; it is not the disk that this \
         cache belongs to. Attach the right source, or use a new cache"
    )]
    SizeChanged {
        /// "shrank" or "grew".
        verb: &'static str,
        /// Its size now, in bytes.
        now: u64,
        /// Its size when the cache was made.
        then: u64,
    },
    /// The source has other contents.
    #[error(
        "the source is not the one that this cache belongs to, or it was changed since (its identity is {now}, \
         the cache was made from {then}); a cache cannot be continued from changed contents. Attach the right \
         source ({uri} when last attached), or use a new cache"
    )]
    IdentityChanged {
        /// Identity now.
        now: String,
        /// Identity when the cache was made.
        then: String,
        /// Where the source was when it was last attached.
        uri: String,
    },
    /// The source has another disk.
    #[error(
        "the source has disk {now}, and this cache is in standby for disk {then}; attach the right source, or          give this one up with `blkferry abort`"
    )]
    DiskChanged {
        /// The source's disk now.
        now: String,
        /// The disk that the cache is in standby for.
        then: Uuid,
    },
    /// Asked for another block size.
    #[error("this cache has blocks of {found} bytes, not {asked}; leave --block-size out")]
    BlockSize {
        /// The cache's.
        found: u64,
        /// What was asked for.
        asked: u64,
    },
    /// Acknowledged writes would be fetched over.
    #[error(
        "a daemon was killed while it had cache {0} open, and its live map {1} is gone: which unflushed writes the \
         cache holds cannot be told. If the machine that used the disk has been stopped since, or its unflushed \
         writes may be lost, attach with --forget-unflushed"
    )]
    LiveMapGone(PathBuf, PathBuf),
    /// Names too long for the superblock.
    #[error("the source's URI is too long to be kept in the metadata ({0} bytes)")]
    NamesTooLong(usize),
}

/// An open cache.
pub struct Cache {
    /// The data.
    pub data: DataFile,
    /// Present and dirty map.
    pub maps: Maps,
    /// The durable side.
    pub store: Store,
    /// Was it there already?
    pub resumed: bool,
    /// What was odd but harmless, in words for the log.
    pub notes: Vec<String>,
}

/// Metadata file and committer: what the commit thread owns.
pub struct Store {
    data: DataFile,
    metadata: MetadataFile,
    committer: Committer,
    live_path: PathBuf,
}

struct RealDisk<'a> {
    data: &'a DataFile,
    metadata: &'a MetadataFile,
}

impl Durable for RealDisk<'_> {
    fn sync_data(&mut self) -> io::Result<()> {
        self.data.sync_data()
    }

    fn write_map(&mut self, page: u64, copy: u64, bytes: &[u8]) -> io::Result<()> {
        self.metadata.write_map(page, copy, bytes)
    }

    fn sync_metadata(&mut self) -> io::Result<()> {
        self.metadata.sync()
    }
}

impl Store {
    /// One commit; see [`Committer::commit`]. Blocks.
    pub fn commit(&mut self, maps: &Maps) -> io::Result<CommitReport> {
        self.committer.commit(maps, &mut RealDisk { data: &self.data, metadata: &self.metadata })
    }

    /// Records that all blocks are present, after they are all committed.
    pub fn record_complete(&mut self) -> io::Result<()> {
        self.committer.update(&self.metadata, |s| s.state = CacheState::Complete)
    }

    /// Records that the daemon leaves it in order, after the last commit, and removes the live map.
    pub fn record_clean(&mut self) -> io::Result<()> {
        self.committer.update(&self.metadata, |s| s.clean = true)?;
        LiveMap::discard(&self.live_path)
    }

    /// After a failed commit: what is not committed may not stand on the disk, whatever the live map says.
    pub fn distrust_live_map(&self) -> io::Result<()> {
        LiveMap::discard(&self.live_path)
    }

    /// Records a step of a handoff.
    pub fn record(&mut self, change: impl FnOnce(&mut Superblock)) -> io::Result<()> {
        self.committer.update(&self.metadata, change)
    }

    /// The superblock.
    pub fn superblock(&self) -> &Superblock {
        self.committer.superblock()
    }
}

/// The superblock of the cache at `metadata`, if there is one: what a resume can know before it has reached the source.
pub fn peek(metadata: &Path) -> Result<Option<Superblock>, MetadataError> {
    if !metadata.exists() {
        return Ok(None);
    }
    Ok(Some(MetadataFile::peek(metadata)?))
}

impl Cache {
    /// Makes or resumes the cache for this source. On an error nothing was changed.
    pub fn open(options: &CacheOptions, source: &SourceFacts) -> Result<Self, OpenError> {
        if is_same_file(&options.data, &options.metadata) {
            return Err(OpenError::SameFile(options.data.clone()));
        }
        let fresh = !options.metadata.exists();
        let block_bytes = options.block_bytes.unwrap_or(DEFAULT_BLOCK_BYTES);
        if fresh {
            Geometry::new(source.size_bytes, block_bytes)?;
        }
        if !fresh {
            // Before the data file is looked at: a source of another size gets the right error.
            let superblock = MetadataFile::peek(&options.metadata)?;
            check_same(&superblock, source, options.block_bytes)?;
            check_fits(&Superblock { source: source.uri.clone(), ..superblock })?;
        }
        let superblock = if fresh { Some(new_superblock(source, block_bytes, options.standby)?) } else { None };
        let made_by_us = !options.data.exists();
        let data = if options.home {
            DataFile::open_home(&options.data, source.size_bytes)?
        } else {
            DataFile::open(&options.data, &options.metadata, source.size_bytes, fresh)?
        };
        if fresh && data.is_device() && !options.overwrite && !options.home {
            data.check_blank(&options.data)?;
        }
        if fresh && options.metadata == default_metadata_path(&options.data) {
            let path = options.metadata.clone();
            make_device_dir(&options.metadata).map_err(|source| OpenError::MetadataDir { path, source })?;
        }
        let opened = match superblock {
            Some(superblock) => {
                MetadataFile::create(&options.metadata, &superblock).map(|made| (superblock, Some(made)))
            }
            // Read again, now under the lock.
            None => MetadataFile::peek(&options.metadata).map(|superblock| (superblock, None)),
        };
        if opened.is_err() && made_by_us {
            // Gone already is as good.
            let _ = fs::remove_file(&options.data);
        }
        let (superblock, made) = opened?;
        Self::with_maps(options, source, data, &superblock, made)
    }

    fn with_maps(
        options: &CacheOptions,
        source: &SourceFacts,
        data: DataFile,
        superblock: &Superblock,
        made: Option<(MetadataFile, Recovered)>,
    ) -> Result<Self, OpenError> {
        let geometry = Geometry::new(superblock.size_bytes, superblock.block_bytes)?;
        let boot = boot_id().map_or_else(|_| String::new(), |id| id.to_string());
        let killed_in_this_boot = !superblock.clean && superblock.boot_id == boot;
        let live = LiveMap::open(&options.live_dir, superblock.uuid, geometry, !superblock.clean)?;
        if killed_in_this_boot && !live.is_inherited() && !options.forget_unflushed {
            let path = live.path().to_owned();
            LiveMap::discard(&path).ok();
            return Err(OpenError::LiveMapGone(options.data.clone(), path));
        }
        let resumed = made.is_none();
        // Page by page into the live map: those of a large disk are as large as the live map itself.
        let opened = made
            .map_or_else(|| MetadataFile::open_into(&options.metadata, &mut |page| load_page(live.words(), &page)), Ok);
        let (metadata, recovered) = opened.inspect_err(|_| {
            if !live.is_inherited() {
                // It says nothing that the metadata does not say.
                LiveMap::discard(live.path()).ok();
            }
        })?;
        let io = |source| MetadataError::Io { path: options.metadata.clone(), action: "write the superblock", source };
        let mut committer = Committer::new(&recovered);
        // One that was given away had nothing in the air.
        if !superblock.clean && !live.is_inherited() && superblock.state != CacheState::Away && superblock.dirty_exact {
            // Before the seal: to whoever comes after a kill, what is sealed has lost nothing.
            committer.update(&metadata, |s| s.dirty_exact = false).map_err(io)?;
        }
        live.seal();
        let live_path = live.path().to_owned();
        let maps = Maps::new(geometry, Box::new(live));
        let opened = committer.update(&metadata, |s| {
            s.clean = false;
            s.boot_id = boot;
            s.source.clone_from(&source.uri);
        });
        opened.map_err(io)?;
        let store = Store { data: data.clone(), metadata, committer, live_path };
        Ok(Self { data, maps, store, resumed, notes: recovered.notes })
    }
}

/// Removes a cache in which nothing is: its metadata, and the data file if nothing was ever written to it. Not one that
/// is `somebodys`: an image may be nothing but holes, too.
pub fn discard(data: &Path, metadata: &Path, somebodys: bool) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    fs::remove_file(metadata)?;
    sync_dir_of(metadata)?;
    match fs::metadata(data) {
        Ok(meta) if !somebodys && meta.is_file() && meta.blocks() == 0 => fs::remove_file(data),
        _ => Ok(()),
    }
}

/// Do two paths lead to one file, which need not be there yet?
fn is_same_file(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let whole = |path: &Path| {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(parent.canonicalize().ok()?.join(path.file_name()?))
    };
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => one == other || whole(one).is_some_and(|one| Some(one) == whole(other)),
    }
}

fn new_superblock(source: &SourceFacts, block_bytes: u64, standby: bool) -> Result<Superblock, OpenError> {
    let standby = standby || source.disk.is_some();
    let superblock = Superblock {
        uuid: Uuid::new_v4(),
        epoch: if standby { 0 } else { 1 },
        size_bytes: source.size_bytes,
        block_bytes,
        source: source.uri.clone(),
        source_identity: source.identity.clone(),
        state: if standby { CacheState::Standby } else { CacheState::Active },
        dirty_exact: true,
        clean: true,
        boot_id: String::new(),
        gift: source.disk.map(|disk| Gift { disk, epoch: 0 }),
        floor: 0,
        given_to: None,
        released: false,
    };
    check_fits(&superblock)?;
    Ok(superblock)
}

/// Room must also be there for what is filled in later.
fn check_fits(superblock: &Superblock) -> Result<(), OpenError> {
    let boot_id = Uuid::nil().to_string();
    let fullest = Superblock {
        boot_id,
        clean: false,
        dirty_exact: false,
        state: CacheState::Complete,
        gift: Some(Gift { disk: Uuid::nil(), epoch: u64::MAX }),
        floor: u64::MAX,
        given_to: Some(Uuid::nil()),
        released: true,
        epoch: u64::MAX,
        ..superblock.clone()
    };
    if fits(&fullest) { Ok(()) } else { Err(OpenError::NamesTooLong(superblock.source.len())) }
}

fn check_same(superblock: &Superblock, source: &SourceFacts, block_bytes: Option<u64>) -> Result<(), OpenError> {
    let (now, then) = (source.size_bytes, superblock.size_bytes);
    if now != then {
        let verb = if now < then { "shrank" } else { "grew" };
        return Err(OpenError::SizeChanged { verb, now, then });
    }
    let waits = matches!(superblock.state, CacheState::Standby | CacheState::Declined);
    if waits {
        // The source is still written to: what counts is which disk it is.
        if let Some(Gift { disk: then, .. }) = superblock.gift.filter(|gift| source.disk != Some(gift.disk)) {
            let now = source.disk.map_or("of its own that cannot be given away".into(), |disk| disk.to_string());
            return Err(OpenError::DiskChanged { now, then });
        }
    } else if source.identity != superblock.source_identity {
        let (now, then) = (source.identity.clone(), superblock.source_identity.clone());
        return Err(OpenError::IdentityChanged { now, then, uri: superblock.source.clone() });
    }
    match block_bytes {
        Some(asked) if asked != superblock.block_bytes => {
            Err(OpenError::BlockSize { found: superblock.block_bytes, asked })
        }
        _ => Ok(()),
    }
}

/// Where the metadata of a cache lies if the user does not say: beside a file, under /var/lib for a device.
pub fn default_metadata_path(data: &Path) -> PathBuf {
    beside(data, "ferry")
}
