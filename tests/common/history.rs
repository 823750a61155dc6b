//! The naive disk: every sector is an atomic register, and the guest's view of it is a history of writes and
//! reads with a beginning and an end.
//!
//! A read may return any write that some order of all operations allows, where an operation that ended
//! before another began comes first. As every value has one writer (see [`crate::stamp`]) this is exact and
//! cheap (Gibbons and Korach, "Testing shared memories", 1997): put a write and the reads that saw it in one
//! *cluster*. Cluster a must come before cluster b if anything in a ended before something in b began. The
//! history is in order if and only if no two clusters must each come before the other.
//!
//! A write that failed may or may not have been done, at one moment between its beginning and its end: its
//! cluster counts once a read has seen it. A power cut begins the history again, see [`History::lose_power`].
#![allow(dead_code)] // Each test uses its part.

use std::ops::Range;

use crate::check::{Checked, Violation};
use crate::stamp::Stamp;

/// Not ended yet.
const NEVER: u64 = u64::MAX;

/// A write and the reads that saw it.
#[derive(Clone, Debug)]
struct Cluster {
    stamp: Stamp,
    /// When the write itself ended.
    write_end: u64,
    /// The first end and the last beginning of anything in it.
    first_end: u64,
    last_begin: u64,
    /// The guest was told that the write is done.
    acked: bool,
    /// A read returned it.
    seen: bool,
    /// A flush or FUA promised that it survives a power cut.
    promised: bool,
    /// One of several that may be what a power cut left.
    recovered: bool,
}

impl Cluster {
    fn counts(&self) -> bool {
        self.acked || self.seen
    }

    fn must_precede(&self, other: &Self) -> bool {
        self.first_end < other.last_begin
    }

    /// Does it stand on the platter for sure, or something later? What a read showed after a power cut does.
    fn is_durable(&self) -> bool {
        self.promised || (self.recovered && self.seen)
    }
}

/// The histories of all sectors.
pub struct History {
    sectors: Vec<Vec<Cluster>>,
}

impl History {
    /// Sectors that hold these values at time 0.
    pub fn new(initial: impl Iterator<Item = Stamp>) -> Self {
        let first = |stamp| Cluster {
            stamp,
            write_end: 0,
            first_end: 0,
            last_begin: 0,
            acked: false,
            seen: false,
            promised: false,
            recovered: false,
        };
        Self { sectors: initial.map(|stamp| vec![first(stamp)]).collect() }
    }

    /// The guest begins to write.
    pub fn begin_write(&mut self, sectors: Range<u64>, stamp: Stamp, now: u64) {
        let cluster = Cluster {
            stamp,
            write_end: NEVER,
            first_end: NEVER,
            last_begin: now,
            acked: false,
            seen: false,
            promised: false,
            recovered: false,
        };
        sectors.for_each(|sector| self.sectors[sector as usize].push(cluster.clone()));
    }

    /// The guest was told how its write ended.
    pub fn end_write(&mut self, sectors: Range<u64>, stamp: Stamp, now: u64, acked: bool, durable: bool) -> Checked {
        for sector in sectors {
            let clusters = &mut self.sectors[sector as usize];
            let at = clusters.iter().rposition(|c| c.stamp == stamp).expect("the write has begun");
            let cluster = &mut clusters[at];
            cluster.write_end = now;
            cluster.first_end = cluster.first_end.min(now);
            cluster.acked = acked;
            cluster.promised = durable;
            self.check(sector, at)?;
        }
        Ok(())
    }

    /// A read of the guest, or a look into the cache, found this.
    pub fn read(&mut self, sector: u64, found: Stamp, begin: u64, end: u64) -> Checked {
        let clusters = &mut self.sectors[sector as usize];
        let Some(at) = clusters.iter().rposition(|c| c.stamp == found) else {
            let known: Vec<_> = clusters.iter().map(|c| c.stamp).collect();
            return Err(Violation {
                rule: "I3/I4/I5",
                what: format!("sector {sector} read as {found:?}; it may be one of {known:?}"),
            });
        };
        let cluster = &mut clusters[at];
        cluster.first_end = cluster.first_end.min(end);
        cluster.last_begin = cluster.last_begin.max(begin);
        cluster.seen = true;
        self.check(sector, at)
    }

    /// Does the cluster still fit between the others?
    fn check(&self, sector: u64, at: usize) -> Checked {
        let clusters = &self.sectors[sector as usize];
        let this = &clusters[at];
        if !this.counts() {
            return Ok(());
        }
        let clash = clusters
            .iter()
            .enumerate()
            .find(|(i, other)| *i != at && other.counts() && this.must_precede(other) && other.must_precede(this));
        match clash {
            None => Ok(()),
            Some((_, other)) => Err(Violation {
                rule: "I3/I4/I5",
                what: format!("sector {sector}: no order fits both {this:?} and {other:?}"),
            }),
        }
    }

    /// A flush that began at `begin` has succeeded: what was acknowledged before is durable.
    pub fn flushed(&mut self, begin: u64) {
        for cluster in self.sectors.iter_mut().flatten() {
            cluster.promised |= cluster.acked && cluster.write_end < begin;
        }
    }

    /// The process was killed: what was in flight may have been done, and nothing more will happen to it.
    pub fn kill(&mut self, now: u64) {
        for cluster in self.sectors.iter_mut().flatten().filter(|c| c.write_end == NEVER) {
            cluster.write_end = now;
            cluster.first_end = cluster.first_end.min(now);
        }
    }

    /// The power was cut. Each sector now holds one value that is not older than any that was promised;
    /// which one it is, the first read will show. Those that cannot be are forgotten.
    pub fn lose_power(&mut self, now: u64) {
        for clusters in &mut self.sectors {
            let durable: Vec<_> = clusters.iter().filter(|c| c.is_durable()).cloned().collect();
            clusters.retain(|c| durable.iter().all(|d| d.stamp == c.stamp || !c.must_precede(d)));
            for cluster in clusters {
                (cluster.write_end, cluster.first_end, cluster.last_begin) = (now, now, 0);
                (cluster.acked, cluster.seen, cluster.promised) = (false, false, false);
                cluster.recovered = true;
            }
        }
    }

    /// Was a guest's write to this sector promised to survive?
    pub fn guest_data_is_promised(&self, sector: u64) -> bool {
        self.sectors[sector as usize].iter().any(|c| c.promised && c.stamp.is_guests())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_sector() -> History {
        History::new(std::iter::once(Stamp::source(0)))
    }

    fn write(h: &mut History, op: u64, begin: u64, end: u64) -> Checked {
        h.begin_write(0..1, Stamp::write(op), begin);
        h.end_write(0..1, Stamp::write(op), end, true, false)
    }

    #[test]
    fn a_read_sees_the_last_write_or_one_that_runs() {
        let mut h = one_sector();
        assert!(write(&mut h, 1, 1, 2).is_ok());
        h.begin_write(0..1, Stamp::write(2), 3);
        assert!(h.read(0, Stamp::write(1), 4, 5).is_ok());
        assert!(h.read(0, Stamp::write(2), 6, 7).is_ok());
        // New before old: the read that began at 8 comes after the one that ended at 7.
        assert!(h.read(0, Stamp::write(1), 8, 9).is_err());
    }

    #[test]
    fn source_data_never_comes_back() {
        let mut h = one_sector();
        assert!(h.read(0, Stamp::source(0), 1, 10).is_ok());
        assert!(write(&mut h, 1, 2, 3).is_ok());
        assert!(h.read(0, Stamp::source(0), 4, 5).is_err());
        assert!(one_sector().read(0, Stamp::JUNK, 1, 2).is_err());
    }

    #[test]
    fn a_failed_write_is_done_once_or_never() {
        let mut h = one_sector();
        h.begin_write(0..1, Stamp::write(1), 1);
        assert!(h.end_write(0..1, Stamp::write(1), 2, false, false).is_ok());
        assert!(h.read(0, Stamp::source(0), 3, 4).is_ok());
        assert!(h.read(0, Stamp::write(1), 5, 6).is_err());
    }

    #[test]
    fn a_power_cut_takes_what_no_flush_promised() {
        let cut = |promised: bool| {
            let mut h = one_sector();
            assert!(write(&mut h, 1, 1, 2).is_ok() && write(&mut h, 2, 3, 4).is_ok());
            if promised {
                h.flushed(3);
            }
            h.lose_power(5);
            h
        };
        assert!(cut(false).read(0, Stamp::source(0), 6, 7).is_ok());
        assert!(cut(true).read(0, Stamp::source(0), 6, 7).is_err());
        assert!(cut(true).read(0, Stamp::write(1), 6, 7).is_ok());
        // What one read showed, the next one shows as well.
        let mut h = cut(true);
        assert!(h.read(0, Stamp::write(2), 6, 7).is_ok());
        assert!(h.read(0, Stamp::write(1), 8, 9).is_err());
    }
}
