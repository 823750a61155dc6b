//! The local layer: the cache's data, the metadata beside it, and the order in which both become durable.
//!
//! ```text
//!   data      the disk itself, raw; whoever removes blkferry keeps a plain image
//!   metadata  superblock and map pages, two copies each             docs/FORMAT.md
//!   live map  the maps as the running daemon has them, on tmpfs: survives the daemon, not the host
//! ```
//!
//! Invariants: a durable present bit implies durable data (I1; see [`Committer::commit`]); a page is never written
//! over its newest copy; damage is told from a torn write, and is refused, not repaired by guessing.

mod commit;
mod data;
mod holes;
mod layout;
mod live;
mod metadata;
mod open;
mod page;
mod reclaim;
mod recover;
mod superblock;
mod whole;

#[cfg(feature = "planted-faults")]
pub use commit::PlantedFault;
pub use commit::{Commit, CommitReport, Committer, Durable, Step};
pub use data::{CacheError, DataFile};
pub use layout::{encode_superblock, file_bytes, map_offset};
pub use live::{LiveError, LiveMap};
pub use metadata::MetadataFile;
pub use open::{
    Cache, CacheOptions, DEFAULT_BLOCK_BYTES, OpenError, SourceFacts, Store, default_metadata_path, discard, peek,
};
pub use page::{CopyState, PAGE_BYTES, PAYLOAD_BYTES, SealedPage};
pub use reclaim::{ReclaimError, reclaim};
pub use recover::{MetadataError, ReadAt, Recovered, Recovery};
pub use superblock::{CacheState, FORMAT_VERSION, Gift, Superblock};
pub use whole::{Whole, forget_given, is_held};
