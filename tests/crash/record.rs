//! What the disk must hold: every acknowledged change, and what a crash may make of the others.
//!
//! All is kept by the sector. After a kill a sector holds what was acknowledged last, or that with one change
//! on top that was under way. After a power cut it may also hold anything older, back to the last promise
//! (a flush or FUA that covered it). What was found then counts from there on: a sector may not change its mind.

use std::collections::HashMap;
use std::ops::Range;

pub const SECTOR: u64 = 512;

type Sector = [u8; SECTOR as usize];

/// How the machine went down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The daemon was killed, the machine goes on.
    Kill,
    /// What was not durable may be gone.
    PowerCut,
}

/// A write, zeroing or trim: what its bytes become.
#[derive(Clone, Debug)]
pub struct Change {
    pub start: u64,
    pub end: u64,
    /// `None`: zeros.
    pub data: Option<Vec<u8>>,
    pub fua: bool,
}

impl Change {
    fn sectors(&self) -> Range<u64> {
        sectors(self.start, self.end)
    }

    /// The sector after the change, or after as much of the change as falls into it.
    fn applied_to(&self, index: u64, mut sector: Sector) -> Sector {
        let base = index * SECTOR;
        let (from, to) = (self.start.max(base), self.end.min(base + SECTOR));
        for at in from..to {
            sector[(at - base) as usize] = self.data.as_ref().map_or(0, |data| data[(at - self.start) as usize]);
        }
        sector
    }
}

/// Sectors that a range of bytes touches.
pub fn sectors(start: u64, end: u64) -> Range<u64> {
    if start < end { start / SECTOR..end.div_ceil(SECTOR) } else { 0..0 }
}

pub struct Record {
    source: Vec<u8>,
    now: Vec<u8>,
    /// Sent, not answered. No two of them touch the same sector.
    pending: HashMap<u64, Change>,
    /// What a sector was before, since the last promise, each with the time when it was replaced.
    older: HashMap<u64, Vec<(u64, Sector)>>,
    time: u64,
}

impl Record {
    pub fn new(source: Vec<u8>) -> Self {
        let now = source.clone();
        Self { source, now, pending: HashMap::new(), older: HashMap::new(), time: 0 }
    }

    pub fn size(&self) -> u64 {
        self.now.len() as u64
    }

    /// What was acknowledged.
    pub fn bytes(&self, start: u64, end: u64) -> &[u8] {
        &self.now[start as usize..end as usize]
    }

    pub fn source_bytes(&self, start: u64, end: u64) -> &[u8] {
        &self.source[start as usize..end as usize]
    }

    /// Where the source has something else than zeros first.
    pub fn first_data(&self) -> u64 {
        self.source.iter().position(|&byte| byte != 0).expect("no image is empty") as u64
    }

    /// A change is about to be sent.
    pub fn begin(&mut self, cookie: u64, change: Change) {
        self.pending.insert(cookie, change);
    }

    /// It was refused, and did nothing.
    pub fn refused(&mut self, cookie: u64) {
        self.pending.remove(&cookie).expect("it was sent");
    }

    /// It was acknowledged.
    pub fn acknowledged(&mut self, cookie: u64) {
        let change = self.pending.remove(&cookie).expect("it was sent");
        self.time += 1;
        for index in change.sectors() {
            let before = self.sector(index);
            self.put(index, &change.applied_to(index, before));
            if change.fua {
                self.older.remove(&index);
            } else {
                self.older.entry(index).or_default().push((self.time, before));
            }
        }
    }

    /// What a flush that is sent now will promise.
    pub fn flush_sent(&self) -> u64 {
        self.time
    }

    /// That flush was acknowledged.
    pub fn flushed(&mut self, sent: u64) {
        self.older.retain(|_, versions| {
            versions.retain(|(replaced, _)| *replaced > sent);
            !versions.is_empty()
        });
    }

    /// After a crash: may this sector hold that? If so it is what the sector holds from now on.
    pub fn settle(&mut self, index: u64, found: &[u8], crash: Crash) -> bool {
        let found: Sector = found.try_into().expect("a sector");
        let now = self.sector(index);
        if found == now && crash == Crash::Kill {
            return true;
        }
        let mut bases = vec![now];
        if crash == Crash::PowerCut {
            bases.extend(self.older.remove(&index).into_iter().flatten().map(|(_, sector)| sector));
        }
        let change = self.pending.values().find(|change| change.sectors().contains(&index));
        let on_top = |base: &Sector| change.is_some_and(|change| change.applied_to(index, *base) == found);
        if !bases.iter().any(|base| found == *base || on_top(base)) {
            return false;
        }
        if crash == Crash::Kill {
            self.time += 1;
            self.older.entry(index).or_default().push((self.time, now));
        }
        self.put(index, &found);
        true
    }

    /// All sectors are settled: what was under way is decided.
    pub fn settled(&mut self, crash: Crash) {
        self.pending.clear();
        if crash == Crash::PowerCut {
            self.older.clear();
        }
    }

    /// Is every sector of a range beyond doubt?
    pub fn is_certain(&self, start: u64, end: u64, crash: Crash) -> bool {
        let range = sectors(start, end);
        let meets = |other: Range<u64>| other.start < range.end && range.start < other.end;
        let older = || (range.start..range.end).any(|index| self.older.contains_key(&index));
        !self.pending.values().any(|change| meets(change.sectors())) && (crash == Crash::Kill || !older())
    }

    /// In words, for a failure.
    pub fn tell(&self, index: u64, found: &[u8]) -> String {
        let change = self.pending.values().find(|change| change.sectors().contains(&index));
        let head = |bytes: &[u8]| format!("{:02x?}", &bytes[..bytes.len().min(16)]);
        let range = |bytes: &[u8]| head(&bytes[(index * SECTOR) as usize..]);
        let is_source = found == &self.source[(index * SECTOR) as usize..][..SECTOR as usize];
        let change = change.map(|c| (c.start, c.end, c.data.as_deref().map(head)));
        format!(
            "sector {index}: found {} (zeros: {}, the source's: {is_source}), acknowledged {}, source {}, under way {change:?}",
            head(found),
            found.iter().all(|&b| b == 0),
            range(&self.now),
            range(&self.source),
        )
    }

    fn sector(&self, index: u64) -> Sector {
        self.now[(index * SECTOR) as usize..][..SECTOR as usize].try_into().expect("whole sectors")
    }

    fn put(&mut self, index: u64, sector: &Sector) {
        self.now[(index * SECTOR) as usize..][..SECTOR as usize].copy_from_slice(sector);
    }
}
