//! Bytes as people write them down.

/// Bytes from hexadecimal digits and 'quoted ASCII'; white space separates.
pub fn bytes(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for (index, part) in text.split('\'').enumerate() {
        if index % 2 == 1 {
            out.extend_from_slice(part.as_bytes());
            continue;
        }
        let digits: Vec<u8> = part.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        assert!(digits.len().is_multiple_of(2), "odd number of digits in {part:?}");
        for pair in digits.chunks(2) {
            let pair = std::str::from_utf8(pair).expect("hexadecimal digits");
            out.push(u8::from_str_radix(pair, 16).expect("hexadecimal digits"));
        }
    }
    out
}
