//! A simulated disk: a page cache over a platter, sector by sector. One for the cache's data, whose sectors are
//! stamps, and one for the metadata file, whose sectors are bytes.
//!
//! A write is seen at once and is durable after a sync. In between it may reach the platter at any time: at
//! a power cut each sector holds what it held at some moment since the last sync, each a moment of its own. So
//! writes are lost in part, out of order, and torn. After a sync that failed, what did not reach the platter
//! never will: the kernel has dropped it, reads show it all the same, and the next sync will know nothing of it. The same
//! may happen while the kernel writes back by itself, between two syncs: the next one is told, and no later one. (A new
//! process is told as well; by a real kernel only if nobody was told before: docs/ARCHITECTURE.md.)

use std::ops::Range;

use crate::rng::Rng;

/// More unsynced writes than this, and the kernel begins to write them back.
const WRITE_BACK_AT: usize = 2000;

struct Unsynced<T> {
    at: u64,
    sector: u64,
    value: T,
}

/// What of the unsynced writes a power cut or a failed sync leaves.
#[derive(Clone, Copy, Debug)]
pub enum Survives {
    /// Nothing.
    None,
    /// Everything.
    All,
    /// Each write of a sector, in order, as long as this many of a hundred throws allow it.
    Percent(u64),
}

impl Survives {
    /// Does one write of a sector?
    pub fn throw(self, rng: &mut Rng) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Percent(percent) => rng.percent(percent),
        }
    }
}

/// The disk.
pub struct Disk<T> {
    /// What reads see.
    current: Vec<T>,
    platter: Vec<T>,
    unsynced: Vec<Unsynced<T>>,
    writes: u64,
    /// Something could not be written back, and these were not told yet. The kernel tells each opening once.
    untold: [bool; 2],
    /// A write with RWF_DSYNC was told: the word of others is not enough any more.
    pub doubts_dsync: bool,
}

/// An opening of the cache's data, by what it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The guest's writes.
    Writes,
    /// The commits' syncs.
    Commits,
}

impl<T: Clone + PartialEq> Disk<T> {
    /// A disk that holds this, synced.
    pub fn new(content: Vec<T>) -> Self {
        Self {
            platter: content.clone(),
            current: content,
            unsynced: Vec::new(),
            writes: 0,
            untold: [false; 2],
            doubts_dsync: false,
        }
    }

    /// Number of sectors.
    pub fn sectors(&self) -> u64 {
        self.current.len() as u64
    }

    /// Reads one sector.
    pub fn read(&self, sector: u64) -> T {
        self.current[sector as usize].clone()
    }

    /// Writes one sector.
    pub fn write(&mut self, sector: u64, value: T) {
        self.current[sector as usize] = value.clone();
        self.writes += 1;
        self.unsynced.push(Unsynced { at: self.writes, sector, value });
        if self.unsynced.len() > WRITE_BACK_AT {
            self.sync(self.writes - WRITE_BACK_AT as u64 / 2);
        }
    }

    /// A sync that begins now covers the writes up to this mark.
    pub fn mark(&self) -> u64 {
        self.writes
    }

    /// The sync that began at this mark has ended.
    pub fn sync(&mut self, mark: u64) {
        let covered = self.unsynced.partition_point(|w| w.at <= mark);
        for write in self.unsynced.drain(..covered) {
            self.platter[write.sector as usize] = write.value;
        }
    }

    /// The sync that began at this mark has failed. What of it did not reach the platter is dropped.
    pub fn sync_fails(&mut self, mark: u64, survives: Survives, rng: &mut Rng) {
        let covered = self.unsynced.partition_point(|w| w.at <= mark);
        for write in self.unsynced.drain(..covered) {
            if survives.throw(rng) {
                self.platter[write.sector as usize] = write.value;
            }
        }
    }

    /// The kernel writes back by itself, and the disk fails. What did not reach the platter is dropped.
    pub fn write_back_fails(&mut self, survives: Survives, rng: &mut Rng) {
        self.sync_fails(self.writes, survives, rng);
        self.untold = [true; 2];
    }

    /// Will a sync be told of an error that is over?
    pub fn has_untold_error(&self) -> bool {
        self.untold.contains(&true)
    }

    /// Is a sync that ends now told of an error? Once for each opening.
    pub fn tell_error(&mut self, to: Opening) -> bool {
        std::mem::take(&mut self.untold[to as usize])
    }

    /// A write with RWF_DSYNC has ended: its own sectors are durable, and no other.
    pub fn sync_write(&mut self, sectors: Range<u64>, value: T) {
        let platter = &mut self.platter;
        let mut last = vec![0; (sectors.end - sectors.start) as usize];
        for write in self.unsynced.iter().filter(|w| sectors.contains(&w.sector) && w.value == value) {
            last[(write.sector - sectors.start) as usize] = write.at;
        }
        self.unsynced.retain(|write| {
            let covered = sectors.contains(&write.sector) && write.at <= last[(write.sector - sectors.start) as usize];
            if covered {
                platter[write.sector as usize] = write.value.clone();
            }
            !covered
        });
    }

    /// Cuts the power.
    pub fn lose_power(&mut self, survives: Survives, rng: &mut Rng) {
        let mut stopped = vec![false; self.platter.len()];
        for write in self.unsynced.drain(..) {
            let stopped = &mut stopped[write.sector as usize];
            *stopped |= !survives.throw(rng);
            if !*stopped {
                self.platter[write.sector as usize] = write.value;
            }
        }
        self.current.clone_from(&self.platter);
        (self.untold, self.doubts_dsync) = ([false; 2], false);
    }
}
