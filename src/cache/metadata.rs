//! The metadata file: superblock and map pages, two copies each.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::posix_fallocate;

use super::layout::{encode_superblock, file_bytes, map_offset};
use super::page::PAGE_BYTES;
use super::recover::{MetadataError, Newest, Recovered, Recovery, geometry_of};
use super::superblock::Superblock;
use crate::beside::sync_dir_of;
use crate::engine::{Maps, PageImage};

/// An open metadata file.
#[derive(Debug)]
pub struct MetadataFile {
    file: File,
    pages: u64,
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
