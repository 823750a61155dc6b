//! The metadata file: superblock and map pages, two copies each.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::posix_fallocate;
use uuid::Uuid;

use super::page::{PAGE_BYTES, PAYLOAD_BYTES, SealedPage};
use super::recover::{Newest, Recovered, Recovery, geometry_of};
use super::superblock::{FORMAT_VERSION, Superblock};
use crate::beside::sync_dir_of;
use crate::engine::{GeometryError, Maps, PageImage};

pub(super) const KIND_SUPERBLOCK: u32 = 1;
pub(super) const KIND_MAP: u32 = 2;
/// Copies of the superblock come first, then all first copies of the map pages, then all second ones.
pub(super) const SUPERBLOCK_COPIES: u64 = 2;

/// Why a metadata file cannot be used. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The system refused.
    #[error("metadata {path}: {action}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Some other file.
    #[error("metadata {0}: this is not a blkferry metadata file; name the right one with --metadata")]
    NotMetadata(PathBuf),
    /// Written by a later blkferry.
    #[error(
        "metadata {path}: format version {found} is newer than this program's {FORMAT_VERSION}; use the blkferry that wrote it"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// Too short.
    #[error(
        "metadata {path}: truncated: {found} bytes, a disk of this size has {expected}; restore the file, \
         or start again with a new cache (writes made here would be lost)"
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// What it should be.
        expected: u64,
    },
    /// A page that may hold what a guest was promised cannot be read.
    #[error(
        "metadata {path}: {what} is damaged (both copies unusable, or the newer one); restore the file from a \
         backup. Starting without it would fetch these blocks from the source again and lose what was written to them here"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which page, and the bytes of the disk that it tells about.
        what: String,
    },
    /// The superblock says something impossible.
    #[error("metadata {path}: {source}")]
    Geometry {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: GeometryError,
    },
}

/// An open metadata file.
#[derive(Debug)]
pub struct MetadataFile {
    file: File,
    pages: u64,
}

/// The page as it goes to disk: present words, then dirty words, little-endian.
pub(super) fn encode_map(uuid: Uuid, epoch: u64, sequence: u64, image: &PageImage) -> Vec<u8> {
    let mut payload = Vec::with_capacity(PAYLOAD_BYTES);
    image.present.iter().chain(&image.dirty).for_each(|word| payload.extend_from_slice(&word.to_le_bytes()));
    SealedPage { kind: KIND_MAP, version: FORMAT_VERSION, uuid, epoch, index: image.page, sequence, payload }.encode()
}

/// The page as it goes to disk: JSON, padded with zeros. A new cache's first one has sequence 1, in copy 0.
pub fn encode_superblock(superblock: &Superblock, sequence: u64) -> Vec<u8> {
    let payload = serde_json::to_vec(superblock).expect("plain data serializes");
    assert!(payload.len() <= PAYLOAD_BYTES, "names and URIs are checked to be short before");
    let (uuid, epoch) = (superblock.uuid, superblock.epoch);
    SealedPage { kind: KIND_SUPERBLOCK, version: FORMAT_VERSION, uuid, epoch, index: 0, sequence, payload }.encode()
}

/// Would this superblock fit into its page?
pub(super) fn fits(superblock: &Superblock) -> bool {
    serde_json::to_vec(superblock).is_ok_and(|json| json.len() <= PAYLOAD_BYTES)
}

impl MetadataFile {
    /// Makes the file for a new cache, durably, or nothing at all.
    pub fn create(path: &Path, superblock: &Superblock) -> Result<(Self, Recovered), MetadataError> {
        let geometry = geometry_of(path, superblock)?;
        let pages = Maps::pages(geometry);
        let io = |action| move |source| MetadataError::Io { path: path.into(), action, source };
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(".new");
        let fresh = PathBuf::from(fresh);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&fresh);
        let file = file.map_err(io("create"))?;
        file.set_len(file_bytes(pages)).map_err(io("set the size"))?;
        // All of it now: a commit must not fail for want of space.
        let reserve = posix_fallocate(&file, 0, file_bytes(pages) as i64);
        reserve.map_err(|e| io("reserve its space")(e.into()))?;
        file.write_all_at(&encode_superblock(superblock, 1), 0).map_err(io("write the superblock"))?;
        file.sync_all().map_err(io("sync"))?;
        fs::rename(&fresh, path).map_err(io("rename into place"))?;
        sync_dir_of(path).map_err(io("sync the directory"))?;
        let recovered = Recovered {
            superblock: superblock.clone(),
            pages: Vec::new(),
            newest: vec![Newest::default(); pages as usize],
            superblock_newest: Newest { copy: 0, sequence: 1 },
            damaged: Vec::new(),
            superblock_damaged: false,
            notes: Vec::new(),
        };
        Ok((Self { file, pages }, recovered))
    }

    /// Reads the superblock only.
    pub fn peek(path: &Path) -> Result<Superblock, MetadataError> {
        let io = |source| MetadataError::Io { path: path.into(), action: "open", source };
        Recovery::new(path, &File::open(path).map_err(io)?).superblock()
    }

    /// Opens and reads the file of an existing cache. Changes nothing.
    pub fn open(path: &Path) -> Result<(Self, Recovered), MetadataError> {
        let mut images = Vec::new();
        let (file, recovered) = Self::open_into(path, &mut |image| images.push(image))?;
        Ok((file, Recovered { pages: images, ..recovered }))
    }

    /// The same, with the map pages given away one by one; see [`Recovery::run_into`].
    pub fn open_into(path: &Path, take: &mut dyn FnMut(PageImage)) -> Result<(Self, Recovered), MetadataError> {
        let io = |source| MetadataError::Io { path: path.into(), action: "open", source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io)?;
        let recovered = Recovery::new(path, &file).run_into(take)?;
        let pages = Maps::pages(geometry_of(path, &recovered.superblock)?);
        Ok((Self { file, pages }, recovered))
    }

    /// Writes a copy of a map page; durable after [`MetadataFile::sync`].
    pub(super) fn write_map(&self, page: u64, copy: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, map_offset(self.pages, page, copy))
    }

    /// Replaces the superblock, durably: over the older copy, so that a cut leaves one of both.
    pub(super) fn write_superblock(&self, superblock: &Superblock, newest: Newest) -> io::Result<Newest> {
        let next = newest.next();
        self.file.write_all_at(&encode_superblock(superblock, next.sequence), next.copy * PAGE_BYTES as u64)?;
        self.sync()?;
        Ok(next)
    }

    /// Makes the copy of the superblock that is not the newest a blank one, durably; see [`Committer::begin`].
    ///
    /// [`Committer::begin`]: super::Committer::begin
    pub(super) fn blank_superblock(&self, newest: Newest) -> io::Result<()> {
        self.file.write_all_at(&[0; PAGE_BYTES], newest.next().copy * PAGE_BYTES as u64)?;
        self.sync()
    }

    /// fdatasync(2).
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Length of the file for so many map pages.
pub fn file_bytes(pages: u64) -> u64 {
    (SUPERBLOCK_COPIES + 2 * pages) * PAGE_BYTES as u64
}

/// Where a copy of a map page lies, in the file for so many of them.
pub fn map_offset(pages: u64, page: u64, copy: u64) -> u64 {
    (SUPERBLOCK_COPIES + copy * pages + page) * PAGE_BYTES as u64
}
