//! Keeping an image that was given away from being written, also when no export runs: it is made read-only, and
//! immutable where the file system and the user's rights allow that. A block device has no such thing that lasts.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

/// Bits that allow somebody to write.
const WRITE_BITS: u32 = 0o222;
const MODE_BITS: u32 = 0o7777;

/// How well an image is fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// Nobody can write it, root included.
    Immutable,
    /// Only root can.
    ReadOnly,
    /// Nothing stands in the way once no export runs.
    None,
}

/// Permission bits of an image; `None` if it is not a file.
pub fn mode_of(image: &File) -> io::Result<Option<u32>> {
    let meta = image.metadata()?;
    Ok(meta.is_file().then(|| meta.permissions().mode() & MODE_BITS))
}

/// Fences an image.
pub fn raise(image: &File) -> io::Result<Fence> {
    let Some(mode) = mode_of(image)? else { return Ok(Fence::None) };
    if is_immutable(image) {
        return Ok(Fence::Immutable);
    }
    let read_only = image.set_permissions(Permissions::from_mode(mode & !WRITE_BITS));
    let immutable = ioctl_getflags(image).and_then(|flags| ioctl_setflags(image, flags | IFlags::IMMUTABLE));
    Ok(match (immutable, read_only) {
        (Ok(()), _) => Fence::Immutable,
        (Err(_), Ok(())) => Fence::ReadOnly,
        (Err(_), Err(_)) => Fence::None,
    })
}

/// Takes the fence away; `mode`: the permission bits from before it.
pub fn lower(image: &File, mode: Option<u32>) -> io::Result<()> {
    let Some(now) = mode_of(image)? else { return Ok(()) };
    if is_immutable(image) {
        let flags = ioctl_getflags(image)?;
        ioctl_setflags(image, flags - IFlags::IMMUTABLE)?;
    }
    match mode {
        // What somebody else made of it since stays.
        Some(mode) if mode != now && mode & !WRITE_BITS == now => image.set_permissions(Permissions::from_mode(mode)),
        _ => Ok(()),
    }
}

fn is_immutable(image: &File) -> bool {
    ioctl_getflags(image).is_ok_and(|flags| flags.contains(IFlags::IMMUTABLE))
}
