//! What a cache is: whose blocks, how many, and how far it has come.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Version of the metadata format that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// How far a cache has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheState {
    /// The disk is still the source's: nothing is here.
    Standby,
    /// It was in standby, and will never be anything else.
    Declined,
    /// Blocks are absent, or not committed.
    Active,
    /// All blocks are present and committed: the cache is a plain raw image.
    Complete,
    /// It was given to another host; blocks may be absent.
    Away,
}

/// The disk of the source that a cache is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gift {
    /// The disk's own name.
    pub disk: Uuid,
    /// The epoch that began there when it was given; 0 before.
    pub epoch: u64,
}

/// The body of the superblock, kept as JSON inside a sealed page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Superblock {
    /// The cache's own name, made when it was created.
    pub uuid: Uuid,
    /// Handoff epoch: 0 in standby; 1 of a source that gives nothing away, else one more than the source's was.
    pub epoch: u64,
    /// Size of the device in bytes.
    pub size_bytes: u64,
    /// Size of a block in bytes.
    pub block_bytes: u64,
    /// The source, as an NBD URI.
    pub source: String,
    /// What the source's contents are known by.
    pub source_identity: String,
    /// How far it has come.
    pub state: CacheState,
    /// False once the host went down with writes in the air: a block may then have been written
    /// without its dirty bit. The way back must then compare rather than trust the dirty map.
    pub dirty_exact: bool,
    /// Was the cache left in order? False while a daemon runs.
    pub clean: bool,
    /// Boot id of the host on which a daemon last opened it.
    pub boot_id: String,
    /// What was given, if the source can give its disk away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gift: Option<Gift>,
    /// In standby: what is given in an earlier epoch than this is not accepted. 0: nothing was ever called off.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub floor: u64,
    /// Who it was given to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_to: Option<Uuid>,
    /// Whoever it was given to has all of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub released: bool,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}
