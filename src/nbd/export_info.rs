//! What a server says about an export.

use super::consts::{DEFAULT_MAX_PAYLOAD, MAX_MIN_BLOCK, TransmissionFlags};
use super::error::ProtocolError;
use super::handoff::Standing;

/// The sizes that requests keep to, in bytes (spec: "Size constraints").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this. A power of two, at most 65536.
    pub min: u32,
    /// From this size on, aligned requests are efficient. A power of two, at least `min` and at least 512.
    pub preferred: u32,
    /// Largest payload of a read or write; at least `preferred`.
    pub max: u32,
}

impl BlockSizes {
    /// What a server supports when nothing is said.
    pub const SERVER_DEFAULT: Self = Self { min: 1, preferred: 4096, max: DEFAULT_MAX_PAYLOAD };
    /// What a client keeps to when nothing is said.
    pub const CLIENT_DEFAULT: Self = Self { min: 512, preferred: 4096, max: DEFAULT_MAX_PAYLOAD };

    /// Checks the rules of the spec. Fails with [`ProtocolError::BadBlockSizes`].
    pub fn check(self) -> Result<Self, ProtocolError> {
        let Self { min, preferred, max } = self;
        let sound = min.is_power_of_two()
            && min <= MAX_MIN_BLOCK
            && preferred.is_power_of_two()
            && preferred >= min.max(512)
            && max >= preferred;
        if sound { Ok(self) } else { Err(ProtocolError::BadBlockSizes { min, preferred, max }) }
    }
}

/// One export of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its name: at most 4096 bytes, no NUL; may be empty.
    pub name: String,
    /// A text for humans.
    pub description: Option<String>,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// What it can do. What goes on the wire is [`wire_flags`](Self::wire_flags).
    pub flags: TransmissionFlags,
    /// Minimum block size, in bytes.
    pub min_block: u32,
    /// Preferred block size, in bytes.
    pub preferred_block: u32,
    /// Maximum payload, in bytes.
    pub max_block: u32,
    /// What the private ferry option answers; `None` refuses that option.
    pub identity: Option<String>,
    /// How the disk stands, if it can change hands: part of that answer.
    pub standing: Option<Standing>,
    /// It offers the metadata context `blkferry:hot`.
    pub tells_hot: bool,
}

impl ExportInfo {
    /// An export with the spec's default block sizes, no description and no identity.
    pub fn new(name: impl Into<String>, size_bytes: u64, flags: TransmissionFlags) -> Self {
        let BlockSizes { min, preferred, max } = BlockSizes::SERVER_DEFAULT;
        Self {
            name: name.into(),
            description: None,
            size_bytes,
            flags,
            min_block: min,
            preferred_block: preferred,
            max_block: max,
            identity: None,
            standing: None,
            tells_hot: false,
        }
    }

    /// The three block sizes together.
    pub fn block_sizes(&self) -> BlockSizes {
        BlockSizes { min: self.min_block, preferred: self.preferred_block, max: self.max_block }
    }

    /// The transmission flags to send: `HAS_FLAGS` is set, `SEND_DF` only goes with structured replies,
    /// `SEND_FAST_ZERO` only with `SEND_WRITE_ZEROES` (spec: "Transmission flags").
    pub fn wire_flags(&self, structured: bool) -> TransmissionFlags {
        let mut flags = self.flags | TransmissionFlags::HAS_FLAGS;
        if !structured {
            flags.remove(TransmissionFlags::SEND_DF);
        }
        if !flags.contains(TransmissionFlags::SEND_WRITE_ZEROES) {
            flags.remove(TransmissionFlags::SEND_FAST_ZERO);
        }
        flags
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_keep_the_rules_of_the_spec() {
        let ok = |min, preferred, max| BlockSizes { min, preferred, max }.check().is_ok();
        assert!(ok(1, 512, 512));
        assert!(ok(65536, 65536, u32::MAX));
        assert!(ok(512, 4096, 33_000_001), "the maximum need not be a power of two");
        assert!(!ok(0, 4096, 4096));
        assert!(!ok(3, 4096, 4096));
        assert!(!ok(131_072, 131_072, 1 << 25), "min above 65536");
        assert!(!ok(1, 256, 4096), "preferred below 512");
        assert!(!ok(4096, 512, 4096), "preferred below min");
        assert!(!ok(1, 5000, 1 << 25));
        assert!(!ok(1, 4096, 4095), "max below preferred");
    }

    #[test]
    fn wire_flags_never_promise_what_the_session_lacks() {
        let all = ExportInfo::new("", 0, TransmissionFlags::SEND_DF | TransmissionFlags::SEND_FAST_ZERO);
        assert_eq!(all.wire_flags(false), TransmissionFlags::HAS_FLAGS);
        assert_eq!(all.wire_flags(true), TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_DF);
    }
}
