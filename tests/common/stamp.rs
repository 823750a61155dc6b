//! What stands in a sector: not 512 bytes, but a number that says where they came from.
//!
//! Zeros carry their origin too. So every value has one writer, and "which write did this read see?" is
//! never in doubt. That zeros written by the guest and zeros of the source are the same bytes does not
//! matter here: an engine that mixes them up would mix up data as well.
#![allow(dead_code)] // Each test uses its part.

use std::fmt;

/// Bytes of a sector.
pub const SECTOR: u64 = blkferry::engine::SECTOR_BYTES;

/// The content of a sector.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Stamp(u32);

const KIND_SHIFT: u32 = 28;

impl Stamp {
    /// Nothing was read yet.
    pub const NONE: Self = Self(0);
    /// What stands in an absent block of the cache: nobody may ever see it.
    pub const JUNK: Self = Self(5 << KIND_SHIFT);

    /// As a number, and back.
    pub fn number(self) -> u32 {
        self.0
    }

    /// See [`Stamp::number`].
    pub fn from_number(number: u32) -> Self {
        Self(number)
    }

    /// What the source has in this sector (perhaps zeros).
    pub fn source(sector: u64) -> Self {
        Self((1 << KIND_SHIFT) | sector as u32)
    }

    /// What the guest wrote here before the case began.
    pub fn old(sector: u64) -> Self {
        Self((2 << KIND_SHIFT) | sector as u32)
    }

    /// The data of a guest's write.
    pub fn write(op: u64) -> Self {
        Self((3 << KIND_SHIFT) | op as u32)
    }

    /// The zeros of a guest's zeroing or trim.
    pub fn zeros(op: u64) -> Self {
        Self((4 << KIND_SHIFT) | op as u32)
    }

    /// What another disk has in this sector.
    pub fn other(sector: u64) -> Self {
        Self((6 << KIND_SHIFT) | sector as u32)
    }

    /// Did the guest of this case make it?
    pub fn is_guests(self) -> bool {
        matches!(self.0 >> KIND_SHIFT, 3 | 4)
    }
}

impl fmt::Debug for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.0 & ((1 << KIND_SHIFT) - 1);
        match self.0 >> KIND_SHIFT {
            0 => write!(f, "nothing"),
            1 => write!(f, "source data of sector {number}"),
            2 => write!(f, "older guest data of sector {number}"),
            3 => write!(f, "data of op {number}"),
            4 => write!(f, "zeros of op {number}"),
            5 => write!(f, "junk of an absent block"),
            6 => write!(f, "another disk's data of sector {number}"),
            kind => write!(f, "garbage ({kind}, {number})"),
        }
    }
}
