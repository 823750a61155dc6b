//! I/O that is done on the spot: a copy from or to the page cache costs less than the way through a ring.
//!
//! io_uring tries a buffered read on the spot by itself where the file system can say "not now", and hands
//! everything else to worker threads: all I/O on tmpfs, all buffered writes on ext4. There a request costs two
//! thread switches for a copy of a page. So the copy is made here, by the thread that has the bytes, and only
//! what would wait goes through the ring.
//!
//! - **Reads** wait for nothing with RWF_NOWAIT: what is not in the page cache is left to the ring.
//! - **Writes** have RWF_NOWAIT on some file systems (xfs, btrfs). On the others nobody can say before whether one
//!   waits, for a journal or because there is too much dirty memory. A write that took long is taken as a sign
//!   that more will: for some time all go through the ring, and for longer each time that this comes true again.

use std::fmt::Debug;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::statfs::{FsType, TMPFS_MAGIC, fstatfs};

/// Longest copy on the spot that the ring would leave to another thread: a longer one is worth the way there.
/// Writes of this length went 1.2 times as fast so (ext4; tmpfs 1.7), for three quarters of the processor time.
const MAX_COPY_BYTES: usize = 128 << 10;
/// A write of up to 32 KiB that took longer has waited; longer ones may take so much for each 32 KiB.
const WAITED: Duration = Duration::from_micros(500);
const WAITED_FOR_BYTES: usize = 32 << 10;
/// How long no write is tried on the spot after one that waited.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The same at most, when each try waits.
const MAX_PAUSE: Duration = Duration::from_secs(3);
/// linux/magic.h. Neither this nor tmpfs has a disk to wait for.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// What is known about waiting for one file.
#[derive(Debug)]
pub(super) struct NowIo {
    /// The file is memory: it need not be asked not to wait.
    in_memory: bool,
    no_nowait_reads: AtomicBool,
    no_nowait_writes: AtomicBool,
    patience: Patience,
}

impl NowIo {
    pub(super) fn of(file: &impl AsFd) -> Self {
        let kind = fstatfs(file).map(|stat| stat.filesystem_type());
        Self {
            in_memory: kind.is_ok_and(|kind| kind == TMPFS_MAGIC || kind == RAMFS_MAGIC),
            no_nowait_reads: AtomicBool::new(false),
            no_nowait_writes: AtomicBool::new(false),
            patience: Patience::default(),
        }
    }

    /// How many bytes of `target` could be read without waiting.
    pub(super) fn read(&self, fd: &OwnedFd, target: &mut [u8], offset_bytes: u64) -> usize {
        let pointless = match self.in_memory {
            true => target.len() > MAX_COPY_BYTES,
            false => self.no_nowait_reads.load(Ordering::Relaxed),
        };
        if pointless {
            return 0;
        }
        let flags = if self.in_memory { 0 } else { libc::RWF_NOWAIT };
        let vector = libc::iovec { iov_base: target.as_mut_ptr().cast(), iov_len: target.len() };
        // SAFETY: one vector, which is exactly `target`, borrowed for the call.
        let done = unsafe { libc::preadv2(fd.as_raw_fd(), &raw const vector, 1, offset_bytes as i64, flags) };
        count(done, &self.no_nowait_reads)
    }

    /// How many bytes of `source` could be written, as far as one can tell without waiting.
    pub(super) fn write(&self, fd: &OwnedFd, source: &[u8], offset_bytes: u64) -> usize {
        if source.len() > MAX_COPY_BYTES {
            return 0;
        }
        let vector = libc::iovec { iov_base: source.as_ptr().cast_mut().cast(), iov_len: source.len() };
        let write = |flags| {
            // SAFETY: one vector, which is exactly `source`, borrowed for the call; it is only read.
            unsafe { libc::pwritev2(fd.as_raw_fd(), &raw const vector, 1, offset_bytes as i64, flags) }
        };
        if self.in_memory {
            return usize::try_from(write(0)).unwrap_or(0);
        }
        if !self.no_nowait_writes.load(Ordering::Relaxed) {
            let done = count(write(libc::RWF_NOWAIT), &self.no_nowait_writes);
            if !self.no_nowait_writes.load(Ordering::Relaxed) {
                return done;
            }
        }
        // Half a page that is not in the cache has to be read first.
        let is_whole = |bytes: u64| bytes.is_multiple_of(super::PAGE_BYTES as u64);
        if !is_whole(offset_bytes) || !is_whole(source.len() as u64) {
            return 0;
        }
        self.patience.attempt(source.len(), || usize::try_from(write(0)).unwrap_or(0))
    }
}

/// Bytes done; that the file system cannot do it at all is remembered. Other errors are for the ring to meet again.
fn count(done: isize, unsupported: &AtomicBool) -> usize {
    if done < 0 && nix::errno::Errno::last() == nix::errno::Errno::EOPNOTSUPP {
        unsupported.store(true, Ordering::Relaxed);
    }
    usize::try_from(done).unwrap_or(0)
}

/// Whether to try again what may wait.
#[derive(Debug, Default)]
struct Patience {
    /// Nanoseconds of [`clock`] until which nothing is tried.
    paused_until: AtomicU64,
    /// The last pause in nanoseconds; 0 if the last attempt did not wait.
    pause: AtomicU64,
}

impl Patience {
    fn attempt(&self, len_bytes: usize, work: impl FnOnce() -> usize) -> usize {
        let before = clock();
        if before < self.paused_until.load(Ordering::Relaxed) {
            return 0;
        }
        let done = work();
        self.judge(len_bytes, before, clock());
        done
    }

    fn judge(&self, len_bytes: usize, before: u64, after: u64) {
        let pieces = len_bytes.div_ceil(WAITED_FOR_BYTES).max(1) as u64;
        if after - before <= pieces * WAITED.as_nanos() as u64 {
            self.pause.store(0, Ordering::Relaxed);
            return;
        }
        let doubled = self.pause.load(Ordering::Relaxed) * 2;
        let pause = doubled.clamp(FIRST_PAUSE.as_nanos() as u64, MAX_PAUSE.as_nanos() as u64);
        self.pause.store(pause, Ordering::Relaxed);
        self.paused_until.store(after + pause, Ordering::Relaxed);
    }
}

/// Nanoseconds since this was first asked.
fn clock() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_is_done_at_once_is_what_was_asked_for() {
        for directory in [std::path::Path::new("/dev/shm"), &std::env::temp_dir()] {
            let file = tempfile::tempfile_in(directory).unwrap();
            let now = NowIo::of(&file);
            let fd = OwnedFd::from(file.try_clone().unwrap());
            let bytes: Vec<u8> = (0..20_000u32).map(|n| n as u8 | 1).collect();
            for (at, len) in [(0, 4096), (8192, 16_384), (70_000, 333)] {
                let done = now.write(&fd, &bytes[..len], at);
                file.write_all_at(&bytes[done..len], at + done as u64).unwrap();
                let mut back = vec![0; len];
                let done = now.read(&fd, &mut back, at);
                assert_eq!(back[..done], bytes[..done]);
                assert_eq!(done, len, "it was written just now: {}", directory.display());
            }
            let mut back = [9; 8];
            assert_eq!(now.read(&fd, &mut back, 70_330), 3, "the end of the file");
        }
    }

    #[test]
    fn errors_are_for_the_ring() {
        let file = File::open("/dev/null").unwrap();
        let now = NowIo::of(&file);
        assert_eq!(now.write(&file.into(), &[0; 4096], 0), 0, "it is not open for writing");
    }

    #[test]
    fn the_pause_grows_while_attempts_wait_and_ends_with_one_that_does_not() {
        let patience = Patience::default();
        let (ms, slow) = (1_000_000, 2_000_000);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            patience.judge(4096, 0, slow);
            pauses.push((patience.paused_until.load(Ordering::Relaxed) - slow) / ms);
        }
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 3000, 3000]);
        patience.judge(4096, 0, 1000);
        patience.judge(128 << 10, 0, slow);
        assert_eq!(patience.pause.load(Ordering::Relaxed), 0, "it was long");
        patience.judge(4096, 0, slow);
        assert_eq!(patience.paused_until.load(Ordering::Relaxed) - slow, 50 * ms);
        // While it pauses, nothing is tried.
        patience.paused_until.store(u64::MAX, Ordering::Relaxed);
        assert_eq!(patience.attempt(1, || unreachable!("paused")), 0);
    }
}
