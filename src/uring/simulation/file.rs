//! Positioned I/O: a delay drawn by the world, then the real file, on the spot. What stands in a file is so after any
//! number of killed processes; power cuts are not for here.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::DiskWork;
use super::world::{current, sleep};
use crate::uring::file::{self, FileExtent, ZeroMode};
use crate::uring::net::Part;
use crate::uring::residency::Residency;

/// Zeros are written in pieces of so many bytes where the file system cannot punch.
const ZEROS_BYTES: usize = 64 << 10;

/// See [`file::FileIo`].
#[derive(Clone, Debug)]
pub struct FileIo {
    real: file::FileIo,
    /// The same file, where it was opened in a world.
    simulated: Option<Arc<File>>,
}

impl From<File> for FileIo {
    fn from(file: File) -> Self {
        let again = current().map(|_| Arc::new(file.try_clone().expect("the simulation has descriptors enough")));
        Self { real: file.into(), simulated: again }
    }
}

/// Waits for a disk; the error that it comes up with.
async fn wait(work: DiskWork, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
    let world = current().expect("what was opened in a world is used in it");
    let (delay, result) = world.surroundings.disk(work, offset_bytes, len_bytes);
    sleep(delay).await;
    result
}

impl FileIo {
    /// See [`file::FileIo::replace`].
    pub fn replace(&self, file: File) -> io::Result<()> {
        self.real.replace(file)
    }

    /// See [`file::FileIo::fd`].
    pub fn fd(&self) -> &OwnedFd {
        self.real.fd()
    }

    /// See [`file::FileIo::extents`].
    pub fn extents(&self, range: Range<u64>, max: usize) -> Vec<FileExtent> {
        self.real.extents(range, max)
    }

    /// See [`file::FileIo::tells_residency`].
    pub fn tells_residency(&self) -> bool {
        self.real.tells_residency()
    }

    /// See [`file::FileIo::residency`].
    pub async fn residency(&self, range: Range<u64>, max: usize) -> io::Result<Vec<(u64, Residency)>> {
        self.real.residency(range, max).await
    }

    /// See [`file::FileIo::read_exact_at`].
    pub async fn read_exact_at<B: AsMut<[u8]> + 'static>(
        &self,
        mut buf: B,
        at: Range<usize>,
        offset_bytes: u64,
    ) -> (io::Result<()>, B) {
        let Some(file) = &self.simulated else { return self.real.read_exact_at(buf, at, offset_bytes).await };
        let waited = wait(DiskWork::Read, offset_bytes, at.len() as u64).await;
        let result = waited.and_then(|()| file.read_exact_at(&mut buf.as_mut()[at], offset_bytes));
        (result, buf)
    }

    /// See [`file::FileIo::write_all_at`].
    pub async fn write_all_at(&self, part: Part, offset_bytes: u64, dsync: bool) -> io::Result<()> {
        let Some(file) = &self.simulated else { return self.real.write_all_at(part, offset_bytes, dsync).await };
        wait(DiskWork::Write, offset_bytes, part.len() as u64).await?;
        let mut bytes = Vec::new();
        part.append_to(&mut bytes);
        file.write_all_at(&bytes, offset_bytes)
    }

    /// See [`file::FileIo::write_from`].
    pub async fn write_from<S: AsRef<[u8]> + 'static>(
        &self,
        buf: S,
        len: usize,
        offset_bytes: u64,
        dsync: bool,
    ) -> (io::Result<()>, S) {
        let Some(file) = &self.simulated else { return self.real.write_from(buf, len, offset_bytes, dsync).await };
        let waited = wait(DiskWork::Write, offset_bytes, len as u64).await;
        let result = waited.and_then(|()| file.write_all_at(&buf.as_ref()[..len], offset_bytes));
        (result, buf)
    }

    /// See [`file::FileIo::free_bytes`].
    pub fn free_bytes(&self) -> io::Result<u64> {
        match (&self.simulated, current()) {
            (Some(_), Some(world)) => Ok(world.surroundings.free_bytes()),
            _ => self.real.free_bytes(),
        }
    }

    /// See [`file::FileIo::reserve`].
    pub async fn reserve(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        match &self.simulated {
            Some(_) => wait(DiskWork::Write, offset_bytes, len_bytes).await,
            None => self.real.reserve(offset_bytes, len_bytes).await,
        }
    }

    /// See [`file::FileIo::zero_at`].
    pub async fn zero_at(&self, offset_bytes: u64, len_bytes: u64, mode: ZeroMode, fast_only: bool) -> io::Result<()> {
        let Some(file) = &self.simulated else {
            return self.real.zero_at(offset_bytes, len_bytes, mode, fast_only).await;
        };
        wait(DiskWork::Zero, offset_bytes, len_bytes).await?;
        let end = offset_bytes + len_bytes;
        for at in (offset_bytes..end).step_by(ZEROS_BYTES) {
            let len = (end - at).min(ZEROS_BYTES as u64) as usize;
            file.write_all_at(&vec![0; len], at)?;
        }
        Ok(())
    }
}
