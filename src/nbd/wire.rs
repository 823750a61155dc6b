//! Reading and collecting wire bytes: the only place that cuts slices.
//!
//! [`Reader`] walks over bytes that are all there; [`Intake`] collects exactly as many bytes as the next message
//! needs, however they are split on their way, and never more (the bytes behind the last handshake message belong
//! to the transmission phase).

use super::consts::MAX_NAME;
use super::error::ProtocolError;
use thiserror::Error;

/// How the inside of a message is wrong. Always wrapped by an error that says which message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Defect {
    /// A length field points past the end of the message.
    #[error("it ends too early")]
    TooShort,
    /// The message has more bytes than its fields.
    #[error("it has bytes left over")]
    TrailingBytes,
    /// A string above the limit of 4096 bytes (spec: "Conventions").
    #[error("a string in it is longer than 4096 bytes")]
    StringTooLong,
    /// A string that is not UTF-8 (spec: "Conventions").
    #[error("a string in it is not UTF-8")]
    NotUtf8,
    /// A string that contains NUL (spec: "Conventions").
    #[error("a string in it contains a NUL byte")]
    ContainsNul,
    /// A message of fixed length, or of whole records, that has another length.
    #[error("its length is not one that this kind of message can have")]
    WrongLength,
    /// A length or an error number that must not be zero.
    #[error("a field that must not be zero is zero")]
    Zero,
    /// Transmission flags without `NBD_FLAG_HAS_FLAGS`.
    #[error("its transmission flags lack NBD_FLAG_HAS_FLAGS")]
    NoHasFlags,
    /// A JSON text that does not parse, or lacks a field.
    #[error("its JSON text cannot be understood")]
    BadJson,
    /// A flag that this kind of message must carry is missing.
    #[error("a flag that it must carry is missing")]
    MissingFlag,
}

/// A cursor over the bytes of one message. Every method fails instead of panicking.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) fn take(&mut self, len_bytes: usize) -> Result<&'a [u8], Defect> {
        let (head, tail) = self.rest.split_at_checked(len_bytes).ok_or(Defect::TooShort)?;
        self.rest = tail;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Defect> {
        let (head, tail) = self.rest.split_first_chunk::<N>().ok_or(Defect::TooShort)?;
        self.rest = tail;
        Ok(*head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Defect> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Defect> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Defect> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with a 32-bit length before it.
    pub(super) fn string32(&mut self) -> Result<String, Defect> {
        let len_bytes = self.u32()? as usize;
        string(self.take(len_bytes)?)
    }

    /// All bytes that are left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// How many bytes are left.
    pub(super) fn left(&self) -> usize {
        self.rest.len()
    }

    pub(super) fn end(&self) -> Result<(), Defect> {
        if self.rest.is_empty() { Ok(()) } else { Err(Defect::TrailingBytes) }
    }
}

/// A string as the spec ("Conventions") allows it: UTF-8, no NUL, at most 4096 bytes.
pub(super) fn string(bytes: &[u8]) -> Result<String, Defect> {
    if bytes.len() > MAX_NAME {
        return Err(Defect::StringTooLong);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| Defect::NotUtf8)?;
    if text.contains('\0') {
        return Err(Defect::ContainsNul);
    }
    Ok(text.to_owned())
}

/// A peer's text for a human, made safe to print: at most 4096 bytes, no control characters (a terminal would obey
/// them), wrong UTF-8 replaced.
pub(super) fn printable(bytes: &[u8]) -> String {
    let bytes = bytes.get(..MAX_NAME).unwrap_or(bytes);
    let text = String::from_utf8_lossy(bytes);
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.trim().to_owned()
}

/// The longest start of `text` that has at most `max_bytes` bytes and ends between two characters.
pub(super) fn cut(text: &str, max_bytes: usize) -> &str {
    &text[..text.floor_char_boundary(max_bytes)]
}

/// Appends a string with a 32-bit length before it.
pub(super) fn put_string32(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Collects the bytes of the next message.
#[derive(Debug)]
pub(super) struct Intake {
    have: Vec<u8>,
    want_bytes: usize,
}

impl Intake {
    pub(super) fn new(want_bytes: usize) -> Self {
        Self { have: Vec::new(), want_bytes }
    }

    /// How many bytes are still missing; 0 only when nothing more is wanted.
    pub(super) fn missing_bytes(&self) -> usize {
        self.want_bytes - self.have.len()
    }

    /// Sets the length of the next message. The former one has been handed out.
    pub(super) fn expect_bytes(&mut self, want_bytes: usize) {
        self.have.clear();
        self.want_bytes = want_bytes;
    }

    /// Takes bytes; hands out the message when it is complete. Memory grows with what has arrived, never with what
    /// a length field promises.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Option<Vec<u8>>, ProtocolError> {
        let missing_bytes = self.missing_bytes();
        if bytes.len() > missing_bytes {
            return Err(ProtocolError::FedTooMuch { needs_bytes: missing_bytes, got_bytes: bytes.len() });
        }
        self.have.extend_from_slice(bytes);
        if self.missing_bytes() > 0 {
            return Ok(None);
        }
        self.want_bytes = 0;
        Ok(Some(std::mem::take(&mut self.have)))
    }
}
