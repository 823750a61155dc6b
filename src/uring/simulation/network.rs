//! Who is connected to whom.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::rc::{Rc, Weak};
use std::time::Duration;

use event_listener::Event;
use futures_util::FutureExt;
use futures_util::future::select;

use super::pipe::{Found, Pipe};
use super::world::{Inner, sleep, sleep_until};
use super::{Connecting, Sending};
use crate::uring::Part;

/// Names a connection for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// The connections and listeners of a world.
#[derive(Default)]
pub struct Network {
    listeners: RefCell<BTreeMap<String, Rc<Queue>>>,
    /// Both ends, the client's first, for as long as somebody holds them.
    ends: RefCell<BTreeMap<ConnectionId, [Weak<End>; 2]>>,
    next: Cell<u64>,
}

/// Connections that nobody has accepted yet.
#[derive(Default)]
pub(super) struct Queue {
    waiting: RefCell<VecDeque<Rc<End>>>,
    arrived: Event,
}

/// One end of a connection.
pub(super) struct End {
    id: ConnectionId,
    is_client: bool,
    incoming: Rc<Pipe>,
    outgoing: Rc<Pipe>,
    broken: Cell<Option<io::ErrorKind>>,
    has_left: Cell<bool>,
    world: Rc<Inner>,
}

impl Network {
    /// The connections that somebody still holds.
    pub fn connections(&self) -> Vec<ConnectionId> {
        self.ends.borrow().keys().copied().collect()
    }

    /// Breaks one end: what waits there ends with this error, what was to be read there is lost, and the other end
    /// hears nothing of it.
    pub fn break_end(&self, id: ConnectionId, client: bool, error: io::ErrorKind) {
        let end = self.ends.borrow().get(&id).and_then(|ends| ends[usize::from(!client)].upgrade());
        if let Some(end) = end {
            end.shatter(error);
        }
    }

    /// Whatever is sent on a connection from now on does not arrive.
    pub fn fall_silent(&self, id: ConnectionId) {
        let ends = self.ends.borrow().get(&id).cloned();
        ends.iter().flatten().filter_map(Weak::upgrade).for_each(|end| end.outgoing.fall_silent());
    }

    /// Connections, and bytes under way on them.
    pub(super) fn count(&self) -> (usize, usize) {
        let ends = self.ends.borrow();
        let bytes = ends.values().flatten().filter_map(Weak::upgrade).map(|end| end.incoming.under_way()).sum();
        (ends.len(), bytes)
    }

    pub(super) fn end(&self) {
        let listeners = std::mem::take(&mut *self.listeners.borrow_mut());
        drop(listeners);
    }

    /// False: somebody listens there already.
    pub(super) fn listen(&self, address: &str) -> bool {
        let mut listeners = self.listeners.borrow_mut();
        let is_free = !listeners.contains_key(address);
        listeners.entry(address.into()).or_default();
        is_free
    }

    pub(super) fn queue(&self, address: &str) -> Option<Rc<Queue>> {
        self.listeners.borrow().get(address).cloned()
    }

    pub(super) fn stop_listening(&self, address: &str) {
        let queue = self.listeners.borrow_mut().remove(address);
        drop(queue);
    }

    pub(super) async fn connect(world: Rc<Inner>, address: String, timeout: Duration) -> io::Result<Rc<End>> {
        let this = &world.network;
        let id = ConnectionId(this.next.get() + 1);
        this.next.set(id.0);
        let (delay, outcome) = match world.surroundings.connecting(id, &address) {
            Connecting::After(delay) if delay < timeout => (delay, Ok(())),
            Connecting::Refused(delay) => (delay, Err(io::ErrorKind::ConnectionRefused)),
            Connecting::After(_) | Connecting::Never => (timeout, Err(io::ErrorKind::TimedOut)),
        };
        sleep(delay).await;
        outcome?;
        let queue = this.listeners.borrow().get(&address).cloned();
        let queue = queue.ok_or(io::ErrorKind::ConnectionRefused)?;
        let (there, back) = (Rc::new(Pipe::default()), Rc::new(Pipe::default()));
        let end = |is_client, incoming: &Rc<Pipe>, outgoing: &Rc<Pipe>| {
            let (incoming, outgoing) = (incoming.clone(), outgoing.clone());
            let (broken, has_left, world) = (Cell::new(None), Cell::new(false), world.clone());
            Rc::new(End { id, is_client, incoming, outgoing, broken, has_left, world })
        };
        let (client, server) = (end(true, &back, &there), end(false, &there, &back));
        this.ends.borrow_mut().insert(id, [Rc::downgrade(&client), Rc::downgrade(&server)]);
        queue.waiting.borrow_mut().push_back(server);
        queue.arrived.notify(1);
        Ok(client)
    }
}

impl Queue {
    pub(super) async fn accept(&self) -> Rc<End> {
        loop {
            let arrived = self.arrived.listen();
            let first = self.waiting.borrow_mut().pop_front();
            match first {
                Some(end) => return end,
                None => arrived.await,
            }
        }
    }
}

impl End {
    pub(super) async fn recv(&self, target: &mut [u8]) -> io::Result<usize> {
        loop {
            let changed = self.incoming.changed.listen();
            if let Some(error) = self.broken.get() {
                return Err(error.into());
            }
            match self.incoming.take(self.world.elapsed(), target) {
                Found::Bytes(len) => {
                    self.world.surroundings.received(self.id, self.is_client, &target[..len]);
                    return Ok(len);
                }
                Found::End => return Ok(0),
                Found::NotBefore(Some(at)) => {
                    let arrival = sleep_until(self.world.clone(), at).boxed_local();
                    select(changed, arrival).await;
                }
                Found::NotBefore(None) => changed.await,
            }
        }
    }

    pub(super) async fn send(&self, parts: &[Part]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(parts.iter().map(Part::len).sum());
        parts.iter().for_each(|part| part.append_to(&mut bytes));
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let changed = self.outgoing.changed.listen();
            if let Some(error) = self.broken.get() {
                return Err(error.into());
            }
            if self.has_left.get() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if self.outgoing.is_mute() {
                return Ok(());
            }
            if self.outgoing.is_deaf() {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            let room = self.outgoing.room();
            if room == 0 {
                changed.await;
                continue;
            }
            let surroundings = &self.world.surroundings;
            let len = surroundings.piece(rest.len().min(room)).clamp(1, rest.len().min(room));
            let (piece, after) = rest.split_at(len);
            let mut piece = piece.to_vec();
            match surroundings.sending(self.id, self.is_client, &mut piece) {
                Sending::After(delay) => self.outgoing.put(self.world.elapsed() + delay, piece),
                Sending::Never => self.outgoing.fall_silent(),
            }
            rest = after;
        }
        Ok(())
    }

    pub(super) fn stop_receiving(&self) {
        self.incoming.stop_reading(self.world.elapsed());
    }

    /// Ends both directions; what was sent goes out.
    pub(super) fn leave(&self) {
        if self.has_left.replace(true) {
            return;
        }
        self.stop_receiving();
        let delay = match self.world.surroundings.sending(self.id, self.is_client, &mut []) {
            Sending::After(delay) => delay,
            Sending::Never => {
                self.outgoing.fall_silent();
                Duration::ZERO
            }
        };
        self.outgoing.close(self.world.elapsed() + delay);
        self.outgoing.changed.notify(usize::MAX);
        self.world.surroundings.left(self.id, self.is_client);
    }

    fn shatter(&self, error: io::ErrorKind) {
        self.broken.set(Some(error));
        self.incoming.clear();
        self.incoming.changed.notify(usize::MAX);
        self.outgoing.changed.notify(usize::MAX);
        if !self.has_left.replace(true) {
            self.world.surroundings.left(self.id, self.is_client);
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.leave();
        let mut ends = self.world.network.ends.borrow_mut();
        if ends.get(&self.id).is_some_and(|ends| ends.iter().all(|end| end.strong_count() == 0)) {
            ends.remove(&self.id);
        }
    }
}

impl std::fmt::Debug for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.id)
    }
}
