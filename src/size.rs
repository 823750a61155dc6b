//! Sizes, rates and durations as people write them: `64K`, `100M`, `1G`, `30s`.

use std::time::Duration;

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

/// A text that is no duration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a duration: write a number with ms, s, m or h, such as 30s")]
pub struct ParseDurationError(String);

const DURATION_UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];

/// Reads a duration: a whole number with `ms`, `s`, `m` or `h`.
pub fn parse_duration(text: &str) -> Result<Duration, ParseDurationError> {
    let bad = || ParseDurationError(text.to_owned());
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let (_, ms) = DURATION_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(bad)?;
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(*ms).map(Duration::from_millis).ok_or_else(bad)
}

/// Writes a duration of whole milliseconds so that [`parse_duration`] reads the same back.
pub fn format_duration(duration: Duration) -> String {
    let ms = duration.as_millis();
    let exact = DURATION_UNITS.iter().rev().find(|(_, unit)| ms > 0 && ms.is_multiple_of(u128::from(*unit)));
    exact.map_or_else(|| format!("{ms}ms"), |(name, unit)| format!("{}{name}", ms / u128::from(*unit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_written() {
        for (text, ms) in [("5s", 5000), ("1500ms", 1500), ("2m", 120_000), ("1h", 3_600_000), ("0s", 0)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)));
            assert_eq!(parse_duration(&format_duration(Duration::from_millis(ms))), Ok(Duration::from_millis(ms)));
        }
        for text in ["", "5", "s", "-1s", "1.5s", "5d", "99999999999999999999s", "9999999999999999h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

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
