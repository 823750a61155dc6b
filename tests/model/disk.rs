//! The simulated cache: a page cache over a platter, sector by sector.
//!
//! A write is seen at once and is durable after a sync. In between it may reach the platter at any time: at
//! a power cut each sector holds what it held at some moment since the last sync, each a moment of its own.

use std::ops::Range;

use crate::rng::Rng;
use crate::stamp::Stamp;

/// More unsynced writes than this, and the kernel begins to write them back.
const WRITE_BACK_AT: usize = 2000;

struct Unsynced {
    at: u64,
    sector: u64,
    stamp: Stamp,
}

/// What of the unsynced writes a power cut leaves.
#[derive(Clone, Copy, Debug)]
pub enum Survives {
    /// Nothing.
    None,
    /// Everything.
    All,
    /// Each write of a sector, in order, as long as this many of a hundred throws allow it.
    Percent(u64),
}

/// The cache.
pub struct Disk {
    /// What reads see.
    current: Vec<Stamp>,
    platter: Vec<Stamp>,
    unsynced: Vec<Unsynced>,
    writes: u64,
}

impl Disk {
    /// A disk that holds this, synced.
    pub fn new(content: Vec<Stamp>) -> Self {
        Self { platter: content.clone(), current: content, unsynced: Vec::new(), writes: 0 }
    }

    /// Reads one sector.
    pub fn read(&self, sector: u64) -> Stamp {
        self.current[sector as usize]
    }

    /// Writes one sector.
    pub fn write(&mut self, sector: u64, stamp: Stamp) {
        self.current[sector as usize] = stamp;
        self.writes += 1;
        self.unsynced.push(Unsynced { at: self.writes, sector, stamp });
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
            self.platter[write.sector as usize] = write.stamp;
        }
    }

    /// A write with RWF_DSYNC has ended: its own sectors are durable, and no other.
    pub fn sync_write(&mut self, sectors: Range<u64>, stamp: Stamp) {
        let platter = &mut self.platter;
        let mut last = vec![0; (sectors.end - sectors.start) as usize];
        for write in self.unsynced.iter().filter(|w| sectors.contains(&w.sector) && w.stamp == stamp) {
            last[(write.sector - sectors.start) as usize] = write.at;
        }
        self.unsynced.retain(|write| {
            let covered = sectors.contains(&write.sector) && write.at <= last[(write.sector - sectors.start) as usize];
            if covered {
                platter[write.sector as usize] = write.stamp;
            }
            !covered
        });
    }

    /// Cuts the power.
    pub fn lose_power(&mut self, survives: Survives, rng: &mut Rng) {
        let mut stopped = vec![false; self.platter.len()];
        for write in self.unsynced.drain(..) {
            let stopped = &mut stopped[write.sector as usize];
            *stopped |= match survives {
                Survives::None => true,
                Survives::All => false,
                Survives::Percent(percent) => !rng.percent(percent),
            };
            if !*stopped {
                self.platter[write.sector as usize] = write.stamp;
            }
        }
        self.current.clone_from(&self.platter);
    }
}
