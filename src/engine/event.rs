//! What goes into the engine and what comes out.

use std::fmt;

use super::geometry::{BlockRun, ByteRange};
use super::inflight::{FetchId, IoId};
use super::survey::Extent;

/// A guest request, named by the shell. Not used again before its [`Action::Complete`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpId(pub u64);

/// An error number of the operating system, as guests understand it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// Not allowed: the disk is not ours to write.
    pub const EPERM: Self = Self(1);
    /// Input/output error.
    pub const EIO: Self = Self(5);
    /// No space left on the cache.
    pub const ENOSPC: Self = Self(28);
    /// The request cannot be done the way it was asked for.
    pub const ENOTSUP: Self = Self(95);
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl From<&std::io::Error> for Errno {
    fn from(error: &std::io::Error) -> Self {
        error.raw_os_error().map_or(Self::EIO, Self)
    }
}

/// What a source has in memory, in ranges of the device. None is in both lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HotRanges {
    /// What its machine used there.
    pub used: Vec<ByteRange>,
    /// What may only have been read ahead, or nobody knows.
    pub in_memory: Vec<ByteRange>,
}

/// Why the data of a fetch does not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchError {
    /// The source's own answer: it cannot read this.
    Refused(Errno),
    /// The source is lost, and has been for longer than whoever waits is to wait.
    Unreachable,
    /// Of what nobody waits for: the cache has no room for the data, and the source was not asked.
    NoRoom,
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(errno) => write!(f, "{errno}"),
            Self::Unreachable => f.write_str("the source is lost"),
            Self::NoRoom => f.write_str("no room in the cache"),
        }
    }
}

/// What a guest wants done with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Read it.
    Read,
    /// Write it; with `fua` it is durable when it completes.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Make it read as zeros.
    Zero {
        /// Force unit access.
        fua: bool,
        /// NO_HOLE: keep the space allocated.
        keep_allocated: bool,
        /// FAST_ZERO: refuse rather than take as long as a write would.
        fast_only: bool,
    },
    /// The guest needs it no more. Whole blocks read as zeros from then on, the rest stays as it is.
    Trim {
        /// Force unit access.
        fua: bool,
    },
    /// Make it local; nobody waits for the data itself.
    Prefetch,
}

impl OpKind {
    pub(super) fn is_change(self) -> bool {
        !matches!(self, Self::Read | Self::Prefetch)
    }

    pub(super) fn wants_fua(self) -> bool {
        matches!(self, Self::Write { fua: true } | Self::Zero { fua: true, .. } | Self::Trim { fua: true })
    }
}

/// Which connections a fetch uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Somebody waits for it.
    Demand,
    /// Somebody may wait for it soon.
    Ahead,
    /// Hydration.
    Bulk,
}

/// Something happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A guest request on a range that lies on the device and is not empty.
    Submit {
        /// Its name.
        op: OpId,
        /// What it wants.
        kind: OpKind,
        /// Where.
        range: ByteRange,
    },
    /// A guest wants all that was acknowledged so far to be durable.
    Flush {
        /// Its name.
        op: OpId,
    },
    /// ReadLocal, WriteLocal, ZeroLocal or Deliver was carried out.
    LocalDone {
        /// Which.
        io: IoId,
        /// How it ended.
        result: Result<(), Errno>,
    },
    /// The data of a fetch is here, in the shell's buffer, or will not come.
    Fetched {
        /// Which.
        fetch: FetchId,
        /// How it ended.
        result: Result<(), FetchError>,
    },
    /// A Store or StoreZero was carried out.
    Stored {
        /// Of which fetch.
        fetch: FetchId,
        /// The blocks, as the action named them.
        run: BlockRun,
        /// How it ended.
        result: Result<(), Errno>,
    },
    /// The shell's word, after a read that missed, that what may be wanted next can be asked for beside it.
    Ahead {
        /// What was read.
        range: ByteRange,
    },
    /// Hydration has room for one more step.
    Hydrate,
    /// The answer to a QueryExtents: extents in order from the start of the run. Empty: unknown.
    Extents {
        /// What was asked about.
        run: BlockRun,
        /// What the source said.
        extents: Vec<Extent>,
    },
    /// What the source used last: to be fetched before the rest. A hint, and bounded.
    Hot {
        /// As far as it is told.
        ranges: HotRanges,
    },
    /// The commit that runs has ended. An error stops the device for good.
    Committed {
        /// How it ended.
        result: Result<(), Errno>,
    },
    /// It is time to commit what was merely fetched.
    CommitDue,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read the cache into the op's buffer.
    ReadLocal {
        /// Answer with LocalDone.
        io: IoId,
        /// For whom.
        op: OpId,
        /// What.
        range: ByteRange,
    },
    /// Write the op's data into the cache.
    WriteLocal {
        /// Answer with LocalDone.
        io: IoId,
        /// For whom.
        op: OpId,
        /// What.
        range: ByteRange,
        /// The data itself must be durable when it is done (the bits are already).
        dsync: bool,
    },
    /// Make a range of the cache read as zeros.
    ZeroLocal {
        /// Answer with LocalDone.
        io: IoId,
        /// For whom.
        op: OpId,
        /// What.
        range: ByteRange,
        /// Keep the space allocated.
        keep_allocated: bool,
    },
    /// Copy fetched data from the network buffer to the op.
    Deliver {
        /// Answer with LocalDone.
        io: IoId,
        /// For whom.
        op: OpId,
        /// Out of the data of which fetch.
        fetch: FetchId,
        /// What.
        range: ByteRange,
    },
    /// Ask the source for blocks. Answer with Fetched.
    Fetch {
        /// Its name.
        fetch: FetchId,
        /// The blocks.
        run: BlockRun,
        /// How urgent.
        lane: Lane,
    },
    /// Write these blocks of the fetched data into the cache. Answer with Stored.
    Store {
        /// Out of the data of which fetch.
        fetch: FetchId,
        /// The blocks.
        run: BlockRun,
    },
    /// The source has zeros here: make the cache read as zeros. Answer with Stored.
    StoreZero {
        /// Its name.
        fetch: FetchId,
        /// The blocks.
        run: BlockRun,
    },
    /// No action with this fetch will follow: its buffer may go, once the Delivers before this are done.
    Release {
        /// Which.
        fetch: FetchId,
    },
    /// Ask the source where it has holes and zeros. Answer with Extents. Several may be under way.
    QueryExtents {
        /// The blocks to ask about.
        run: BlockRun,
    },
    /// Hydration can do nothing until something in flight has ended.
    HydrationWaits,
    /// Hydration has been everywhere, and some blocks could not be read: time to pause before they are tried again.
    HydrationRests,
    /// All blocks are present.
    HydrationDone,
    /// Take the changed map pages and make data and maps durable. Answer with Committed.
    Commit,
    /// Tell the guest.
    Complete {
        /// Whom.
        op: OpId,
        /// How it ended.
        result: Result<(), Errno>,
    },
}
