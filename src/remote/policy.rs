//! How long requests wait for a source that is lost.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::size::{ParseDurationError, format_duration, parse_duration};

/// What becomes of requests for absent blocks while the source is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLoss {
    /// They wait until it is back.
    Wait,
    /// They fail once it has been lost for so long, those that come later at once; until it is back.
    FailAfter(Duration),
}

/// A policy that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum OnLossError {
    /// Something else altogether.
    #[error("on-source-loss={0:?}: use wait, or fail-after:DURATION such as fail-after:30s")]
    Unknown(String),
    /// No duration.
    #[error("on-source-loss={0:?}: {1}")]
    Duration(String, #[source] ParseDurationError),
}

impl FromStr for OnLoss {
    type Err = OnLossError;

    fn from_str(text: &str) -> Result<Self, OnLossError> {
        match (text, text.strip_prefix("fail-after:")) {
            ("wait", _) => Ok(Self::Wait),
            (_, Some(duration)) => {
                parse_duration(duration).map(Self::FailAfter).map_err(|e| OnLossError::Duration(text.into(), e))
            }
            _ => Err(OnLossError::Unknown(text.into())),
        }
    }
}

impl fmt::Display for OnLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wait => f.write_str("wait"),
            Self::FailAfter(duration) => write!(f, "fail-after:{}", format_duration(*duration)),
        }
    }
}

/// The policy of a device; any thread reads and changes it.
#[derive(Clone, Debug)]
pub struct LossPolicy(Arc<AtomicU64>);

impl LossPolicy {
    /// Starts with this.
    pub fn new(policy: OnLoss) -> Self {
        let this = Self(Arc::new(AtomicU64::new(0)));
        this.set(policy);
        this
    }

    /// What it is.
    pub fn get(&self) -> OnLoss {
        match self.0.load(Ordering::Relaxed) {
            u64::MAX => OnLoss::Wait,
            ms => OnLoss::FailAfter(Duration::from_millis(ms)),
        }
    }

    /// Counts from now on, also for those who wait already.
    pub fn set(&self, policy: OnLoss) {
        let ms = match policy {
            OnLoss::Wait => u64::MAX,
            OnLoss::FailAfter(duration) => u64::try_from(duration.as_millis()).unwrap_or(u64::MAX - 1),
        };
        self.0.store(ms, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read_and_written() {
        for text in ["wait", "fail-after:5s", "fail-after:0ms", "fail-after:1500ms"] {
            let policy: OnLoss = text.parse().unwrap();
            assert_eq!(policy.to_string(), text);
            assert_eq!(LossPolicy::new(policy).get(), policy);
        }
        for text in ["", "panic", "fail-after", "fail-after:", "fail-after:5"] {
            assert!(text.parse::<OnLoss>().is_err(), "{text}");
        }
    }
}
