//! A file mapped as atomic words: memory that survives the process.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A shared mapping of a whole file, seen as 64-bit words.
#[derive(Debug)]
pub struct SharedWords {
    start: NonNull<AtomicU64>,
    len_words: usize,
}

// SAFETY: the mapping is plain memory that is only reached through atomics; it belongs to this value alone.
unsafe impl Send for SharedWords {}
// SAFETY: as above: shared access is through `&[AtomicU64]` only.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the first `len_words` words of `file`, which must be at least that long
    /// (a shorter file would fault on access).
    pub fn map(file: &File, len_words: usize) -> io::Result<Self> {
        let len_bytes = len_words.checked_mul(8).and_then(NonZeroUsize::new);
        let len_bytes = len_bytes.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        if file.metadata()?.len() < len_bytes.get() as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; the length was checked against
        // the file, and our own lock on the disk keeps others from truncating it.
        let start = unsafe { mmap(None, len_bytes, protection, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { start: start.cast(), len_words })
    }

    /// All words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: start and length are those of the live mapping; pages are aligned for u64, and any
        // bit pattern is a valid word.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len_words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `map` mapped; no borrow of `words` outlives self.
        let _ = unsafe { munmap(self.start.cast(), self.len_words * 8) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_one_mapping_writes_the_next_one_reads() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * 1000).unwrap();
        SharedWords::map(&file, 1000).unwrap().words()[999].fetch_or(5, Ordering::SeqCst);
        assert_eq!(SharedWords::map(&file, 1000).unwrap().words()[999].load(Ordering::SeqCst), 5);
        assert!(SharedWords::map(&file, 1001).is_err());
    }
}
