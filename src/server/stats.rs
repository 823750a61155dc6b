//! Counting.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What went through a server, in bytes and clients.
#[derive(Clone, Debug, Default)]
pub struct ServeStats {
    inner: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    sent_bytes: AtomicU64,
    written_bytes: AtomicU64,
    clients: AtomicU64,
}

impl ServeStats {
    pub(super) fn add_sent(&self, bytes: u64) {
        self.inner.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_written(&self, bytes: u64) {
        self.inner.written_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn client_came(&self) {
        self.inner.clients.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn client_left(&self) {
        self.inner.clients.fetch_sub(1, Ordering::Relaxed);
    }

    /// Bytes sent to clients, headers included.
    pub fn sent_bytes(&self) -> u64 {
        self.inner.sent_bytes.load(Ordering::Relaxed)
    }

    /// Payload bytes that clients sent in writes.
    pub fn written_bytes(&self) -> u64 {
        self.inner.written_bytes.load(Ordering::Relaxed)
    }

    /// Clients connected now.
    pub fn clients(&self) -> u64 {
        self.inner.clients.load(Ordering::Relaxed)
    }
}
