//! What can go wrong while two ends speak NBD. Each text says what, where and what to do.
//!
//! A [`ProtocolError`] always ends the connection. An error of a single request is an
//! [`NbdError`](super::NbdError), and the connection lives on.

use super::chunk::ChunkKind;
use super::option::{OptionKind, OptionReplyKind};
use super::wire::Defect;
use thiserror::Error;

/// Why a connection cannot go on.
///
/// Strings named `message` are the peer's own words, freed of control characters; they may be empty.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ProtocolError {
    /// The peer does not start as an NBD server does.
    #[error(
        "no NBD server answers there: it sent {:?} first, not \"NBDMAGIC\"; check host and port",
        String::from_utf8_lossy(.got)
    )]
    NotNbd {
        /// The first 8 bytes it sent.
        got: [u8; 8],
    },
    /// The server speaks the oldstyle negotiation, without export names.
    #[error(
        "the server speaks oldstyle NBD only, which has no options; use a newer server, or start it in newstyle mode \
         (nbdkit: without --oldstyle; nbd-server: 3.10 or newer)"
    )]
    Oldstyle,
    /// `NBDMAGIC`, then neither `IHAVEOPT` nor the oldstyle magic.
    #[error("the server greets with an unknown NBD dialect (second magic {magic:#018x}); use a newstyle server")]
    UnknownDialect {
        /// The second 8 bytes it sent.
        magic: u64,
    },
    /// A newstyle server from before the fix.
    #[error("the server speaks NBD without fixed newstyle, so options cannot be negotiated; use a newer server")]
    NotFixedNewstyle,
    /// The client set flags that the server did not offer; the spec wants the connection dropped.
    #[error("the client set handshake flags {flags:#010x}, some of which were not offered; connection dropped")]
    UnknownClientFlags {
        /// All flags it set.
        flags: u32,
    },
    /// An option that does not start with `IHAVEOPT`.
    #[error(
        "the client sent {got:#018x} where an option starts: it is out of step or no NBD client; connection dropped"
    )]
    BadOptionMagic {
        /// What stood there.
        got: u64,
    },
    /// Option data that is not even worth skipping.
    #[error(
        "the client announced {len_bytes} bytes of data for {option}, the limit is {max_bytes}; connection dropped"
    )]
    OptionTooLong {
        /// The option.
        option: OptionKind,
        /// What it announced, in bytes.
        len_bytes: u32,
        /// The limit, in bytes.
        max_bytes: usize,
    },
    /// A client that goes on and on without choosing an export.
    #[error("the client sent more than {max} options without choosing an export; connection dropped")]
    TooManyOptions {
        /// The limit.
        max: u32,
    },
    /// An option reply that does not start with its magic.
    #[error(
        "the server sent {got:#018x} where a reply to {option} starts: it is out of step; reconnect, and if that \
             does not help, use another server version"
    )]
    BadOptionReplyMagic {
        /// The option that was sent.
        option: OptionKind,
        /// What stood there.
        got: u64,
    },
    /// A reply to an option that was not asked.
    #[error(
        "the server answered {got} when {sent} was asked: it is out of step; reconnect, and if that does not \
             help, use another server version"
    )]
    ReplyToOtherOption {
        /// The option that was sent.
        sent: OptionKind,
        /// The option that the reply names.
        got: OptionKind,
    },
    /// A reply type that does not belong to this option.
    #[error("the server answered {option} with {kind}, which does not belong there; use another server version")]
    UnexpectedReply {
        /// The option that was sent.
        option: OptionKind,
        /// The type of the reply.
        kind: OptionReplyKind,
    },
    /// Option reply data above the limit.
    #[error(
        "the server announced {len_bytes} bytes in reply to {option}, the limit is {max_bytes}; connection dropped"
    )]
    OptionReplyTooLong {
        /// The option that was sent.
        option: OptionKind,
        /// What it announced, in bytes.
        len_bytes: u32,
        /// The limit, in bytes.
        max_bytes: usize,
    },
    /// More handshake bytes than a sane server has to say.
    #[error("the server sent more than {max_bytes} bytes before the handshake ended; connection dropped")]
    HandshakeTooLong {
        /// The limit, in bytes.
        max_bytes: usize,
    },
    /// An option reply that is wrong inside.
    #[error("the server's reply to {option} cannot be understood: {defect}; use another server version")]
    MalformedOptionReply {
        /// The option that was sent.
        option: OptionKind,
        /// What is wrong with it.
        defect: Defect,
    },
    /// `NBD_REP_ERR_POLICY` to an option that is needed.
    #[error("the server's configuration forbids {option}{}; allow this client there", said(.message))]
    RefusedByPolicy {
        /// The option that was sent.
        option: OptionKind,
        /// The server's words.
        message: String,
    },
    /// Another error reply to an option that is needed.
    #[error("the server refused {option} with {kind}{}", said(.message))]
    OptionRefused {
        /// The option that was sent.
        option: OptionKind,
        /// Its answer.
        kind: OptionReplyKind,
        /// The server's words.
        message: String,
    },
    /// `NBD_REP_ERR_TLS_REQD`.
    #[error(
        "the server wants TLS for {}, which is not supported yet{}; let the server \
             serve it without TLS on a trusted network, or through an SSH tunnel", named(.export), said(.message)
    )]
    TlsRequired {
        /// The export that was asked for.
        export: String,
        /// The server's words.
        message: String,
    },
    /// The server has no export of this name.
    #[error(
        "the server has no export named {export:?}{}; list what it has, and check the last part of \
             the URI", said(.message)
    )]
    ExportUnknown {
        /// The export that was asked for.
        export: String,
        /// The server's words.
        message: String,
    },
    /// No name was given, and the server has no default export.
    #[error("the server offers no default export{}; name one in the URI, as in nbd://host/NAME", said(.message))]
    NoDefaultExport {
        /// The server's words.
        message: String,
    },
    /// `NBD_REP_ERR_BLOCK_SIZE_REQD` although the block sizes were asked for.
    #[error(
        "the server wants its block sizes acknowledged, although it was asked for them{}; use \
             another server version", said(.message)
    )]
    BlockSizesRequired {
        /// The server's words.
        message: String,
    },
    /// `NBD_REP_ERR_SHUTDOWN`.
    #[error("the server is shutting down{}; connect again later", said(.message))]
    ServerShutdown {
        /// The server's words.
        message: String,
    },
    /// `NBD_OPT_GO` was acknowledged without `NBD_INFO_EXPORT`.
    #[error("the server accepted export {export:?} without telling its size; use another server version")]
    NoExportInfo {
        /// The export that was asked for.
        export: String,
    },
    /// An export of 2^63 bytes or more, which no file offset can reach.
    #[error("the server claims a size of {size_bytes} bytes, more than a file offset can reach; check the server")]
    ExportTooLarge {
        /// The size it claims.
        size_bytes: u64,
    },
    /// Block sizes that break the rules of the spec's "Size constraints".
    #[error(
        "block sizes min {min}, preferred {preferred}, max {max} break the NBD rules (min and preferred powers of \
             two, min <= 65536, max(min, 512) <= preferred <= max); correct the server's configuration"
    )]
    BadBlockSizes {
        /// Minimum block size, in bytes.
        min: u32,
        /// Preferred block size, in bytes.
        preferred: u32,
        /// Maximum payload, in bytes.
        max: u32,
    },
    /// The server hung up during the handshake.
    #[error("the server closed the connection {during}; its log may say why")]
    ClosedInHandshake {
        /// What was going on, as in "before its greeting".
        during: &'static str,
    },
    /// A request that does not start with its magic.
    #[error("the client sent {got:#010x} where a request starts: it is out of step; connection dropped")]
    BadRequestMagic {
        /// What stood there.
        got: u32,
    },
    /// A reply that starts with neither reply magic.
    #[error("the server sent {got:#010x} where a reply starts: it is out of step; reconnect")]
    BadReplyMagic {
        /// What stood there.
        got: u32,
    },
    /// A chunk type that the client must not accept (spec: "Structured reply types").
    #[error("the server sent a reply chunk of type {kind}, which was not negotiated; reconnect")]
    UnexpectedChunk {
        /// Its type.
        kind: ChunkKind,
    },
    /// A chunk longer than its type or the payload limit allows.
    #[error("the server announced {len_bytes} bytes in a chunk of type {kind}, the limit is {max_bytes}; reconnect")]
    ChunkTooLong {
        /// Its type.
        kind: ChunkKind,
        /// What it announced, in bytes.
        len_bytes: u32,
        /// The limit, in bytes.
        max_bytes: u32,
    },
    /// A chunk that is wrong inside.
    #[error("the server sent a chunk of type {kind} that cannot be understood: {defect}; reconnect")]
    MalformedChunk {
        /// Its type.
        kind: ChunkKind,
        /// What is wrong with it.
        defect: Defect,
    },
    /// The caller read more bytes than `needs()` said. A bug on this side.
    #[error("{got_bytes} bytes were fed to a handshake that needs {needs_bytes}: a bug in blkferry, please report it")]
    FedTooMuch {
        /// What it needs, in bytes.
        needs_bytes: usize,
        /// What it got, in bytes.
        got_bytes: usize,
    },
    /// The caller fed bytes after the handshake had ended. A bug on this side.
    #[error("bytes were fed to a handshake that is over: a bug in blkferry, please report it")]
    HandshakeOver,
}

/// The peer's words, where there are any.
fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" (it says: {message:?})") }
}

fn named(export: &str) -> String {
    if export.is_empty() { "its default export".to_owned() } else { format!("export {export:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_words_are_quoted_only_where_there_are_any() {
        let text = |export: &str, message: &str| {
            let (export, message) = (export.to_owned(), message.to_owned());
            let unknown = ProtocolError::ExportUnknown { export: export.clone(), message: message.clone() };
            (unknown.to_string(), ProtocolError::TlsRequired { export, message }.to_string())
        };
        let (unknown, tls) = text("disk", "");
        assert!(unknown.starts_with("the server has no export named \"disk\"; list"), "{unknown}");
        assert!(tls.starts_with("the server wants TLS for export \"disk\", which"), "{tls}");
        let (unknown, tls) = text("", "go away");
        assert!(unknown.contains(" (it says: \"go away\"); list"), "{unknown}");
        assert!(tls.starts_with("the server wants TLS for its default export, which"), "{tls}");
    }

    #[test]
    fn a_wrong_greeting_is_shown_harmlessly() {
        let text = ProtocolError::NotNbd { got: *b"\x1b[2J\xff\0\r\n" }.to_string();
        assert!(!text.contains(char::is_control), "{text:?}");
    }
}
