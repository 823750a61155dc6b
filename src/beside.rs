//! Where the files lie that belong to a disk: beside it, or under /var/lib for a block device.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

/// Where what belongs to block devices is kept.
const DEVICE_DIR: &str = "/var/lib/blkferry";

/// The file of a disk with this extension: `disk.raw` and `ferry` make `disk.raw.ferry`.
pub fn beside(disk: &Path, extension: &str) -> PathBuf {
    let is_device = fs::metadata(disk).is_ok_and(|m| m.file_type().is_block_device());
    let mut name = if is_device {
        let plain = fs::canonicalize(disk).unwrap_or_else(|_| disk.into());
        let flat = plain.display().to_string().trim_start_matches('/').replace('/', "-");
        Path::new(DEVICE_DIR).join(flat).into_os_string()
    } else {
        disk.as_os_str().to_owned()
    };
    name.push(".");
    name.push(extension);
    name.into()
}

/// The place for block devices may not be there yet; any other place is the user's.
pub fn make_device_dir(file: &Path) -> std::io::Result<()> {
    match file.parent().filter(|dir| *dir == Path::new(DEVICE_DIR)) {
        Some(dir) => fs::DirBuilder::new().recursive(true).mode(0o700).create(dir),
        None => Ok(()),
    }
}

/// Makes a rename or an unlink in the directory of `file` durable.
pub fn sync_dir_of(file: &Path) -> std::io::Result<()> {
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::File::open(dir)?.sync_all()
}
