//! Options and their replies: the frames of the handshake (spec: "Fixed newstyle negotiation").
//!
//! ```text
//! C: IHAVEOPT (8)   option (4)  length (4)              data…
//! S: 0x3e889…  (8)  option (4)  reply type (4)  length (4)  data…
//! ```
//! The data of each option is in [`option_data`](super::option_data).

use super::consts::{OPTION_MAGIC, OPTION_REPLY_MAGIC};
use super::error::ProtocolError;
use std::fmt;

/// Makes an enum of wire numbers that keeps the numbers it does not know.
macro_rules! wire_enum {
    ($(#[$doc:meta])* $name:ident: $ty:ty {
        $($(#[$variant_doc:meta])* $variant:ident = $value:literal, $spec:literal;)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
            /// A number that this version does not know.
            Unknown($ty),
        }

        impl $name {
            /// The meaning of a number from the wire.
            pub const fn from_wire(value: $ty) -> Self {
                match value {
                    $($value => Self::$variant,)*
                    other => Self::Unknown(other),
                }
            }

            /// The number on the wire.
            pub const fn to_wire(self) -> $ty {
                match self {
                    $(Self::$variant => $value,)*
                    Self::Unknown(value) => value,
                }
            }
        }

        /// The name that the spec uses.
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$variant => f.write_str($spec),)*
                    Self::Unknown(value) => write!(f, "number {value:#x}"),
                }
            }
        }
    };
}
pub(super) use wire_enum;

wire_enum! {
    /// What a client asks for in the handshake (spec: "Option types").
    OptionKind: u32 {
        /// Choose an export, the old way: no errors possible.
        ExportName = 1, "NBD_OPT_EXPORT_NAME";
        /// End the session.
        Abort = 2, "NBD_OPT_ABORT";
        /// Which exports are there?
        List = 3, "NBD_OPT_LIST";
        /// Go on in TLS.
        StartTls = 5, "NBD_OPT_STARTTLS";
        /// Tell about an export.
        Info = 6, "NBD_OPT_INFO";
        /// Choose an export, and enter transmission.
        Go = 7, "NBD_OPT_GO";
        /// Use structured replies.
        StructuredReply = 8, "NBD_OPT_STRUCTURED_REPLY";
        /// Which metadata contexts are there?
        ListMetaContext = 9, "NBD_OPT_LIST_META_CONTEXT";
        /// Select metadata contexts.
        SetMetaContext = 10, "NBD_OPT_SET_META_CONTEXT";
        /// Use extended headers (not spoken yet).
        ExtendedHeaders = 11, "NBD_OPT_EXTENDED_HEADERS";
        /// Private to blkferry: are you a blkferry export, and which disk is it?
        Ferry = 0x6672_7279, "NBD_OPT_FERRY";
    }
}

wire_enum! {
    /// What a server answers to an option (spec: "Option reply types").
    OptionReplyKind: u32 {
        /// Done, or the last of several replies.
        Ack = 1, "NBD_REP_ACK";
        /// One export of the list.
        Server = 2, "NBD_REP_SERVER";
        /// One piece of information on an export.
        Info = 3, "NBD_REP_INFO";
        /// One metadata context.
        MetaContext = 4, "NBD_REP_META_CONTEXT";
        /// Private to blkferry: the identity of the disk.
        Ferry = 0x6672_7279, "NBD_REP_FERRY";
        /// The server does not know this option.
        ErrUnsupported = 0x8000_0001, "NBD_REP_ERR_UNSUP";
        /// The server's configuration forbids it.
        ErrPolicy = 0x8000_0002, "NBD_REP_ERR_POLICY";
        /// The option is wrong in itself.
        ErrInvalid = 0x8000_0003, "NBD_REP_ERR_INVALID";
        /// Not on this platform.
        ErrPlatform = 0x8000_0004, "NBD_REP_ERR_PLATFORM";
        /// Not without TLS.
        ErrTlsRequired = 0x8000_0005, "NBD_REP_ERR_TLS_REQD";
        /// No such export.
        ErrUnknown = 0x8000_0006, "NBD_REP_ERR_UNKNOWN";
        /// The server is going away; the client has to disconnect.
        ErrShutdown = 0x8000_0007, "NBD_REP_ERR_SHUTDOWN";
        /// Not unless the client asks for the block sizes.
        ErrBlockSizeRequired = 0x8000_0008, "NBD_REP_ERR_BLOCK_SIZE_REQD";
        /// The request or its answer is too large.
        ErrTooBig = 0x8000_0009, "NBD_REP_ERR_TOO_BIG";
        /// Not without extended headers.
        ErrExtHeaderRequired = 0x8000_000a, "NBD_REP_ERR_EXT_HEADER_REQD";
    }
}

impl OptionReplyKind {
    /// Whether this is an error reply: bit 31 is set, known or not.
    pub const fn is_error(self) -> bool {
        self.to_wire() & (1 << 31) != 0
    }
}

/// What stands before the data of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// What is asked.
    pub option: OptionKind,
    /// Bytes of data that follow.
    pub len_bytes: u32,
}

impl OptionHeader {
    /// Bytes on the wire.
    pub const LEN: usize = 16;

    /// Reads a header. Fails with [`ProtocolError::BadOptionMagic`].
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, ProtocolError> {
        let [a, b, c, d, e, f, g, h, o0, o1, o2, o3, l0, l1, l2, l3] = *bytes;
        let magic = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        if magic != OPTION_MAGIC {
            return Err(ProtocolError::BadOptionMagic { got: magic });
        }
        Ok(Self {
            option: OptionKind::from_wire(u32::from_be_bytes([o0, o1, o2, o3])),
            len_bytes: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }
}

/// What stands before the data of an option reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that it answers.
    pub option: OptionKind,
    /// The kind of answer.
    pub kind: OptionReplyKind,
    /// Bytes of data that follow.
    pub len_bytes: u32,
}

impl OptionReplyHeader {
    /// Bytes on the wire.
    pub const LEN: usize = 20;

    /// Reads a header that answers `sent`. Fails with [`ProtocolError::BadOptionReplyMagic`], or with
    /// [`ProtocolError::ReplyToOtherOption`].
    pub fn decode(bytes: &[u8; Self::LEN], sent: OptionKind) -> Result<Self, ProtocolError> {
        let [a, b, c, d, e, f, g, h, o0, o1, o2, o3, k0, k1, k2, k3, l0, l1, l2, l3] = *bytes;
        let magic = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        if magic != OPTION_REPLY_MAGIC {
            return Err(ProtocolError::BadOptionReplyMagic { option: sent, got: magic });
        }
        let option = OptionKind::from_wire(u32::from_be_bytes([o0, o1, o2, o3]));
        if option != sent {
            return Err(ProtocolError::ReplyToOtherOption { sent, got: option });
        }
        Ok(Self {
            option,
            kind: OptionReplyKind::from_wire(u32::from_be_bytes([k0, k1, k2, k3])),
            len_bytes: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }
}

/// Appends an option with its data.
pub fn put_option(out: &mut Vec<u8>, option: OptionKind, data: &[u8]) {
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_wire().to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

/// Appends an option reply with its data.
pub fn put_option_reply(out: &mut Vec<u8>, option: OptionKind, kind: OptionReplyKind, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_wire().to_be_bytes());
    out.extend_from_slice(&kind.to_wire().to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}
