//! Taking clients in.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::select;
use slab::Slab;

use super::disk::Disk;
use super::{MAX_CONNECTIONS, connection};
use crate::uring::{Budget, Connection, Listener, Task, sleep, spawn};

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

/// A listener at work.
pub struct Server {
    accepting: Task<()>,
    open: Rc<RefCell<Slab<Connection>>>,
    places: Budget,
}

impl Server {
    /// Serves `disk` to whoever connects, from now on.
    pub fn start<D: Disk>(listener: Listener, disk: Rc<D>, stats: ServeStats) -> Self {
        let open = Rc::new(RefCell::new(Slab::new()));
        let places = Budget::new(MAX_CONNECTIONS);
        let accepting = spawn(accept(listener, disk, stats, open.clone(), places.clone()));
        Self { accepting, open, places }
    }

    /// Takes no more clients and no more requests, and gives those under way so long to end.
    pub async fn stop(self, patience: Duration) {
        self.accepting.cancel().await;
        for (_, connection) in self.open.borrow().iter() {
            connection.shutdown_receiving();
        }
        select(self.places.all_back().boxed_local(), sleep(patience).boxed_local()).await;
    }
}

async fn accept<D: Disk>(
    listener: Listener,
    disk: Rc<D>,
    stats: ServeStats,
    open: Rc<RefCell<Slab<Connection>>>,
    places: Budget,
) {
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
        let (disk, stats, open) = (disk.clone(), stats.clone(), open.clone());
        let local = listener.local().to_owned();
        spawn(async move {
            let key = open.borrow_mut().insert(connection.clone());
            stats.inner.clients.fetch_add(1, Ordering::Relaxed);
            if let Err(e) = connection::run(connection, disk, stats.clone()).await {
                log::warn!("{local}: a client was dropped: {e}");
            }
            stats.inner.clients.fetch_sub(1, Ordering::Relaxed);
            open.borrow_mut().remove(key);
            drop(place);
        })
        .detach();
    }
}
