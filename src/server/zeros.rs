//! Zeros that need not cross as data.

use std::sync::Arc;

use crate::uring::{Buffer, Part};

/// Granule in which zeros are looked for: a run of them crosses as a hole.
const ZERO_GRANULE: usize = 4096;
static ZEROS: [u8; ZERO_GRANULE] = [0; ZERO_GRANULE];

/// Cuts what was read into data and runs of zeros, along the granules of the disk.
pub fn without_zeros(offset_bytes: u64, bytes: Buffer) -> Vec<Part> {
    let bytes = Arc::new(bytes);
    let mut pieces: Vec<(bool, std::ops::Range<usize>)> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let to_boundary = ZERO_GRANULE - ((offset_bytes + at as u64) % ZERO_GRANULE as u64) as usize;
        let end = bytes.len().min(at + to_boundary);
        let zero = bytes[at..end] == ZEROS[..end - at];
        match pieces.last_mut() {
            Some((was_zero, range)) if *was_zero == zero => range.end = end,
            _ => pieces.push((zero, at..end)),
        }
        at = end;
    }
    let piece = |(zero, range): (bool, std::ops::Range<usize>)| match zero {
        true => Part::Zeros(range.len()),
        false => Part::Shared { bytes: bytes.clone(), range },
    };
    pieces.into_iter().map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(offset: u64, bytes: &[u8]) -> Vec<(bool, u64)> {
        let pieces = without_zeros(offset, bytes.to_vec().into());
        let mut flat = Vec::new();
        pieces.iter().for_each(|part| part.append_to(&mut flat));
        assert_eq!(flat, bytes);
        pieces.iter().map(|p| (matches!(p, Part::Zeros(_)), p.len() as u64)).collect()
    }

    #[test]
    fn runs_of_zeros_become_holes_along_the_granules() {
        let mut bytes = vec![0; 5 * 4096];
        bytes[4096 * 2 + 7] = 1;
        assert_eq!(shape(0, &bytes), [(true, 8192), (false, 4096), (true, 8192)]);
        assert_eq!(shape(0, &[0; 100]), [(true, 100)]);
        // Unaligned: the granules are the disk's, not the request's.
        assert_eq!(shape(4000, &bytes[4000..12000]), [(true, 4192), (false, 3808)]);
    }
}
