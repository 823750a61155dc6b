//! Which parts of a file are in the page cache (`cachestat(2)`, Linux 6.5).

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use nix::libc;

use super::file::{FileIo, PAGE_BYTES};

/// The system call's number, the same wherever Linux has the generic table.
const SYS_CACHESTAT: libc::c_long = 451;
/// Piece that is told to be in the cache or not: in it is what has any of its pages there. Small, since what a machine
/// uses lies scattered in single pages, too, a file system's metadata above all.
pub(super) const PIECE_BYTES: u64 = 16 << 10;
/// Piece that is looked at first; where nothing is, or all, nothing smaller is.
pub(super) const FIRST_BYTES: u64 = 64 << 20;

/// `struct cachestat_range` of `<linux/mman.h>`.
#[repr(C)]
struct CachestatRange {
    offset: u64,
    len: u64,
}

/// `struct cachestat` of `<linux/mman.h>`, in pages.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

impl FileIo {
    /// Stretches from the start of a range that are or are not in the page cache: their lengths in bytes, and which it is.
    /// At least one and at most `max`, perhaps short of the range's end. Fails where the system does not tell: before
    /// Linux 6.5, or if the file is another user's.
    pub(super) fn cached(&self, range: Range<u64>, max: usize) -> io::Result<Vec<(u64, bool)>> {
        let mut stretches = Stretches::new(max);
        let mut at = range.start;
        while at < range.end && stretches.has_room() {
            let end = range.end.min((at / FIRST_BYTES + 1) * FIRST_BYTES);
            self.look(at..end, &mut stretches)?;
            at = end;
        }
        Ok(stretches.found())
    }

    /// Adds what there is in a range.
    fn look(&self, range: Range<u64>, stretches: &mut Stretches<bool>) -> io::Result<()> {
        if !stretches.has_room() {
            return Ok(());
        }
        let len = range.end - range.start;
        let pages = self.cached_pages(&range)?;
        let all = len.div_ceil(PAGE_BYTES as u64);
        if pages == 0 || pages >= all || len <= PIECE_BYTES {
            stretches.push(len, pages > 0);
            return Ok(());
        }
        // Within the range, since that is longer than a piece.
        let whole = |at: u64| at / PIECE_BYTES * PIECE_BYTES;
        let half = whole(range.start + len / 2).max(whole(range.start) + PIECE_BYTES);
        self.look(range.start..half, stretches)?;
        self.look(half..range.end, stretches)
    }

    /// How many pages of a range are in the page cache.
    pub(super) fn cached_pages(&self, range: &Range<u64>) -> io::Result<u64> {
        let asked = CachestatRange { offset: range.start, len: range.end - range.start };
        let mut told = Cachestat::default();
        // SAFETY: both structures are those of the kernel's interface and live until the call returns; it writes
        // nothing but the second one.
        let result = unsafe { libc::syscall(SYS_CACHESTAT, self.fd.as_raw_fd(), &raw const asked, &raw mut told, 0) };
        if result == 0 { Ok(told.cache) } else { Err(io::Error::last_os_error()) }
    }
}

/// Neighbours that are alike are one.
pub(super) struct Stretches<T> {
    found: Vec<(u64, T)>,
    max: usize,
}

impl<T: PartialEq> Stretches<T> {
    pub(super) fn new(max: usize) -> Self {
        Self { found: Vec::new(), max }
    }

    pub(super) fn has_room(&self) -> bool {
        self.found.len() < self.max
    }

    /// Is there one that there was no room for? Until then the last one may still grow.
    pub(super) fn is_over(&self) -> bool {
        self.found.len() > self.max
    }

    pub(super) fn push(&mut self, len: u64, state: T) {
        match self.found.last_mut() {
            Some((before, was)) if *was == state => *before += len,
            _ => self.found.push((len, state)),
        }
    }

    /// As many as there was room for.
    pub(super) fn found(mut self) -> Vec<(u64, T)> {
        self.found.truncate(self.max);
        self.found
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_was_read_is_there_and_what_was_dropped_is_not() {
        // On a disk: what is in a tmpfs is nowhere but in the page cache.
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all_at(&vec![7; 8 * MIB as usize], 0).unwrap();
        file.set_len(100 * MIB).unwrap();
        file.sync_all().unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
        file.read_exact_at(&mut vec![0; 256 << 10], 3 * MIB).unwrap();
        let io = FileIo::from(file);
        let told = io.cached(0..100 * MIB, 100).unwrap();
        assert_eq!(told, [(3 * MIB, false), (256 << 10, true), (97 * MIB - (256 << 10), false)]);
        assert_eq!(io.cached(3 * MIB..3 * MIB + 4096, 100).unwrap(), [(4096, true)]);
        // The middle lies in the last piece, and that is not there.
        let odd = 3 * MIB + (244 << 10)..3 * MIB + (272 << 10);
        assert_eq!(io.cached(odd, 100).unwrap(), [(12 << 10, true), (16 << 10, false)]);
        // Ranges that begin and end anywhere, and are there in part.
        for start in (3 * MIB - 40_000..3 * MIB - 17_000).step_by(1111) {
            for end in (3 * MIB + 1..3 * MIB + 300_000).step_by(7777) {
                let told = io.cached(start..end, 100).unwrap();
                assert_eq!(told.iter().map(|(len, _)| len).sum::<u64>(), end - start, "{start}..{end}: {told:?}");
                let first = 3 * MIB - start;
                let there = (end - 3 * MIB).next_multiple_of(PIECE_BYTES).min(256 << 10).min(end - 3 * MIB);
                assert_eq!(told[..2], [(first, false), (there, true)], "{start}..{end}");
            }
        }
        let few = io.cached(0..100 * MIB, 2).unwrap();
        assert_eq!(few, told[..2], "as many as there is room for");
        assert!(FileIo::from(std::fs::File::open("/dev/null").unwrap()).cached(0..4096, 1).is_ok_and(|s| !s[0].1));
    }
}
