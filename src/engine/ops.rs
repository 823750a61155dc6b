//! The guest requests that are not answered yet.

use std::collections::HashMap;

use super::event::{Errno, OpId, OpKind};
use super::geometry::ByteRange;

/// A part of a request that waits for one thing, or is about to be started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) op: OpId,
    pub(super) kind: OpKind,
    pub(super) range: ByteRange,
}

#[derive(Debug)]
struct Op {
    kind: OpKind,
    /// Segments that wait and local I/O that runs.
    pending: u64,
    error: Option<Errno>,
    needs_commit: bool,
}

/// What to do with a request whose last part has ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Parts are still under way.
    Not,
    /// Tell the guest.
    Complete(Result<(), Errno>),
    /// Tell the guest, who asked for durability, that all was written durably.
    Durable,
    /// It asked for durability, and its bits are not committed: after the next commit.
    AfterCommit,
}

/// All open requests.
#[derive(Debug, Default)]
pub(super) struct Ops {
    open: HashMap<OpId, Op>,
}

impl Ops {
    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    /// Opens a request with one part, the whole of it.
    pub(super) fn open(&mut self, op: OpId, kind: OpKind) {
        let old = self.open.insert(op, Op { kind, pending: 1, error: None, needs_commit: false });
        assert!(old.is_none(), "{op:?} was submitted twice");
    }

    pub(super) fn add_part(&mut self, op: OpId) {
        self.op(op).pending += 1;
    }

    /// A write that found its bits not committed: if it is FUA, it waits for a commit in the end.
    pub(super) fn needs_commit(&mut self, op: OpId) {
        self.op(op).needs_commit = true;
    }

    /// One part has ended; `error` is kept if it is the first.
    pub(super) fn end_part(&mut self, id: OpId, result: Result<(), Errno>) -> Ended {
        let op = self.op(id);
        op.pending -= 1;
        op.error = op.error.or(result.err());
        if op.pending > 0 {
            return Ended::Not;
        }
        let op = self.open.remove(&id).expect("found above");
        match op.error {
            Some(errno) => Ended::Complete(Err(errno)),
            None if op.kind.wants_fua() && op.needs_commit => Ended::AfterCommit,
            None if op.kind.wants_fua() => Ended::Durable,
            None => Ended::Complete(Ok(())),
        }
    }

    fn op(&mut self, op: OpId) -> &mut Op {
        self.open.get_mut(&op).expect("every part belongs to an open request")
    }
}
