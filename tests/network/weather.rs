//! What the network and the disk are like at the moment, and what is known of each connection.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use blkferry::uring::simulation::{Connecting, ConnectionId, DiskWork, Sending, Surroundings};

use crate::judge::Judge;
use crate::rng::Rng;
use crate::wire::Wire;

/// How those who connect fare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    Open,
    /// They are refused at once.
    Refuses,
    /// Nobody answers.
    Dead,
}

/// Delays in microseconds, from and to.
pub type Delay = (u64, u64);

/// See the module's page.
pub struct Weather {
    rng: RefCell<Rng>,
    pub judge: Rc<Judge>,
    pub door: Cell<Door>,
    pub delay: Cell<Delay>,
    pub disk_delay: Cell<Delay>,
    /// Most bytes that travel together.
    pub piece: Cell<usize>,
    /// Bytes a second of each direction of a connection.
    pub rate: Cell<u64>,
    /// What is sent now arrives then, if that is later.
    pub held_until: Cell<Duration>,
    /// Of a thousand bytes of framing so many have a bit flipped.
    pub flips: Cell<u64>,
    wires: RefCell<BTreeMap<ConnectionId, Wires>>,
}

struct Wires {
    /// As the server sent it.
    sent: Wire,
    to_server: Wire,
    to_client: Wire,
    /// When each direction is free again.
    free: [Duration; 2],
}

impl Weather {
    pub fn new(seed: u64, judge: Rc<Judge>) -> Rc<Self> {
        Rc::new(Self {
            rng: RefCell::new(Rng::new(seed, u64::MAX - 7)),
            judge,
            door: Cell::new(Door::Open),
            delay: Cell::new((50, 500)),
            disk_delay: Cell::new((10, 200)),
            piece: Cell::new(64 << 10),
            rate: Cell::new(u64::MAX),
            held_until: Cell::default(),
            flips: Cell::default(),
            wires: RefCell::default(),
        })
    }

    /// Nothing is wrong any more.
    pub fn clear_up(&self) {
        self.door.set(Door::Open);
        self.delay.set((50, 500));
        self.disk_delay.set((10, 200));
        self.rate.set(u64::MAX);
        self.held_until.set(Duration::ZERO);
        self.flips.set(0);
    }

    /// Forgets connections that never came to be.
    pub fn forget_all_but(&self, connections: &[ConnectionId]) {
        self.wires.borrow_mut().retain(|id, _| connections.contains(id));
    }

    pub fn draw(&self, (from, to): Delay) -> Duration {
        Duration::from_micros(self.rng.borrow_mut().between(from, to))
    }

    fn corrupt(&self, framing: &[usize], bytes: &mut [u8]) {
        for &at in framing {
            if self.flips.get() > 0 && self.below(1000) < self.flips.get() {
                bytes[at] ^= 1 << self.below(8);
                self.judge.flipped();
            }
        }
    }
}

impl Surroundings for Weather {
    fn below(&self, n: u64) -> u64 {
        self.rng.borrow_mut().below(n)
    }

    fn connecting(&self, id: ConnectionId, _to: &str) -> Connecting {
        let wires = Wires {
            sent: Wire::from_server(),
            to_server: Wire::from_client(),
            to_client: Wire::from_server(),
            free: [Duration::ZERO; 2],
        };
        self.wires.borrow_mut().insert(id, wires);
        let delay = self.draw(self.delay.get()) * 2;
        let connecting = match self.door.get() {
            Door::Open => Connecting::After(delay + self.held_until.get().saturating_sub(self.judge.now())),
            Door::Refuses => Connecting::Refused(delay),
            Door::Dead => Connecting::Never,
        };
        self.judge.dialled(id, connecting);
        connecting
    }

    fn piece(&self, len: usize) -> usize {
        // A slow link is one of many small packets.
        let most = usize::try_from(self.rate.get() / 16).unwrap_or(usize::MAX).min(self.piece.get());
        if len > 64 && self.below(4) == 0 { 1 + self.below(len as u64) as usize } else { len }.min(most)
    }

    fn sending(&self, id: ConnectionId, to_server: bool, bytes: &mut [u8]) -> Sending {
        let mut wires = self.wires.borrow_mut();
        let Some(wires) = wires.get_mut(&id) else { return Sending::Never };
        if to_server {
            wires.to_server.pass(bytes, |said| self.judge.heard_request(id, said), |_| ());
        } else {
            let mut framing = Vec::new();
            wires.sent.pass(bytes, |_| (), |at| framing.push(at));
            self.corrupt(&framing, bytes);
        }
        let now = self.judge.now();
        let takes = Duration::from_nanos((bytes.len() as u64).saturating_mul(1_000_000_000) / self.rate.get());
        let free = &mut wires.free[usize::from(to_server)];
        *free = (*free).max(now) + takes;
        let arrival = (*free + self.draw(self.delay.get())).max(self.held_until.get());
        Sending::After(arrival - now)
    }

    fn received(&self, id: ConnectionId, by_client: bool, bytes: &[u8]) {
        if !by_client {
            return;
        }
        self.judge.heard_bytes(id, bytes.len());
        if let Some(wires) = self.wires.borrow_mut().get_mut(&id) {
            wires.to_client.pass(bytes, |said| self.judge.heard_answer(id, said), |_| ());
        }
    }

    fn left(&self, id: ConnectionId, client: bool) {
        if client {
            self.judge.left(id);
            self.wires.borrow_mut().remove(&id);
        }
    }

    fn disk(&self, _work: DiskWork, _offset_bytes: u64, _len_bytes: u64) -> (Duration, io::Result<()>) {
        (self.draw(self.disk_delay.get()), Ok(()))
    }

    fn free_bytes(&self) -> u64 {
        u64::MAX
    }
}
