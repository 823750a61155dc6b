//! A guest: random requests of every kind, several in flight, on one connection or more.
//!
//! No two requests that are in flight touch the same sector unless both only read; what they do to the same
//! *block* is the daemon's problem, and the point. So every read has exactly one right answer.

use std::collections::HashMap;
use std::io;

use blkferry::engine::{ByteRange, Geometry};
use blkferry::nbd::{Command, CommandFlags, NbdError, Request};

use crate::client::Client;
use crate::common::noise;
use crate::record::{Change, Record, sectors};
use crate::rng::Rng;

/// The daemon is gone.
#[derive(Debug)]
pub struct Died;

enum Open {
    Read(ByteRange),
    Change { range: ByteRange, may_refuse: bool },
    Flush { sent: u64 },
    Prefetch,
}

/// How a guest behaves.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    pub connections: u64,
    pub depth: usize,
    /// Of a hundred requests.
    pub flush_percent: u64,
    /// Of a hundred changes.
    pub fua_percent: u64,
}

impl Habits {
    pub fn random(rng: &mut Rng) -> Self {
        let depth = rng.one_of(&[2, 8, 16, 32]);
        let flush_percent = rng.one_of(&[0, 3, 15]);
        Self { connections: rng.between(1, 3), depth, flush_percent, fua_percent: rng.one_of(&[0, 10, 40]) }
    }
}

pub struct Workload<'a> {
    record: &'a mut Record,
    rng: Rng,
    clients: Vec<Client>,
    geometry: Geometry,
    habits: Habits,
    open: HashMap<u64, Open>,
    next_cookie: u64,
    hot: Vec<u64>,
    /// Requests that were answered.
    pub answered: u64,
}

impl<'a> Workload<'a> {
    pub fn start(
        record: &'a mut Record,
        uri: &str,
        block_bytes: u64,
        habits: Habits,
        mut rng: Rng,
    ) -> io::Result<Self> {
        let clients = (0..habits.connections).map(|_| Client::connect(uri, rng.percent(70)));
        let clients = clients.collect::<io::Result<Vec<_>>>()?;
        assert_eq!(clients[0].session().size_bytes, record.size());
        let geometry = Geometry::new(record.size(), block_bytes).unwrap();
        let hot = (0..3).map(|_| rng.below(record.size())).collect();
        Ok(Self { record, rng, clients, geometry, habits, open: HashMap::new(), next_cookie: 1, hot, answered: 0 })
    }

    /// Sends one request, or takes one answer.
    pub fn step(&mut self) -> Result<(), Died> {
        if self.open.len() < self.habits.depth && self.rng.percent(70) && self.send_one()? {
            return Ok(());
        }
        let busy: Vec<usize> = (0..self.clients.len()).filter(|&at| self.clients[at].in_flight() > 0).collect();
        if busy.is_empty() {
            return Ok(());
        }
        let at = self.rng.one_of(&busy);
        self.receive_one(at)
    }

    /// Takes all answers.
    pub fn drain(&mut self) -> Result<(), Died> {
        (0..self.clients.len()).try_for_each(|at| {
            while self.clients[at].in_flight() > 0 {
                self.receive_one(at)?;
            }
            Ok(())
        })
    }

    /// The daemon is dead: takes the answers that it sent before.
    pub fn bury(mut self) {
        for at in 0..self.clients.len() {
            while self.clients[at].in_flight() > 0 && self.receive_one(at).is_ok() {}
        }
    }

    fn receive_one(&mut self, at: usize) -> Result<(), Died> {
        let answer = self.clients[at].receive().map_err(|e| {
            let hung = matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
            assert!(!hung, "the daemon does not answer");
            Died
        })?;
        self.answered += 1;
        match (self.open.remove(&answer.cookie).expect("it is open"), answer.result) {
            (Open::Read(range), Ok(data)) => {
                let want = self.record.bytes(range.start, range.end);
                if let Some(at) = (0..data.len()).find(|&at| data[at] != want[at]) {
                    panic!("a read of {range:?} is wrong from {} on", range.start + at as u64);
                }
            }
            (Open::Change { .. }, Ok(_)) => self.record.acknowledged(answer.cookie),
            (Open::Change { may_refuse: true, .. }, Err(NbdError::NotSup)) => self.record.refused(answer.cookie),
            (Open::Flush { sent }, Ok(_)) => self.record.flushed(sent),
            (Open::Prefetch, Ok(_)) => {}
            (_, Err(error)) => panic!("a request failed: {error}"),
        }
        Ok(())
    }

    /// False: no place was found for it.
    fn send_one(&mut self) -> Result<bool, Died> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let what = self.rng.below(100);
        let flush = self.habits.flush_percent;
        let rest = 100 - flush;
        let command = match what {
            n if n < flush => Command::Flush,
            n if n < flush + rest * 20 / 100 => Command::Read,
            n if n < flush + rest * 75 / 100 => Command::Write,
            n if n < flush + rest * 87 / 100 => Command::WriteZeroes,
            n if n < flush + rest * 98 / 100 => Command::Trim,
            _ => Command::Cache,
        };
        if command == Command::Flush {
            self.open.insert(cookie, Open::Flush { sent: self.record.flush_sent() });
            let request = Request { flags: CommandFlags::empty(), command, cookie, offset: 0, len: 0 };
            return self.send(&request, &[]).map(|()| true);
        }
        let Some(range) = self.free_range(command.writes()) else { return Ok(false) };
        let flags = self.flags(command);
        let mut payload = Vec::new();
        if command.writes() {
            let fua = flags.contains(CommandFlags::FUA);
            let may_refuse = flags.contains(CommandFlags::FAST_ZERO);
            let touched = match command {
                Command::Trim => self.geometry.bytes_of(self.geometry.inside(range)),
                _ => range,
            };
            let data =
                (command == Command::Write).then(|| noise(cookie ^ self.rng.below(u64::MAX), range.len() as usize));
            payload = data.clone().unwrap_or_default();
            self.record.begin(cookie, Change { start: touched.start, end: touched.end.max(touched.start), data, fua });
            self.open.insert(cookie, Open::Change { range, may_refuse });
        } else {
            self.open.insert(cookie, if command == Command::Read { Open::Read(range) } else { Open::Prefetch });
        }
        let request = Request { flags, command, cookie, offset: range.start, len: range.len() as u32 };
        self.send(&request, &payload).map(|()| true)
    }

    fn send(&mut self, request: &Request, payload: &[u8]) -> Result<(), Died> {
        let at = self.rng.below(self.clients.len() as u64) as usize;
        self.clients[at].send(request, payload).map_err(|_| Died)
    }

    fn flags(&mut self, command: Command) -> CommandFlags {
        let mut flags = CommandFlags::empty();
        flags.set(CommandFlags::FUA, command.writes() && self.rng.percent(self.habits.fua_percent));
        if command == Command::WriteZeroes {
            flags.set(CommandFlags::NO_HOLE, self.rng.percent(40));
            flags.set(CommandFlags::FAST_ZERO, self.rng.percent(30));
        }
        flags
    }

    /// A range that meets no sector that is being changed, and for a change none that is being read.
    fn free_range(&mut self, change: bool) -> Option<ByteRange> {
        for _ in 0..8 {
            let range = self.range();
            let wanted = sectors(range.start, range.end);
            let in_the_way = |open: &Open| {
                let taken = match open {
                    Open::Change { range, .. } => range,
                    Open::Read(range) if change => range,
                    _ => return false,
                };
                let taken = sectors(taken.start, taken.end);
                taken.start < wanted.end && wanted.start < taken.end
            };
            if !self.open.values().any(in_the_way) {
                return Some(range);
            }
        }
        None
    }

    fn range(&mut self) -> ByteRange {
        let (size, block, rng) = (self.record.size(), self.geometry.block_bytes(), &mut self.rng);
        let (unit, len) = match rng.weighted(&[20, 40, 25, 15]) {
            0 => (1, rng.between(1, 3000)),
            1 => (512, 512 * rng.between(1, 40)),
            2 => (block, block * rng.between(1, 8)),
            _ => (512, 512 * rng.between(1, 512)),
        };
        let start = match rng.weighted(&[50, 40, 10]) {
            0 => rng.one_of(&self.hot) + rng.below(512 << 10),
            1 => rng.below(size),
            _ => size.saturating_sub(rng.below(4 * block)),
        };
        let start = start.min(size - 1) / unit * unit;
        ByteRange { start, end: (start + len.min(512 << 10)).min(size) }
    }
}
