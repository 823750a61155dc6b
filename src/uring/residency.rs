//! How much of a file is in the page cache, and what of that was used there.
//!
//! The kernel reads ahead: of what a machine has made it read, half may be pages that nobody ever looked at. Those are told
//! apart by the flags of each page, where the system shows them to us.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Duration;

use super::cached::{FIRST_BYTES, PIECE_BYTES, Stretches};
use super::file::{FileIo, PAGE_BYTES};
use super::page_flags::PageFlags;
use super::sleep;

/// Looked at in one breath, before others have their turn: less than a millisecond.
const LOOK_BYTES: u64 = 1 << 20;
/// Looks that one question takes.
const MOST_LOOKS: usize = 256;

/// How a stretch of a file stands with the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// None of its pages is there.
    Absent,
    /// Some of its pages are there.
    Cached,
    /// Some of its pages are there and were read or written since they came.
    Used,
}

impl FileIo {
    /// Does the system tell? Not before Linux 6.5, nor of another user's file.
    pub fn tells_residency(&self) -> bool {
        self.cached(0..1, 1).is_ok()
    }

    /// Stretches from the start of a range, their lengths in bytes, and how they stand with the page cache, in pieces of
    /// 16 KiB. At least one and at most `max`, perhaps short of the range's end. What was used is told to root alone, and
    /// not of a file that is there as a whole: who read that, a copy or a machine, nobody knows. All else is
    /// [`Residency::Cached`] then. Fails where the system tells nothing.
    pub async fn residency(&self, range: Range<u64>, max: usize) -> io::Result<Vec<(u64, Residency)>> {
        let flags = PageFlags::open().ok();
        let mut stretches = Stretches::new(max);
        let mut looks = MOST_LOOKS;
        let mut at = range.start;
        for (len, is_cached) in self.cached(range, max)? {
            let end = at + len;
            let Some(flags) = flags.as_ref().filter(|_| is_cached) else {
                stretches.push(len, if is_cached { Residency::Cached } else { Residency::Absent });
                at = end;
                continue;
            };
            while at < end && stretches.has_room() {
                let whole = (at / FIRST_BYTES + 1) * FIRST_BYTES;
                if at.is_multiple_of(FIRST_BYTES) && whole <= end {
                    stretches.push(FIRST_BYTES, Residency::Cached);
                    at = whole;
                    continue;
                }
                if looks == 0 {
                    return Ok(stretches.found());
                }
                looks -= 1;
                let until = end.min((at / LOOK_BYTES + 1) * LOOK_BYTES);
                self.look_at_use(flags, at..until, &mut stretches);
                at = until;
                sleep(Duration::ZERO).await;
            }
        }
        Ok(stretches.found())
    }

    fn look_at_use(&self, flags: &PageFlags, range: Range<u64>, stretches: &mut Stretches<Residency>) {
        let page_bytes = PAGE_BYTES as u64;
        let first = range.start / page_bytes;
        let used = flags.used(self.fd.as_fd(), first..range.end.div_ceil(page_bytes)).unwrap_or_else(|e| {
            log::debug!("which pages were used is not told: {e}");
            Vec::new()
        });
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / PIECE_BYTES + 1) * PIECE_BYTES);
            let mut pages = at / page_bytes - first..end.div_ceil(page_bytes) - first;
            let is_used = pages.any(|page| used.get(page as usize).copied().unwrap_or_default());
            stretches.push(end - at, if is_used { Residency::Used } else { Residency::Cached });
            at = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

    use super::*;
    use crate::uring::Reactor;

    const MIB: u64 = 1 << 20;
    const KIB: u64 = 1 << 10;

    fn told(io: &FileIo, range: Range<u64>, max: usize) -> Vec<(u64, Residency)> {
        let io = io.clone();
        Reactor::new().unwrap().block_on(async move { io.residency(range, max).await }).unwrap().unwrap()
    }

    #[test]
    fn what_was_read_ahead_is_there_and_only_what_was_read_was_used() {
        // On a disk: what is in a tmpfs is nowhere but in the page cache.
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all_at(&vec![7; 80 * MIB as usize], 0).unwrap();
        file.sync_all().unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
        file.read_exact_at(&mut [0; 64 << 10], 3 * MIB).unwrap();
        // Into the page cache, and to nobody.
        posix_fadvise(&file, 9 * MIB as i64, MIB as i64, PosixFadviseAdvice::POSIX_FADV_WILLNEED).unwrap();
        let io = FileIo::from(file);
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while io.cached(9 * MIB..10 * MIB, 100).unwrap() != [(MIB, true)] {
            assert!(std::time::Instant::now() < deadline, "it never came: {:?}", io.cached(9 * MIB..10 * MIB, 100));
            std::thread::sleep(Duration::from_millis(1));
        }
        // To root alone.
        let used = if PageFlags::open().is_ok() { Residency::Used } else { Residency::Cached };
        let all = [
            (3 * MIB, Residency::Absent),
            (64 * KIB, used),
            (6 * MIB - 64 * KIB, Residency::Absent),
            (MIB, Residency::Cached),
            (70 * MIB, Residency::Absent),
        ];
        for _ in 0..3 {
            // To look is not to use.
            assert_eq!(told(&io, 0..80 * MIB, 100), all);
        }
        assert_eq!(told(&io, 3 * MIB + 5..3 * MIB + 4099, 100), [(4094, used)]);
        assert_eq!(told(&io, 0..80 * MIB, 2), all[..2], "as many as there is room for");
    }

    #[test]
    fn a_file_that_is_there_as_a_whole_says_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 65 * MIB as usize], 0).unwrap();
        file.set_len(200 * MIB).unwrap();
        let told = told(&FileIo::from(file), 0..200 * MIB, 100);
        assert_eq!(told[0].1, Residency::Cached);
        assert!(told[0].0 >= 64 * MIB, "{told:?}");
    }
}
