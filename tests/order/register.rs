//! Several clients at once on the same blocks, with a slow source that answers in any order and hangs up now and
//! then. Each sector has to be a regular register: a read returns what the last write before it left, or what a
//! write wrote that was under way at the same time.
//!
//! Every write has a stamp of its own, and every word of a sector says the stamp and the sector, so that also a
//! sector that is put together from two is seen, and one that came out in the wrong place.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use blkferry::nbd::{Command, CommandFlags};

use crate::client::{Client, Reply};
use crate::common::{World, noise};
use crate::manners::Manners;
use crate::source::Source;

const SECTOR: u64 = 512;
const SECTORS: u64 = 2048;
const CLIENTS: u64 = 4;
const OPS: usize = 500;
/// Requests of one client under way.
const DEPTH: usize = 4;

/// Zeros, and what the source has.
const ZEROS: u64 = 0;
const FROM_SOURCE: u64 = 1;

/// Numbers without pattern.
struct Dice(std::vec::IntoIter<u8>);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(noise(seed, 1 << 20).into_iter())
    }

    fn below(&mut self, limit: u64) -> u64 {
        let word = (0..4).fold(0, |word, _| word << 8 | u64::from(self.0.next().expect("a megabyte is enough")));
        word % limit
    }
}

fn contents(stamp: u64, first: u64, sectors: u64) -> Vec<u8> {
    let word = |sector: u64| if stamp == ZEROS { 0 } else { stamp << 16 | sector };
    (first..first + sectors).flat_map(|sector| word(sector).to_le_bytes().repeat(64)).collect()
}

/// The stamps that are in a sector, in most cases one.
fn stamps(sector: u64, bytes: &[u8]) -> Vec<u64> {
    let mut found: Vec<u64> = Vec::new();
    for word in bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())) {
        assert!(word == 0 || word & 0xffff == sector, "sector {sector} holds contents of sector {}", word & 0xffff);
        if !found.contains(&(word >> 16)) {
            found.push(word >> 16);
        }
    }
    found
}

/// A change of a run of sectors, or a read of one, with its begin and its end.
struct Record<T> {
    began: u64,
    ended: u64,
    first: u64,
    sectors: u64,
    what: T,
}

#[derive(Default)]
struct History {
    writes: Vec<Record<u64>>,
    /// What each sector of the read held.
    reads: Vec<Record<Vec<Vec<u64>>>>,
}

/// What all clients share.
struct Run<'a> {
    uri: &'a str,
    clock: AtomicU64,
    stamp: AtomicU64,
    sectors_per_block: u64,
}

impl Run<'_> {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// One client's part of the history.
    fn client(&self, seed: u64) -> History {
        let mut dice = Dice::new(seed);
        let mut client = Client::connect(self.uri);
        let mut open = HashMap::new();
        let mut history = History::default();
        for turn in 0..OPS {
            let (cookie, op) = self.begin(&mut client, &mut dice);
            open.insert(cookie, op);
            while open.len() >= DEPTH || (turn + 1 == OPS && !open.is_empty()) {
                let (cookie, reply) = client.wait_any();
                self.end(open.remove(&cookie).unwrap(), reply, &mut history);
            }
        }
        history
    }

    fn begin(&self, client: &mut Client, dice: &mut Dice) -> (u64, Record<Option<u64>>) {
        let first = dice.below(SECTORS);
        let sectors = (1 + dice.below(24)).min(SECTORS - first);
        let (offset, len) = (first * SECTOR, (sectors * SECTOR) as u32);
        let fua = if dice.below(8) == 0 { CommandFlags::FUA } else { CommandFlags::empty() };
        let kind = dice.below(16);
        let (began, mut op) = (self.now(), Record { began: 0, ended: 0, first, sectors, what: None });
        op.began = began;
        let cookie = match kind {
            0..7 => client.start_read(offset, len),
            7..12 => {
                let stamp = self.stamp.fetch_add(1, Ordering::SeqCst);
                op.what = Some(stamp);
                client.ask(Command::Write, fua, offset, len, &contents(stamp, first, sectors))
            }
            12 => {
                op.what = Some(ZEROS);
                client.ask(Command::WriteZeroes, fua, offset, len, &[])
            }
            13 => {
                // Only whole blocks are given up, and they read as zeros here.
                let unit = self.sectors_per_block;
                op.first = first.next_multiple_of(unit);
                let end = first + sectors;
                let end = if end == SECTORS { end } else { end / unit * unit };
                op.sectors = end.saturating_sub(op.first);
                op.what = Some(ZEROS);
                client.ask(Command::Trim, fua, offset, len, &[])
            }
            14 => {
                (op.sectors, op.what) = (0, Some(ZEROS));
                client.start(Command::Flush, 0, 0)
            }
            _ => {
                (op.sectors, op.what) = (0, Some(ZEROS));
                client.start(Command::Cache, offset, len)
            }
        };
        (cookie, op)
    }

    fn end(&self, op: Record<Option<u64>>, reply: Reply, history: &mut History) {
        let data = reply.unwrap_or_else(|e| panic!("{} sectors at {}: {e}", op.sectors, op.first));
        let Record { began, first, sectors, what, .. } = op;
        let ended = self.now();
        match what {
            Some(stamp) => history.writes.push(Record { began, ended, first, sectors, what: stamp }),
            None => {
                let pieces = (first..).zip(data.chunks_exact(SECTOR as usize));
                let what = pieces.map(|(sector, bytes)| stamps(sector, bytes)).collect();
                history.reads.push(Record { began, ended, first, sectors, what });
            }
        }
    }
}

/// Answers what is held in any order, one at a time, and hangs up now and then.
fn dawdle(source: &Source, seed: u64, done: &AtomicBool) {
    let mut dice = Dice::new(seed);
    let mut left_until_cut = 150;
    while !done.load(Ordering::SeqCst) {
        let held = source.held();
        if held.is_empty() {
            thread::sleep(Duration::from_micros(200));
            continue;
        }
        left_until_cut -= 1;
        if left_until_cut == 0 {
            source.cut();
            left_until_cut = 150 + dice.below(300);
            continue;
        }
        let chosen = held[dice.below(held.len() as u64) as usize];
        source.release(|asked| *asked == chosen);
        if dice.below(4) == 0 {
            thread::sleep(Duration::from_micros(300));
        }
    }
}

fn check(history: &History) {
    let mut by_sector: Vec<Vec<(u64, u64, u64)>> = vec![vec![(0, 0, FROM_SOURCE)]; SECTORS as usize];
    for write in &history.writes {
        for sector in write.first..write.first + write.sectors {
            by_sector[sector as usize].push((write.began, write.ended, write.what));
        }
    }
    for read in &history.reads {
        for (sector, found) in (read.first..).zip(&read.what) {
            let writes = &by_sector[sector as usize];
            for stamp in found {
                let allowed = writes.iter().any(|&(began, ended, written)| {
                    let overwritten = |&(b, e, _): &(u64, u64, u64)| ended < b && e < read.began;
                    written == *stamp && began <= read.ended && !writes.iter().any(overwritten)
                });
                assert!(
                    allowed,
                    "sector {sector}: the read at {}..{} found stamp {stamp}; writes (begin, end, stamp): {writes:?}",
                    read.began, read.ended
                );
            }
        }
    }
}

fn read_all(client: &mut Client, run: &Run<'_>, history: &mut History) {
    let began = run.now();
    let reply = client.try_read(0, (SECTORS * SECTOR) as u32);
    run.end(Record { began, ended: 0, first: 0, sectors: SECTORS, what: None }, reply, history);
}

fn one_run(seed: u64) {
    println!("seed {seed} (BLKFERRY_TEST_SEED={seed} runs it alone)");
    let world = World::new();
    let block_bytes = [4096, 4096, 16384, 65536][(seed % 4) as usize];
    let manners = Manners { pieces: seed.is_multiple_of(2), several: !seed.is_multiple_of(5), ..Manners::default() };
    let source = Source::start(&world.path("source"), contents(FROM_SOURCE, 0, SECTORS), manners);
    source.hold_all();
    let (cache, size) = (world.path("cache"), block_bytes.to_string());
    let device = world.attach(&source.uri, &cache, "disk", &["--hydrate", "off", "--block-size", &size]);
    let sectors_per_block = block_bytes / SECTOR;
    let run = Run { uri: &device.uri, clock: AtomicU64::new(1), stamp: AtomicU64::new(2), sectors_per_block };
    let mut history = History::default();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| dawdle(&source, seed, &done));
        let run = &run;
        let clients: Vec<_> = (0..CLIENTS).map(|n| scope.spawn(move || run.client(seed * 100 + n))).collect();
        // Hydration joins in while they are at it.
        source.wait_asked(8);
        device.set(if seed.is_multiple_of(3) { "hydrate=auto" } else { "hydrate=200K" });
        for client in clients {
            let part = client.join();
            // Whatever comes of it, the source must not go on for ever.
            let Ok(part) = part else {
                done.store(true, Ordering::SeqCst);
                panic!("a client failed");
            };
            history.writes.extend(part.writes);
            history.reads.extend(part.reads);
        }
        done.store(true, Ordering::SeqCst);
    });
    source.let_go();
    let mut client = Client::connect(&device.uri);
    read_all(&mut client, &run, &mut history);
    check(&history);
    drop(client);
    world.ok(["detach", "disk", "--incomplete"]);

    // Nothing is under way any more: the next daemon has to see the same, and so has whoever reads the raw image.
    let device = world.attach(&source.uri, &cache, "disk", &[]);
    let run = Run { uri: &device.uri, ..run };
    let mut client = Client::connect(&device.uri);
    read_all(&mut client, &run, &mut history);
    check(&history);
    let last = client.read(0, (SECTORS * SECTOR) as u32);
    device.wait_complete();
    device.detach();
    assert!(std::fs::read(&cache).unwrap() == last, "the cache is not what the device was");
}

#[test]
fn every_sector_is_a_regular_register() {
    match std::env::var("BLKFERRY_TEST_SEED") {
        Ok(seed) => one_run(seed.parse().unwrap()),
        Err(_) => (1..=8).for_each(one_run),
    }
}
