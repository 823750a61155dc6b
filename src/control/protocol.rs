//! The lines on the control socket.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What [`Request::Set`] can change.
pub const SETTINGS: &str =
    "hydrate=auto|off|RATE, on-source-loss=wait|fail-after:DURATION, or export=HOST:PORT|unix:PATH|off";

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// How is the device? Answered with a [`super::Status`].
    Status,
    /// Change a setting while running.
    Set {
        /// Which.
        key: String,
        /// To what.
        value: String,
    },
    /// End the device. Answered with [`Detached`].
    Detach {
        /// Also if blocks are absent; the cache can be attached again.
        incomplete: bool,
    },
    /// Compare with the source. Answered with progress and a report.
    Verify,
    /// In standby: get the disk from the source, and do not use it yet. Answered with [`Taken`].
    Take {
        /// How long to wait for those who still write to it, in milliseconds.
        wait_ms: u64,
    },
    /// In standby: get the disk, if that was not done, and let the guest write. Answered with [`Taken`].
    Activate {
        /// How long to wait for those who still write to it, in milliseconds.
        wait_ms: u64,
    },
    /// In standby: give back what was taken. Answered with null.
    #[serde(rename = "call-off")]
    CallOff,
    /// In standby: give back what was taken, for good, and end the device. Answered with null.
    Abort,
}

impl Request {
    /// How long the daemon is asked to wait for others before it answers.
    pub fn may_wait(&self) -> Duration {
        match self {
            Self::Take { wait_ms } | Self::Activate { wait_ms } => Duration::from_millis(*wait_ms),
            _ => Duration::ZERO,
        }
    }
}

/// What the daemon answers: any number of `Progress`, then one of the others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer<T> {
    /// Done.
    Ok(T),
    /// Not done, and why, in one line.
    Error(String),
    /// Under way.
    Progress(serde_json::Value),
}

/// The source has given the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// The epoch that has begun.
    pub epoch: u64,
    /// Was it so already?
    pub already: bool,
    /// What the operator has to see to, because the source cannot.
    pub warning: Option<String>,
}

/// How a device was left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// Is everything here, so that the source may be switched off?
    pub complete: bool,
    /// The cache.
    pub cache: String,
    /// Bytes still at the source.
    pub absent_bytes: u64,
    /// Was the disk given to the next host, so that the cache is not the disk any more?
    pub given_away: bool,
}
