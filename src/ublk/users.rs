//! Who has a block device open. Before Linux 7.0 the driver cannot tell.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::libc;

/// Somebody who has /dev/ublkbN or one of its partitions open, in words; nobody if there is nobody.
pub(super) fn of(id: u32) -> Option<String> {
    let disk = format!("ublkb{id}");
    let numbers = numbers_of(&disk);
    if let Some(place) = mounted(&numbers) {
        return Some(format!("mounted on {place}"));
    }
    if let Some(process) = opened(&numbers) {
        return Some(process);
    }
    if let Some(holder) = held(&disk) {
        return Some(format!("{holder} is on it"));
    }
    if let Some(device) = looped(&disk) {
        return Some(format!("{device} is on it"));
    }
    // Whoever mounts, maps or swaps holds it exclusively, in whatever namespace.
    let exclusive = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(Path::new("/dev").join(disk));
    match exclusive {
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            Some("a file system, a device mapper or a swap area is on it".into())
        }
        _ => None,
    }
}

/// `major:minor` of a disk and of its partitions.
fn numbers_of(disk: &str) -> Vec<String> {
    let base = Path::new("/sys/block").join(disk);
    let mut numbers: Vec<String> = number_in(&base).into_iter().collect();
    for entry in fs::read_dir(&base).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(disk) {
            numbers.extend(number_in(&entry.path()));
        }
    }
    numbers
}

fn number_in(directory: &Path) -> Option<String> {
    fs::read_to_string(directory.join("dev")).ok().map(|text| text.trim().to_owned())
}

/// A device that is made of this disk or of one of its partitions: a mapped one, with the name that it has for
/// `dmsetup` and LVM, or an array.
fn held(disk: &str) -> Option<String> {
    let base = Path::new("/sys/block").join(disk);
    let partitions = fs::read_dir(&base).into_iter().flatten().flatten();
    let partitions = partitions.map(|entry| entry.path()).filter(|path| path.join("partition").exists());
    let places: Vec<_> = std::iter::once(base.clone()).chain(partitions).collect();
    let holder = places.iter().find_map(|place| fs::read_dir(place.join("holders")).ok()?.flatten().next())?;
    let device = holder.file_name().to_string_lossy().into_owned();
    match fs::read_to_string(holder.path().join("dm/name")) {
        Ok(name) => Some(format!("{} ({device})", name.trim())),
        Err(_) => Some(device),
    }
}

/// A loop device on this disk or on one of its partitions: no process has it open, and nobody holds it.
fn looped(disk: &str) -> Option<String> {
    fs::read_dir("/sys/block").ok()?.flatten().find_map(|entry| {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        let name = file.trim().strip_prefix("/dev/")?;
        let after = name.strip_prefix(disk)?;
        (after.is_empty() || after.starts_with('p')).then(|| entry.file_name().to_string_lossy().into_owned())
    })
}

/// Where one of the devices is mounted: as the first process sees it, since ours may see less.
fn mounted(numbers: &[String]) -> Option<String> {
    let table = fs::read_to_string("/proc/1/mountinfo").or_else(|_| fs::read_to_string("/proc/self/mountinfo"));
    mount_place(&table.unwrap_or_default(), numbers)
}

fn mount_place(table: &str, numbers: &[String]) -> Option<String> {
    table.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let (number, place) = (fields.next()?, fields.nth(1)?);
        numbers.iter().any(|n| n == number).then(|| place.to_owned())
    })
}

/// A process that has one of the devices open.
fn opened(numbers: &[String]) -> Option<String> {
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        for fd in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            // A descriptor that has just been closed is as good as none.
            let Ok(meta) = fs::metadata(fd.path()) else { continue };
            if meta.file_type().is_block_device() && numbers.contains(&number_of(meta.rdev())) {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Some(format!("opened by process {pid}, {}", name.trim()));
            }
        }
    }
    None
}

pub(super) fn number_of(device: u64) -> String {
    format!("{}:{}", libc::major(device), libc::minor(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_number() {
        let table = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                     99 22 259:3 / /mnt/a\\040b rw - ext4 /dev/ublkb0 rw\n";
        assert_eq!(mount_place(table, &["259:3".into()]).as_deref(), Some("/mnt/a\\040b"));
        assert_eq!(mount_place(table, &["259:4".into()]), None);
        assert_eq!(mount_place(table, &[]), None);
    }
}
