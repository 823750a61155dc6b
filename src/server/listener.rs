//! Taking clients in.

use std::cell::{Cell, RefCell};
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
    hall: Hall,
    places: Budget,
    leftovers: Budget,
}

impl Server {
    /// Serves `disk` to whoever connects, from now on.
    pub fn start<D: Disk>(listener: Listener, disk: Rc<D>, stats: ServeStats) -> Self {
        let hall = Hall::default();
        let places = Budget::new(MAX_CONNECTIONS);
        let leftovers = Budget::new(MAX_LEFTOVERS);
        let budgets = [places.clone(), leftovers.clone()];
        let accepting = spawn(accept(listener, disk, stats, hall.clone(), budgets));
        Self { accepting, hall, places, leftovers }
    }

    /// Takes no more clients and no more requests, and gives those under way so long to end.
    pub async fn stop(self, patience: Duration) {
        self.accepting.cancel().await;
        for (_, client) in self.hall.clients.borrow().iter() {
            client.connection.shutdown_receiving();
        }
        let ended = async {
            self.places.all_back().await;
            self.leftovers.all_back().await;
        };
        select(ended.boxed_local(), sleep(patience).boxed_local()).await;
    }
}

/// The clients that have a place.
#[derive(Clone, Default)]
struct Hall {
    clients: Rc<RefCell<Slab<Client>>>,
    arrivals: Rc<Cell<u64>>,
}

struct Client {
    connection: Connection,
    /// The how-manieth of all it is.
    arrival: u64,
    /// It is past its handshake.
    agreed: bool,
}

impl Hall {
    fn enter(&self, connection: Connection) -> usize {
        let arrival = self.arrivals.get();
        self.arrivals.set(arrival + 1);
        self.clients.borrow_mut().insert(Client { connection, arrival, agreed: false })
    }

    fn agreed(&self, key: usize) {
        self.clients.borrow_mut()[key].agreed = true;
    }

    fn leave(&self, key: usize) {
        self.clients.borrow_mut().remove(key);
    }

    /// Makes room at the cost of who has been at its handshake for longest. A crowd that never comes to the point
    /// must not keep others out.
    fn turn_one_out(&self) {
        let clients = self.clients.borrow();
        let strangers = clients.iter().map(|(_, client)| client).filter(|client| !client.agreed);
        if let Some(oldest) = strangers.min_by_key(|client| client.arrival) {
            oldest.connection.shutdown();
        }
    }
}

async fn accept<D: Disk>(
    listener: Listener,
    disk: Rc<D>,
    stats: ServeStats,
    hall: Hall,
    [places, leftovers]: [Budget; 2],
) {
    let local: Rc<str> = listener.local().into();
    loop {
        let connection = match listener.accept().await {
            Ok(connection) => connection,
            Err(e) => {
                // Out of descriptors, most likely: others may leave.
                log::warn!("{local}: cannot accept a connection: {e}");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let place = match places.try_take(1) {
            Some(place) => place,
            None => {
                hall.turn_one_out();
                places.take(1).await
            }
        };
        let (disk, stats, hall, leftovers) = (disk.clone(), stats.clone(), hall.clone(), leftovers.clone());
        let local = local.clone();
        spawn(async move {
            let key = hall.enter(connection.clone());
            stats.client_came();
            let on_agreed = || hall.agreed(key);
            if let Err(e) = connection::run(connection, disk, stats.clone(), leftovers, on_agreed).await {
                log::warn!("{local}: a client was dropped: {e}");
            }
            stats.client_left();
            hall.leave(key);
            drop(place);
        })
        .detach();
    }
}
