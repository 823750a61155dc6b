//! The cache's data: the file or block device that becomes the disk.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::unistd::{Whence, lseek};

use crate::beside::sync_dir_of;
use crate::uring::FileIo;

/// The bytes that QEMU locks on an image (OFD locks): 100+n "permission n in use", 200+n "permission n
/// not shared". We take all of them exclusively: no QEMU opens a half-present disk, no second daemon either.
const LOCK_BYTES: [(i64, i64); 2] = [(100, 5), (200, 5)];
/// So much of a device's start and end is looked at.
const BLANK_BYTES: u64 = 1 << 20;
/// A killed daemon's last I/O holds its lock until the kernel has finished it.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Why the cache cannot be used. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The system refused.
    #[error("cache {path}: {action}: {source}")]
    Io {
        /// The file or device.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has it.
    #[error("cache {0} is in use by another process (a blkferry daemon or QEMU holds its lock); see `blkferry list`")]
    InUse(PathBuf),
    /// Does not hold the disk.
    #[error("cache {path} is too small: {found} bytes, the source has {needed}; use a larger device or a new file")]
    TooSmall {
        /// The file or device.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// What it must hold.
        needed: u64,
    },
    /// Nowhere to make it.
    #[error("cache {0}: the directory that it is to be made in is not there; make that first, or name another file")]
    NoDirectory(PathBuf),
    /// Metadata without contents.
    #[error(
        "cache {path} is not there, but its metadata {metadata} is: put it back where it was, or, if what was in it is \
         not needed any more, remove the metadata too, and a new one is begun"
    )]
    Gone {
        /// The file.
        path: PathBuf,
        /// Its metadata.
        metadata: PathBuf,
    },
    /// A file with contents that no metadata explains.
    #[error(
        "cache {path} has contents but no metadata at {metadata}: it is not a blkferry cache; remove it or name another file"
    )]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// Where its metadata should be.
        metadata: PathBuf,
    },
    /// A device that holds something, and no metadata that explains it.
    #[error(
        "cache {0} is a block device with something on it, and would be overwritten; wipe it (`blkdiscard` or \
        `wipefs -a`), or say that you mean it with --overwrite"
    )]
    NotBlank(PathBuf),
    /// Something that cannot hold a disk.
    #[error("cache {0} is neither a regular file nor a block device")]
    WrongKind(PathBuf),
}

/// The open cache. Its lock goes with the last descriptor, in-flight I/O included.
#[derive(Clone, Debug)]
pub struct DataFile {
    io: FileIo,
    /// The same file, opened once more, for commits alone. The kernel tells each opening once that something could
    /// not be written: a write with RWF_DSYNC by the other one must not take that from the commit (I11).
    for_sync: Arc<File>,
    is_device: bool,
}

impl DataFile {
    /// Opens an existing cache, or makes a sparse file for a new one (`fresh`), and locks it.
    pub fn open(path: &Path, metadata: &Path, size_bytes: u64, fresh: bool) -> Result<Self, CacheError> {
        let io = |action| move |source| CacheError::Io { path: path.into(), action, source };
        let found = match fs::metadata(path) {
            Ok(meta) => Some(meta),
            Err(e) if e.kind() == io::ErrorKind::NotFound && fresh => {
                let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
                if dir.is_some_and(|dir| !dir.exists()) {
                    return Err(CacheError::NoDirectory(path.into()));
                }
                None
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(CacheError::Gone { path: path.into(), metadata: metadata.into() });
            }
            Err(e) => return Err(io("open")(e)),
        };
        let is_device = found.as_ref().is_some_and(|m| m.file_type().is_block_device());
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(found.is_none()).mode(0o600);
        if is_device {
            // Refuses a device that is mounted, or that another exclusive owner has.
            options.custom_flags(libc::O_EXCL);
        }
        match &found {
            Some(meta) if !meta.is_file() && !is_device => return Err(CacheError::WrongKind(path.into())),
            Some(meta) if fresh && meta.is_file() && meta.blocks() > 0 => {
                return Err(CacheError::NotOurs { path: path.into(), metadata: metadata.into() });
            }
            _ => {}
        }
        let file = options.open(path).map_err(io("open for writing"))?;
        lock(&file, path, libc::F_WRLCK)?;
        if is_device {
            let found = lseek(file.as_fd(), 0, Whence::SeekEnd).map_err(|e| io("find the size")(e.into()))? as u64;
            check_size(path, found, size_bytes)?;
        } else if fresh {
            file.set_len(size_bytes).map_err(io("set the size"))?;
            file.sync_all().map_err(io("sync"))?;
            sync_dir_of(path).map_err(io("sync the directory"))?;
        } else {
            check_size(path, file.metadata().map_err(io("stat"))?.len(), size_bytes)?;
        }
        // By its descriptor: the name may lead elsewhere by now.
        let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(io("open a second time"))?;
        Ok(Self { io: file.into(), for_sync: Arc::new(again), is_device })
    }

    /// Opens an image that is to become the cache of a disk that comes home, for reading only: it is still fenced.
    pub fn open_home(path: &Path, size_bytes: u64) -> Result<Self, CacheError> {
        let io = |action| move |source| CacheError::Io { path: path.into(), action, source };
        let file = File::open(path).map_err(io("open"))?;
        let is_device = file.metadata().map_err(io("stat"))?.file_type().is_block_device();
        let found = lseek(file.as_fd(), 0, Whence::SeekEnd).map_err(|e| io("find the size")(e.into()))? as u64;
        check_size(path, found, size_bytes)?;
        let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(io("open a second time"))?;
        Ok(Self { io: file.into(), for_sync: Arc::new(again), is_device })
    }

    /// Sees to it that no daemon has it, for as long as the file is held, and writes nothing: it may be fenced.
    pub(super) fn keep_daemons_out(path: &Path) -> Result<File, CacheError> {
        let file = File::open(path).map_err(|source| CacheError::Io { path: path.into(), action: "open", source })?;
        lock(&file, path, libc::F_RDLCK)?;
        Ok(file)
    }

    /// Makes it writable, and locks it as any cache.
    pub fn come_home(&self, path: &Path) -> Result<(), CacheError> {
        let io = |action| move |source| CacheError::Io { path: path.into(), action, source };
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if self.is_device {
            options.custom_flags(libc::O_EXCL);
        }
        let file = options.open(path).map_err(io("open for writing"))?;
        lock(&file, path, libc::F_WRLCK)?;
        self.io.replace(file).map_err(io("duplicate the descriptor"))
    }

    /// Refuses a device with something on it: partition tables and file systems are at its start or its end.
    pub fn check_blank(&self, path: &Path) -> Result<(), CacheError> {
        let io = |action| move |source| CacheError::Io { path: path.into(), action, source };
        let file = File::from(self.io.fd().try_clone().map_err(io("duplicate the descriptor"))?);
        let size_bytes = lseek(file.as_fd(), 0, Whence::SeekEnd).map_err(|e| io("find the size")(e.into()))? as u64;
        let len = BLANK_BYTES.min(size_bytes);
        for start in [0, size_bytes - len] {
            let mut bytes = vec![0; len as usize];
            file.read_exact_at(&mut bytes, start).map_err(io("read"))?;
            if bytes.iter().any(|byte| *byte != 0) {
                return Err(CacheError::NotBlank(path.into()));
            }
        }
        Ok(())
    }

    /// Positioned I/O on it.
    pub fn io(&self) -> &FileIo {
        &self.io
    }

    /// A block device, not a file?
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// fdatasync(2). Blocks: for the commit thread.
    pub fn sync_data(&self) -> io::Result<()> {
        self.for_sync.sync_data()
    }

    /// Can a range be turned into zeros without writing them?
    pub fn punches_holes(&self, size_bytes: u64) -> bool {
        // Beyond the end nothing changes: the question is only whether the system knows how.
        let flags = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        !self.is_device && nix::fcntl::fallocate(self.io.fd(), flags, size_bytes as i64, 4096).is_ok()
    }
}

fn check_size(path: &Path, found: u64, needed: u64) -> Result<(), CacheError> {
    if found < needed {
        return Err(CacheError::TooSmall { path: path.into(), found, needed });
    }
    Ok(())
}

fn lock(file: &File, path: &Path, how: libc::c_int) -> Result<(), CacheError> {
    let started = Instant::now();
    for (start, len) in LOCK_BYTES {
        let whence = libc::SEEK_SET as libc::c_short;
        let lock = libc::flock { l_type: how as libc::c_short, l_whence: whence, l_start: start, l_len: len, l_pid: 0 };
        loop {
            match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)) {
                Ok(_) => break,
                Err(Errno::EAGAIN | Errno::EACCES) if started.elapsed() < LOCK_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(Errno::EAGAIN | Errno::EACCES) => return Err(CacheError::InUse(path.into())),
                Err(e) => return Err(CacheError::Io { path: path.into(), action: "lock", source: e.into() }),
            }
        }
    }
    Ok(())
}
