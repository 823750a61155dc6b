//! The engine: what happens to every block, and nothing else.
//!
//! Pure: no descriptor, no clock, no thread, no I/O. [`Engine::apply`] takes one [`Event`] and appends
//! [`Action`]s for the shell around it to carry out; their outcomes come back as events. The daemon and
//! the simulator run the same engine.
//!
//! ```text
//!   guest request ─► Submit ─┐                      ┌─► ReadLocal, WriteLocal, ZeroLocal, Deliver ─► LocalDone
//!   data from the source ────┼─► Engine::apply ─────┼─► Fetch ─► Fetched ─► Store, StoreZero ─► Stored
//!   hydration has room ──────┘   maps + inflight    ├─► QueryExtents ─► Extents
//!                                                   ├─► Commit ─► Committed
//!                                                   └─► Complete
//! ```
//!
//! Requests whose blocks are all present need not come here: the present map may be read without the
//! engine, because bits only grow.

mod ahead;
mod event;
mod geometry;
mod hot;
mod hydrate;
mod inflight;
mod maps;
mod ops;
mod state;
mod stride;
mod survey;

pub use event::{Action, Errno, Event, FetchError, HotRanges, Lane, OpId, OpKind};
pub use geometry::{BlockRun, ByteRange, Geometry, GeometryError, MAX_BLOCK_BYTES, MIN_BLOCK_BYTES, SECTOR_BYTES};
pub use inflight::{FetchId, IoId};
pub use maps::{Maps, PAGE_BLOCKS, PAGE_WORDS, PageImage, Words, load_page};
#[cfg(feature = "planted-faults")]
pub use state::PlantedFault;
pub use state::{Engine, EngineConfig};
pub use survey::{Extent, Questions};
