//! Requests (spec: "Request message", "Request types"): codec, and the rules a server holds them to.
//!
//! ```text
//! C: 0x25609513 (4)  flags (2)  type (2)  cookie (8)  offset (8)  length (4)   [length bytes, WRITE only]
//! ```
//! Extended headers would be a second codec for the same [`Request`].

use super::consts::{CommandFlags, REQUEST_MAGIC, TransmissionFlags};
use super::errno::NbdError;
use super::error::ProtocolError;
use super::handoff::MAX_HANDOFF_LEN;
use super::option::wire_enum;
use std::fmt;

wire_enum! {
    /// What a request asks for (spec: "Request types").
    Command: u16 {
        /// Read `len` bytes.
        Read = 0, "NBD_CMD_READ";
        /// Write the `len` bytes that follow the header.
        Write = 1, "NBD_CMD_WRITE";
        /// Finish what is outstanding, then hang up; has no reply.
        Disc = 2, "NBD_CMD_DISC";
        /// Make all acknowledged writes durable.
        Flush = 3, "NBD_CMD_FLUSH";
        /// This range is no longer needed.
        Trim = 4, "NBD_CMD_TRIM";
        /// This range will be read soon.
        Cache = 5, "NBD_CMD_CACHE";
        /// Make this range read as zeros.
        WriteZeroes = 6, "NBD_CMD_WRITE_ZEROES";
        /// Which parts of this range are holes or zeros?
        BlockStatus = 7, "NBD_CMD_BLOCK_STATUS";
        /// Private to blkferry: the hashes of this range. Needs the ferry option and structured replies.
        FerryHash = 0xf001, "CMD_FERRY_HASH";
        /// Private to blkferry: a step of a handoff, in the `len` bytes that follow the header.
        FerryHandoff = 0xf002, "CMD_FERRY_HANDOFF";
        /// Private to blkferry: which parts of this range were written since the disk was made from its base?
        FerryChanged = 0xf003, "CMD_FERRY_CHANGED";
    }
}

impl Command {
    /// Whether the command changes what the export holds.
    pub const fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes)
    }
}

/// A request header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How it is to be done; unknown bits are kept.
    pub flags: CommandFlags,
    /// What is asked.
    pub command: Command,
    /// The client's own mark, returned in the reply.
    pub cookie: u64,
    /// First byte, in bytes from the start of the export.
    pub offset: u64,
    /// Length of the range, in bytes.
    pub len: u32,
}

impl Request {
    /// Bytes on the wire, without data.
    pub const LEN: usize = 28;

    /// Reads a header. Fails with [`ProtocolError::BadRequestMagic`], after which nothing that follows makes sense.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, ProtocolError> {
        let [m0, m1, m2, m3, f0, f1, t0, t1, rest @ ..] = *bytes;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        if magic != REQUEST_MAGIC {
            return Err(ProtocolError::BadRequestMagic { got: magic });
        }
        let [c0, c1, c2, c3, c4, c5, c6, c7, o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        Ok(Self {
            flags: CommandFlags::from_bits_retain(u16::from_be_bytes([f0, f1])),
            command: Command::from_wire(u16::from_be_bytes([t0, t1])),
            cookie: u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            len: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.bits().to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_wire().to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..28].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    /// Bytes of data that follow the header. A server has to read (or skip) them even if it refuses the request.
    pub const fn payload_len(&self) -> u32 {
        match self.command {
            Command::Write | Command::FerryHandoff => self.len,
            _ => 0,
        }
    }

    /// Checks the request against what was agreed on, in this order: command, read-only, flags, length, alignment,
    /// range. The error is what the reply has to say (spec: "Error values", "Size constraints").
    ///
    /// `NBD_CMD_DISC` is always fine: it ends the session, and has no reply that could carry an error. A length of
    /// 0, which the spec leaves open, is `NBD_EINVAL`.
    pub fn validate(&self, limits: &Limits) -> Result<(), NbdError> {
        if self.command == Command::Disc {
            return Ok(());
        }
        self.check_command(limits)?;
        self.check_flags(limits)?;
        if self.command == Command::Flush {
            return if self.offset == 0 && self.len == 0 { Ok(()) } else { Err(NbdError::Inval) };
        }
        if self.command == Command::FerryHandoff {
            let fits = (1..=MAX_HANDOFF_LEN as u32).contains(&self.len);
            return if self.offset == 0 && fits { Ok(()) } else { Err(NbdError::Inval) };
        }
        self.check_range(limits)
    }

    fn check_command(&self, limits: &Limits) -> Result<(), NbdError> {
        if self.command.writes() && limits.flags.contains(TransmissionFlags::READ_ONLY) {
            return Err(NbdError::Perm);
        }
        let offered = match self.command {
            Command::Read | Command::Write | Command::Disc => true,
            Command::Flush => limits.flags.contains(TransmissionFlags::SEND_FLUSH),
            Command::Trim => limits.flags.contains(TransmissionFlags::SEND_TRIM),
            Command::Cache => limits.flags.contains(TransmissionFlags::SEND_CACHE),
            Command::WriteZeroes => limits.flags.contains(TransmissionFlags::SEND_WRITE_ZEROES),
            Command::BlockStatus => limits.structured && limits.contexts,
            Command::FerryHash => limits.structured && limits.ferry,
            Command::FerryHandoff | Command::FerryChanged => limits.structured && limits.handoff,
            Command::Unknown(_) => false,
        };
        if offered { Ok(()) } else { Err(NbdError::Inval) }
    }

    fn check_flags(&self, limits: &Limits) -> Result<(), NbdError> {
        let mut allowed = match self.command {
            Command::Read if limits.structured && limits.flags.contains(TransmissionFlags::SEND_DF) => CommandFlags::DF,
            Command::WriteZeroes if limits.flags.contains(TransmissionFlags::SEND_FAST_ZERO) => {
                CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO
            }
            Command::WriteZeroes => CommandFlags::NO_HOLE,
            Command::BlockStatus => CommandFlags::REQ_ONE,
            _ => CommandFlags::empty(),
        };
        // Known clients set FUA on everything, and the spec lets them.
        allowed.set(CommandFlags::FUA, limits.flags.contains(TransmissionFlags::SEND_FUA));
        if allowed.contains(self.flags) { Ok(()) } else { Err(NbdError::Inval) }
    }

    fn check_range(&self, limits: &Limits) -> Result<(), NbdError> {
        if self.len == 0 {
            return Err(NbdError::Inval);
        }
        if self.len > limits.max_payload {
            match self.command {
                // With structured replies a client expects this answer, and tries again with less.
                Command::Read if limits.structured => return Err(NbdError::Overflow),
                Command::Read | Command::Write => return Err(NbdError::Inval),
                _ => {}
            }
        }
        let min_block = limits.min_block.max(1);
        if !self.offset.is_multiple_of(u64::from(min_block)) || !self.len.is_multiple_of(min_block) {
            return Err(NbdError::Inval);
        }
        match self.offset.checked_add(u64::from(self.len)) {
            Some(end) if end <= limits.size_bytes => Ok(()),
            _ if matches!(self.command, Command::Write | Command::WriteZeroes) => Err(NbdError::NoSpc),
            _ => Err(NbdError::Inval),
        }
    }
}

/// What requests of a session have to keep to. See [`Session::limits`](super::Session::limits).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size of the export, in bytes.
    pub size_bytes: u64,
    /// The transmission flags as they were sent.
    pub flags: TransmissionFlags,
    /// Offsets and lengths are multiples of this, in bytes (0 counts as 1).
    pub min_block: u32,
    /// Largest read or write, in bytes.
    pub max_payload: u32,
    /// Structured replies were agreed on.
    pub structured: bool,
    /// A metadata context was selected.
    pub contexts: bool,
    /// The ferry option was answered.
    pub ferry: bool,
    /// It said how the disk stands.
    pub handoff: bool,
}

#[cfg(test)]
mod tests;
