//! What a metadata file says, wherever its bytes are: in a file, or on a test's disk after a power cut.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::holes::next_data;
use super::layout::{KIND_MAP, KIND_SUPERBLOCK, SUPERBLOCK_COPIES, file_bytes, map_offset};
use super::page::{CopyState, PAGE_BYTES, SealedPage};
use super::superblock::{FORMAT_VERSION, Superblock};
use crate::engine::{Geometry, GeometryError, Maps, PAGE_BLOCKS, PAGE_WORDS, PageImage};

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

/// Bytes to recover from.
pub trait ReadAt {
    /// How many they are.
    fn size_bytes(&self) -> io::Result<u64>;
    /// Fills `bytes` with what stands at `offset`.
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
    /// Up to where there are zeros from `offset` on, as far as that is known without reading them.
    fn zeros_until(&self, offset: u64) -> u64 {
        offset
    }
}

impl ReadAt for File {
    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, bytes, offset)
    }

    fn zeros_until(&self, offset: u64) -> u64 {
        next_data(self, offset).map_or(u64::MAX, |data| data.start)
    }
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
    /// The map pages that hold a bit, unless they were given to somebody else.
    pub pages: Vec<PageImage>,
    pub(super) newest: Vec<Newest>,
    pub(super) superblock_newest: Newest,
    /// Copies of map pages that are damaged and were not needed: page and copy.
    pub(super) damaged: Vec<(u64, u64)>,
    /// The copy of the superblock that is not the newest is damaged.
    pub(super) superblock_damaged: bool,
    /// What was odd but harmless, in words for the log.
    pub notes: Vec<String>,
}

/// A superblock as it was found.
struct FoundSuperblock {
    superblock: Superblock,
    newest: Newest,
    damaged: bool,
    notes: Vec<String>,
}

/// Reads a metadata file and judges it.
pub struct Recovery<'a, F> {
    /// For messages.
    path: &'a Path,
    file: &'a F,
    #[cfg(feature = "planted-faults")]
    uses_torn_pages: bool,
}

impl<'a, F: ReadAt> Recovery<'a, F> {
    /// Of these bytes, which errors call `path`.
    pub fn new(path: &'a Path, file: &'a F) -> Self {
        Self {
            path,
            file,
            #[cfg(feature = "planted-faults")]
            uses_torn_pages: false,
        }
    }

    /// Breaks it, for the tests of the tests: a map page that a crash tore is taken for the newest.
    #[cfg(feature = "planted-faults")]
    pub fn use_torn_pages(mut self) -> Self {
        self.uses_torn_pages = true;
        self
    }

    /// The superblock only.
    pub fn superblock(&self) -> Result<Superblock, MetadataError> {
        let superblock = self.find_superblock()?.superblock;
        geometry_of(self.path, &superblock)?;
        Ok(superblock)
    }

    /// Everything.
    pub fn run(&self) -> Result<Recovered, MetadataError> {
        let mut pages = Vec::new();
        let recovered = self.run_into(&mut |page| pages.push(page))?;
        Ok(Recovered { pages, ..recovered })
    }

    /// Everything; each map page that holds a bit goes to `take`, so that they need not all be in memory. After an
    /// error, what it was given before was true all the same.
    pub fn run_into(&self, take: &mut dyn FnMut(PageImage)) -> Result<Recovered, MetadataError> {
        let FoundSuperblock { superblock, newest: superblock_newest, damaged, notes } = self.find_superblock()?;
        let pages = Maps::pages(geometry_of(self.path, &superblock)?);
        let (found, expected) = (self.size_bytes()?, file_bytes(pages));
        if found < expected {
            return Err(MetadataError::Truncated { path: self.path.into(), found, expected });
        }
        let mut recovered = Recovered {
            superblock,
            pages: Vec::new(),
            newest: Vec::new(),
            superblock_newest,
            damaged: Vec::new(),
            superblock_damaged: damaged,
            notes,
        };
        recovered.newest.reserve_exact(pages as usize);
        let mut blank_until = [0; 2];
        for page in 0..pages {
            if let Some(image) = self.recover_page(page, pages, &mut blank_until, &mut recovered)? {
                take(image);
            }
        }
        Ok(recovered)
    }

    fn size_bytes(&self) -> Result<u64, MetadataError> {
        let stat = |source| MetadataError::Io { path: self.path.into(), action: "stat", source };
        self.file.size_bytes().map_err(stat)
    }

    fn read_page(&self, offset: u64, action: &'static str) -> Result<Vec<u8>, MetadataError> {
        let mut bytes = vec![0; PAGE_BYTES];
        let result = self.file.read_exact_at(&mut bytes, offset);
        result.map_err(|source| MetadataError::Io { path: self.path.into(), action, source })?;
        Ok(bytes)
    }

    fn find_superblock(&self) -> Result<FoundSuperblock, MetadataError> {
        let damaged = || MetadataError::Damaged { path: self.path.into(), what: "the superblock".into() };
        let mut states = Vec::new();
        if self.size_bytes()? < SUPERBLOCK_COPIES * PAGE_BYTES as u64 {
            return Err(MetadataError::NotMetadata(self.path.into()));
        }
        for copy in 0..SUPERBLOCK_COPIES {
            let bytes = self.read_page(copy * PAGE_BYTES as u64, "read the superblock")?;
            let magic = bytes.starts_with(b"BLKFERRY");
            states.push((SealedPage::decode(&bytes, KIND_SUPERBLOCK, 0), magic));
        }
        if !states.iter().any(|(_, magic)| *magic) {
            return Err(MetadataError::NotMetadata(self.path.into()));
        }
        let (copy, page) = newest_of(&states[0].0, &states[1].0).ok_or_else(damaged)?;
        if page.version > FORMAT_VERSION {
            return Err(MetadataError::Newer { path: self.path.into(), found: page.version });
        }
        let json_end = page.payload.iter().position(|&b| b == 0).unwrap_or(page.payload.len());
        let superblock = serde_json::from_slice(&page.payload[..json_end]).map_err(|_| damaged())?;
        let mut notes = Vec::new();
        for (copy, (state, _)) in states.iter().enumerate() {
            push_note(&mut notes, || format!("superblock, copy {copy}"), state);
        }
        Ok(FoundSuperblock {
            superblock,
            newest: Newest { copy, sequence: after_torn(page.sequence, [&states[0].0, &states[1].0]) },
            damaged: states.iter().any(|(state, _)| matches!(state, CopyState::Damaged(_))),
            notes,
        })
    }

    fn recover_page(
        &self,
        page: u64,
        pages: u64,
        blank_until: &mut [u64; 2],
        recovered: &mut Recovered,
    ) -> Result<Option<PageImage>, MetadataError> {
        let [first, second] = [
            self.read_copy(map_offset(pages, page, 0), page, &mut blank_until[0], recovered)?,
            self.read_copy(map_offset(pages, page, 1), page, &mut blank_until[1], recovered)?,
        ];
        if (&first, &second) == (&CopyState::Blank, &CopyState::Blank) {
            recovered.newest.push(Newest::default());
            return Ok(None);
        }
        let (image, newest) = join(page, &first, &second).ok_or_else(|| {
            let (start, end) = (page * PAGE_BLOCKS, (page + 1) * PAGE_BLOCKS);
            let bytes = recovered.superblock.block_bytes;
            let size = recovered.superblock.size_bytes;
            let what = format!("map page {page} (bytes {}..{} of the disk)", start * bytes, (end * bytes).min(size));
            MetadataError::Damaged { path: self.path.into(), what }
        })?;
        #[cfg(feature = "planted-faults")]
        let image = if self.uses_torn_pages { self.torn_instead(image, pages, [&first, &second])? } else { image };
        for (copy, state) in [(0, &first), (1, &second)] {
            push_note(&mut recovered.notes, || format!("map page {page}, copy {copy}"), state);
            if matches!(state, CopyState::Damaged(_)) {
                recovered.damaged.push((page, copy));
            }
        }
        recovered.newest.push(newest);
        let holds_a_bit = image.present.iter().chain(&image.dirty).any(|&word| word != 0);
        Ok(holds_a_bit.then(|| mask_beyond_end(image, &recovered.superblock)))
    }

    /// `blank_until`: up to where the file is known to be zeros from here on. A new cache's file is nothing else, and
    /// that of a large disk takes long to read.
    fn read_copy(
        &self,
        offset: u64,
        page: u64,
        blank_until: &mut u64,
        of: &Recovered,
    ) -> Result<CopyState, MetadataError> {
        let end = offset + PAGE_BYTES as u64;
        if end > *blank_until {
            // Before it is read: what was read counts as data from then on.
            *blank_until = self.file.zeros_until(offset);
        }
        if end <= *blank_until {
            return Ok(CopyState::Blank);
        }
        let bytes = self.read_page(offset, "read a map page")?;
        Ok(match SealedPage::decode(&bytes, KIND_MAP, page) {
            // A page of another cache, copied here.
            CopyState::Valid(found) if found.uuid != of.superblock.uuid => CopyState::Damaged(None),
            other => other,
        })
    }

    /// The planted fault: what stands in the torn copy, if one is torn.
    #[cfg(feature = "planted-faults")]
    fn torn_instead(&self, image: PageImage, pages: u64, copies: [&CopyState; 2]) -> Result<PageImage, MetadataError> {
        let Some(copy) = copies.iter().position(|state| matches!(state, CopyState::Torn(_))) else { return Ok(image) };
        let bytes = self.read_page(map_offset(pages, image.page, copy as u64), "read a map page")?;
        Ok(decode_map(image.page, &super::page::payload(&bytes)))
    }
}

pub(super) fn geometry_of(path: &Path, superblock: &Superblock) -> Result<Geometry, MetadataError> {
    Geometry::new(superblock.size_bytes, superblock.block_bytes)
        .map_err(|source| MetadataError::Geometry { path: path.into(), source })
}

fn decode_map(page: u64, payload: &[u8]) -> PageImage {
    let mut image = PageImage::empty(page);
    let mut words = payload.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")));
    image.present.iter_mut().chain(&mut image.dirty).for_each(|word| *word = words.next().expect("a page is full"));
    image
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
    let mut image = decode_map(page, &newest.payload);
    if let (Valid(a), Valid(b)) = (first, second) {
        let older = decode_map(page, &if copy == 0 { b } else { a }.payload);
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

fn push_note(notes: &mut Vec<String>, what: impl FnOnce() -> String, state: &CopyState) {
    let said = match state {
        CopyState::Torn(_) => "torn by a crash in the middle of a write; the other copy holds all that was promised",
        CopyState::Damaged(_) => "damaged; the other copy is newer and whole",
        CopyState::Blank | CopyState::Valid(_) => return,
    };
    notes.push(format!("{}: {said}", what()));
}
