//! The shell around the engine: carries out its actions, on threads that wait only in their rings.
//!
//! ```text
//!   frontend thread(s)          any thread                fetch thread              commit thread
//!   ┌──────────────┐   Submit  ┌───────────┐   Fetch     ┌──────────────┐
//!   │ Queue        ├──────────►│ Core      ├────────────►│ Fetcher      │◄──► source
//!   │  hits: cache │◄──────────┤  engine   │◄────────────┤  stores ─────┼──► cache
//!   │  directly    │ ReadLocal,│  (short   │   Fetched,  │  hydration   │
//!   └──────────────┘ Deliver,… │   lock)   │   Stored    └──────────────┘
//!                              └─────┬─────┘──── Commit ───────────────────►  cache::Store
//! ```
//!
//! Invariants: the engine's lock is never held across I/O; a request whose blocks are all present never
//! takes it; every action of the engine is answered exactly once.

mod committer;
mod core;
mod fetch_bytes;
mod fetch_thread;
mod fetcher;
mod gate;
mod hits;
mod hydration;
mod hydrator;
mod messages;
mod queue;
#[cfg(feature = "simulation")]
pub mod simulation;
mod source_side;
#[cfg(test)]
mod testing;
mod verify;
mod window;

pub use committer::CommitThread;
pub use core::{Core, Counters, Health};
pub use fetch_bytes::MAX_FETCH_BYTES;
pub use fetch_thread::{FetchThread, FetchThreadError, SourceHello, engine_config};
pub use gate::{Gate, Phase};
pub use hydration::{Hydration, HydrationState, Mode, ModeError};
pub use messages::{VerifyProgress, VerifyReport};
pub use queue::Queue;
pub use source_side::SourceSide;
pub use verify::Verifier;
