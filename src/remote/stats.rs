//! Counting.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes over all links, since the source was opened. Readable from any thread.
#[derive(Clone, Debug, Default)]
pub struct SourceStats {
    inner: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    received: AtomicU64,
    sent: AtomicU64,
    data: AtomicU64,
    greeted: AtomicU64,
    links: AtomicU64,
}

impl SourceStats {
    pub(super) fn add_received(&self, bytes: u64) {
        self.inner.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The same, of a handshake.
    pub(super) fn add_greeted(&self, bytes: u64) {
        self.inner.greeted.fetch_add(bytes, Ordering::Relaxed);
        self.add_received(bytes);
    }

    /// Bytes received in handshakes.
    pub(super) fn greeted_bytes(&self) -> u64 {
        self.inner.greeted.load(Ordering::Relaxed)
    }

    pub(super) fn add_sent(&self, bytes: u64) {
        self.inner.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_data(&self, bytes: u64) {
        self.inner.data.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes received, headers and handshakes included.
    pub fn received_bytes(&self) -> u64 {
        self.inner.received.load(Ordering::Relaxed)
    }

    /// Bytes sent.
    pub fn sent_bytes(&self) -> u64 {
        self.inner.sent.load(Ordering::Relaxed)
    }

    /// Bytes of the disk received as data (not as holes).
    pub fn data_bytes(&self) -> u64 {
        self.inner.data.load(Ordering::Relaxed)
    }

    pub(super) fn set_links(&self, links: usize) {
        self.inner.links.store(links as u64, Ordering::Relaxed);
    }

    /// Links that are up.
    pub fn links(&self) -> u64 {
        self.inner.links.load(Ordering::Relaxed)
    }
}
