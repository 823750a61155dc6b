//! Where a file has nothing: what was reserved and never written need not be read.

use std::fs::File;
use std::ops::Range;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// The next stretch of a file, at or after `from`, that may hold anything but zeros. None: there is none.
pub(super) fn next_data(file: &File, from: u64) -> Option<Range<u64>> {
    let start = match lseek(file, from as i64, Whence::SeekData) {
        Ok(start) => start as u64,
        Err(Errno::ENXIO) => return None,
        // It cannot tell: all of it may.
        Err(_) => return Some(from..u64::MAX),
    };
    let end = lseek(file, start as i64, Whence::SeekHole).map_or(u64::MAX, |end| end as u64);
    Some(start.max(from)..end.max(start + 1))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_was_written_is_found_and_what_was_reserved_is_not() {
        let file = tempfile::tempfile().unwrap();
        nix::fcntl::posix_fallocate(&file, 0, 64 << 20).unwrap();
        file.write_all_at(b"here", 20 << 20).unwrap();
        // A file system may know less, and never more: then everything counts as data.
        let mut at = 0;
        let mut found = false;
        while let Some(data) = next_data(&file, at) {
            assert!(data.start >= at && data.end > data.start);
            found |= data.contains(&(20 << 20));
            at = data.end;
        }
        assert!(found);
    }
}
