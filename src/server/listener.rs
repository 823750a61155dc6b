//! Taking clients in.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::disk::Disk;
use super::{MAX_CONNECTIONS, connection};
use crate::uring::{Budget, Listener, sleep, spawn};

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

/// Serves `disk` to whoever connects, until the task is dropped.
pub async fn serve<D: Disk>(listener: Listener, disk: Rc<D>, stats: ServeStats) {
    let places = Budget::new(MAX_CONNECTIONS);
    loop {
        let place = places.take(1).await;
        let connection = match listener.accept().await {
            Ok(connection) => connection,
            Err(e) => {
                // Out of descriptors, most likely: others may leave.
                log::warn!("{}: cannot accept a connection: {e}", listener.local());
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (disk, stats) = (disk.clone(), stats.clone());
        let local = listener.local().to_owned();
        spawn(async move {
            stats.inner.clients.fetch_add(1, Ordering::Relaxed);
            if let Err(e) = connection::run(connection, disk, stats.clone()).await {
                log::warn!("{local}: a client was dropped: {e}");
            }
            stats.inner.clients.fetch_sub(1, Ordering::Relaxed);
            drop(place);
        })
        .detach();
    }
}
