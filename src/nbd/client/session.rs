//! What the client learned in the handshake, checked.

use crate::nbd::consts::{DEFAULT_MAX_PAYLOAD, TransmissionFlags};
use crate::nbd::error::ProtocolError;
use crate::nbd::export_info::BlockSizes;
use crate::nbd::handoff::Standing;
use crate::nbd::option::OptionKind;
use crate::nbd::option_data::Info;

/// What was agreed on, once the transmission phase begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientSession {
    /// Size of the export, in bytes; below 2^63.
    pub size_bytes: u64,
    /// What the export can do; unknown flags are dropped, `SEND_DF` goes with structured replies only.
    pub flags: TransmissionFlags,
    /// Offsets and lengths are multiples of this, in bytes: a power of two, at most 65536. 512 if nothing was said.
    pub min_block: u32,
    /// From this size on, aligned requests are efficient, in bytes: a power of two. 4096 if nothing was said.
    pub preferred_block: u32,
    /// Largest payload the server accepts, in bytes, as advertised (`u32::MAX`: no limit). 32 MiB if nothing was
    /// said. See [`max_payload_bytes`](Self::max_payload_bytes).
    pub max_block: u32,
    /// Reads are answered with structured replies; other requests may be.
    pub structured: bool,
    /// The metadata context id of `base:allocation`, if the server has it.
    pub base_allocation: Option<u32>,
    /// The same of `blkferry:hot`.
    pub hot: Option<u32>,
    /// The identity that a blkferry server gave. `Some` allows `CMD_FERRY_HASH` (with structured replies).
    pub ferry_identity: Option<String>,
    /// How its disk stands, if that can change hands. `Some` allows `CMD_FERRY_HANDOFF`.
    pub standing: Option<Standing>,
    /// The canonical name of the export, if the server sent it.
    pub name: Option<String>,
    /// The description of the export, if the server sent it.
    pub description: Option<String>,
}

impl ClientSession {
    /// The largest read or write to send, in bytes: a multiple of the minimum block size, no more than the server
    /// advertised, and no more than the 32 MiB that every peer must put up with.
    pub fn max_payload_bytes(&self) -> u32 {
        let max = self.max_block.min(DEFAULT_MAX_PAYLOAD);
        max - max % self.min_block.max(1)
    }
}

/// What the replies said so far.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) structured: bool,
    pub(super) base_allocation: Option<u32>,
    pub(super) hot: Option<u32>,
    pub(super) ferry_identity: Option<String>,
    pub(super) standing: Option<Standing>,
    pub(super) export: Option<(u64, TransmissionFlags)>,
    block_sizes: Option<BlockSizes>,
    name: Option<String>,
    description: Option<String>,
}

impl Findings {
    pub(super) fn add_info(&mut self, info: Info) {
        match info {
            Info::Export { size_bytes, flags } => self.export = Some((size_bytes, flags)),
            Info::Name(name) => self.name = Some(name),
            Info::Description(text) => self.description = Some(text),
            Info::BlockSize(sizes) => self.block_sizes = Some(sizes),
            Info::Unknown(_) => {}
        }
    }

    /// Drops what an option brought that ended in an error after all.
    pub(super) fn forget(&mut self, option: OptionKind) {
        match option {
            OptionKind::SetMetaContext => (self.base_allocation, self.hot) = (None, None),
            OptionKind::Ferry => (self.ferry_identity, self.standing) = (None, None),
            OptionKind::Go => (self.export, self.block_sizes, self.name, self.description) = (None, None, None, None),
            _ => {}
        }
    }

    pub(super) fn into_session(self, export: &str) -> Result<ClientSession, ProtocolError> {
        let no_info = || ProtocolError::NoExportInfo { export: export.to_owned() };
        let (size_bytes, mut flags) = self.export.ok_or_else(no_info)?;
        if i64::try_from(size_bytes).is_err() {
            return Err(ProtocolError::ExportTooLarge { size_bytes });
        }
        if !self.structured {
            flags.remove(TransmissionFlags::SEND_DF);
        }
        let sizes = self.block_sizes.unwrap_or(BlockSizes::CLIENT_DEFAULT).check()?;
        Ok(ClientSession {
            size_bytes,
            flags,
            min_block: sizes.min,
            preferred_block: sizes.preferred,
            max_block: sizes.max,
            structured: self.structured,
            base_allocation: self.base_allocation,
            hot: self.hot,
            ferry_identity: self.ferry_identity,
            standing: self.standing.filter(|_| self.structured),
            name: self.name,
            description: self.description,
        })
    }
}
