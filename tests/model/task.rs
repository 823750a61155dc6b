//! What the engine asked for and the shell has not finished yet.

use std::ops::Range;

use blkferry::engine::{BlockRun, FetchId, IoId, OpId, PageImage};

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

/// Where a commit stands; the order is the commit protocol.
#[derive(Clone, Debug)]
pub enum Stage {
    /// Next: take the changed pages.
    Take,
    /// Next: begin to sync the cache.
    SyncData(Vec<PageImage>),
    /// Next: the sync of the cache, begun at this mark, ends.
    DataSynced(Vec<PageImage>, u64),
    /// Next: write the pages.
    WritePages(Vec<PageImage>),
    /// Next: sync the pages.
    SyncPages,
    /// Next: tell.
    Tell,
}

impl Stage {
    /// What comes next, for the trace.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Take => "take the changed pages",
            Self::SyncData(_) => "begin to sync the cache",
            Self::DataSynced(..) => "the cache is synced",
            Self::WritePages(_) => "write the pages",
            Self::SyncPages => "the pages are synced",
            Self::Tell => "done",
        }
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
