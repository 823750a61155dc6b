//! A guest request that is not answered yet, as the shell keeps it: with its buffer.

use std::ops::Range;

use blkferry::engine::{BlockRun, ByteRange, Errno, Maps, OpId, OpKind};

use crate::check::{Checked, ensure};
use crate::setup::{Setup, sectors_of};
use crate::stamp::Stamp;

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Something with a range.
    Op(OpKind, ByteRange),
    /// A flush.
    Flush,
}

/// An open request.
pub struct Guest {
    /// Its name.
    pub op: OpId,
    /// What it wants.
    pub wish: Wish,
    /// When it began.
    pub begin: u64,
    /// Must it be answered though the source is silent (I8, I9)?
    pub is_local: bool,
    /// Must it be refused: FAST_ZERO of a part of an absent block?
    pub must_refuse: bool,
    /// A part of it was made to fail, or the device has failed: it must not be told that all is well (I11).
    pub must_fail: bool,
    /// The sectors that it reads or changes.
    sectors: Range<u64>,
    /// For each of them: what a read found, or what a change wrote. NONE: nothing yet.
    buffer: Vec<Stamp>,
    /// Which of them some action takes care of.
    claimed: Vec<bool>,
}

impl Guest {
    /// A request as it comes in.
    pub fn new(op: OpId, wish: Wish, begin: u64, setup: &Setup, maps: &Maps) -> Self {
        let sectors = match wish {
            Wish::Flush | Wish::Op(OpKind::Prefetch, _) => 0..0,
            // Only whole blocks are trimmed.
            Wish::Op(OpKind::Trim { .. }, range) => whole_sectors(setup, range),
            Wish::Op(_, range) => sectors_of(range),
        };
        let has_edge = has_absent_edge(setup, maps, wish);
        let must_refuse = has_edge && matches!(wish, Wish::Op(OpKind::Zero { fast_only: true, .. }, _));
        let is_local = match wish {
            Wish::Op(OpKind::Read | OpKind::Prefetch, range) => all_present(maps, setup.touched(range)),
            Wish::Op(OpKind::Write { .. } | OpKind::Zero { .. }, _) => !has_edge || must_refuse,
            Wish::Flush | Wish::Op(OpKind::Trim { .. }, _) => true,
        };
        let len = (sectors.end - sectors.start) as usize;
        Self {
            op,
            wish,
            begin,
            is_local,
            must_refuse,
            must_fail: false,
            sectors,
            buffer: vec![Stamp::NONE; len],
            claimed: vec![false; len],
        }
    }

    /// What a change writes; none if the request changes nothing.
    pub fn stamp(&self) -> Option<Stamp> {
        match self.wish {
            Wish::Op(OpKind::Write { .. }, _) => Some(Stamp::write(self.op.0)),
            Wish::Op(OpKind::Zero { .. } | OpKind::Trim { .. }, _) => Some(Stamp::zeros(self.op.0)),
            _ => None,
        }
    }

    /// Does it ask for durability of its own data?
    pub fn is_fua(&self) -> bool {
        matches!(
            self.wish,
            Wish::Op(OpKind::Write { fua: true } | OpKind::Zero { fua: true, .. } | OpKind::Trim { fua: true }, _)
        )
    }

    /// Is it a read that wants its data?
    pub fn is_read(&self) -> bool {
        matches!(self.wish, Wish::Op(OpKind::Read, _))
    }

    /// The sectors that it reads or changes.
    pub fn sectors(&self) -> Range<u64> {
        self.sectors.clone()
    }

    /// What a read found, sector by sector.
    pub fn found(&self) -> impl Iterator<Item = (u64, Stamp)> {
        self.sectors.clone().zip(self.buffer.iter().copied())
    }

    /// An action takes care of this range. No sector is handled twice, none outside of the request.
    pub fn claim(&mut self, range: ByteRange) -> Checked {
        let sectors = sectors_of(range);
        ensure!(!sectors.is_empty(), "I10", "an action without bytes for {:?}", self.op);
        let inside = sectors.start >= self.sectors.start && sectors.end <= self.sectors.end;
        ensure!(inside, "scope", "{range:?} is not in the range of {:?} {:?}", self.op, self.wish);
        for sector in sectors {
            let claimed = &mut self.claimed[(sector - self.sectors.start) as usize];
            ensure!(!*claimed, "scope", "sector {sector} is handled twice for {:?}", self.op);
            *claimed = true;
        }
        Ok(())
    }

    /// The shell has read or written one sector.
    pub fn fill(&mut self, sector: u64, stamp: Stamp) {
        self.buffer[(sector - self.sectors.start) as usize] = stamp;
    }

    /// May it be answered like this?
    pub fn check_answer(&self, result: Result<(), Errno>, a_failure_was_injected: bool) -> Checked {
        let (op, wish) = (self.op, self.wish);
        ensure!(!(self.must_fail && result.is_ok()), "I11", "{op:?} {wish:?} succeeded in spite of a failure");
        match result {
            Ok(()) => {
                ensure!(!self.must_refuse, "FAST_ZERO", "{op:?} {wish:?} was not refused");
                let missing = self.found().find(|(_, stamp)| *stamp == Stamp::NONE);
                ensure!(missing.is_none(), "I11", "{op:?} {wish:?} is done, but sector {missing:?} is not");
            }
            Err(Errno::ENOTSUP) if self.must_refuse => {}
            Err(_) => ensure!(a_failure_was_injected, "I11", "{op:?} {wish:?} failed with {result:?} out of nothing"),
        }
        Ok(())
    }
}

fn all_present(maps: &Maps, mut blocks: Range<u64>) -> bool {
    blocks.all(|block| maps.is_present(block))
}

/// The sectors of the blocks that lie in a range whole.
fn whole_sectors(setup: &Setup, range: ByteRange) -> Range<u64> {
    let mut whole = setup.touched(range).filter(|&block| setup.covers(range, block));
    whole.next().map_or(0..0, |first| {
        let last = whole.next_back().unwrap_or(first);
        setup.sectors_in(BlockRun::new(first, last + 1))
    })
}

/// Is there an absent block that the wish would change in part?
fn has_absent_edge(setup: &Setup, maps: &Maps, wish: Wish) -> bool {
    let Wish::Op(OpKind::Write { .. } | OpKind::Zero { .. }, range) = wish else {
        return false;
    };
    setup.touched(range).any(|block| !setup.covers(range, block) && !maps.is_present(block))
}
