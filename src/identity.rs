//! What the contents of a disk are known by: enough to notice that a source was replaced or written to.
//!
//! BLAKE3 of the size, the modification time where there is one, and 16 samples of the contents, the first
//! of them at the start of the disk, where partition tables and file systems keep their UUIDs. Both ends
//! use it: the export on its image, the fetch layer on servers that have no identity to tell.

use crate::engine::ByteRange;

const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 4096;

/// The ranges that are sampled on a disk of that size, evenly spread, on boundaries of 4 KiB.
pub fn sample_ranges(size_bytes: u64) -> impl Iterator<Item = ByteRange> {
    let last = u128::from(size_bytes.saturating_sub(1) / SAMPLE_BYTES);
    (0..SAMPLES).map(move |index| {
        let start = (last * u128::from(index) / u128::from(SAMPLES - 1)) as u64 * SAMPLE_BYTES;
        ByteRange { start, end: size_bytes.min(start + SAMPLE_BYTES) }
    })
}

/// Makes an identity out of its parts.
pub struct IdentityHasher(blake3::Hasher);

impl IdentityHasher {
    /// For a disk of that size, changed last at that time (seconds, nanoseconds), if it says so.
    pub fn new(size_bytes: u64, modified: Option<(i64, i64)>) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"blkferry identity v1");
        hasher.update(&size_bytes.to_le_bytes());
        if let Some((seconds, nanoseconds)) = modified {
            hasher.update(&seconds.to_le_bytes());
            hasher.update(&nanoseconds.to_le_bytes());
        }
        Self(hasher)
    }

    /// Adds a sample; they come in the order of [`sample_ranges`].
    pub fn sample(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// 128 bits in hexadecimal, after the word that says where they come from.
    pub fn finish(self, kind: &str) -> String {
        format!("{kind}:{}", &self.0.finalize().to_hex()[..32])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_lie_on_the_disk() {
        for size in [512, 4096, 4608, 1 << 20, (1 << 40) + 512, i64::MAX as u64 / 512 * 512] {
            let ranges: Vec<ByteRange> = sample_ranges(size).collect();
            assert_eq!(ranges[0].start, 0);
            assert!(ranges.is_sorted_by_key(|r| r.start) && ranges.iter().all(|r| r.end <= size && !r.is_empty()));
        }
    }
}
