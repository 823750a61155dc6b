//! The server's side of the handshake (spec: "Fixed newstyle negotiation"), without I/O.
//!
//! ```text
//!  new() ─ greeting ─► ClientFlags ──► Header ──► Data ──┐ reply
//!                           │            ▲  └──► Skip ──┤ "unsupported", "too big"
//!                           ▼            └──────────────┘
//!                        dropped         GO, EXPORT_NAME ──► Transmission(Session)
//!                                        ABORT, unknown EXPORT_NAME ──► Close
//! ```
//! Invariants: the handshake never asks for a byte of the transmission phase; whatever a client sends, at most
//! [`MAX_OPTION_LEN`] bytes of it are held, and at most [`MAX_OPTIONS`] options are answered.
//!
//! Seams: STARTTLS becomes one more [`ServerStep`] and forgets `agreed`; extended headers become one more field of
//! [`Session`].

mod options;
#[cfg(test)]
mod tests;

use super::consts::{
    ClientFlags, HandshakeFlags, MAX_NAME, MAX_OPTION_LEN, MAX_OPTIONS, MAX_SKIPPED_OPTION_LEN, NBD_MAGIC,
    OPTION_MAGIC, TransmissionFlags,
};
use super::error::ProtocolError;
use super::export_info::ExportInfo;
use super::option::{OptionHeader, OptionKind, OptionReplyKind, put_option_reply};
use super::request::Limits;
use super::wire::Intake;

/// The id that `base:allocation` has in every session of this server.
const BASE_ALLOCATION_ID: u32 = 1;
/// The same for `blkferry:hot`.
const FERRY_HOT_ID: u32 = 2;

/// What was agreed on, once the transmission phase begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Index of the chosen export in the list given to [`ServerHandshake::new`].
    pub export_index: usize,
    /// The transmission flags as they were sent.
    pub flags: TransmissionFlags,
    /// Reads are answered with structured replies; other requests may be.
    pub structured: bool,
    /// The metadata context id of `base:allocation`, if it was selected for this export.
    pub base_allocation: Option<u32>,
    /// The same of `blkferry:hot`.
    pub hot: Option<u32>,
    /// The client is blkferry: `CMD_FERRY_HASH` is allowed (with structured replies), and, if the disk can change hands,
    /// `CMD_FERRY_HANDOFF` and `CMD_FERRY_CHANGED`.
    pub ferry: bool,
    /// The client chose to do without the 124 zero bytes.
    pub no_zeroes: bool,
}

impl Session {
    /// The rules that [`Request::validate`](super::Request::validate) holds requests of this session to.
    pub fn limits(&self, export: &ExportInfo) -> Limits {
        Limits {
            size_bytes: export.size_bytes,
            flags: self.flags,
            min_block: export.min_block,
            max_payload: export.max_block,
            structured: self.structured,
            contexts: self.base_allocation.is_some() || self.hot.is_some(),
            ferry: self.ferry,
            handoff: self.ferry && export.standing.is_some(),
        }
    }
}

/// What to do after [`ServerHandshake::feed`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerStep {
    /// Send this (it may be empty), then read [`needs`](ServerHandshake::needs) bytes more.
    Reply(Vec<u8>),
    /// Send this; every byte after it belongs to the transmission phase.
    Transmission {
        /// What to send.
        reply: Vec<u8>,
        /// What was agreed on.
        session: Session,
    },
    /// Send this (it may be empty), then close the connection.
    Close {
        /// What to send.
        reply: Vec<u8>,
    },
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Header,
    Data(OptionKind),
    Skip { option: OptionKind, left_bytes: usize, reply: OptionReplyKind },
    Over,
}

/// What the options changed so far.
#[derive(Debug, Default)]
struct Agreed {
    structured: bool,
    /// Index of the export for which metadata contexts were selected, and the contexts.
    contexts_of: Option<(usize, Contexts)>,
    /// Index of the export whose identity was asked for.
    ferry_of: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Contexts {
    base_allocation: bool,
    hot: bool,
}

/// The handshake of one connection.
#[derive(Debug)]
pub struct ServerHandshake {
    exports: Vec<ExportInfo>,
    state: State,
    intake: Intake,
    options_seen: u32,
    fixed_newstyle: bool,
    no_zeroes: bool,
    agreed: Agreed,
}

impl ServerHandshake {
    /// Starts a handshake that offers `exports`, of which the first is the default; returns the greeting to send.
    pub fn new(exports: Vec<ExportInfo>) -> (Self, Vec<u8>) {
        let mut greeting = Vec::with_capacity(18);
        greeting.extend_from_slice(&NBD_MAGIC.to_be_bytes());
        greeting.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        greeting.extend_from_slice(&HandshakeFlags::all().bits().to_be_bytes());
        let handshake = Self {
            exports,
            state: State::ClientFlags,
            intake: Intake::new(4),
            options_seen: 0,
            fixed_newstyle: false,
            no_zeroes: false,
            agreed: Agreed::default(),
        };
        (handshake, greeting)
    }

    /// How many bytes to read next from the client: exactly this many, or fewer in several turns. 0 once the
    /// handshake is over.
    pub fn needs(&self) -> usize {
        self.intake.missing_bytes()
    }

    /// The export of a session.
    pub fn export(&self, session: &Session) -> Option<&ExportInfo> {
        self.exports.get(session.export_index)
    }

    /// Takes at most [`needs`](Self::needs) bytes from the client. With fewer, the answer is an empty
    /// [`ServerStep::Reply`].
    ///
    /// Fails when the client breaks a rule that the spec punishes by dropping the connection; nothing is to be sent
    /// then, and the handshake is over.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<ServerStep, ProtocolError> {
        let step = self.advance(bytes);
        if !matches!(step, Ok(ServerStep::Reply(_))) {
            self.state = State::Over;
            self.intake.expect_bytes(0);
        }
        step
    }

    fn advance(&mut self, bytes: &[u8]) -> Result<ServerStep, ProtocolError> {
        if matches!(self.state, State::Over) {
            return Err(ProtocolError::HandshakeOver);
        }
        let Some(message) = self.intake.push(bytes)? else {
            return Ok(ServerStep::Reply(Vec::new()));
        };
        match self.state {
            State::ClientFlags => self.on_client_flags(&message),
            State::Header => self.on_header(&message),
            State::Data(option) => Ok(self.on_data(option, &message)),
            State::Skip { option, left_bytes, reply } => Ok(self.skip(option, left_bytes - message.len(), reply)),
            State::Over => Err(ProtocolError::HandshakeOver),
        }
    }

    fn on_client_flags(&mut self, message: &[u8]) -> Result<ServerStep, ProtocolError> {
        let bits = message.iter().fold(0, |bits, byte| (bits << 8) | u32::from(*byte));
        let flags = ClientFlags::from_bits(bits).ok_or(ProtocolError::UnknownClientFlags { flags: bits })?;
        self.fixed_newstyle = flags.contains(ClientFlags::FIXED_NEWSTYLE);
        self.no_zeroes = flags.contains(ClientFlags::NO_ZEROES);
        Ok(self.next_option(Vec::new()))
    }

    fn on_header(&mut self, message: &[u8]) -> Result<ServerStep, ProtocolError> {
        let message = message.try_into().expect("the header was collected in its full length");
        let OptionHeader { option, len_bytes } = OptionHeader::decode(message)?;
        self.options_seen += 1;
        if self.options_seen > MAX_OPTIONS {
            return Err(ProtocolError::TooManyOptions { max: MAX_OPTIONS });
        }
        let len = len_bytes as usize;
        if len > MAX_SKIPPED_OPTION_LEN {
            return Err(ProtocolError::OptionTooLong { option, len_bytes, max_bytes: MAX_SKIPPED_OPTION_LEN });
        }
        // Without fixed newstyle the only option is EXPORT_NAME, and there is no form for any other answer. Nor can
        // EXPORT_NAME be refused in any other way than this.
        if option == OptionKind::ExportName {
            if len > MAX_NAME {
                return Ok(ServerStep::Close { reply: Vec::new() });
            }
        } else if !self.fixed_newstyle {
            return Ok(ServerStep::Close { reply: Vec::new() });
        }
        if !options::is_known(option) {
            return Ok(self.skip(option, len, OptionReplyKind::ErrUnsupported));
        }
        if len > MAX_OPTION_LEN {
            return Ok(self.skip(option, len, OptionReplyKind::ErrTooBig));
        }
        if len == 0 {
            return Ok(self.on_data(option, &[]));
        }
        self.state = State::Data(option);
        self.intake.expect_bytes(len);
        Ok(ServerStep::Reply(Vec::new()))
    }

    /// Reads on over data that nobody looks at, in pieces, then answers.
    fn skip(&mut self, option: OptionKind, left_bytes: usize, reply: OptionReplyKind) -> ServerStep {
        if left_bytes > 0 {
            self.state = State::Skip { option, left_bytes, reply };
            self.intake.expect_bytes(left_bytes.min(MAX_OPTION_LEN));
            return ServerStep::Reply(Vec::new());
        }
        let text = match reply {
            OptionReplyKind::ErrTooBig => {
                format!("more than {MAX_OPTION_LEN} bytes of option data")
            }
            _ => format!("{option} is not supported"),
        };
        if option == OptionKind::SetMetaContext {
            self.agreed.contexts_of = None;
        }
        let mut out = Vec::new();
        put_option_reply(&mut out, option, reply, text.as_bytes());
        self.next_option(out)
    }

    fn next_option(&mut self, reply: Vec<u8>) -> ServerStep {
        self.state = State::Header;
        self.intake.expect_bytes(OptionHeader::LEN);
        ServerStep::Reply(reply)
    }

    fn session(&self, export_index: usize, flags: TransmissionFlags) -> Session {
        // Contexts count only if they were selected for the export that is used in the end.
        let contexts = self.agreed.contexts_of.filter(|(of, _)| *of == export_index).map(|(_, contexts)| contexts);
        Session {
            export_index,
            flags,
            structured: self.agreed.structured,
            base_allocation: contexts.filter(|contexts| contexts.base_allocation).map(|_| BASE_ALLOCATION_ID),
            hot: contexts.filter(|contexts| contexts.hot).map(|_| FERRY_HOT_ID),
            ferry: self.agreed.ferry_of == Some(export_index),
            no_zeroes: self.no_zeroes,
        }
    }
}
