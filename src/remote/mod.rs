//! The fetch layer: blocks from a source, over NBD.
//!
//! ```text
//!   fetch(range, lane) ──► lane ──► link ──► NBD connection      one link a connection; requests
//!                           │        │                            are pipelined on each
//!            demand: 1 link ┘        └─ lost: reconnect with backoff, identity checked again,
//!            bulk: 2 links                the requests that were on it are asked again
//! ```
//!
//! Invariants: nothing is ever written to a source; a link serves only after the source behind it has
//! shown that it is still the same disk; a demand fetch never stands behind hydration on a connection,
//! unless the source takes only one.

mod dial;
mod doubt;
mod hot;
mod keep;
mod link;
#[cfg(feature = "planted-faults")]
mod planted;
mod policy;
mod read;
mod shared;
mod silence;
mod source;
mod stats;

pub use dial::DialError;
#[cfg(feature = "planted-faults")]
pub(crate) use planted::is_planted;
#[cfg(feature = "planted-faults")]
pub use planted::{PlantedFault, plant};
pub use policy::{LossPolicy, OnLoss, OnLossError};
pub use read::FetchedData;
pub use shared::{Expect, Lost, SourceEvents};
pub use source::{Beforehand, Changed, HandOffError, Source};
pub use stats::SourceStats;

use std::time::Duration;

/// Links for hydration, where the source takes several connections.
const BULK_LINKS: usize = 2;
/// How long connecting may take, and the handshake after it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest pause between two attempts to reconnect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// A link that lived for less than this and answered nothing was no good: reconnecting at once would hammer at its
/// source.
const SHORT_LIFE: Duration = Duration::from_secs(5);
/// A source that says nothing for so long while requests wait is taken for dead.
const SILENCE: Duration = Duration::from_secs(30);
/// The same, if requests are to fail sooner than that: no less, since a busy source may need a moment.
const MIN_SILENCE: Duration = Duration::from_secs(2);
/// Pace at which silence and the patience of requests are looked after.
const WATCH_PERIOD: Duration = Duration::from_millis(200);
