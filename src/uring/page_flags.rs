//! What the kernel knows of single pages of a file: were they used since they came into the page cache?
//!
//! A page that is read is marked as referenced, and later as active; one that was only read ahead is neither. (One that is
//! written is not, but is dirty for a while.) The marks are in /proc/kpageflags, by page frame; which frame has which page of
//! a file is in /proc/self/pagemap, of pages that are mapped. (The kernel's Documentation/admin-guide/mm/pagemap.rst.) They
//! are those of a folio, of many pages on some file systems; before Linux 6.10 its first page alone shows them.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};

use super::file::PAGE_BYTES;

/// Bytes of an entry of both files: a word in native order.
const ENTRY_BYTES: u64 = 8;
/// In /proc/self/pagemap: the page is in memory.
const PRESENT: u64 = 1 << 63;
/// And where: zero for those who may not know.
const FRAME: u64 = (1 << 55) - 1;
/// KPF_REFERENCED, KPF_DIRTY, KPF_ACTIVE and KPF_WRITEBACK of `<linux/kernel-page-flags.h>`.
const USED: u64 = 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8;
/// Pages that the kernel maps at a time (fault_around_bytes, by default).
const FAULT_AROUND: usize = 16;
/// Most that one call takes (UIO_MAXIOV of `<linux/uio.h>`).
const MOST_IOVECS: usize = 1024;

pub(super) struct PageFlags {
    pagemap: File,
    flags: File,
    /// Where bytes go that nobody wants.
    bin: OwnedFd,
}

impl PageFlags {
    /// Fails for everybody but root, and where pages have another size than ours.
    pub(super) fn open() -> io::Result<Self> {
        if sysconf(SysconfVar::PAGE_SIZE)? != Some(PAGE_BYTES as libc::c_long) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            flags: File::open("/proc/kpageflags")?,
            pagemap: File::open("/proc/self/pagemap")?,
            bin: memfd_create(c"blkferry-pages", MFdFlags::MFD_CLOEXEC)?,
        })
    }

    /// Which of these pages of a file were used. A page that is not in the page cache is not read for it. Those who may not
    /// know the pages' frames are told that none was used.
    pub(super) fn used(&self, file: BorrowedFd<'_>, pages: Range<u64>) -> io::Result<Vec<bool>> {
        let window = Window::map(file, pages)?;
        let mut used = vec![false; window.pages];
        let frames = self.frames(&window)?;
        let frame_of =
            |page: usize| (frames[page] & PRESENT != 0).then_some(frames[page] & FRAME).filter(|&frame| frame != 0);
        let mut page = 0;
        while page < frames.len() {
            let Some(first) = frame_of(page) else {
                page += 1;
                continue;
            };
            // Pages that came together often lie together.
            let len =
                (page..frames.len()).zip(first..).take_while(|&(page, frame)| frame_of(page) == Some(frame)).count();
            for (used, flags) in used[page..].iter_mut().zip(words(&self.flags, first, len)?) {
                *used = flags & USED != 0;
            }
            page += len;
        }
        Ok(used)
    }

    /// Entries of /proc/self/pagemap; those pages are mapped that are in the page cache.
    fn frames(&self, window: &Window) -> io::Result<Vec<u64>> {
        let resident = window.resident()?;
        let mut frames = vec![0; window.pages];
        // The kernel maps more around each page than that one, if it can.
        for step in [FAULT_AROUND, 1] {
            let lacks = |&page: &usize| resident[page] && frames[page] & PRESENT == 0;
            window.fault_in((0..window.pages).step_by(step).filter(lacks), &self.bin)?;
            frames = words(&self.pagemap, window.first_entry(), window.pages)?;
        }
        Ok(frames)
    }
}

fn words(file: &File, first: u64, len: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; len * ENTRY_BYTES as usize];
    file.read_exact_at(&mut bytes, first * ENTRY_BYTES)?;
    let (words, _) = bytes.as_chunks();
    Ok(words.iter().map(|word| u64::from_ne_bytes(*word)).collect())
}

/// Pages of a file, mapped and never touched by ourselves: a file that is made shorter meanwhile would raise SIGBUS.
struct Window {
    start: NonNull<libc::c_void>,
    pages: usize,
}

impl Window {
    fn map(file: BorrowedFd<'_>, pages: Range<u64>) -> io::Result<Self> {
        let len = usize::try_from(pages.end - pages.start).ok().and_then(|pages| pages.checked_mul(PAGE_BYTES));
        let len = len.and_then(NonZeroUsize::new).ok_or(io::ErrorKind::InvalidInput)?;
        let at = i64::try_from(pages.start * PAGE_BYTES as u64).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice, which nobody reads from or writes to.
        let start = unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, at) }?;
        let window = Self { start, pages: len.get() / PAGE_BYTES };
        // So that neither looking reads ahead, nor having looked counts as use.
        // SAFETY: of our own mapping; it changes what the kernel expects of us, and no memory.
        unsafe { madvise(start, len.get(), MmapAdvise::MADV_RANDOM) }?;
        Ok(window)
    }

    /// Where /proc/self/pagemap tells of the first one, in entries.
    fn first_entry(&self) -> u64 {
        self.start.addr().get() as u64 / PAGE_BYTES as u64
    }

    /// Has pages mapped: by the kernel, which fetches a byte of each, so that one behind the file's new end is an error.
    /// (MADV_POPULATE_READ would map them, too, and would mark them as referenced.)
    fn fault_in(&self, pages: impl Iterator<Item = usize>, bin: &OwnedFd) -> io::Result<()> {
        let bytes_of =
            |page| libc::iovec { iov_base: self.start.as_ptr().wrapping_byte_add(page * PAGE_BYTES), iov_len: 1 };
        let bytes: Vec<_> = pages.map(bytes_of).collect();
        for bytes in bytes.chunks(MOST_IOVECS) {
            // SAFETY: each byte lies in our own mapping, and the kernel only reads them; it answers EFAULT if it cannot.
            let written = unsafe { libc::pwritev(bin.as_raw_fd(), bytes.as_ptr(), bytes.len() as libc::c_int, 0) };
            // A file that was made shorter: what is behind its new end is not mapped, and so was not used.
            if let Err(e) = Errno::result(written)
                && e != Errno::EFAULT
            {
                return Err(e.into());
            }
        }
        Ok(())
    }

    fn resident(&self) -> io::Result<Vec<bool>> {
        let mut told = vec![0_u8; self.pages];
        // SAFETY: our own mapping, and a byte for each of its pages, which is all that the kernel writes to.
        let result = unsafe { libc::mincore(self.start.as_ptr(), self.pages * PAGE_BYTES, told.as_mut_ptr()) };
        Errno::result(result)?;
        Ok(told.into_iter().map(|page| page & 1 != 0).collect())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `map` mapped; nothing refers to it.
        let _ = unsafe { munmap(self.start, self.pages * PAGE_BYTES) };
    }
}
