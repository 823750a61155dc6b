//! The directory where daemons leave their sockets, and the names that they go by.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::uring::is_dying;

/// Longest name of a device: it becomes part of a socket's path.
const MAX_NAME: usize = 48;

/// A name may be held for a moment by a daemon that was just killed, or by somebody who lists the devices.
const CLAIM_PATIENCE: Duration = Duration::from_secs(1);

/// Why there is no run directory.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// None can be had.
    #[error("run directory {path}: {source}; set BLKFERRY_RUN_DIR to a directory that you may write to")]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The one that was named is not there.
    #[error("run directory {path}: {source}; BLKFERRY_RUN_DIR has to name the directory that the daemons use")]
    NotThere {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a name cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// Not a name.
    #[error("{0:?} is no name for a device: use 1 to {MAX_NAME} letters, digits, dots, dashes and underscores")]
    Invalid(String),
    /// Somebody has it.
    #[error(
        "the name {0} is in use by a running device; choose another with --name, or detach it (`blkferry detach {0}`)"
    )]
    InUse(String),
    /// The system refused.
    #[error(
        "cannot claim the name {name}: {path}: {source}; this user has to be able to write there, or set \
         BLKFERRY_RUN_DIR to another directory"
    )]
    Io {
        /// The name.
        name: String,
        /// The file that stands for it.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What a daemon writes down about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Name of the device.
    pub name: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Absolute path of the cache.
    pub cache: PathBuf,
    /// Path of the control socket.
    pub control: PathBuf,
    /// Where the guest finds the device.
    pub uri: String,
    /// If it is a ublk device: what it takes to take it over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ublk: Option<UblkEntry>,
}

/// What another daemon needs to take over a ublk device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UblkEntry {
    /// The N of /dev/ublkbN.
    pub id: u32,
    /// A word that the driver keeps for us: is it still the same device?
    pub mark: u64,
    /// NBD URI of the source.
    pub source: String,
    /// Path of the metadata.
    pub metadata: PathBuf,
    /// How to hydrate.
    pub hydrate: String,
    /// What becomes of requests while the source is lost.
    pub on_source_loss: String,
    /// Known to ublksrv's `ublk`?
    #[serde(default)]
    pub ublksrv: bool,
    /// In standby, the guest's first write makes it active.
    #[serde(default)]
    pub on_write: bool,
    /// It was given away, and goes on without its source.
    #[serde(default)]
    pub no_source: bool,
    /// Where it is offered to other hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
}

/// The directory: `$BLKFERRY_RUN_DIR`, or `/run/blkferry`, or without root `$XDG_RUNTIME_DIR/blkferry`, or, without that
/// too, `blkferry-UID` in the directory for temporary files.
#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
}

/// A name that is ours until this is dropped.
#[derive(Debug)]
pub struct Claim {
    file: File,
    path: PathBuf,
    /// A daemon that was killed left its entry.
    inherited: bool,
}

impl RunDir {
    /// Finds the directory, and makes it if need be: for a daemon.
    pub fn open() -> Result<Self, RunDirError> {
        // One that was named is as its owner wants it.
        let made = match std::env::var_os("BLKFERRY_RUN_DIR") {
            Some(path) => make_dir(path.into()),
            None => make_dir(Self::default_path()).and_then(check_own),
        };
        made.map(|path| Self { path })
    }

    /// Finds the directory for somebody who only asks: it is not made. One that was named has to be there.
    pub fn find() -> Result<Self, RunDirError> {
        let path = match std::env::var_os("BLKFERRY_RUN_DIR").map(PathBuf::from) {
            Some(path) => match fs::read_dir(&path) {
                // Whoever may not list it may still know what is in it.
                Err(source) if source.kind() != io::ErrorKind::PermissionDenied => {
                    return Err(RunDirError::NotThere { path, source });
                }
                _ => path,
            },
            None => match Self::default_path() {
                path if fs::symlink_metadata(&path).is_ok() => check_own(path)?,
                path => path,
            },
        };
        Ok(Self { path })
    }

    /// A directory that is there.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    fn default_path() -> PathBuf {
        match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(base) if !geteuid().is_root() => Path::new(&base).join("blkferry"),
            _ if geteuid().is_root() => "/run/blkferry".into(),
            _ => std::env::temp_dir().join(format!("blkferry-{}", geteuid())),
        }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory on tmpfs for live maps: inside this one if it is on tmpfs, else in /dev/shm. It is made if need be.
    /// Inside, it is as safe as this one.
    pub fn live_dir(&self) -> Result<PathBuf, RunDirError> {
        let on_tmpfs = statfs(&self.path).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC);
        if on_tmpfs {
            return make_dir(self.path.join("live"));
        }
        make_dir(format!("/dev/shm/blkferry-{}", geteuid()).into()).and_then(check_own)
    }

    /// Path of the control socket of a device.
    pub fn control_socket(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.ctl"))
    }

    /// Path of the NBD socket of a device, where the user names none.
    pub fn nbd_socket(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.nbd"))
    }

    /// Path of the daemon's log.
    pub fn log_file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.log"))
    }

    fn entry_file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.json"))
    }

    /// Takes a name; it is free again when the process ends, however it ends.
    pub fn claim(&self, name: &str) -> Result<Claim, NameError> {
        check_name(name)?;
        let path = self.entry_file(name);
        let io = |source| NameError::Io { name: name.into(), path: path.clone(), source };
        let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let mut file = open().map_err(io)?;
        let started = Instant::now();
        loop {
            match file.try_lock() {
                // Who had it before may have removed the file at its end: then the lock is on nothing.
                Ok(()) if !is_at(&file, &path).map_err(io)? => file = open().map_err(io)?,
                Ok(()) => {
                    let inherited = file.metadata().map_err(io)?.len() > 0;
                    return Ok(Claim { file, path, inherited });
                }
                Err(TryLockError::WouldBlock) if started.elapsed() < CLAIM_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(TryLockError::WouldBlock) => return Err(NameError::InUse(name.into())),
                Err(TryLockError::Error(source)) => return Err(io(source)),
            }
        }
    }

    /// The entry of a device whose daemon is dead, or dying.
    pub fn dead(&self, name: &str) -> io::Result<Option<Entry>> {
        let entries = self.entries()?.into_iter();
        let found = entries.filter(|(entry, alive)| entry.name == name && (!alive || is_dying(entry.pid as i32)));
        Ok(found.map(|(entry, _)| entry).next())
    }

    /// All devices that have an entry, each with "is its daemon alive?", by name.
    pub fn entries(&self) -> io::Result<Vec<(Entry, bool)>> {
        let mut entries = Vec::new();
        let files = match fs::read_dir(&self.path) {
            // Nobody has made it yet.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(entries),
            files => files?,
        };
        for file in files {
            let path = file?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            let Ok(text) = fs::read_to_string(&path) else { continue };
            let Ok(entry) = serde_json::from_str::<Entry>(&text) else { continue };
            let free = File::open(&path).is_ok_and(|file| file.try_lock_shared().is_ok());
            entries.push((entry, !free));
        }
        entries.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Removes what a dead daemon left. `Ok(false)`: there was nothing.
    pub fn forget(&self, name: &str) -> Result<bool, NameError> {
        check_name(name)?;
        if !self.entry_file(name).exists() {
            return Ok(false);
        }
        self.claim(name)?.release();
        for path in [self.control_socket(name), self.nbd_socket(name), self.log_file(name)] {
            // Gone already is as good.
            let _ = fs::remove_file(path);
        }
        Ok(true)
    }
}

impl Claim {
    /// Writes down who has the name.
    pub fn publish(&mut self, entry: &Entry) -> io::Result<()> {
        let mut json = serde_json::to_vec(entry).expect("plain data serializes");
        let (len, len_before) = (json.len(), self.file.metadata()?.len() as usize);
        // In one write that covers what was there: whoever is killed here leaves one entry or the other.
        json.resize(len.max(len_before), b' ');
        self.file.write_all_at(&json, 0)?;
        self.file.set_len(len as u64)
    }

    /// Who had the name before, if that one left an entry behind.
    pub fn previous(&self) -> Option<Entry> {
        fs::read(&self.path).ok().and_then(|text| serde_json::from_slice(&text).ok())
    }

    /// Gives the name back after a failure: the entry of a daemon that was killed stays, for the next attempt.
    pub fn give_back(self) {
        if !self.inherited {
            self.release();
        }
    }

    /// Gives the name back for good.
    pub fn release(self) {
        // Gone already is as good.
        let _ = fs::remove_file(&self.path);
    }
}

fn make_dir(path: PathBuf) -> Result<PathBuf, RunDirError> {
    match fs::DirBuilder::new().recursive(true).mode(0o700).create(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(RunDirError::Unusable { path, source }),
    }
}

/// Where everybody may write, somebody else may have been there first: what lies in such a directory is not believed.
fn check_own(path: PathBuf) -> Result<PathBuf, RunDirError> {
    let found = fs::symlink_metadata(&path).and_then(|found| {
        let whose = || io::Error::other(format!("belongs to user {}, and not to user {}", found.uid(), geteuid()));
        match found.mode() & 0o022 {
            _ if !found.is_dir() => Err(io::Error::other("is no directory, and somebody else may have put it there")),
            _ if found.uid() != geteuid().as_raw() => Err(whose()),
            0 => Ok(()),
            _ => Err(io::Error::other("may be written to by others; `chmod 700` it if what is in it is yours")),
        }
    });
    match found {
        Ok(()) => Ok(path),
        Err(source) => Err(RunDirError::Unusable { path, source }),
    }
}

/// Is it still what lies there?
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    Ok(fs::metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())))
}

/// Gives back what may be the name of a device.
pub fn check_name(name: &str) -> Result<String, NameError> {
    let fits = (1..=MAX_NAME).contains(&name.len()) && !name.starts_with(['.', '-']);
    if fits && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) {
        Ok(name.into())
    } else {
        Err(NameError::Invalid(name.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_name_that_is_given_back_meanwhile_is_had_for_good() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::at(dir.path().into());
        for _ in 0..20 {
            let first = run.claim("web").unwrap();
            let waiting = std::thread::spawn({
                let run = run.clone();
                move || run.claim("web").unwrap()
            });
            // It waits for the lock on this file, which goes away.
            std::thread::sleep(Duration::from_millis(15));
            first.release();
            let second = waiting.join().unwrap();
            assert!(second.path.exists(), "who has the name can be found");
            assert!(is_at(&second.file, &second.path).unwrap());
            second.release();
        }
    }

    #[test]
    fn a_directory_that_may_be_of_somebody_else_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let [own, open, link] = ["own", "open", "link"].map(|name| dir.path().join(name));
        let check = |path: &Path| make_dir(path.into()).and_then(check_own).map_err(|e| e.to_string());
        assert_eq!(check(&own), Ok(own.clone()));
        assert_eq!(fs::metadata(&own).unwrap().mode() & 0o777, 0o700);
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o770)).unwrap();
        assert!(check(&open).unwrap_err().contains("may be written to by others"));
        std::os::unix::fs::symlink(&own, &link).unwrap();
        assert!(check(&link).unwrap_err().contains("is no directory"));
        // As root, whose directories are everywhere, one of another user can be had.
        if geteuid().is_root() {
            std::os::unix::fs::chown(&own, Some(12345), None).unwrap();
            assert!(check(&own).unwrap_err().contains("belongs to user 12345, and not to user 0"));
        }
    }

    #[test]
    fn a_name_is_had_once_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir { path: dir.path().into() };
        let mut claim = run.claim("disk0").unwrap();
        assert!(matches!(run.claim("disk0"), Err(NameError::InUse(_))));
        let entry = Entry {
            name: "disk0".into(),
            pid: 1,
            cache: "/c".into(),
            control: run.control_socket("disk0"),
            uri: "nbd://x".into(),
            ublk: None,
        };
        claim.publish(&entry).unwrap();
        assert_eq!(run.entries().unwrap(), [(entry.clone(), true)]);
        // A daemon that was killed leaves its entry, and its name is free.
        drop(claim);
        assert_eq!(run.entries().unwrap(), [(entry, false)]);
        run.claim("disk0").unwrap().give_back();
        assert_eq!(run.entries().unwrap().len(), 1);
        assert!(run.forget("disk0").unwrap());
        assert!(!run.forget("disk0").unwrap());
        assert!(run.entries().unwrap().is_empty());
        for bad in ["", ".x", "a/b", "a b", &"x".repeat(49)] {
            assert!(matches!(run.claim(bad), Err(NameError::Invalid(_))), "{bad}");
        }
    }
}
