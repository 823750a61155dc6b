//! What the engine asked for and the shell has not finished yet.

use std::ops::Range;

use blkferry::engine::{BlockRun, FetchId, IoId, OpId};

/// What to do to the cache for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Read the cache.
    Read,
    /// Write the request's data.
    Write {
        /// With RWF_DSYNC.
        dsync: bool,
    },
    /// Write zeros.
    Zero,
    /// Copy fetched data.
    Deliver,
}

impl Act {
    /// Does it change the cache?
    pub fn is_change(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero)
    }
}

/// Where a commit stands: what comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Take the changed pages.
    Begin,
    /// Begin to sync the cache.
    SyncData,
    /// The sync of the cache, begun at this mark, ends.
    DataSynced(u64),
    /// Write a page.
    WriteMap,
    /// Sync the pages.
    SyncMetadata,
    /// Tell.
    Tell,
}

impl Stage {
    /// For the trace.
    pub fn name(self) -> &'static str {
        match self {
            Self::Begin => "take the changed pages",
            Self::SyncData => "begin to sync the cache",
            Self::DataSynced(_) => "the cache is synced",
            Self::WriteMap => "write a page",
            Self::SyncMetadata => "sync the pages",
            Self::Tell => "done",
        }
    }

    /// Does the disk have to do something that it may refuse?
    pub fn may_fail(self) -> bool {
        !matches!(self, Self::Begin | Self::Tell)
    }
}

/// The kinds of tasks.
#[derive(Clone, Debug)]
pub enum What {
    /// An I/O for a guest, by the engine's order.
    Local(IoId, OpId, Act),
    /// The same without the engine: the frontend's own way for blocks that are present.
    Hit(OpId, Act),
    /// Fetched data, or zeros, into the cache.
    Store(FetchId, BlockRun),
    /// Waits for the source.
    Wire(FetchId),
    /// Waits for the source to describe itself.
    Query(BlockRun),
    /// The commit that runs.
    Commit(Stage),
}

/// A task and how far it has come: sectors are handled one by one, from both ends.
#[derive(Clone, Debug)]
pub struct Task {
    /// What it is.
    pub what: What,
    /// All of its sectors.
    pub sectors: Range<u64>,
    /// Those that are not handled yet.
    pub left: Range<u64>,
}

impl Task {
    /// A task that handles sectors.
    pub fn on(sectors: Range<u64>, what: What) -> Self {
        Self { what, left: sectors.clone(), sectors }
    }

    /// A task without sectors.
    pub fn new(what: What) -> Self {
        Self { what, sectors: 0..0, left: 0..0 }
    }

    /// How many sectors are left.
    pub fn left(&self) -> u64 {
        self.left.end - self.left.start
    }

    /// Can it go on while the source is silent?
    pub fn is_local(&self) -> bool {
        !matches!(self.what, What::Wire(_) | What::Query(_))
    }

    /// Does it change the cache by order of the engine, for a guest?
    pub fn is_guest_change(&self) -> bool {
        matches!(self.what, What::Local(_, _, act) if act.is_change())
    }

    /// Do both have a sector in common?
    pub fn meets(&self, sectors: &Range<u64>) -> bool {
        self.sectors.start < sectors.end && sectors.start < self.sectors.end
    }
}
