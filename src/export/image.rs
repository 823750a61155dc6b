//! The image: a raw file or a block device.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::unistd::{Whence, lseek};

use crate::engine::SECTOR_BYTES;
use crate::identity::{IdentityHasher, sample_ranges};
use crate::uring::FileIo;

/// QEMU's lock bytes (OFD locks): "somebody reads", "somebody writes", "writing is not shared".
const LOCK_READS: i64 = 100;
const LOCK_WRITES: i64 = 101;
const LOCK_NOBODY_WRITES: i64 = 201;

/// What a qcow2 image begins with.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Why an image cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The system refused.
    #[error("image {path}: {action}: {source}{}", what_to_do(.source))]
    Io {
        /// The image.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Not a thing with blocks.
    #[error("image {0} is neither a regular file nor a block device")]
    WrongKind(PathBuf),
    /// Not a whole number of sectors.
    #[error("image {path}: size {size_bytes} is not a multiple of 512 bytes; pad it (`truncate -s %512 {path}`)")]
    OddSize {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size_bytes: u64,
    },
    /// Nothing in it.
    #[error("image {0} is empty")]
    Empty(PathBuf),
    /// Whoever reads it would find a container, and not the disk in it.
    #[error(
        "image {0} is a qcow2 image, and its bytes would be served as if they were the disk: serve it with qemu-nbd \
         (`qemu-nbd --read-only --persistent --shared=8 {0}`), or convert it (`qemu-img convert -O raw`); with --raw \
         it is served as it is"
    )]
    Qcow2(PathBuf),
    /// A virtual machine has it.
    #[error("{0}")]
    InUse(InUse),
}

/// An image that is open for writing elsewhere.
#[derive(Debug)]
pub struct InUse {
    path: PathBuf,
    /// Served already, and asked for by a destination.
    served: bool,
}

impl fmt::Display for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is = "is open for writing by another process (QEMU holds its lock)";
        write!(f, "image {} {is}", self.path.display())?;
        if self.served {
            return f.write_str(": stop the machine there first");
        }
        f.write_str(
            ": what is fetched would be a mix of old and new. Stop the machine first, or serve it with --handoff to let \
             it change hosts",
        )
    }
}

fn what_to_do(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; is that the right path?",
        io::ErrorKind::PermissionDenied => "; this user has to be able to read it",
        _ => "",
    }
}

/// An open image. Clones are the same opening, with the same locks.
#[derive(Clone, Debug)]
pub struct Image {
    path: PathBuf,
    file: Arc<File>,
    io: FileIo,
    size_bytes: u64,
}

impl Image {
    /// Opens an image for reading. Unless `in_use`, it must not be open for writing anywhere, and nobody
    /// who honours QEMU's locks can open it for writing while it is served.
    pub fn open(path: &Path, in_use: bool) -> Result<Self, ImageError> {
        let io = |action| move |source| ImageError::Io { path: path.into(), action, source };
        let file = OpenOptions::new().read(true).open(path).map_err(io("open"))?;
        let kind = file.metadata().map_err(io("stat"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::WrongKind(path.into()));
        }
        if !in_use {
            keep_writers_out(&file, path, false)?;
        }
        let size_bytes = lseek(file.as_fd(), 0, Whence::SeekEnd).map_err(|e| io("find the size")(e.into()))? as u64;
        match size_bytes {
            0 => return Err(ImageError::Empty(path.into())),
            odd if odd % SECTOR_BYTES != 0 => {
                return Err(ImageError::OddSize { path: path.into(), size_bytes });
            }
            _ => {}
        }
        let io = FileIo::from(file.try_clone().map_err(io("duplicate the descriptor"))?);
        Ok(Self { path: path.into(), file: Arc::new(file), io, size_bytes })
    }

    /// Sees to it that nobody who honours QEMU's locks writes to it. Fails with [`ImageError::InUse`] if somebody has it
    /// open for writing; then nothing has changed.
    pub fn keep_writers_out(&self) -> Result<(), ImageError> {
        keep_writers_out(&self.file, &self.path, true).inspect_err(|_| {
            // Nothing that was not locked is unlocked by this.
            let _ = self.let_writers_in();
        })
    }

    /// Takes that back.
    pub fn let_writers_in(&self) -> io::Result<()> {
        for byte in [LOCK_NOBODY_WRITES, LOCK_READS] {
            fcntl(self.file.as_fd(), FcntlArg::F_OFD_SETLK(&lock_on(libc::F_UNLCK, byte)))?;
        }
        Ok(())
    }

    /// Another descriptor of the same opening.
    pub fn duplicate(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Positioned I/O on it.
    pub fn io(&self) -> &FileIo {
        &self.io
    }

    /// Size in bytes when it was opened.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Size in bytes as it is now: somebody may have cut the file off, or made it longer.
    pub fn size_now_bytes(&self) -> io::Result<u64> {
        Ok(lseek(self.file.as_fd(), 0, Whence::SeekEnd)? as u64)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the contents are known by; see [`crate::identity`]. It changes when somebody writes to the file, and when the file is replaced by another disk's.
    pub fn identity(&self) -> io::Result<String> {
        let size_bytes = self.size_now_bytes()?;
        let meta = self.file.metadata()?;
        let modified = meta.is_file().then(|| (meta.mtime(), meta.mtime_nsec()));
        let mut hasher = IdentityHasher::new(size_bytes, modified);
        for range in sample_ranges(size_bytes) {
            let mut sample = vec![0; range.len() as usize];
            self.file.read_exact_at(&mut sample, range.start)?;
            hasher.sample(&sample);
        }
        Ok(hasher.finish("image"))
    }
}

/// Refuses what is a disk inside of another format. What cannot be read is told of when it is opened.
pub fn refuse_other_format(path: &Path) -> Result<(), ImageError> {
    let kind = std::fs::metadata(path).map(|meta| meta.file_type());
    if !kind.is_ok_and(|kind| kind.is_file() || kind.is_block_device()) {
        return Ok(());
    }
    let mut start = [0; 4];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut start, 0));
    if read.is_ok() && start == QCOW2_MAGIC { Err(ImageError::Qcow2(path.into())) } else { Ok(()) }
}

fn lock_on(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn keep_writers_out(file: &File, path: &Path, served: bool) -> Result<(), ImageError> {
    let io = |e: nix::Error| ImageError::Io { path: path.into(), action: "lock", source: e.into() };
    let in_use = || ImageError::InUse(InUse { path: path.into(), served });
    for byte in [LOCK_READS, LOCK_NOBODY_WRITES] {
        fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock_on(libc::F_RDLCK, byte))).map_err(|e| match e {
            nix::Error::EAGAIN | nix::Error::EACCES => in_use(),
            other => io(other),
        })?;
    }
    let mut writers = lock_on(libc::F_WRLCK, LOCK_WRITES);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut writers)).map_err(io)?;
    if writers.l_type != libc::F_UNLCK as libc::c_short {
        return Err(in_use());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_follows_the_contents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, vec![7; 100 * 512]).unwrap();
        let image = Image::open(&path, false).unwrap();
        let before = image.identity().unwrap();
        assert_eq!(before, image.identity().unwrap());
        let time = std::fs::metadata(&path).unwrap().modified().unwrap();
        let writer = OpenOptions::new().write(true).open(&path).unwrap();
        writer.write_all_at(b"x", 0).unwrap();
        writer.set_modified(time).unwrap();
        assert_ne!(before, image.identity().unwrap(), "a sampled byte was changed");
        writer.write_all_at(&[7], 0).unwrap();
        writer.set_modified(time).unwrap();
        assert_eq!(before, image.identity().unwrap());
        writer.set_modified(time + std::time::Duration::from_nanos(1)).unwrap();
        assert_ne!(before, image.identity().unwrap(), "the modification time changed");
    }

    #[test]
    fn odd_and_empty_images_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, [1; 513]).unwrap();
        assert!(matches!(Image::open(&path, false), Err(ImageError::OddSize { size_bytes: 513, .. })));
        std::fs::write(&path, []).unwrap();
        assert!(matches!(Image::open(&path, false), Err(ImageError::Empty(_))));
        assert!(matches!(Image::open(dir.path(), false), Err(ImageError::WrongKind(_))));
    }
}
