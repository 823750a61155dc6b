//! What is mounted from ferried disks, in the mount namespace that a daemon has for itself.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use super::users::number_of;

/// Gives up this namespace's copies of mounts from ublk devices, whoever serves them: with a copy somewhere,
/// an unmount does not end a file system. Those below which one of `needed` lies are kept.
pub(super) fn let_go(needed: &[PathBuf]) {
    let needed: Vec<PathBuf> = needed.iter().filter_map(|path| existing(path)).collect();
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    // What was mounted last may lie on what was mounted before.
    for mount in table.split(|byte| *byte == b'\n').rev().filter_map(parse) {
        if is_on_ublk(&mount.number()) && !needed.iter().any(|path| path.starts_with(&mount.place)) {
            // What cannot be let go is found in use later, and said so by detach.
            let _ = umount2(&mount.place, MntFlags::MNT_DETACH);
        }
    }
}

/// The part of a path that is there, without links.
fn existing(path: &Path) -> Option<PathBuf> {
    std::path::absolute(path).ok()?.ancestors().find_map(|part| fs::canonicalize(part).ok())
}

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// `major:minor`.
    device: String,
    place: PathBuf,
    source: PathBuf,
}

impl Mount {
    /// The block device's: btrfs shows another number for the mount.
    fn number(&self) -> String {
        match fs::metadata(&self.source) {
            Ok(meta) if meta.file_type().is_block_device() => number_of(meta.rdev()),
            _ => self.device.clone(),
        }
    }
}

/// A line of mountinfo, see proc(5).
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ').skip(2);
    let (device, place) = (fields.next()?, fields.nth(1)?);
    let source = fields.skip_while(|field| *field != b"-").nth(2)?;
    Some(Mount {
        device: String::from_utf8_lossy(device).into_owned(),
        place: unescape(place),
        source: unescape(source),
    })
}

/// Blanks and the like are `\040`.
fn unescape(text: &[u8]) -> PathBuf {
    let mut plain = Vec::new();
    let mut rest = text;
    while let [first, after @ ..] = rest {
        let octal = after.get(..3).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        (plain, rest) = match (first, octal) {
            (b'\\', Some(byte)) => ([plain, vec![byte]].concat(), &after[3..]),
            _ => ([plain, vec![*first]].concat(), after),
        };
    }
    OsString::from_vec(plain).into()
}

/// Is this block device a ublk device, a partition of one, or mapped to one?
fn is_on_ublk(number: &str) -> bool {
    fs::canonicalize(Path::new("/sys/dev/block").join(number)).is_ok_and(|path| leads_to_ublk(&path))
}

fn leads_to_ublk(path: &Path) -> bool {
    let is_ublk = path.iter().any(|part| part.as_bytes().starts_with(b"ublkb"));
    let mut below = fs::read_dir(path.join("slaves")).into_iter().flatten().flatten();
    is_ublk || below.any(|entry| fs::canonicalize(entry.path()).is_ok_and(|path| leads_to_ublk(&path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_has_a_device_a_place_and_a_source() {
        let line = b"99 22 259:3 / /mnt/a\\040b rw,relatime shared:7 - ext4 /dev/ublkb0 rw";
        let mount = Mount { device: "259:3".into(), place: "/mnt/a b".into(), source: "/dev/ublkb0".into() };
        assert_eq!(parse(line), Some(mount));
        assert_eq!(parse(b""), None);
        assert_eq!(unescape(b"a\\134b\\04"), Path::new("a\\b\\04"));
    }

    #[test]
    fn what_is_not_there_yet_lies_in_what_is() {
        assert_eq!(existing(Path::new("/proc/../nowhere/at/all")), Some("/".into()));
    }
}
