//! The metadata file: superblock and map pages, two copies each.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::posix_fallocate;
use uuid::Uuid;

use super::page::{CopyState, PAGE_BYTES, PAYLOAD_BYTES, SealedPage};
use super::superblock::{FORMAT_VERSION, Superblock};
use crate::engine::{Geometry, GeometryError, Maps, PAGE_BLOCKS, PAGE_WORDS, PageImage};

const KIND_SUPERBLOCK: u32 = 1;
const KIND_MAP: u32 = 2;
/// Copies of the superblock come first, then all first copies of the map pages, then all second ones.
const SUPERBLOCK_COPIES: u64 = 2;

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

/// Which copy of a page is the newest, and its sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Newest {
    pub(super) copy: u64,
    pub(super) sequence: u64,
}

impl Newest {
    /// Where the next write goes, so that the newest copy stays as it is.
    pub(super) fn next(self) -> Self {
        Self { copy: if self.sequence == 0 { 0 } else { 1 - self.copy }, sequence: self.sequence + 1 }
    }
}

/// What a metadata file said.
#[derive(Debug)]
pub struct Recovered {
    /// Its superblock.
    pub superblock: Superblock,
    /// The map pages that hold a bit.
    pub pages: Vec<PageImage>,
    pub(super) newest: Vec<Newest>,
    pub(super) superblock_newest: Newest,
    /// What was odd but harmless, in words for the log.
    pub notes: Vec<String>,
}

/// An open metadata file.
#[derive(Debug)]
pub struct MetadataFile {
    file: File,
    path: PathBuf,
    pages: u64,
}

/// The page as it goes to disk: present words, then dirty words, little-endian.
pub(super) fn encode_map(uuid: Uuid, epoch: u64, sequence: u64, image: &PageImage) -> Vec<u8> {
    let words = image.present.iter().chain(&image.dirty);
    let payload = words.flat_map(|word| word.to_le_bytes()).collect();
    SealedPage { kind: KIND_MAP, version: FORMAT_VERSION, uuid, epoch, index: image.page, sequence, payload }.encode()
}

fn decode_map(page: &SealedPage) -> PageImage {
    let mut image = PageImage::empty(page.index);
    let mut words = page.payload.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")));
    image.present.iter_mut().chain(&mut image.dirty).for_each(|word| *word = words.next().expect("a page is full"));
    image
}

fn encode_superblock(superblock: &Superblock, sequence: u64) -> Vec<u8> {
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
        sync_directory(path).map_err(io("sync the directory"))?;
        let recovered = Recovered {
            superblock: superblock.clone(),
            pages: Vec::new(),
            newest: vec![Newest::default(); pages as usize],
            superblock_newest: Newest { copy: 0, sequence: 1 },
            notes: Vec::new(),
        };
        Ok((Self { file, path: path.into(), pages }, recovered))
    }

    /// Reads the superblock only.
    pub fn peek(path: &Path) -> Result<Superblock, MetadataError> {
        let io = |source| MetadataError::Io { path: path.into(), action: "open", source };
        let superblock = read_superblock(path, &File::open(path).map_err(io)?)?.superblock;
        geometry_of(path, &superblock)?;
        Ok(superblock)
    }

    /// Opens and reads the file of an existing cache. Changes nothing.
    pub fn open(path: &Path) -> Result<(Self, Recovered), MetadataError> {
        let io = |action| move |source| MetadataError::Io { path: path.into(), action, source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io("open"))?;
        let FoundSuperblock { superblock, newest: superblock_newest, notes } = read_superblock(path, &file)?;
        let geometry = geometry_of(path, &superblock)?;
        let pages = Maps::pages(geometry);
        let (found, expected) = (file.metadata().map_err(io("stat"))?.len(), file_bytes(pages));
        if found < expected {
            return Err(MetadataError::Truncated { path: path.into(), found, expected });
        }
        let this = Self { file, path: path.into(), pages };
        let uuid = superblock.uuid;
        let mut recovered = Recovered { superblock, pages: Vec::new(), newest: Vec::new(), superblock_newest, notes };
        for page in 0..pages {
            this.recover_page(page, uuid, &mut recovered)?;
        }
        Ok((this, recovered))
    }

    fn recover_page(&self, page: u64, uuid: Uuid, recovered: &mut Recovered) -> Result<(), MetadataError> {
        let mut copies = Vec::with_capacity(2);
        for copy in 0..2 {
            copies.push(self.read_copy(page, copy, uuid)?);
        }
        let second = copies.pop().expect("two were read");
        let first = copies.pop().expect("two were read");
        let (image, newest) = join(page, &first, &second).ok_or_else(|| {
            let (start, end) = (page * PAGE_BLOCKS, (page + 1) * PAGE_BLOCKS);
            let bytes = recovered.superblock.block_bytes;
            let size = recovered.superblock.size_bytes;
            let what = format!("map page {page} (bytes {}..{} of the disk)", start * bytes, (end * bytes).min(size));
            MetadataError::Damaged { path: self.path.clone(), what }
        })?;
        for (copy, state) in [(0, &first), (1, &second)] {
            push_note(&mut recovered.notes, format!("map page {page}, copy {copy}"), state);
        }
        recovered.newest.push(newest);
        if image.present.iter().chain(&image.dirty).any(|&word| word != 0) {
            recovered.pages.push(mask_beyond_end(image, &recovered.superblock));
        }
        Ok(())
    }

    fn read_copy(&self, page: u64, copy: u64, uuid: Uuid) -> Result<CopyState, MetadataError> {
        let mut bytes = vec![0; PAGE_BYTES];
        let action = "read a map page";
        let result = self.file.read_exact_at(&mut bytes, self.map_offset(page, copy));
        result.map_err(|source| MetadataError::Io { path: self.path.clone(), action, source })?;
        Ok(match SealedPage::decode(&bytes, KIND_MAP, page) {
            // A page of another cache, copied here.
            CopyState::Valid(found) if found.uuid != uuid => CopyState::Damaged(None),
            other => other,
        })
    }

    fn map_offset(&self, page: u64, copy: u64) -> u64 {
        (SUPERBLOCK_COPIES + copy * self.pages + page) * PAGE_BYTES as u64
    }

    /// Writes a copy of a map page; durable after [`MetadataFile::sync`].
    pub(super) fn write_map(&self, page: u64, copy: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.map_offset(page, copy))
    }

    /// Replaces the superblock, durably: over the older copy, so that a cut leaves one of both.
    pub(super) fn write_superblock(&self, superblock: &Superblock, newest: Newest) -> io::Result<Newest> {
        let next = newest.next();
        self.file.write_all_at(&encode_superblock(superblock, next.sequence), next.copy * PAGE_BYTES as u64)?;
        self.sync()?;
        Ok(next)
    }

    /// fdatasync(2).
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

fn file_bytes(pages: u64) -> u64 {
    (SUPERBLOCK_COPIES + 2 * pages) * PAGE_BYTES as u64
}

fn geometry_of(path: &Path, superblock: &Superblock) -> Result<Geometry, MetadataError> {
    Geometry::new(superblock.size_bytes, superblock.block_bytes)
        .map_err(|source| MetadataError::Geometry { path: path.into(), source })
}

/// A superblock as it was found.
struct FoundSuperblock {
    superblock: Superblock,
    newest: Newest,
    notes: Vec<String>,
}

fn read_superblock(path: &Path, file: &File) -> Result<FoundSuperblock, MetadataError> {
    let damaged = || MetadataError::Damaged { path: path.into(), what: "the superblock".into() };
    let mut states = Vec::new();
    let stat = |source| MetadataError::Io { path: path.into(), action: "stat", source };
    if file.metadata().map_err(stat)?.len() < SUPERBLOCK_COPIES * PAGE_BYTES as u64 {
        return Err(MetadataError::NotMetadata(path.into()));
    }
    for copy in 0..SUPERBLOCK_COPIES {
        let mut bytes = vec![0; PAGE_BYTES];
        let result = file.read_exact_at(&mut bytes, copy * PAGE_BYTES as u64);
        let action = "read the superblock";
        result.map_err(|source| MetadataError::Io { path: path.into(), action, source })?;
        let magic = bytes.starts_with(b"BLKFERRY");
        states.push((SealedPage::decode(&bytes, KIND_SUPERBLOCK, 0), magic));
    }
    if !states.iter().any(|(_, magic)| *magic) {
        return Err(MetadataError::NotMetadata(path.into()));
    }
    let (copy, page) = newest_of(&states[0].0, &states[1].0).ok_or_else(damaged)?;
    if page.version > FORMAT_VERSION {
        return Err(MetadataError::Newer { path: path.into(), found: page.version });
    }
    let json_end = page.payload.iter().position(|&b| b == 0).unwrap_or(page.payload.len());
    let superblock = serde_json::from_slice(&page.payload[..json_end]).map_err(|_| damaged())?;
    let mut notes = Vec::new();
    for (copy, (state, _)) in states.iter().enumerate() {
        push_note(&mut notes, format!("superblock, copy {copy}"), state);
    }
    Ok(FoundSuperblock {
        superblock,
        newest: Newest { copy, sequence: after_torn(page.sequence, [&states[0].0, &states[1].0]) },
        notes,
    })
}

/// The newest valid copy, unless the other one may have been newer and is damaged.
fn newest_of<'a>(first: &'a CopyState, second: &'a CopyState) -> Option<(u64, &'a SealedPage)> {
    let outranks = |valid: &SealedPage, other: &CopyState| match other {
        CopyState::Valid(other) => valid.sequence >= other.sequence,
        CopyState::Blank | CopyState::Torn(_) => true,
        CopyState::Damaged(sequence) => sequence.is_some_and(|s| s < valid.sequence as u32),
    };
    match (first, second) {
        (CopyState::Valid(page), other) if outranks(page, other) => Some((0, page)),
        (other, CopyState::Valid(page)) if outranks(page, other) => Some((1, page)),
        _ => None,
    }
}

/// The sequence to go on from: past that of a torn write, whose sectors still lie there.
fn after_torn(sequence: u64, states: [&CopyState; 2]) -> u64 {
    let torn = states.into_iter().find_map(|state| if let CopyState::Torn(low) = state { Some(*low) } else { None });
    sequence.max(torn.map_or(0, |low| sequence & !u64::from(u32::MAX) | u64::from(low)))
}

/// What both copies of a map page say together. `None`: a bit that was promised may be missing.
fn join(page: u64, first: &CopyState, second: &CopyState) -> Option<(PageImage, Newest)> {
    use CopyState::{Blank, Torn, Valid};
    match (first, second) {
        (Blank, Blank) => return Some((PageImage::empty(page), Newest::default())),
        // The first write of this page was cut off: the next goes over it, with a later sequence.
        (Torn(low), Blank) => return Some((PageImage::empty(page), Newest { copy: 1, sequence: u64::from(*low) })),
        (Blank, Torn(low)) => return Some((PageImage::empty(page), Newest { copy: 0, sequence: u64::from(*low) })),
        _ => {}
    }
    let (copy, newest) = newest_of(first, second)?;
    let mut image = decode_map(newest);
    if let (Valid(a), Valid(b)) = (first, second) {
        let older = decode_map(if copy == 0 { b } else { a });
        image.present.iter_mut().zip(older.present).for_each(|(word, old)| *word |= old);
        image.dirty.iter_mut().zip(older.dirty).for_each(|(word, old)| *word |= old);
    }
    Some((image, Newest { copy, sequence: after_torn(newest.sequence, [first, second]) }))
}

/// Bits beyond the end of the device mean nothing and must not count.
fn mask_beyond_end(mut image: PageImage, superblock: &Superblock) -> PageImage {
    let blocks = superblock.size_bytes.div_ceil(superblock.block_bytes);
    for offset in 0..PAGE_WORDS {
        let first = image.page * PAGE_BLOCKS + offset as u64 * 64;
        let mask = match blocks.saturating_sub(first) {
            0 => 0,
            n if n >= 64 => u64::MAX,
            n => u64::MAX >> (64 - n),
        };
        image.present[offset] &= mask;
        image.dirty[offset] &= mask;
    }
    image
}

fn push_note(notes: &mut Vec<String>, what: String, state: &CopyState) {
    let said = match state {
        CopyState::Torn(_) => "torn by a crash in the middle of a write; the other copy holds all that was promised",
        CopyState::Damaged(_) => "damaged; the other copy is newer and whole",
        CopyState::Blank | CopyState::Valid(_) => return,
    };
    notes.push(format!("{what}: {said}"));
}

pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}
