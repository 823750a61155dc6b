//! What two blkferry ends say to each other when a disk changes hands: JSON, in `CMD_FERRY_HANDOFF` and its answer
//! (docs/FORMAT.md). What follows from it is decided in [`crate::handoff`]; this is only the form.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::ProtocolError;
use super::wire::{Defect, string};

/// Version of these messages, told with [`Standing`].
pub const HANDOFF_VERSION: u16 = 1;
/// Longest message, in bytes.
pub const MAX_HANDOFF_LEN: usize = 16 * 1024;

/// How the disk of an export stands: part of what `NBD_REP_FERRY` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// [`HANDOFF_VERSION`].
    pub version: u16,
    /// The disk's own name.
    pub disk: Uuid,
    /// Its epoch: grows by one each time it changes hands.
    pub epoch: u64,
    /// Who it was given to; `None`: it is here, and may be written here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_to: Option<Uuid>,
    /// What it was made from, if the difference is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// Is all of it here, so that nobody else is needed?
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub complete: bool,
}

/// The disk that another one was made from, and of which it holds what was not written since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Base {
    /// The disk.
    pub disk: Uuid,
    /// The epoch that began when it was given away: the contents are those of that moment.
    pub epoch: u64,
}

/// What a destination asks of a source.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Ask {
    /// Stop everybody from writing to the disk, record that it is mine, and say so.
    Take {
        /// The disk that is meant.
        disk: Uuid,
        /// Who asks: the destination's own disk.
        to: Uuid,
        /// The epoch that is to begin: the source's, and one more.
        epoch: u64,
        /// How long the source may wait for its writers to end, in milliseconds.
        wait_ms: u64,
    },
    /// I will never use what you gave me, or may have given me, in that epoch.
    GiveBack {
        /// The disk that is meant.
        disk: Uuid,
        /// Who asks.
        to: Uuid,
        /// The epoch that was to begin.
        epoch: u64,
    },
    /// I have everything: you are not needed any more.
    Done {
        /// The disk that is meant.
        disk: Uuid,
        /// Who asks.
        to: Uuid,
        /// The epoch in which it was given.
        epoch: u64,
    },
}

/// What the source answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "told", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Told {
    /// It is yours; that is on disk here.
    Given {
        /// The epoch that has begun.
        epoch: u64,
        /// What the contents are known by from now on.
        identity: String,
    },
    /// It is not yours, and will not be: a request that is still on its way comes too late.
    Back {
        /// The source's epoch now.
        epoch: u64,
    },
    /// Understood.
    Noted,
    /// No, and nothing has changed.
    No {
        /// Why: one clear line.
        why: String,
        /// The source's epoch now.
        epoch: u64,
        /// Is it worth asking again? Somebody still writes, for example.
        later: bool,
    },
}

impl Ask {
    /// Its JSON form.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data always has a JSON form")
    }

    /// Reads it.
    pub fn decode(data: &[u8]) -> Result<Self, Defect> {
        serde_json::from_slice(data).map_err(|_| Defect::BadJson)
    }
}

impl Told {
    /// Its JSON form.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data always has a JSON form")
    }

    /// Reads it. An identity keeps the rules of NBD strings.
    pub fn decode(data: &[u8]) -> Result<Self, ProtocolError> {
        let malformed = |defect| ProtocolError::MalformedChunk { kind: super::ChunkKind::FerryTold, defect };
        let told: Self = serde_json::from_slice(data).map_err(|_| malformed(Defect::BadJson))?;
        if let Self::Given { identity, .. } = &told {
            string(identity.as_bytes()).map_err(malformed)?;
        }
        Ok(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_documented_form() {
        let (disk, to) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let ask = Ask::Take { disk, to, epoch: 3, wait_ms: 500 };
        let json = r#"{"ask":"take","disk":"00000000-0000-0000-0000-000000000001","to":"00000000-0000-0000-0000-000000000002","epoch":3,"wait_ms":500}"#;
        assert_eq!(String::from_utf8(ask.encode()).unwrap(), json);
        assert_eq!(Ask::decode(json.as_bytes()), Ok(ask));
        let json = r#"{"told":"no","why":"it is raining","epoch":2,"later":true}"#;
        let no = Told::No { why: "it is raining".into(), epoch: 2, later: true };
        assert_eq!(Told::decode(json.as_bytes()).unwrap(), no);
        assert_eq!(String::from_utf8(no.encode()).unwrap(), json);
        let back = Ask::GiveBack { disk, to, epoch: 3 };
        assert!(String::from_utf8(back.encode()).unwrap().starts_with(r#"{"ask":"give-back","#));
        assert_eq!(Ask::decode(br#"{"ask":"steal"}"#), Err(Defect::BadJson));
        assert!(Told::decode(br#"{"told":"given","epoch":1,"identity":"a\u0000b"}"#).is_err());
    }
}
