//! Requests for blocks that are present: between the caller's memory and the cache, past the engine.
//!
//! A present block never becomes absent again, so what [`Queue::is_hit`] said once stays true.

use std::sync::atomic::Ordering;

use super::queue::Queue;
use crate::engine::{ByteRange, Errno};

impl Queue {
    /// Is everything in a range here? Then it stays here.
    pub fn is_hit(&self, range: ByteRange) -> bool {
        self.core.is_hit(range)
    }

    /// Reads a range that is here into the first bytes of `target`; it comes back either way.
    pub async fn read_hit<B: AsMut<[u8]> + 'static>(&self, range: ByteRange, target: B) -> (Result<(), Errno>, B) {
        self.count_hit(range);
        if let Err(errno) = self.check_health() {
            return (Err(errno), target);
        }
        let (result, target) = self.cache.read_exact_at(target, 0..range.len() as usize, range.start).await;
        (result.map_err(|e| self.io_error("read", &e)), target)
    }

    /// Writes the first bytes of `data` to a range that is here; it comes back either way.
    pub async fn write_hit<B>(&self, range: ByteRange, data: B, fua: bool) -> (Result<(), Errno>, B)
    where
        B: AsRef<[u8]> + 'static,
    {
        let _pass = match self.pass().await {
            Ok(pass) => pass,
            Err(errno) => return (Err(errno), data),
        };
        self.count_write(range);
        if let Err(errno) = self.check_health() {
            return (Err(errno), data);
        }
        let dsync = self.prepare_change(range, fua);
        let (result, data) = self.cache.write_from(data, range.len() as usize, range.start, dsync).await;
        match result {
            Err(e) => (Err(self.io_error("write", &e)), data),
            // A commit that failed meanwhile may have dropped what this write had written before its own sync.
            Ok(()) if dsync => (self.check_health(), data),
            Ok(()) => (self.finish_change(fua && !dsync).await, data),
        }
    }

    fn count_hit(&self, range: ByteRange) {
        self.core.counters.read_bytes.fetch_add(range.len(), Ordering::Relaxed);
        self.core.counters.read_hits.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_write(&self, range: ByteRange) {
        self.core.counters.writes.fetch_add(1, Ordering::Relaxed);
        self.core.counters.written_bytes.fetch_add(range.len(), Ordering::Relaxed);
    }

    pub(super) fn check_health(&self) -> Result<(), Errno> {
        if self.core.health.has_failed() { Err(Errno::EIO) } else { Ok(()) }
    }

    /// Before a change of present blocks. True: with RWF_DSYNC the write alone is durable, bits and all.
    pub(super) fn prepare_change(&self, range: ByteRange, fua: bool) -> bool {
        let blocks = self.core.geometry().covering(range);
        self.core.maps().mark_dirty(blocks);
        fua && self.core.maps().is_committed(blocks)
    }

    pub(super) async fn finish_change(&self, flush: bool) -> Result<(), Errno> {
        if flush { self.flush().await } else { Ok(()) }
    }
}
