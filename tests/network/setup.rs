//! What a case is about: a disk, its source, and how its users behave.

use std::time::Duration;

use blkferry::device::Mode;
use blkferry::remote::OnLoss;

use crate::history::History;
use crate::rng::Rng;
use crate::stamp::{SECTOR, Stamp};

/// Stream of the setup; steps of trouble use the numbers from 0.
const SETUP: u64 = u64::MAX;
/// A hole or data: the source's disk is made of stretches of so many blocks.
const STRETCH: u64 = 4;

/// See the module's page.
#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    pub block_bytes: u64,
    pub blocks: u64,
    /// Of each stretch of blocks, is it a hole?
    holes: Vec<bool>,
    /// The source tells what is hot; not drawn, so that seeds mean what they meant before it did.
    pub tells_hot: bool,
    /// The source takes one connection at a time.
    pub single: bool,
    pub policy: OnLoss,
    pub mode: Mode,
    pub guests: u64,
    /// Longest pause of a guest between two operations.
    pub think_ms: u64,
    /// Of a hundred operations so many are writes.
    pub writes: u64,
    pub delay_us: (u64, u64),
    pub piece: usize,
    /// How long the source's own disk takes.
    pub source_us: (u64, u64),
    /// Steps of trouble.
    pub steps: u64,
    /// Only of this kind, and of nothing, if it is said.
    pub kinds: Vec<u64>,
}

pub fn random_policy(rng: &mut Rng) -> OnLoss {
    match rng.below(2) {
        0 => OnLoss::Wait,
        _ => OnLoss::FailAfter(Duration::from_millis(rng.one_of(&[0, 100, 1000, 5000, 5000, 30_000]))),
    }
}

pub fn random_mode(rng: &mut Rng) -> Mode {
    match rng.below(4) {
        0 => Mode::Auto,
        1 => Mode::Off,
        _ => Mode::Rate(rng.one_of(&[1 << 10, 4 << 10, 64 << 10])),
    }
}

impl Setup {
    pub fn random(seed: u64) -> Self {
        let rng = &mut Rng::new(seed, SETUP);
        let block_bytes = rng.one_of(&[4096, 4096, 4096, 65_536]);
        let most = rng.one_of(&[16, 64, 256, 512]);
        let blocks = rng.between(2, most);
        let holes = rng.one_of(&[0, 30, 30, 80]);
        Self {
            seed,
            block_bytes,
            blocks,
            holes: (0..blocks.div_ceil(STRETCH)).map(|_| rng.percent(holes)).collect(),
            tells_hot: seed % 3 == 1,
            single: rng.percent(35),
            policy: random_policy(rng),
            mode: random_mode(rng),
            guests: rng.between(1, 6),
            think_ms: rng.one_of(&[20, 200, 1000]),
            writes: rng.one_of(&[0, 10, 50]),
            delay_us: rng.one_of(&[(1, 1), (50, 500), (1000, 5000), (10_000, 80_000), (1, 200_000)]),
            piece: rng.one_of(&[1500, 64 << 10, 64 << 10]),
            source_us: rng.one_of(&[(1, 10), (50, 300), (1000, 20_000)]),
            steps: rng.between(2, 12),
            kinds: Vec::new(),
        }
    }

    /// Another size, with data everywhere.
    pub fn set_blocks(&mut self, blocks: u64) {
        (self.blocks, self.holes) = (blocks, vec![false; blocks.div_ceil(STRETCH) as usize]);
    }

    pub fn size_bytes(&self) -> u64 {
        self.block_bytes * self.blocks
    }

    /// Is this sector zeros at the source?
    pub fn is_hole(&self, sector: u64) -> bool {
        self.holes[(sector * SECTOR / self.block_bytes / STRETCH) as usize]
    }

    /// The disk before anybody wrote to it.
    pub fn history(&self) -> History {
        History::new((0..self.size_bytes() / SECTOR).map(Stamp::source))
    }

    /// The bytes of a sector of the source, or of the disk that takes its place.
    pub fn put_source(&self, sector: u64, other: bool, out: &mut Vec<u8>) {
        match other {
            true => put(Stamp::other(sector), out),
            false if self.is_hole(sector) => out.resize(out.len() + SECTOR as usize, 0),
            false => put(Stamp::source(sector), out),
        }
    }

    /// What stands in a sector that was read; an error, if it is not one thing.
    pub fn stamp_of(&self, sector: u64, bytes: &[u8]) -> Result<Stamp, String> {
        if bytes.chunks(4).any(|word| word != &bytes[..4]) {
            return Err(format!("sector {sector} is a mix: it begins with {:?}", &bytes[..16]));
        }
        let number = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
        let is_source = number == 0 && self.is_hole(sector);
        Ok(if is_source { Stamp::source(sector) } else { Stamp::from_number(number) })
    }
}

/// A sector full of a stamp.
pub fn put(stamp: Stamp, out: &mut Vec<u8>) {
    for _ in 0..SECTOR / 4 {
        out.extend_from_slice(&stamp.number().to_le_bytes());
    }
}
