//! How much of a file is in the page cache, and what of that was used there.
//!
//! The kernel reads ahead: of what a machine has made it read, half may be pages that nobody ever looked at. Those are told
//! apart by the flags of each page, where the system shows them to us.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Duration;

use async_lock::Mutex;

use super::cached::{FIRST_BYTES, PIECE_BYTES, Stretches};
use super::file::{FileIo, PAGE_BYTES};
use super::page_flags::PageFlags;
use super::sleep;

/// Looked at in one breath, before others have their turn: less than a millisecond.
const LOOK_BYTES: u64 = 1 << 20;
/// Looked through for what is there at all in one breath.
const BREATH_BYTES: u64 = 4 << 20;
/// Looks that one question takes.
const MOST_LOOKS: usize = 256;

/// How a stretch of a file stands with the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// None of its pages is there.
    Absent,
    /// Some of its pages are there.
    Cached,
    /// Some of its pages are there, and were read since they came or are not written back yet.
    Used,
}

impl FileIo {
    /// Does the system tell? Not before Linux 6.5, nor of another user's file.
    pub fn tells_residency(&self) -> bool {
        self.cached(0..1, 1).is_ok()
    }

    /// Stretches from the start of a range, their lengths in bytes, and how they stand with the page cache, in pieces of
    /// 16 KiB. At least one and at most `max`, perhaps short of the range's end. What was used is told to root alone, and
    /// not of 64 MiB that are there as a whole: who read that, a copy or a machine, nobody knows. All else is
    /// [`Residency::Cached`] then. Fails where the system tells nothing.
    pub async fn residency(&self, range: Range<u64>, max: usize) -> io::Result<Vec<(u64, Residency)>> {
        let _turn = TURN.lock().await;
        let mut looks = Looks { flags: PageFlags::open().ok(), last: None, left: MOST_LOOKS };
        let mut stretches = Stretches::new(max);
        let mut at = range.start;
        while at < range.end && stretches.has_room() && looks.left > 0 {
            let until = range.end.min((at / FIRST_BYTES + 1) * FIRST_BYTES);
            match self.cached_pages(&(at..until))? {
                0 => stretches.push(until - at, Residency::Absent),
                pages if pages >= FIRST_BYTES / PAGE_BYTES as u64 => stretches.push(until - at, Residency::Cached),
                _ => {
                    self.look_closely(at..until, &mut looks, &mut stretches).await?;
                    if looks.left == 0 || stretches.is_over() {
                        break;
                    }
                }
            }
            at = until;
            sleep(Duration::ZERO).await;
        }
        Ok(stretches.found())
    }

    /// Of a range that is there in part; ends where no look is left, or no room.
    async fn look_closely(
        &self,
        range: Range<u64>,
        looks: &mut Looks,
        stretches: &mut Stretches<Residency>,
    ) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let until = range.end.min((at / BREATH_BYTES + 1) * BREATH_BYTES);
            for (len, is_cached) in self.cached(at..until, usize::MAX)? {
                let end = at + len;
                if is_cached && looks.flags.is_some() {
                    self.look_at_use(at..end, looks, stretches).await;
                } else {
                    stretches.push(len, if is_cached { Residency::Cached } else { Residency::Absent });
                }
                if looks.left == 0 || stretches.is_over() {
                    return Ok(());
                }
                at = end;
            }
            sleep(Duration::ZERO).await;
        }
        Ok(())
    }

    /// Of a range that is there at least in part; ends where no look is left.
    async fn look_at_use(&self, range: Range<u64>, looks: &mut Looks, stretches: &mut Stretches<Residency>) {
        let page_bytes = PAGE_BYTES as u64;
        let mut at = range.start;
        while at < range.end && !stretches.is_over() {
            let window = at / LOOK_BYTES;
            if looks.last.as_ref().is_none_or(|(last, _)| *last != window) {
                if looks.left == 0 {
                    return;
                }
                looks.left -= 1;
                sleep(Duration::ZERO).await;
                let pages = window * LOOK_BYTES / page_bytes..(window + 1) * LOOK_BYTES / page_bytes;
                let used = looks.flags.as_ref().map(|flags| flags.used(self.fd.as_fd(), pages));
                let used = used.transpose().unwrap_or_else(|e| {
                    log::debug!("which pages were used is not told: {e}");
                    None
                });
                looks.last = Some((window, used.unwrap_or_default()));
            }
            let (_, used) = looks.last.as_ref().expect("it has just been looked at");
            let end = range.end.min((at / PIECE_BYTES + 1) * PIECE_BYTES);
            let first = window * LOOK_BYTES / page_bytes;
            let mut pages = at / page_bytes - first..end.div_ceil(page_bytes) - first;
            let is_used = pages.any(|page| used.get(page as usize).copied().unwrap_or_default());
            stretches.push(end - at, if is_used { Residency::Used } else { Residency::Cached });
            at = end;
        }
    }
}

/// One question at a time, whoever asks: they are hints, and each takes descriptors and time.
static TURN: Mutex<()> = Mutex::new(());

struct Looks {
    flags: Option<PageFlags>,
    /// The last window of [`LOOK_BYTES`], by number, and which of its pages were used.
    last: Option<(u64, Vec<bool>)>,
    left: usize,
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
        for max in 1..5 {
            assert_eq!(told(&io, 0..80 * MIB, max), all[..max], "as many as there is room for");
        }
        for (start, end) in [(3 * MIB - 5, 3 * MIB + 100_000), (3 * MIB - 20_001, 3 * MIB + 1), (1, 80 * MIB - 1)] {
            let found = told(&io, start..end, 100);
            assert_eq!(found.iter().map(|(len, _)| len).sum::<u64>(), end - start, "{found:?}");
            assert_eq!((found[0], found[1].1), ((3 * MIB - start, Residency::Absent), used), "{found:?}");
        }
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
