//! Anything in any order, against an array of bytes: reads, writes, zeroes, trims, prefetches and flushes, many at
//! once on several connections, while hydration starts and stops, and the device is detached and attached again.
//!
//! Requests under way at the same time never touch the same block, so that the array knows every answer. What they
//! do share is everything else: fetches (requests of hydration reach over many blocks), maps, the cache, the wire.

use std::collections::HashMap;

use blkferry::nbd::{Command, CommandFlags};

use crate::bench::{Phase, attach_in, finish, mixed_image};
use crate::client::Client;
use crate::common::{Device, World, noise};

const SIZE: u64 = (12 << 20) + 512;
const CONNECTIONS: usize = 3;
const UNDER_WAY: usize = 24;

/// Numbers without pattern; the same for the same seed.
pub struct Dice {
    bytes: Vec<u8>,
    at: usize,
}

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self { bytes: noise(seed, 1 << 20), at: 0 }
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        let bytes = self.bytes[self.at..self.at + 8].try_into().unwrap();
        self.at = (self.at + 8) % self.bytes.len();
        u64::from_le_bytes(bytes) % limit
    }
}

/// A request that was sent: on which connection, where, and what a read must give.
struct Sent {
    offset: u64,
    len: u64,
    read: bool,
    what: String,
}

struct Run<'a> {
    clients: Vec<Client>,
    under_way: Vec<HashMap<u64, Sent>>,
    disk: &'a mut [u8],
    dice: &'a mut Dice,
    block: u64,
    seed: u64,
}

impl Run<'_> {
    fn go(&mut self, steps: u64) {
        for step in 0..steps {
            while self.under_way.iter().map(HashMap::len).sum::<usize>() >= UNDER_WAY {
                self.receive_any();
            }
            self.step(step);
        }
        self.settle();
    }

    /// Answers to everything.
    fn settle(&mut self) {
        while self.under_way.iter().any(|sent| !sent.is_empty()) {
            self.receive_any();
        }
    }

    fn is_free(&self, offset: u64, len: u64) -> bool {
        let blocks = |offset: u64, len: u64| offset / self.block..(offset + len).div_ceil(self.block);
        let new = blocks(offset, len);
        self.under_way.iter().flat_map(HashMap::values).all(|sent| {
            let old = blocks(sent.offset, sent.len);
            old.end <= new.start || new.end <= old.start
        })
    }

    /// Sizes from a byte to many blocks, at any offset, sometimes aligned, sometimes at the very end.
    fn range(&mut self) -> (u64, u64) {
        let offset = match self.dice.below(8) {
            0 => SIZE - 1 - self.dice.below(2 * self.block).min(SIZE - 1),
            1..3 => self.dice.below(SIZE) / self.block * self.block,
            _ => self.dice.below(SIZE),
        };
        let len = match self.dice.below(8) {
            0 => 1 + self.dice.below(100),
            1..3 => (1 + self.dice.below(8)) * self.block,
            3 => 1 + self.dice.below(600_000),
            _ => 1 + self.dice.below(20_000),
        };
        (offset, len.min(SIZE - offset))
    }

    fn step(&mut self, step: u64) {
        let (offset, len) = self.range();
        if !self.is_free(offset, len) {
            return self.receive_any();
        }
        let range = offset as usize..(offset + len) as usize;
        let fua = if self.dice.below(8) == 0 { CommandFlags::FUA } else { CommandFlags::empty() };
        let (command, flags, payload) = match self.dice.below(16) {
            0..6 => (Command::Read, CommandFlags::empty(), Vec::new()),
            6..11 => {
                let data = noise(self.seed << 32 | step, len as usize);
                self.disk[range].copy_from_slice(&data);
                (Command::Write, fua, data)
            }
            11..13 => {
                self.disk[range].fill(0);
                let hole = if self.dice.below(2) == 0 { CommandFlags::NO_HOLE } else { CommandFlags::empty() };
                (Command::WriteZeroes, fua | hole, Vec::new())
            }
            13 => {
                let end = if offset + len == SIZE { SIZE } else { (offset + len) / self.block * self.block };
                let start = offset.next_multiple_of(self.block);
                if start < end {
                    self.disk[start as usize..end as usize].fill(0);
                }
                (Command::Trim, fua, Vec::new())
            }
            14 => (Command::Cache, CommandFlags::empty(), Vec::new()),
            _ => {
                let on = self.dice.below(CONNECTIONS as u64) as usize;
                let cookie = self.clients[on].send(Command::Flush, CommandFlags::empty(), 0, 0, &[]);
                // A flush is in nobody's way.
                self.under_way[on].insert(cookie, Sent { offset: SIZE * 2, len: 0, read: false, what: "flush".into() });
                return;
            }
        };
        let on = self.dice.below(CONNECTIONS as u64) as usize;
        let cookie = self.clients[on].send(command, flags, offset, len as u32, &payload);
        let what = format!("step {step}: {command:?} {flags:?} of {len} bytes at {offset}");
        self.under_way[on].insert(cookie, Sent { offset, len, read: command == Command::Read, what });
    }

    fn receive_any(&mut self) {
        let busy: Vec<usize> = (0..CONNECTIONS).filter(|&i| !self.under_way[i].is_empty()).collect();
        if busy.is_empty() {
            return;
        }
        let on = busy[self.dice.below(busy.len() as u64) as usize];
        let (cookie, answer) = self.clients[on].receive();
        let sent = self.under_way[on].remove(&cookie).unwrap();
        let bytes = answer.unwrap_or_else(|e| panic!("seed {}: {}: {e}", self.seed, sent.what));
        if sent.read {
            let want = &self.disk[sent.offset as usize..(sent.offset + sent.len) as usize];
            if let Some(i) = (0..want.len()).find(|&i| want[i] != bytes[i]) {
                panic!("seed {}: {}: wrong at byte {}", self.seed, sent.what, sent.offset + i as u64);
            }
        }
    }
}

fn run_on(device: &Device<'_>, disk: &mut [u8], dice: &mut Dice, block: u64, seed: u64, steps: u64) {
    let clients = (0..CONNECTIONS).map(|_| Client::connect(&device.uri)).collect();
    let under_way = (0..CONNECTIONS).map(|_| HashMap::new()).collect();
    Run { clients, under_way, disk, dice, block, seed }.go(steps);
}

/// One disk through its whole life.
fn live(seed: u64, block: u64, foreign: bool) {
    println!("seed {seed}, blocks of {block}");
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let mut disk = std::fs::read(&image).unwrap();
    let dice = &mut Dice::new(seed);
    let (_export, _nbdkit, uri);
    if foreign {
        let nbdkit = crate::servers::nbdkit(&world, &["--no-sr", "file", crate::bench::text(&image)]);
        uri = nbdkit.uri.clone();
        _nbdkit = nbdkit;
    } else {
        let export = world.export(&image);
        uri = export.uri.clone();
        _export = export;
    }
    let device = attach_in(&world, Phase::Before, &uri, &cache, &["--block-size", &block.to_string()]);
    run_on(&device, &mut disk, dice, block, seed, 300);
    device.set("hydrate=2M");
    run_on(&device, &mut disk, dice, block, seed + 1, 300);
    device.set("hydrate=off");
    run_on(&device, &mut disk, dice, block, seed + 2, 100);
    // Away, and back: present, dirty and absent blocks are what they were.
    world.ok(["detach", "--incomplete", &device.name]);
    let device = world.attach(&uri, &cache, "again", &["--hydrate", "off"]);
    run_on(&device, &mut disk, dice, block, seed + 3, 200);
    device.set("hydrate=auto");
    run_on(&device, &mut disk, dice, block, seed + 4, 400);
    device.wait_complete();
    run_on(&device, &mut disk, dice, block, seed + 5, 200);
    assert!(Client::connect(&device.uri).read_all() == disk, "seed {seed}: the device is not the model");
    finish(device);
    assert!(std::fs::read(&cache).unwrap() == disk, "seed {seed}: the raw image is not the model");
}

#[test]
fn anything_in_any_order() {
    for seed in 1..=4 {
        live(seed * 1000, 4096, false);
    }
}

#[test]
fn anything_in_any_order_in_large_blocks() {
    live(5000, 65536, false);
    live(6000, 1 << 20, false);
}

#[test]
fn anything_in_any_order_over_a_source_that_knows_no_structured_replies() {
    live(7000, 4096, true);
}
