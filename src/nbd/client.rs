//! The client's side of the handshake (spec: "Fixed newstyle negotiation"), without I/O.
//!
//! ```text
//!  new() ──► greeting (8 + 8 + 2 bytes)
//!              │ flags, first option
//!              ▼
//!   FERRY ──► STRUCTURED_REPLY ──► SET_META_CONTEXT ──► GO ─────────────► Ready
//!   (each only if wanted; "no" to one of            │ ERR_UNSUP
//!    them means to live without it)                 └──► EXPORT_NAME ──► Ready
//!   LIST ──► Listed
//! ```
//! An option waits for the final reply to the one before, as the specification wants it. A server that has answered
//! FERRY takes the rest together, in one round trip (docs/FORMAT.md).
//!
//! Invariants: the handshake never asks for a byte of the transmission phase; whatever a server sends, no message
//! above [`MAX_OPTION_REPLY_LEN`](super::MAX_OPTION_REPLY_LEN) bytes is taken and no more than
//! [`MAX_HANDSHAKE_BYTES`] bytes in all; what it claims about the export is checked before anyone sees it.
//!
//! Seams: STARTTLS comes before all other options and becomes one more [`ClientStep`]; extended headers are one
//! more option in `next_option`.

mod replies;
mod session;
#[cfg(test)]
mod tests;

pub use session::ClientSession;

use std::collections::VecDeque;

use super::consts::{
    BASE_ALLOCATION, ClientFlags, EXPORT_NAME_ZEROES, FERRY_HOT, FERRY_VERSION, HandshakeFlags, MAX_HANDSHAKE_BYTES,
    NBD_MAGIC, OLDSTYLE_MAGIC, OPTION_MAGIC,
};
use super::error::ProtocolError;
use super::option::{OptionKind, OptionReplyHeader, put_option};
use super::option_data::{FerryRequest, InfoKind, InfoRequest, MetaContextRequest, size_and_flags};
use super::wire::{Intake, Reader};
use session::Findings;

/// What is asked for, in this order. FERRY comes first: who knows it takes the others together.
const ORDER: [OptionKind; 4] =
    [OptionKind::Ferry, OptionKind::StructuredReply, OptionKind::SetMetaContext, OptionKind::Go];

/// What the client would like to have. A server that lacks it is fine; see [`ClientSession`] for what came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Structured replies.
    pub structured: bool,
    /// Holes and zeros; asked for only when the server gave structured replies.
    pub base_allocation: bool,
    /// What the server has in its page cache; in the same way.
    pub hot: bool,
    /// blkferry's own option: the identity of the disk, and hashes (which come as structured replies).
    pub ferry: bool,
    /// The server has answered that option on another connection: it gets everything together.
    pub known_ferry: bool,
    /// Only list the exports; all other wishes are ignored then.
    pub list: bool,
}

/// What to do after [`ClientHandshake::feed`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientStep {
    /// Send this (it may be empty), then read [`needs`](ClientHandshake::needs) bytes more.
    Send(Vec<u8>),
    /// Send this (it may be empty); every byte after it belongs to the transmission phase.
    Ready {
        /// What was agreed on.
        session: ClientSession,
        /// What to send.
        send: Vec<u8>,
    },
    /// The exports were listed: send this, then close the connection.
    Listed {
        /// Name and description of each; a description may be empty.
        exports: Vec<(String, String)>,
        /// What to send: `NBD_OPT_ABORT`.
        send: Vec<u8>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Magic,
    Style,
    Flags,
    ReplyHeader,
    ReplyData(OptionReplyHeader),
    ExportNameReply,
    Over,
}

/// The handshake of one connection.
#[derive(Debug)]
pub struct ClientHandshake {
    export: String,
    wants: Wants,
    state: State,
    intake: Intake,
    taken_bytes: usize,
    no_zeroes: bool,
    /// The option that the server owes a reply to.
    asked: OptionKind,
    /// Options that it has got already, and owes replies to after that.
    later: VecDeque<OptionKind>,
    found: Findings,
    listed: Vec<(String, String)>,
}

impl ClientHandshake {
    /// Starts a handshake for an export (empty: the server's default one). Nothing is sent before the greeting.
    pub fn new(export_name: String, wants: Wants) -> Self {
        Self {
            export: export_name,
            wants,
            state: State::Magic,
            intake: Intake::new(8),
            taken_bytes: 0,
            no_zeroes: false,
            asked: OptionKind::Abort,
            later: VecDeque::new(),
            found: Findings::default(),
            listed: Vec::new(),
        }
    }

    /// How many bytes to read next from the server: exactly this many, or fewer in several turns. 0 once the
    /// handshake is over.
    pub fn needs(&self) -> usize {
        self.intake.missing_bytes()
    }

    /// Takes at most [`needs`](Self::needs) bytes from the server. With fewer, the answer is an empty
    /// [`ClientStep::Send`].
    ///
    /// Fails when there is no way to the export; send [`farewell`](Self::farewell) then, and close.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<ClientStep, ProtocolError> {
        let step = self.advance(bytes);
        if !matches!(step, Ok(ClientStep::Send(_))) {
            self.state = State::Over;
            self.intake.expect_bytes(0);
        }
        step
    }

    /// What to send, as far as the connection takes it, before closing it ahead of time: `NBD_OPT_ABORT` once
    /// options are spoken, else nothing (spec: "Termination of the session during option haggling").
    pub fn farewell(&self) -> Vec<u8> {
        // `asked` is Abort until the first option is sent; after EXPORT_NAME no option may follow.
        match self.asked {
            OptionKind::Abort | OptionKind::ExportName => Vec::new(),
            // Behind a GO that may succeed it would be no option.
            _ if !self.later.is_empty() => Vec::new(),
            _ => option_bytes(OptionKind::Abort, &[]),
        }
    }

    /// Has the server shown that it is a blkferry export?
    pub fn is_ferry(&self) -> bool {
        self.found.ferry_identity.is_some()
    }

    /// Can it be one, as far as it has spoken?
    pub fn may_be_ferry(&self) -> bool {
        self.is_ferry() || matches!(self.asked, OptionKind::Abort | OptionKind::Ferry)
    }

    /// The error to report when the server closes the connection now.
    pub fn closed_by_server(&self) -> ProtocolError {
        let during = match self.state {
            State::Magic => "before its greeting (too many connections, or a host it does not allow?)",
            State::Style | State::Flags => "in the middle of its greeting",
            State::ExportNameReply => "when it was asked for the export (it may have none of this name)",
            State::ReplyHeader | State::ReplyData(_) => "while options were negotiated",
            State::Over => "after the handshake",
        };
        ProtocolError::ClosedInHandshake { during }
    }

    fn advance(&mut self, bytes: &[u8]) -> Result<ClientStep, ProtocolError> {
        if self.state == State::Over {
            return Err(ProtocolError::HandshakeOver);
        }
        self.taken_bytes += bytes.len();
        if self.taken_bytes > MAX_HANDSHAKE_BYTES {
            return Err(ProtocolError::HandshakeTooLong { max_bytes: MAX_HANDSHAKE_BYTES });
        }
        let Some(message) = self.intake.push(bytes)? else {
            return Ok(ClientStep::Send(Vec::new()));
        };
        match self.state {
            State::Magic => self.on_magic(&message),
            State::Style => self.on_style(&message),
            State::Flags => self.on_flags(&message),
            State::ReplyHeader => self.on_reply_header(&message),
            State::ReplyData(header) => self.on_reply(header.kind, &message),
            State::ExportNameReply => self.on_export_name_reply(&message),
            State::Over => Err(ProtocolError::HandshakeOver),
        }
    }

    fn read_on(&mut self, state: State, want_bytes: usize) -> Result<ClientStep, ProtocolError> {
        self.state = state;
        self.intake.expect_bytes(want_bytes);
        Ok(ClientStep::Send(Vec::new()))
    }

    fn on_magic(&mut self, message: &[u8]) -> Result<ClientStep, ProtocolError> {
        let got: [u8; 8] = message.try_into().expect("8 bytes were collected");
        if u64::from_be_bytes(got) != NBD_MAGIC {
            return Err(ProtocolError::NotNbd { got });
        }
        self.read_on(State::Style, 8)
    }

    fn on_style(&mut self, message: &[u8]) -> Result<ClientStep, ProtocolError> {
        let magic = u64::from_be_bytes(message.try_into().expect("8 bytes were collected"));
        match magic {
            OPTION_MAGIC => self.read_on(State::Flags, 2),
            OLDSTYLE_MAGIC => Err(ProtocolError::Oldstyle),
            _ => Err(ProtocolError::UnknownDialect { magic }),
        }
    }

    fn on_flags(&mut self, message: &[u8]) -> Result<ClientStep, ProtocolError> {
        let bits = u16::from_be_bytes(message.try_into().expect("2 bytes were collected"));
        let offered = HandshakeFlags::from_bits_truncate(bits);
        if !offered.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            return Err(ProtocolError::NotFixedNewstyle);
        }
        let mut flags = ClientFlags::FIXED_NEWSTYLE;
        self.no_zeroes = offered.contains(HandshakeFlags::NO_ZEROES);
        flags.set(ClientFlags::NO_ZEROES, self.no_zeroes);
        let mut out = flags.bits().to_be_bytes().to_vec();
        out.extend_from_slice(&match self.wants {
            Wants { list: true, .. } => self.ask(OptionKind::List),
            Wants { known_ferry: true, .. } => self.ask_together(&ORDER),
            _ => {
                let first = self.next_option(None);
                self.ask(first)
            }
        });
        Ok(ClientStep::Send(out))
    }

    /// The option to send when `done` is through (`None`: nothing was sent yet).
    fn next_option(&self, done: Option<OptionKind>) -> OptionKind {
        let start = done.and_then(|done| ORDER.iter().position(|option| *option == done)).map_or(0, |at| at + 1);
        // Without structured replies there are no contexts.
        let useful = |option: &OptionKind| *option != OptionKind::SetMetaContext || self.found.structured;
        let next = ORDER[start..].iter().copied().find(|option| self.wants(*option) && useful(option));
        next.unwrap_or(OptionKind::Go)
    }

    fn wants(&self, option: OptionKind) -> bool {
        match option {
            OptionKind::Ferry => self.wants.ferry,
            OptionKind::StructuredReply => self.wants.structured,
            OptionKind::SetMetaContext => self.wants.base_allocation || self.wants.hot,
            _ => true,
        }
    }

    /// The bytes of an option; its reply is expected next.
    fn ask(&mut self, option: OptionKind) -> Vec<u8> {
        self.expect_reply(option);
        self.encode(option)
    }

    /// The bytes of those options that are wanted, one after the other; their replies are expected in this order.
    fn ask_together(&mut self, options: &[OptionKind]) -> Vec<u8> {
        self.later = options.iter().copied().filter(|option| self.wants(*option)).collect();
        let bytes = self.later.iter().flat_map(|option| self.encode(*option)).collect();
        let first = self.later.pop_front().expect("GO is always wanted");
        self.expect_reply(first);
        bytes
    }

    fn expect_reply(&mut self, option: OptionKind) {
        self.asked = option;
        if option == OptionKind::ExportName {
            self.state = State::ExportNameReply;
            self.intake.expect_bytes(10 + if self.no_zeroes { 0 } else { EXPORT_NAME_ZEROES });
        } else {
            self.state = State::ReplyHeader;
            self.intake.expect_bytes(OptionReplyHeader::LEN);
        }
    }

    fn encode(&self, option: OptionKind) -> Vec<u8> {
        let export = self.export.clone();
        let data = match option {
            OptionKind::SetMetaContext => {
                let wanted = [(BASE_ALLOCATION, self.wants.base_allocation), (FERRY_HOT, self.wants.hot)];
                let queries = wanted.iter().filter(|(_, wanted)| *wanted).map(|(name, _)| (*name).to_owned());
                MetaContextRequest { export, queries: queries.collect() }.encode()
            }
            OptionKind::Ferry => FerryRequest { version: FERRY_VERSION, export }.encode(),
            OptionKind::Go => InfoRequest { export, infos: vec![InfoKind::BlockSize] }.encode(),
            OptionKind::ExportName => export.into_bytes(),
            _ => Vec::new(),
        };
        option_bytes(option, &data)
    }

    fn on_export_name_reply(&mut self, message: &[u8]) -> Result<ClientStep, ProtocolError> {
        let option = OptionKind::ExportName;
        let export = size_and_flags(&mut Reader::new(message))
            .map_err(|defect| ProtocolError::MalformedOptionReply { option, defect })?;
        self.found.export = Some(export);
        self.ready()
    }

    fn ready(&mut self) -> Result<ClientStep, ProtocolError> {
        let session = std::mem::take(&mut self.found).into_session(&self.export)?;
        Ok(ClientStep::Ready { session, send: Vec::new() })
    }
}

fn option_bytes(option: OptionKind, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_option(&mut out, option, data);
    out
}
