//! What the threads of a device send each other.

use std::io;
use std::sync::Arc;

use crossbeam::channel::Sender;
use futures_channel::oneshot;
use serde::{Deserialize, Serialize};

use super::core::Core;
use crate::cache::Superblock;
use crate::engine::{BlockRun, ByteRange, Errno, Extent, FetchId, IoId, Lane, OpId};
use crate::nbd::{Ask, Told, Uri};
use crate::remote::{Changed, Expect, HandOffError};
use crate::uring::{FileIo, Part};

/// What the commit thread is asked for.
pub(crate) enum CommitRequest {
    /// A commit, answered to the engine.
    Commit,
    /// A commit, and then a change of the superblock that is durable before the answer.
    Record { change: Box<dyn FnOnce(&mut Superblock) + Send>, answer: Sender<io::Result<()>> },
    /// The last one: commit, record how things stand, and end. The answer: is the cache left in order?
    Stop(Sender<io::Result<()>>),
}

/// Work that the engine has for the owner of a request.
pub(crate) enum QueueMessage {
    Read { io: IoId, op: OpId, range: ByteRange },
    Write { io: IoId, op: OpId, range: ByteRange, dsync: bool },
    Zero { io: IoId, range: ByteRange, keep_allocated: bool },
    Deliver { io: IoId, op: OpId, range: ByteRange, pieces: Vec<Part> },
    Complete { op: OpId, result: Result<(), Errno> },
}

/// Work for the fetch thread.
pub(crate) enum FetchRequest {
    /// The device exists now: begin.
    Begin {
        core: Arc<Core>,
        cache: FileIo,
    },
    Fetch {
        fetch: FetchId,
        run: BlockRun,
        lane: Lane,
    },
    Store {
        fetch: FetchId,
        run: BlockRun,
    },
    Release {
        fetch: FetchId,
    },
    Extents {
        range: ByteRange,
        answer: oneshot::Sender<Vec<Extent>>,
    },
    /// Past the engine and the cache.
    ReadThrough {
        range: ByteRange,
        answer: oneshot::Sender<Result<Vec<Part>, Errno>>,
    },
    HandOff {
        ask: Ask,
        answer: Sender<Result<Told, HandOffError>>,
    },
    /// The same, and what was written as it is after that.
    HandOffAndTell {
        ask: Ask,
        answer: Sender<Result<(Told, Option<Changed>), HandOffError>>,
    },
    /// What the source's contents are known by now.
    Identify {
        answer: Sender<Result<String, HandOffError>>,
    },
    /// What was written since the source's disk was made from its base.
    Changed {
        answer: Sender<Result<Changed, HandOffError>>,
    },
    /// What the source has to be from now on.
    Expect {
        expect: Expect,
        identity: String,
    },
    Verify(VerifyRequest),
    Stop,
}

/// How far a verification is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyProgress {
    /// Bytes of the disk looked at.
    pub done_bytes: u64,
    /// Size of the disk in bytes.
    pub total_bytes: u64,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Bytes that were compared and are the same.
    pub same_bytes: u64,
    /// Bytes left out because the guest wrote them here.
    pub dirty_bytes: u64,
    /// Bytes left out because they are not here yet.
    pub absent_bytes: u64,
    /// Bytes that differ.
    pub different_bytes: u64,
    /// Offsets of the first blocks that differ.
    pub first_differences: Vec<u64>,
    /// Bytes received from the source for this.
    pub received_bytes: u64,
    /// Compared by hash ("hash") or by reading the source ("data").
    pub method: String,
}

/// What comes out of a verification, in order.
pub(crate) enum VerifyMessage {
    Progress(VerifyProgress),
    Done(Result<VerifyReport, String>),
}

/// Asks for a verification.
pub(crate) struct VerifyRequest {
    pub(crate) uri: Uri,
    pub(crate) identity: String,
    pub(crate) answer: Sender<VerifyMessage>,
}
