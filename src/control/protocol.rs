//! The lines on the control socket.

use serde::{Deserialize, Serialize};

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

/// How a device was left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// Is everything here, so that the source may be switched off?
    pub complete: bool,
    /// The cache.
    pub cache: String,
    /// Bytes still at the source.
    pub absent_bytes: u64,
}
