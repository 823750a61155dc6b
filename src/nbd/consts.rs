//! Numbers of the protocol: magics, limits and flag fields (spec: "Values").
//!
//! Numbers that name a kind of message are enums beside the messages: [`OptionKind`](super::OptionKind) and
//! [`OptionReplyKind`](super::OptionReplyKind), [`Command`](super::Command), [`ChunkKind`](super::ChunkKind).

use bitflags::bitflags;

/// First 8 bytes of every NBD server: ASCII `NBDMAGIC` (spec: "Newstyle negotiation").
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second 8 bytes of a newstyle server, and first 8 of every option: ASCII `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Second 8 bytes of an oldstyle server (spec: "Oldstyle negotiation").
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First 8 bytes of every option reply (spec: "Fixed newstyle negotiation").
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First 4 bytes of a request (spec: "Request message").
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First 4 bytes of a simple reply (spec: "Simple reply message").
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First 4 bytes of a structured reply chunk (spec: "Structured reply chunk message").
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// The port that IANA reserved for NBD.
pub const DEFAULT_PORT: u16 = 10809;
/// The metadata context that tells holes and zeros (spec: "`base:allocation` metadata context").
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Zero bytes behind an `NBD_OPT_EXPORT_NAME` reply, unless both ends set `NO_ZEROES`.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// Our own metadata context: what the server has in its page cache. See `docs/FORMAT.md`, "blkferry:hot".
pub const FERRY_HOT: &str = "blkferry:hot";
/// State of an extent in that context: it is there.
pub const FERRY_IS_HOT: u32 = 1;
/// Besides: it was used since it came there.
pub const FERRY_WAS_USED: u32 = 2;
/// The context id that answers to `CMD_FERRY_CHANGED` carry.
pub const FERRY_CHANGED_ID: u32 = 0x6672_0001;
/// In those answers: this extent was written since.
pub const FERRY_CHANGED: u32 = 1;
/// Version of the private ferry option, and of its answer.
pub const FERRY_VERSION: u16 = 1;

/// Longest string, in bytes (spec: "Conventions").
pub const MAX_NAME: usize = 4096;
/// Longest option data that the server looks at, in bytes. Longer data is skipped and answered with
/// `NBD_REP_ERR_TOO_BIG`.
pub const MAX_OPTION_LEN: usize = 64 * 1024;
/// Longest option data that the server skips, in bytes. More is an attack or garbage: the connection ends.
pub const MAX_SKIPPED_OPTION_LEN: usize = 1024 * 1024;
/// Options that a server answers on one connection before it ends it.
pub const MAX_OPTIONS: u32 = 1024;
/// Longest option reply data that a client accepts, in bytes.
pub const MAX_OPTION_REPLY_LEN: usize = 64 * 1024;
/// Bytes that a client accepts from a server in the whole handshake (a long export list, mostly).
pub const MAX_HANDSHAKE_BYTES: usize = 4 * 1024 * 1024;
/// Payload limit where nothing else was agreed, in bytes: 2^25 (spec: "Size constraints").
pub const DEFAULT_MAX_PAYLOAD: u32 = 32 * 1024 * 1024;
/// Largest minimum block size that may be advertised, in bytes: 2^16 (spec: "Size constraints").
pub const MAX_MIN_BLOCK: u32 = 64 * 1024;
/// Most extents in one block status chunk: 2^20 (spec: `NBD_REPLY_TYPE_BLOCK_STATUS`).
pub const MAX_EXTENTS: usize = 1 << 20;
/// Most hashes in one ferry hash chunk: 2^20, that is 32 MiB of payload.
pub const MAX_FERRY_HASHES: usize = 1 << 20;
/// Most extents in one chunk of a context of ours, [`FERRY_HOT`] or [`FERRY_CHANGED_ID`].
pub const MAX_FERRY_EXTENTS: usize = 64 << 10;

bitflags! {
    /// What the server offers in its greeting (spec: "Handshake flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct HandshakeFlags: u16 {
        /// The server speaks fixed newstyle.
        const FIXED_NEWSTYLE = 1 << 0;
        /// The server can leave out the 124 zero bytes of an `NBD_OPT_EXPORT_NAME` reply.
        const NO_ZEROES = 1 << 1;
    }

    /// What the client chooses of the offer (spec: "Client flags"). An unknown bit ends the connection.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct ClientFlags: u32 {
        /// The client speaks fixed newstyle.
        const FIXED_NEWSTYLE = 1 << 0;
        /// The server leaves out the 124 zero bytes.
        const NO_ZEROES = 1 << 1;
    }

    /// What an export can do (spec: "Transmission flags"). Unknown bits are ignored by clients.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct TransmissionFlags: u16 {
        /// Always set on the wire.
        const HAS_FLAGS = 1 << 0;
        /// Writes fail with `NBD_EPERM`.
        const READ_ONLY = 1 << 1;
        /// `NBD_CMD_FLUSH` is there.
        const SEND_FLUSH = 1 << 2;
        /// [`CommandFlags::FUA`] is there.
        const SEND_FUA = 1 << 3;
        /// The export seeks like a spinning disk.
        const ROTATIONAL = 1 << 4;
        /// `NBD_CMD_TRIM` is there.
        const SEND_TRIM = 1 << 5;
        /// `NBD_CMD_WRITE_ZEROES` and [`CommandFlags::NO_HOLE`] are there.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// [`CommandFlags::DF`] is there; only with structured replies.
        const SEND_DF = 1 << 7;
        /// A flush on one connection covers the writes of all.
        const CAN_MULTI_CONN = 1 << 8;
        /// The resize extension (not spoken here).
        const SEND_RESIZE = 1 << 9;
        /// `NBD_CMD_CACHE` is there.
        const SEND_CACHE = 1 << 10;
        /// [`CommandFlags::FAST_ZERO`] is there; only with `SEND_WRITE_ZEROES`.
        const SEND_FAST_ZERO = 1 << 11;
    }

    /// How a request is to be done (spec: "Command flags"). Bits that are not named here survive decoding, so that
    /// [`Request::validate`](super::Request::validate) can refuse them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct CommandFlags: u16 {
        /// Answer only when what was written is on stable storage.
        const FUA = 1 << 0;
        /// Zero without punching a hole (`NBD_CMD_WRITE_ZEROES`).
        const NO_HOLE = 1 << 1;
        /// Do not fragment the reply (`NBD_CMD_READ`).
        const DF = 1 << 2;
        /// One extent only (`NBD_CMD_BLOCK_STATUS`).
        const REQ_ONE = 1 << 3;
        /// Zero quickly or fail quickly with `NBD_ENOTSUP` (`NBD_CMD_WRITE_ZEROES`).
        const FAST_ZERO = 1 << 4;
    }

    /// Flags of a structured reply chunk (spec: "Structured reply flags"). Unknown bits are ignored.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct ReplyFlags: u16 {
        /// The last chunk of this reply.
        const DONE = 1 << 0;
    }

    /// State of an extent in `base:allocation`. Bits that are not named here survive decoding and mean nothing.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct StateFlags: u32 {
        /// Not allocated: a write may need space.
        const HOLE = 1 << 0;
        /// Reads as zeros.
        const ZERO = 1 << 1;
    }
}
