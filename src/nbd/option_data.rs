//! The data of options and option replies, for both sides (spec: "Option types", "Option reply types").
//!
//! Every `decode` takes exactly the data that the header announced, and fails with the [`Defect`] it found; it
//! allocates no more than it is given.

use super::consts::{FERRY_VERSION, MAX_NAME, TransmissionFlags};
use super::export_info::BlockSizes;
use super::handoff::Standing;
use super::option::wire_enum;
use super::wire::{Defect, Reader, cut, printable, put_string32, string};
use serde::{Deserialize, Serialize};
use std::fmt;

wire_enum! {
    /// A piece of information on an export (spec: `NBD_REP_INFO`).
    InfoKind: u16 {
        /// Size and transmission flags.
        Export = 0, "NBD_INFO_EXPORT";
        /// The canonical name.
        Name = 1, "NBD_INFO_NAME";
        /// A text for humans.
        Description = 2, "NBD_INFO_DESCRIPTION";
        /// Minimum and preferred block size, maximum payload.
        BlockSize = 3, "NBD_INFO_BLOCK_SIZE";
    }
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest {
    /// The export; empty means the default one.
    pub export: String,
    /// What the client wants to know.
    pub infos: Vec<InfoKind>,
}

impl InfoRequest {
    /// The data bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_string32(&mut out, &self.export);
        out.extend_from_slice(&(self.infos.len() as u16).to_be_bytes());
        for info in &self.infos {
            out.extend_from_slice(&info.to_wire().to_be_bytes());
        }
        out
    }

    /// Reads the data bytes.
    pub fn decode(data: &[u8]) -> Result<Self, Defect> {
        let mut reader = Reader::new(data);
        let export = reader.string32()?;
        let count = reader.u16()?;
        let mut infos = Vec::new();
        for _ in 0..count {
            infos.push(InfoKind::from_wire(reader.u16()?));
        }
        reader.end()?;
        Ok(Self { export, infos })
    }
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextRequest {
    /// The export; empty means the default one.
    pub export: String,
    /// Names or wildcards, each as `namespace:leaf`.
    pub queries: Vec<String>,
}

impl MetaContextRequest {
    /// The data bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_string32(&mut out, &self.export);
        out.extend_from_slice(&(self.queries.len() as u32).to_be_bytes());
        for query in &self.queries {
            put_string32(&mut out, query);
        }
        out
    }

    /// Reads the data bytes.
    pub fn decode(data: &[u8]) -> Result<Self, Defect> {
        let mut reader = Reader::new(data);
        let export = reader.string32()?;
        let count = reader.u32()?;
        // No memory is set aside for what `count` promises: the first query that is not there ends it.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(reader.string32()?);
        }
        reader.end()?;
        Ok(Self { export, queries })
    }
}

/// Data of the private `NBD_OPT_FERRY`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FerryRequest {
    /// [`FERRY_VERSION`].
    pub version: u16,
    /// The export; empty means the default one.
    pub export: String,
}

impl FerryRequest {
    /// The data bytes: version (2), name length (4), name.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&self.version.to_be_bytes());
        put_string32(&mut out, &self.export);
        out
    }

    /// Reads the data bytes. Of another version than ours only the version is looked at.
    pub fn decode(data: &[u8]) -> Result<Self, Defect> {
        let mut reader = Reader::new(data);
        let version = reader.u16()?;
        if version != FERRY_VERSION {
            return Ok(Self { version, export: String::new() });
        }
        let export = reader.string32()?;
        reader.end()?;
        Ok(Self { version, export })
    }
}

/// Data of the private `NBD_REP_FERRY`: UTF-8 JSON. Fields that a later version adds are ignored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FerryAnswer {
    /// [`FERRY_VERSION`].
    pub version: u16,
    /// What tells this disk (and its state of writing) from all others.
    pub identity: String,
    /// How the disk stands, if it can change hands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handoff: Option<Standing>,
}

impl FerryAnswer {
    /// The data bytes.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data always has a JSON form")
    }

    /// Reads the data bytes. The identity keeps the rules of NBD strings.
    pub fn decode(data: &[u8]) -> Result<Self, Defect> {
        let answer: Self = serde_json::from_slice(data).map_err(|_| Defect::BadJson)?;
        string(answer.identity.as_bytes())?;
        Ok(answer)
    }
}

/// Data of `NBD_REP_SERVER`: one export of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerEntry {
    /// The export's name.
    pub name: String,
    /// A text for humans; empty if there is none.
    pub description: String,
}

impl ServerEntry {
    /// The data bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_string32(&mut out, &self.name);
        out.extend_from_slice(cut(&self.description, MAX_NAME).as_bytes());
        out
    }

    /// Reads the data bytes. The description is freed of control characters: it is only for display.
    pub fn decode(data: &[u8]) -> Result<Self, Defect> {
        let mut reader = Reader::new(data);
        let name = reader.string32()?;
        Ok(Self { name, description: printable(reader.rest()) })
    }
}

/// Data of `NBD_REP_INFO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Info {
    /// What `NBD_OPT_EXPORT_NAME` would tell, too.
    Export {
        /// Size of the export, in bytes.
        size_bytes: u64,
        /// What it can do; unknown flags are dropped.
        flags: TransmissionFlags,
    },
    /// The canonical name.
    Name(String),
    /// A text for humans, freed of control characters.
    Description(String),
    /// Block sizes, not yet checked.
    BlockSize(BlockSizes),
    /// Something that this version does not know; clients ignore it.
    Unknown(u16),
}

impl Info {
    /// The data bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Export { size_bytes, flags } => {
                out.extend_from_slice(&InfoKind::Export.to_wire().to_be_bytes());
                out.extend_from_slice(&size_bytes.to_be_bytes());
                out.extend_from_slice(&flags.bits().to_be_bytes());
            }
            Self::Name(name) => {
                out.extend_from_slice(&InfoKind::Name.to_wire().to_be_bytes());
                out.extend_from_slice(name.as_bytes());
            }
            Self::Description(text) => {
                out.extend_from_slice(&InfoKind::Description.to_wire().to_be_bytes());
                out.extend_from_slice(cut(text, MAX_NAME).as_bytes());
            }
            Self::BlockSize(sizes) => {
                out.extend_from_slice(&InfoKind::BlockSize.to_wire().to_be_bytes());
                out.extend_from_slice(&sizes.min.to_be_bytes());
                out.extend_from_slice(&sizes.preferred.to_be_bytes());
                out.extend_from_slice(&sizes.max.to_be_bytes());
            }
            Self::Unknown(kind) => out.extend_from_slice(&kind.to_be_bytes()),
        }
        out
    }

    /// Reads the data bytes.
    pub fn decode(data: &[u8]) -> Result<Self, Defect> {
        let mut reader = Reader::new(data);
        let info = match InfoKind::from_wire(reader.u16()?) {
            InfoKind::Export => {
                let (size_bytes, flags) = size_and_flags(&mut reader)?;
                Self::Export { size_bytes, flags }
            }
            InfoKind::Name => Self::Name(string(reader.rest())?),
            InfoKind::Description => Self::Description(printable(reader.rest())),
            InfoKind::BlockSize => {
                Self::BlockSize(BlockSizes { min: reader.u32()?, preferred: reader.u32()?, max: reader.u32()? })
            }
            InfoKind::Unknown(kind) => {
                reader.rest();
                Self::Unknown(kind)
            }
        };
        reader.end()?;
        Ok(info)
    }
}

/// The 10 bytes that `NBD_INFO_EXPORT` and the `NBD_OPT_EXPORT_NAME` reply share.
pub(super) fn size_and_flags(reader: &mut Reader<'_>) -> Result<(u64, TransmissionFlags), Defect> {
    let size_bytes = reader.u64()?;
    let flags = TransmissionFlags::from_bits_truncate(reader.u16()?);
    if !flags.contains(TransmissionFlags::HAS_FLAGS) {
        return Err(Defect::NoHasFlags);
    }
    Ok((size_bytes, flags))
}

/// Data of `NBD_REP_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContext {
    /// Opaque number that block status chunks carry; 0 in a list.
    pub id: u32,
    /// Its name, `namespace:leaf`.
    pub name: String,
}

impl MetaContext {
    /// The data bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&self.id.to_be_bytes());
        out.extend_from_slice(self.name.as_bytes());
        out
    }

    /// Reads the data bytes.
    pub fn decode(data: &[u8]) -> Result<Self, Defect> {
        let mut reader = Reader::new(data);
        Ok(Self { id: reader.u32()?, name: string(reader.rest())? })
    }
}
