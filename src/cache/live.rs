//! The live map: both maps as the running daemon has them, in a file on tmpfs.
//!
//! A killed daemon is not a power cut. The guest goes on, and an acknowledged write that nobody flushed
//! stands in the page cache; its bit must survive the process too, or the block would be fetched over it.
//! So the daemon's maps *are* this mapping. It counts only within the boot that wrote it: after a power
//! cut the page cache is gone, and only what was committed is true.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::holes::next_data;
use crate::engine::{Geometry, Maps, Words};
use crate::uring::SharedWords;

/// Words of the header: one page, so that the maps start on a page of their own.
const HEADER_WORDS: usize = 512;
const MAGIC: u64 = u64::from_le_bytes(*b"BFLIVE01");
/// Positions in the header.
const AT_MAGIC: usize = 0;
const AT_BOOT: usize = 1;
const AT_UUID: usize = 3;
const AT_SIZE: usize = 5;
const AT_BLOCK: usize = 6;

/// A killed daemon lets go of its live map when the kernel has finished with it.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Why there is no live map.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// The system refused.
    #[error("live map {path}: {source}; it must lie on a writable tmpfs (/run or /dev/shm) with room for it")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Two caches of one name.
    #[error("live map {0} is in use by another process: is a copy of this cache attached? Detach it first")]
    InUse(PathBuf),
}

/// The mapping of a device's maps.
pub struct LiveMap {
    words: SharedWords,
    path: PathBuf,
    inherited: bool,
    /// Holds the lock.
    file: File,
}

/// This boot's name, as the kernel gives it.
pub(super) fn boot_id() -> io::Result<Uuid> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Uuid::parse_str(text.trim()).map_err(io::Error::other)
}

impl LiveMap {
    /// Opens the live map that a killed daemon left in `dir`, if it is of this boot and this cache and there
    /// is reason to `trust` it (the cache was not left in order); otherwise makes an empty one.
    pub fn open(dir: &Path, uuid: Uuid, geometry: Geometry, trust: bool) -> Result<Self, LiveError> {
        let path = dir.join(format!("{uuid}.live"));
        match Self::open_at(&path, uuid, geometry, trust) {
            Ok(Some(map)) => Ok(map),
            Ok(None) => Err(LiveError::InUse(path)),
            Err(source) => Err(LiveError::Io { path, source }),
        }
    }

    fn open_at(path: &Path, uuid: Uuid, geometry: Geometry, trust: bool) -> io::Result<Option<Self>> {
        let len_words = HEADER_WORDS + Maps::words_needed(geometry);
        let header = header(boot_id()?, uuid, geometry);
        if let Ok(file) = OpenOptions::new().read(true).write(true).open(path) {
            if !lock(&file)? {
                return Ok(None);
            }
            if trust && file.metadata()?.len() == len_words as u64 * 8 {
                let words = SharedWords::map(&file, len_words)?;
                if header.iter().enumerate().all(|(at, value)| words.words()[at].load(Ordering::SeqCst) == *value) {
                    return Ok(Some(Self { words, path: path.into(), inherited: true, file }));
                }
            }
        }
        let file = create(path, len_words)?;
        if !lock(&file)? {
            return Ok(None);
        }
        let words = SharedWords::map(&file, len_words)?;
        for (at, value) in header.iter().enumerate().filter(|(at, _)| *at != AT_MAGIC) {
            words.words()[at].store(*value, Ordering::SeqCst);
        }
        Ok(Some(Self { words, path: path.into(), inherited: false, file }))
    }

    /// It holds all that is known from now on. A file without the magic is nobody's: who is killed before this has left
    /// nothing behind.
    pub fn seal(&self) {
        self.words.words()[AT_MAGIC].store(MAGIC, Ordering::SeqCst);
    }

    /// Did a daemon of this boot leave bits here?
    pub fn is_inherited(&self) -> bool {
        self.inherited
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file: everything is committed, or nothing in it can be trusted any more.
    pub fn discard(path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

impl Words for LiveMap {
    fn words(&self) -> &[AtomicU64] {
        &self.words.words()[HEADER_WORDS..]
    }

    fn filled(&self) -> Vec<Range<usize>> {
        let len_words = Words::words(self).len();
        let mut at_bytes = HEADER_WORDS as u64 * 8;
        let mut filled = Vec::new();
        while let Some(data) = next_data(&self.file, at_bytes) {
            let word_of = |bytes: u64| ((bytes / 8) as usize).saturating_sub(HEADER_WORDS).min(len_words);
            filled.push(word_of(data.start)..word_of(data.end));
            at_bytes = data.end;
            if filled.last().is_some_and(|range| range.end == len_words) {
                break;
            }
        }
        filled
    }
}

/// False: somebody else has it, and keeps it.
fn lock(file: &File) -> io::Result<bool> {
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) if started.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Error(e)) => return Err(e),
        }
    }
}

fn create(path: &Path, len_words: usize) -> io::Result<File> {
    LiveMap::discard(path)?;
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    // All of it now: a mapping that runs out of space later would end the daemon.
    if let Err(e) = nix::fcntl::posix_fallocate(&file, 0, len_words as i64 * 8) {
        LiveMap::discard(path)?;
        return Err(e.into());
    }
    Ok(file)
}

fn header(boot: Uuid, uuid: Uuid, geometry: Geometry) -> [u64; 7] {
    let mut header = [0; 7];
    header[AT_MAGIC] = MAGIC;
    (header[AT_BOOT], header[AT_BOOT + 1]) = boot.as_u64_pair();
    (header[AT_UUID], header[AT_UUID + 1]) = uuid.as_u64_pair();
    header[AT_SIZE] = geometry.size_bytes();
    header[AT_BLOCK] = geometry.block_bytes();
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_outlive_the_mapping_but_not_the_boot_the_disk_or_a_discard() {
        let dir = tempfile::tempdir().unwrap();
        let geometry = Geometry::new(1 << 30, 4096).unwrap();
        let unsealed = |uuid: u128, geometry| LiveMap::open(dir.path(), Uuid::from_u128(uuid), geometry, true).unwrap();
        let open = |uuid: u128, geometry| {
            let map = unsealed(uuid, geometry);
            map.seal();
            map
        };
        Words::words(&unsealed(1, geometry))[7].store(41, Ordering::SeqCst);
        let first = open(1, geometry);
        assert!(!first.is_inherited(), "it was not sealed");
        Words::words(&first)[7].store(42, Ordering::SeqCst);
        let path = first.path().to_owned();
        drop(first);
        let second = open(1, geometry);
        assert!(second.is_inherited());
        assert_eq!(Words::words(&second)[7].load(Ordering::SeqCst), 42);
        assert!(Words::filled(&second).iter().any(|range| range.contains(&7)));
        assert!(Words::filled(&second).iter().all(|range| range.end <= Words::words(&second).len()));
        // Another boot wrote it: worth nothing.
        second.words.words()[AT_BOOT].fetch_xor(1, Ordering::SeqCst);
        drop(second);
        let third = open(1, geometry);
        assert!(!third.is_inherited());
        assert_eq!(Words::words(&third)[7].load(Ordering::SeqCst), 0);
        drop(third);
        assert!(!open(2, geometry).is_inherited());
        assert!(!open(1, Geometry::new(1 << 30, 8192).unwrap()).is_inherited());
        LiveMap::discard(&path).unwrap();
        assert!(!open(1, geometry).is_inherited());
        // Nor where the cache says that all of it was committed.
        assert!(!LiveMap::open(dir.path(), Uuid::from_u128(1), geometry, false).unwrap().is_inherited());
    }
}
