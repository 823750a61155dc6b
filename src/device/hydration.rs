//! How fast the background may go, and how far it is.

use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use event_listener::Event;

use crate::size::{ParseSizeError, format_size, parse_size};

/// What the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As fast as it goes.
    Auto,
    /// Not at all: only what is asked for.
    Off,
    /// At most so many bytes a second.
    Rate(u64),
}

/// A mode that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("hydrate={0:?}: use auto, off, or a rate in bytes a second such as 50M ({1})")]
pub struct ModeError(String, ParseSizeError);

impl FromStr for Mode {
    type Err = ModeError;

    fn from_str(text: &str) -> Result<Self, ModeError> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" | "0" => Ok(Self::Off),
            rate => parse_size(rate).map(Self::Rate).map_err(|e| ModeError(text.into(), e)),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Rate(rate) => f.write_str(&format_size(*rate)),
        }
    }
}

/// What hydration does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HydrationState {
    /// Fetching.
    Running,
    /// Told not to.
    Off,
    /// Waiting for something to change, with the reason.
    Paused(String),
    /// Nothing left to fetch.
    Done,
}

struct Inner {
    mode: Mode,
    state: HydrationState,
}

/// Mode and state, readable and settable from any thread.
pub struct Hydration {
    inner: Mutex<Inner>,
    pub(super) changed: Event,
}

impl Hydration {
    /// Starts in this mode.
    pub fn new(mode: Mode) -> Self {
        let state = if mode == Mode::Off { HydrationState::Off } else { HydrationState::Running };
        Self { inner: Mutex::new(Inner { mode, state }), changed: Event::new() }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        f(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the mode; what is in flight is finished, nothing more is started in the old one.
    pub fn set_mode(&self, mode: Mode) {
        self.with(|inner| inner.mode = mode);
        self.changed.notify(usize::MAX);
    }

    /// Something that it waited for may have happened.
    pub fn wake(&self) {
        self.changed.notify(usize::MAX);
    }

    /// The mode.
    pub fn mode(&self) -> Mode {
        self.with(|inner| inner.mode)
    }

    /// The state.
    pub fn state(&self) -> HydrationState {
        self.with(|inner| inner.state.clone())
    }

    pub(super) fn set_state(&self, state: HydrationState) {
        self.with(|inner| inner.state = state);
    }
}

/// A token bucket: at most `rate` bytes a second, in bursts of at most a quarter of a second.
pub(super) struct Pacer {
    at: Instant,
    credit_bytes: f64,
}

impl Pacer {
    pub(super) fn new(now: Instant) -> Self {
        Self { at: now, credit_bytes: 0.0 }
    }

    /// Takes `bytes`, and says how long to wait before the next may go.
    pub(super) fn spend(&mut self, now: Instant, rate: u64, bytes: u64) -> Duration {
        let rate = rate.max(1) as f64;
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * rate;
        self.at = now;
        self.credit_bytes = (self.credit_bytes + earned).min(rate / 4.0) - bytes as f64;
        Duration::from_secs_f64((-self.credit_bytes / rate).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_read_and_written() {
        for text in ["auto", "off", "50M", "4K"] {
            assert_eq!(text.parse::<Mode>().unwrap().to_string(), text);
        }
        assert!("fast".parse::<Mode>().unwrap_err().to_string().contains("50M"));
    }

    #[test]
    fn the_pacer_keeps_the_rate() {
        let start = Instant::now();
        let mut now = start;
        let mut pacer = Pacer::new(start);
        for _ in 0..1000 {
            now += pacer.spend(now, 1_000_000, 4096);
        }
        let seconds = (now - start).as_secs_f64();
        assert!((4.0..4.2).contains(&seconds), "{seconds}");
        // A pause earns a burst, but a bounded one.
        now += Duration::from_secs(60);
        let wait = pacer.spend(now, 1_000_000, 1_250_000);
        assert!((0.9..=1.1).contains(&wait.as_secs_f64()), "{wait:?}");
    }
}
