//! Taking clients in.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::select;
use slab::Slab;

use super::disk::Disk;
use super::stats::ServeStats;
use super::{MAX_CONNECTIONS, MAX_LEFTOVERS, connection};
use crate::uring::{Budget, Connection, Listener, Task, sleep, spawn};

/// A listener at work.
pub struct Server {
    accepting: Task<()>,
    open: Rc<RefCell<Slab<Connection>>>,
    places: Budget,
    leftovers: Budget,
}

impl Server {
    /// Serves `disk` to whoever connects, from now on.
    pub fn start<D: Disk>(listener: Listener, disk: Rc<D>, stats: ServeStats) -> Self {
        let open = Rc::new(RefCell::new(Slab::new()));
        let places = Budget::new(MAX_CONNECTIONS);
        let leftovers = Budget::new(MAX_LEFTOVERS);
        let accepting = spawn(accept(listener, disk, stats, open.clone(), [places.clone(), leftovers.clone()]));
        Self { accepting, open, places, leftovers }
    }

    /// Takes no more clients and no more requests, and gives those under way so long to end.
    pub async fn stop(self, patience: Duration) {
        self.accepting.cancel().await;
        for (_, connection) in self.open.borrow().iter() {
            connection.shutdown_receiving();
        }
        let ended = async {
            self.places.all_back().await;
            self.leftovers.all_back().await;
        };
        select(ended.boxed_local(), sleep(patience).boxed_local()).await;
    }
}

async fn accept<D: Disk>(
    listener: Listener,
    disk: Rc<D>,
    stats: ServeStats,
    open: Rc<RefCell<Slab<Connection>>>,
    [places, leftovers]: [Budget; 2],
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
        let (disk, stats, open, leftovers) = (disk.clone(), stats.clone(), open.clone(), leftovers.clone());
        let local = listener.local().to_owned();
        spawn(async move {
            let key = open.borrow_mut().insert(connection.clone());
            stats.client_came();
            if let Err(e) = connection::run(connection, disk, stats.clone(), leftovers).await {
                log::warn!("{local}: a client was dropped: {e}");
            }
            stats.client_left();
            open.borrow_mut().remove(key);
            drop(place);
        })
        .detach();
    }
}
