//! Readers that leap, beside a naive look at all misses there ever were.

use super::*;

const BLOCK: u64 = 4096;
const NEAR: u64 = 512 << 10;

fn geometry() -> Geometry {
    Geometry::new(4 << 30, BLOCK).unwrap()
}

/// A disk with these strides: who misses what is not here yet, and what is wanted then comes at once.
struct Disk {
    strides: Strides,
    here: std::collections::HashSet<u64>,
    misses: Vec<ByteRange>,
    /// Blocks that came without having been read.
    brought: u64,
}

impl Disk {
    fn new() -> Self {
        Self { strides: Strides::default(), here: Default::default(), misses: Vec::new(), brought: 0 }
    }

    /// Reads; gives the blocks that are brought beside, if it misses.
    fn read(&mut self, start: u64, len: u64) -> Option<Vec<u64>> {
        let read = ByteRange::new(start, len);
        let blocks = geometry().covering(read);
        if (blocks.start..blocks.end).all(|block| self.here.contains(&block)) {
            return None;
        }
        self.here.extend(blocks.start..blocks.end);
        self.misses.push(read);
        let mut brought = Vec::new();
        if let Leap::Reader(Some(steps)) = self.strides.missed(NEAR, read) {
            assert!(self.is_third_step(steps.step, read), "{steps:?} after {:?}", self.misses);
            assert!(steps.to <= MAX_STEPS && (steps.to * len <= MAX_BYTES || steps.to == 1));
            for run in steps.runs(geometry()) {
                let way = run.start as i64 * BLOCK as i64 - start as i64;
                assert!(run.end <= geometry().blocks() && way.rem_euclid(steps.step) < BLOCK as i64 + steps.step.abs());
                brought.extend((run.start..run.end).filter(|block| self.here.insert(*block)));
            }
        }
        self.brought += brought.len() as u64;
        Some(brought)
    }

    /// Four misses in a row, this one or one that leads to it in whole steps the last of them.
    fn is_third_step(&self, step: i64, read: ByteRange) -> bool {
        let missed = |start: i64| self.misses.iter().any(|miss| miss.start as i64 == start && miss.len() == read.len());
        (0..2000).any(|back| (0..4).all(|number| missed(read.start as i64 - (back + number) * step)))
    }
}

#[test]
fn the_third_equal_step_brings_the_next_ones_and_more_each_time() {
    let mut disk = Disk::new();
    let step = 1 << 20;
    let mut misses = Vec::new();
    for number in 0..200 {
        if let Some(brought) = disk.read(number * step, 4096) {
            misses.push((number, brought.len()));
        }
    }
    let ahead = [(0, 0), (1, 0), (2, 0), (3, 2), (6, 4), (11, 8), (20, 16), (37, 32), (70, 32), (103, 32)];
    assert_eq!(misses[..10], ahead);
    assert_eq!(misses.len(), 12, "200 reads: {misses:?}");
}

#[test]
fn back_too_and_never_beyond_the_ends_of_the_disk() {
    let (mut disk, step, size) = (Disk::new(), 3 << 20, geometry().size_bytes());
    let misses = (1..=size / step).filter(|number| disk.read(size - number * step, 8192).is_some()).count();
    assert!((1..50).contains(&misses), "{misses} of {}", size / step);
    // To the very end, with steps that are no whole number of blocks.
    let (mut disk, step) = (Disk::new(), 5_000_000);
    let misses = (0..size / step).filter(|number| disk.read(number * step, 512).is_some()).count();
    assert!((1..50).contains(&misses), "{misses} of {}", size / step);
}

#[test]
fn long_reads_are_asked_for_one_step_ahead_and_near_ones_not_at_all() {
    let mut disk = Disk::new();
    let brought: Vec<_> = (0..8).map(|number| disk.read(number << 22, 1 << 20).map(|blocks| blocks.len())).collect();
    let mib = 256;
    assert_eq!(brought[..6], [Some(0), Some(0), Some(0), Some(mib), None, Some(mib)]);
    let mut disk = Disk::new();
    assert!((0..4).all(|number| disk.read(number * NEAR, 4096) == Some(Vec::new())));
}

#[test]
fn other_lengths_and_uneven_steps_are_no_readers() {
    let mut disk = Disk::new();
    for number in 0..100 {
        let len = 4096 * (1 + number % 2);
        disk.read(number * (2 << 20), len);
    }
    // Each second one is a reader of its own.
    assert!(disk.brought > 0);
    let mut disk = Disk::new();
    (0..100).for_each(|number: u64| drop(disk.read(number * number * (1 << 18) * 3, 4096)));
    assert_eq!(disk.brought, 0, "each step is longer than the one before");
}

#[test]
fn readers_are_told_apart_among_each_other_and_among_those_that_jump_about() {
    let mut disk = Disk::new();
    let mut rng = fastrand::Rng::with_seed(1);
    let (mut forth, mut back, mut strangers) = (0, 0, 0);
    for number in 0..300 {
        forth += u64::from(disk.read(number * (7 << 20), 4096).is_some());
        back += u64::from(disk.read((4 << 30) - 4096 - number * (11 << 20), 4096).is_some());
        strangers += u64::from(disk.read(rng.u64(..1 << 20) * BLOCK, 4096).is_some());
    }
    assert!(forth < 30 && back < 30, "{forth} and {back} misses of 300");
    assert!(strangers > 290);
}

/// Whatever is read at random brings nothing.
#[test]
fn random_reads_bring_nothing() {
    let mut rng = fastrand::Rng::with_seed(2);
    let mut disk = Disk::new();
    for _ in 0..100_000 {
        disk.read(rng.u64(..1 << 20) * BLOCK, 4096);
    }
    assert_eq!(disk.brought, 0);
}
