//! Positioned I/O on files and block devices.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{opcode, types};
use nix::errno::Errno;
use nix::libc;
use nix::unistd::{Whence, lseek};

use super::net::Part;
use super::now::NowIo;
use super::reactor::submit;

/// Bytes of a page: the unit of direct I/O and of the page cache.
pub const PAGE_BYTES: usize = 4096;
/// Largest piece handed to the kernel at once; longer requests are done piece by piece.
const MAX_PIECE_BYTES: usize = 16 << 20;
/// Piece in which zeros are written where the file system cannot punch.
const ZERO_PIECE_BYTES: u64 = 1 << 20;

/// How a range becomes zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Give the space back (TRIM, WRITE_ZEROES without NO_HOLE).
    Punch,
    /// Keep the space allocated (WRITE_ZEROES with NO_HOLE).
    KeepAllocated,
}

impl ZeroMode {
    fn fallocate_flags(self) -> i32 {
        match self {
            Self::Punch => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Self::KeepAllocated => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        }
    }
}

/// A stretch of a file: data or hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileExtent {
    /// Length in bytes.
    pub len_bytes: u64,
    /// A hole: reads as zeros and takes no space.
    pub hole: bool,
}

/// A file for positioned I/O: at once where the page cache allows it, else through the ring of whichever thread
/// calls.
#[derive(Clone, Debug)]
pub struct FileIo {
    pub(super) fd: Arc<OwnedFd>,
    now: Arc<NowIo>,
}

impl From<File> for FileIo {
    fn from(file: File) -> Self {
        let now = Arc::new(NowIo::of(&file));
        Self { fd: Arc::new(file.into()), now }
    }
}

impl FileIo {
    /// Puts another opening in the place of this one, for all clones and under the same descriptor. Nothing may be under
    /// way; the locks of the old opening go, unless it is held elsewhere.
    pub fn replace(&self, file: File) -> io::Result<()> {
        // SAFETY: both descriptors are open, and owned by what is borrowed here; `dup3` makes the second one refer to
        // another open file without closing it for anybody else.
        let done = unsafe { libc::dup3(file.as_raw_fd(), self.fd.as_raw_fd(), libc::O_CLOEXEC) };
        Errno::result(done).map(drop).map_err(Into::into)
    }
}

struct ReadOp<B> {
    _fd: Arc<OwnedFd>,
    buf: B,
}

struct WriteOp<S> {
    _fd: Arc<OwnedFd>,
    source: S,
}

/// What can be written piece by piece.
trait Pieces: 'static {
    /// At most `max` bytes from `start`; at least one before the end.
    fn piece(&self, start: usize, max: usize) -> &[u8];
}

impl Pieces for Part {
    fn piece(&self, start: usize, max: usize) -> &[u8] {
        self.slice_at(start, max)
    }
}

/// The first bytes of a buffer.
struct Head<S> {
    buf: S,
    len: usize,
}

impl<S: AsRef<[u8]> + 'static> Pieces for Head<S> {
    fn piece(&self, start: usize, max: usize) -> &[u8] {
        &self.buf.as_ref()[start..self.len.min(start + max)]
    }
}

impl FileIo {
    /// The descriptor, for the calls that do not go through a ring (fdatasync, lseek, locks).
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Where data and holes are in a range, in order, at most `max` stretches. A file system or device that
    /// cannot tell says that all is data.
    pub fn extents(&self, range: Range<u64>, max: usize) -> Vec<FileExtent> {
        let mut extents = Vec::new();
        let mut at = range.start;
        while at < range.end && extents.len() < max {
            let data = match lseek(&self.fd, at as i64, Whence::SeekData) {
                Ok(start) => (start as u64).clamp(at, range.end),
                // No data from here to the end of the file.
                Err(Errno::ENXIO) => range.end,
                Err(_) => at,
            };
            if data > at {
                extents.push(FileExtent { len_bytes: data - at, hole: true });
                at = data;
                continue;
            }
            let hole = lseek(&self.fd, at as i64, Whence::SeekHole).map_or(range.end, |end| end as u64);
            let end = hole.clamp(at + 1, range.end);
            extents.push(FileExtent { len_bytes: end - at, hole: false });
            at = end;
        }
        extents
    }

    /// Fills `target` from `offset_bytes` if that takes no waiting; how many bytes of it are filled.
    /// For the rest, and for the reason, there is [`FileIo::read_exact_at`].
    fn read_now(&self, target: &mut [u8], offset_bytes: u64) -> usize {
        self.now.read(&self.fd, target, offset_bytes)
    }

    /// Writes `source` at `offset_bytes` if that takes no waiting, as far as one can tell; how many bytes of it
    /// are written. For the rest, and for the reason, there is [`FileIo::write_all_at`].
    fn write_now(&self, source: &[u8], offset_bytes: u64) -> usize {
        self.now.write(&self.fd, source, offset_bytes)
    }

    /// Reads exactly `at.len()` bytes from `offset_bytes` into `buf[at]`; the buffer comes back either way.
    /// The end of the file is an error ([`io::ErrorKind::UnexpectedEof`]).
    pub async fn read_exact_at<B: AsMut<[u8]> + 'static>(
        &self,
        mut buf: B,
        at: Range<usize>,
        offset_bytes: u64,
    ) -> (io::Result<()>, B) {
        let mut done = self.read_now(&mut buf.as_mut()[at.clone()], offset_bytes);
        let want = at.len();
        while done < want {
            let start = at.start + done;
            let len = (want - done).min(MAX_PIECE_BYTES);
            let fd = types::Fd(self.fd.as_raw_fd());
            let offset = offset_bytes + done as u64;
            // SAFETY: descriptor and buffer are owned by the resource; indexing checks the range.
            let op = unsafe {
                submit(ReadOp { _fd: self.fd.clone(), buf }, |r| {
                    let target = &mut r.buf.as_mut()[start..start + len];
                    opcode::Read::new(fd, target.as_mut_ptr(), target.len() as u32).offset(offset).build()
                })
            };
            let (result, resource) = op.await;
            buf = resource.buf;
            match result {
                Ok(0) => return (Err(io::ErrorKind::UnexpectedEof.into()), buf),
                Ok(n) => done += n as usize,
                Err(e) if is_transient(&e) => {}
                Err(e) => return (Err(e), buf),
            }
        }
        (Ok(()), buf)
    }

    /// Writes the whole part at `offset_bytes`. With `dsync` the data is durable when this returns (RWF_DSYNC).
    pub async fn write_all_at(&self, part: Part, offset_bytes: u64, dsync: bool) -> io::Result<()> {
        let len = part.len();
        self.write_pieces(part, len, offset_bytes, dsync).await.0
    }

    /// Writes the first `len` bytes of a buffer at `offset_bytes`; the buffer comes back either way.
    pub async fn write_from<S: AsRef<[u8]> + 'static>(
        &self,
        buf: S,
        len: usize,
        offset_bytes: u64,
        dsync: bool,
    ) -> (io::Result<()>, S) {
        let (result, head) = self.write_pieces(Head { buf, len }, len, offset_bytes, dsync).await;
        (result, head.buf)
    }

    async fn write_pieces<S: Pieces>(
        &self,
        mut source: S,
        want: usize,
        offset_bytes: u64,
        dsync: bool,
    ) -> (io::Result<()>, S) {
        let mut done = if dsync { 0 } else { self.write_now(source.piece(0, want), offset_bytes) };
        let flags = if dsync { libc::RWF_DSYNC } else { 0 };
        while done < want {
            let len = (want - done).min(MAX_PIECE_BYTES);
            let fd = types::Fd(self.fd.as_raw_fd());
            let offset = offset_bytes + done as u64;
            // SAFETY: descriptor and bytes are owned by the resource; the slice is within them.
            let op = unsafe {
                submit(WriteOp { _fd: self.fd.clone(), source }, |w| {
                    let piece = w.source.piece(done, len);
                    opcode::Write::new(fd, piece.as_ptr(), piece.len() as u32).offset(offset).rw_flags(flags).build()
                })
            };
            let (result, resource) = op.await;
            source = resource.source;
            match result {
                Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), source),
                Ok(n) => done += n as usize,
                Err(e) if is_transient(&e) => {}
                Err(e) => return (Err(e), source),
            }
        }
        (Ok(()), source)
    }

    /// Free bytes of the file system that the file is on, for those who are not root.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let stat = nix::sys::statvfs::fstatvfs(self.fd.as_ref())?;
        Ok(stat.blocks_available() as u64 * stat.fragment_size() as u64)
    }

    /// Makes room for a range, so that writing it cannot fail for want of space. What it reads as stays as it is.
    /// Where the file system cannot, nothing happens.
    pub async fn reserve(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        match self.fallocate(offset_bytes, len_bytes, libc::FALLOC_FL_KEEP_SIZE).await {
            Err(e) if is_unsupported(&e) => Ok(()),
            result => result,
        }
    }

    async fn fallocate(&self, offset_bytes: u64, len_bytes: u64, flags: i32) -> io::Result<()> {
        loop {
            let fd = types::Fd(self.fd.as_raw_fd());
            // SAFETY: the descriptor is owned by the resource; there is no memory.
            let op = unsafe {
                submit(self.fd.clone(), |_| {
                    opcode::Fallocate::new(fd, len_bytes).offset(offset_bytes).mode(flags).build()
                })
            };
            match op.await.0 {
                Ok(_) => return Ok(()),
                Err(e) if is_transient(&e) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Turns a range into zeros. Where the file system cannot, zeros are written, unless `fast_only`:
    /// then the error is `EOPNOTSUPP` and nothing was changed.
    pub async fn zero_at(&self, offset_bytes: u64, len_bytes: u64, mode: ZeroMode, fast_only: bool) -> io::Result<()> {
        match self.fallocate(offset_bytes, len_bytes, mode.fallocate_flags()).await {
            Err(e) if is_unsupported(&e) && fast_only => return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            Err(e) if is_unsupported(&e) => {}
            result => return result,
        }
        let end = offset_bytes + len_bytes;
        let mut at = offset_bytes;
        while at < end {
            let piece = (end - at).min(ZERO_PIECE_BYTES);
            self.write_all_at(Part::Zeros(piece as usize), at, false).await?;
            at += piece;
        }
        Ok(())
    }
}

fn is_transient(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

/// `EINVAL`: a block device, of a range that is not of whole sectors of its own.
fn is_unsupported(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::super::Reactor;
    use super::*;

    #[test]
    fn write_read_zero_and_the_end_of_the_file() {
        let file = FileIo::from(tempfile::tempfile().unwrap());
        let reactor = Reactor::new().unwrap();
        reactor
            .block_on(async move {
                let data: Vec<u8> = (0..100_000u32).map(|n| n as u8 | 1).collect();
                file.write_all_at(Part::Owned(data.clone().into()), 512, false).await.unwrap();
                file.zero_at(4096, 8192, ZeroMode::Punch, false).await.unwrap();
                let (result, back) = file.read_exact_at(vec![9; 100_010], 5..100_005, 512).await;
                result.unwrap();
                let mut want = data;
                want[4096 - 512..4096 - 512 + 8192].fill(0);
                assert_eq!(&back[5..100_005], &want[..]);
                assert_eq!(&back[..5], &[9; 5]);
                let (result, _) = file.read_exact_at(vec![0; 4096], 0..4096, 100_000).await;
                assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            })
            .unwrap();
    }
}
