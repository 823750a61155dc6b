//! Pages written down as what is not zero in them.

use crate::bytes::bytes;

/// `len` bytes of zeros but for these pieces: offset, then hexadecimal digits and 'quoted ASCII'.
pub fn sparse(len: usize, pieces: &[(usize, &str)]) -> Vec<u8> {
    let mut out = vec![0; len];
    for (offset, text) in pieces {
        let piece = bytes(text);
        assert!(out[*offset..offset + piece.len()].iter().all(|&byte| byte == 0), "pieces overlap at {offset}");
        out[*offset..offset + piece.len()].copy_from_slice(&piece);
    }
    out
}

/// The eight seals of a page: sequence and checksum at the end of each sector.
pub fn seals(seals: [&'static str; 8]) -> Vec<(usize, &'static str)> {
    seals.into_iter().enumerate().map(|(sector, seal)| (sector * 512 + 504, seal)).collect()
}

#[track_caller]
pub fn assert_bytes(got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len(), "the lengths differ");
    if let Some(at) = (0..got.len()).find(|&at| got[at] != want[at]) {
        let end = got.len().min(at + 16);
        panic!("from byte {at} on:\n got {:02x?}\nwant {:02x?}", &got[at..end], &want[at..end]);
    }
}
