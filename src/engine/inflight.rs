//! Which blocks are on their way, and who owns them. One owner a block.
//!
//! ```text
//!             fetch sent            data here             data in the cache
//!   Absent ──────────────► Wire ──────────────► Storing ────────────────────► Present
//!     │                     │                                                    ▲
//!     │ whole-block write   │ whole-block write takes the block from the fetch    │
//!     └──────────┬──────────┘                                                    │
//!                └────────────────► Overwriting ─────────────────────────────────┘
//!                                       │          data in the cache
//!   a failure on any arrow goes back to Absent
//! ```
//!
//! Absent and Present are told by the present map; this table holds the states between. It works on
//! runs, so that a hole of gigabytes is one entry.

use std::collections::BTreeMap;

use super::geometry::BlockRun;

/// Names a fetch from its start to its end. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FetchId(pub u64);

/// Names a piece of local I/O from its start to its end. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IoId(pub u64);

/// Who is busy with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A fetch waits for its data from the source.
    Wire(FetchId),
    /// The data of a fetch is being written into the cache.
    Storing(FetchId),
    /// The guest's write, trim or zeroing of the whole block is being done.
    Overwriting(IoId),
}

#[derive(Clone, Copy, Debug)]
struct Span {
    end: u64,
    owner: Owner,
}

/// The table of owned runs. Runs never overlap.
#[derive(Debug, Default)]
pub struct Inflight {
    spans: BTreeMap<u64, Span>,
}

impl Inflight {
    /// The owner at `block` and the end of what it owns there, or the start of the next owned run.
    pub fn look(&self, block: u64) -> (Option<Owner>, u64) {
        if let Some((_, span)) = self.spans.range(..=block).next_back()
            && span.end > block
        {
            return (Some(span.owner), span.end);
        }
        let next = self.spans.range(block..).next().map_or(u64::MAX, |(&start, _)| start);
        (None, next)
    }

    /// Gives a run to an owner. Whoever owned parts of it loses them.
    pub fn give(&mut self, run: BlockRun, owner: Owner) {
        self.free(run);
        if !run.is_empty() {
            self.spans.insert(run.start, Span { end: run.end, owner });
        }
    }

    /// Takes a run from whoever owns parts of it.
    pub fn free(&mut self, run: BlockRun) {
        if run.is_empty() {
            return;
        }
        if let Some((&start, &span)) = self.spans.range(..run.start).next_back()
            && span.end > run.start
        {
            self.spans.insert(start, Span { end: run.start, owner: span.owner });
            if span.end > run.end {
                self.spans.insert(run.end, span);
            }
        }
        while let Some((&start, &span)) = self.spans.range(run.start..run.end).next() {
            self.spans.remove(&start);
            if span.end > run.end {
                self.spans.insert(run.end, span);
            }
        }
    }

    /// The parts of `run` that `owner` still owns.
    pub fn owned(&self, run: BlockRun, owner: Owner) -> Vec<BlockRun> {
        let mut parts = Vec::new();
        let mut at = run.start;
        while at < run.end {
            let (found, end) = self.look(at);
            let end = end.min(run.end);
            if found == Some(owner) {
                parts.push(BlockRun::new(at, end));
            }
            at = end;
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_behave_like_a_list_of_owners(steps in prop::collection::vec((0u64..60, 0u64..30, 0u64..4), 0..60)) {
            let mut table = Inflight::default();
            let mut naive: Vec<Option<Owner>> = vec![None; 100];
            for (start, len, who) in steps {
                let run = BlockRun::new(start, start + len);
                let owner = (who > 0).then_some(Owner::Wire(FetchId(who)));
                match owner {
                    Some(owner) => table.give(run, owner),
                    None => table.free(run),
                }
                naive[run.start as usize..run.end as usize].fill(owner);
                for block in 0..100 {
                    let (owner, end) = table.look(block);
                    prop_assert_eq!(owner, naive[block as usize]);
                    prop_assert!(end > block);
                    for same in block..end.min(100) {
                        prop_assert_eq!(naive[same as usize], owner);
                    }
                }
            }
        }
    }

    #[test]
    fn a_fetch_keeps_what_was_not_taken_from_it() {
        let mut table = Inflight::default();
        let fetch = Owner::Wire(FetchId(1));
        table.give(BlockRun::new(10, 20), fetch);
        table.give(BlockRun::new(12, 14), Owner::Overwriting(IoId(7)));
        assert_eq!(table.owned(BlockRun::new(10, 20), fetch), [BlockRun::new(10, 12), BlockRun::new(14, 20)]);
        table.free(BlockRun::new(0, 100));
        assert!(table.spans.is_empty());
    }
}
