//! Sizes and rates as people write them: `64K`, `100M`, `1G`.

/// A text that is no size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a size: write a number of bytes, or one with K, M, G or T (powers of 1024)")]
pub struct ParseSizeError(String);

const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// Reads a number of bytes with an optional suffix K, M, G or T (powers of 1024; `KiB`, `KB` and `k` are the same).
pub fn parse_size(text: &str) -> Result<u64, ParseSizeError> {
    let bad = || ParseSizeError(text.to_owned());
    let trimmed = text.trim_end_matches(['B', 'b']).trim_end_matches('i');
    let unit = trimmed.chars().last().map(|c| c.to_ascii_uppercase());
    let shift = UNITS.iter().find(|(letter, _)| Some(*letter) == unit).map(|(_, shift)| *shift);
    let digits = if shift.is_some() { &trimmed[..trimmed.len() - 1] } else { trimmed };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift.unwrap_or(0)).ok_or_else(bad)
}

/// Writes a number of bytes so that [`parse_size`] reads the same back.
pub fn format_size(bytes: u64) -> String {
    let exact = UNITS.iter().rev().find(|(_, shift)| bytes > 0 && bytes.trailing_zeros() >= *shift);
    exact.map_or_else(|| bytes.to_string(), |(letter, shift)| format!("{}{letter}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("64K", 65536), ("1MiB", 1 << 20), ("3g", 3 << 30), ("2TB", 2 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes));
            assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }
        for text in ["", "K", "1X", "-1", "1.5G", "99999999999999999999", "20000000T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
