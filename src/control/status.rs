//! What `status --json` prints. Fields are added, never renamed or removed.

use serde::{Deserialize, Serialize};

/// How a device is, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The disk is still the source's: reads pass through, writes are refused, nothing is kept.
    Standby,
    /// Blocks are absent, the source answers.
    Active,
    /// Blocks are absent, the source is lost; hits and writes go on.
    Degraded,
    /// All blocks are here and committed: the source may be switched off.
    Complete,
    /// Given to another host: reads go on, writes are refused.
    Away,
    /// Stopped for good; see `failure`.
    Failed,
}

/// Everything about a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// In one word.
    pub state: State,
    /// Why it has failed.
    pub failure: Option<String>,
    /// Must the source still be kept? False only when that is proven: all present, all committed.
    pub source_needed: bool,
    /// How the disk stands between hosts.
    #[serde(default)]
    pub handoff: HandoffStatus,
    /// The daemon's process id.
    pub pid: u32,
    /// The daemon's version.
    pub version: String,
    /// Seconds since the daemon started.
    pub uptime_s: f64,
    /// How the guest reaches it.
    pub frontend: FrontendStatus,
    /// Where absent blocks come from.
    pub source: SourceStatus,
    /// Where present blocks are.
    pub cache: CacheStatus,
    /// In blocks.
    pub blocks: BlockStatus,
    /// In bytes.
    pub bytes: ByteStatus,
    /// What crossed the network, since the daemon started.
    pub wire: WireStatus,
    /// Background fetching.
    pub hydrate: HydrateStatus,
}

/// How the disk stands between hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoffStatus {
    /// The disk's own name: a UUID.
    pub disk: String,
    /// Its epoch here; 0 in standby.
    pub epoch: u64,
    /// The source's disk, if it can give it away.
    pub source_disk: Option<String>,
    /// Who it was given to.
    pub given_to: Option<String>,
    /// Who it was given to has everything: this device is not needed any more.
    pub released: bool,
    /// Where it is offered to others.
    pub export: Option<String>,
}

/// How the guest reaches the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendStatus {
    /// `nbd` or `ublk`.
    pub kind: String,
    /// Where the guest finds it: an NBD URI, or the path of the block device.
    pub uri: String,
    /// Path of the block device, if it is one.
    #[serde(default)]
    pub device: Option<String>,
    /// What the kernel's driver does for it.
    #[serde(default)]
    pub features: Vec<String>,
    /// Hardware queues of the block device; 0 if it is none.
    #[serde(default)]
    pub queues: u16,
    /// Tags of each.
    #[serde(default)]
    pub depth: u16,
    /// Clients connected.
    pub clients: u64,
    /// Reads answered from the cache alone.
    pub read_hits: u64,
    /// Reads that needed the source.
    pub read_misses: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes, trims and zeroings.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests that wait, for the source or for a partial block.
    pub waiting_requests: u64,
}

/// Where absent blocks come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// NBD URI.
    pub uri: String,
    /// What its contents are known by.
    pub identity: String,
    /// Connections that are up.
    pub connections: u64,
    /// What becomes of requests for absent blocks while it is lost: `wait`, `fail-after:30s`.
    pub on_loss: String,
    /// Seconds since it was lost, if it is.
    pub lost_s: Option<f64>,
    /// Why it was lost.
    pub lost_reason: Option<String>,
}

/// Where present blocks are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheStatus {
    /// The data: a raw image once the device is complete.
    pub path: String,
    /// The metadata beside it.
    pub metadata: String,
    /// Commits since the daemon started.
    pub commits: u64,
}

/// Blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStatus {
    /// Size of one, in bytes.
    pub size_bytes: u64,
    /// All.
    pub total: u64,
    /// In the cache.
    pub present: u64,
    /// Written by the guest here.
    pub dirty: u64,
    /// Still at the source only.
    pub absent: u64,
}

/// Bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteStatus {
    /// Size of the device.
    pub total: u64,
    /// In the cache.
    pub present: u64,
    /// Still at the source only.
    pub absent: u64,
}

/// What crossed the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireStatus {
    /// Received from the source, headers included.
    pub received_bytes: u64,
    /// Sent to the source.
    pub sent_bytes: u64,
    /// Of what was received: data of the disk.
    pub data_bytes: u64,
}

/// Background fetching.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HydrateStatus {
    /// As set: `auto`, `off`, or a rate.
    pub mode: String,
    /// `running`, `off`, `paused` or `done`.
    pub state: String,
    /// Why it is paused.
    pub reason: Option<String>,
    /// Bytes that become present a second, lately.
    pub rate_bytes_per_s: f64,
    /// Seconds to go at that rate.
    pub eta_s: Option<f64>,
}
