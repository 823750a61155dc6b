//! The random driver: one case from one seed.
//!
//! Each case throws its own weights (how often which event, how unreliable, how patient), so that rare
//! combinations are common in some cases. Each step has a random stream of its own: a step can be left out.

use blkferry::engine::{BlockRun, ByteRange, Errno, Event, Extent, HotRanges, OpKind};

use crate::check::Checked;
use crate::disk::Survives;
use crate::rng::Rng;
use crate::setup::{Setup, sectors_of};
use crate::stamp::SECTOR;
use crate::stats::Stats;
use crate::task::What;
use crate::world::{Options, World};

/// Stream of the setup; steps use the numbers from 0.
const SETUP: u64 = u64::MAX;
/// Stream of the end of the case.
const ENDING: u64 = u64::MAX - 1;

/// How a case goes about it.
struct Mood {
    steps: u64,
    /// Of a hundred tasks so many fail.
    failures: u64,
    max_open: usize,
    /// Of a hundred requests on present blocks so many do not go through the engine.
    direct_hits: u64,
    /// Read, write, zero, trim, prefetch.
    kinds: [u64; 5],
    /// Request, flush, hydrate, commit, silence, kill, power cut, task.
    moves: [u64; 8],
    /// Work of a task that is done at once, of a hundred.
    whole: u64,
    fua: u64,
    cache_is_full: bool,
    source_is_mute: bool,
    /// Of a hundred steps of a commit so many are where the process or the machine dies.
    crashes_in_commits: u64,
    /// Of a hundred steps so many are where the kernel finds that it cannot write something back.
    write_back_errors: u64,
}

impl Mood {
    fn random(rng: &mut Rng, setup: &Setup) -> Self {
        let crashes = rng.percent(25);
        let seldom = |rng: &mut Rng| if crashes { rng.one_of(&[0, 1]) } else { 0 };
        Self {
            // A small device is soon complete, and then not much can go wrong.
            steps: rng.between(10, 40) + (setup.blocks.len() as u64).min(30) * rng.between(4, 24),
            failures: rng.one_of(&[0, 0, 0, 5, 20]),
            max_open: rng.one_of(&[1, 2, 3, 6, 12]),
            direct_hits: rng.one_of(&[0, 50, 100]),
            kinds: std::array::from_fn(|_| rng.one_of(&[1, 1, 4, 12])),
            moves: [
                rng.one_of(&[10, 25, 40]),
                rng.one_of(&[0, 2, 10]),
                rng.one_of(&[0, 3, 15]),
                rng.one_of(&[0, 1, 5]),
                rng.one_of(&[0, 2]),
                seldom(rng),
                seldom(rng),
                rng.one_of(&[20, 50, 100]),
            ],
            whole: rng.one_of(&[20, 60, 95]),
            fua: rng.one_of(&[0, 20, 60]),
            cache_is_full: rng.percent(3),
            source_is_mute: rng.percent(5),
            crashes_in_commits: if crashes { rng.one_of(&[0, 0, 5, 20]) } else { 0 },
            write_back_errors: if rng.percent(10) { rng.one_of(&[1, 3]) } else { 0 },
        }
    }
}

/// A case that can be run again, shorter.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub seed: u64,
    /// Steps that are left out.
    pub skipped: Vec<u64>,
    /// Steps after this one are left out.
    pub last: Option<u64>,
}

impl Plan {
    /// The whole case of a seed.
    pub fn of(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// How many steps the whole case has.
    pub fn steps(seed: u64) -> u64 {
        let mut rng = Rng::new(seed, SETUP);
        let setup = Setup::random(&mut rng);
        Mood::random(&mut rng, &setup).steps
    }

    /// Runs it, into a world that is left as it was when something was found.
    pub fn run(&self, options: Options) -> (World, Checked) {
        let mut rng = Rng::new(self.seed, SETUP);
        let setup = Setup::random(&mut rng);
        let mood = Mood::random(&mut rng, &setup);
        let mut world = World::new(setup, options);
        let outcome = self.drive(&mood, &mut world);
        (world, outcome)
    }

    fn drive(&self, mood: &Mood, world: &mut World) -> Checked {
        let setup = world.setup.clone();
        world.note(|| format!("{} bytes, {:?}, {:?}", setup.geometry.size_bytes(), setup.config, setup.blocks));
        (world.cache_is_full, world.source_is_mute) = (mood.cache_is_full, mood.source_is_mute);
        let steps = self.last.map_or(mood.steps, |last| mood.steps.min(last));
        for step in (0..steps).filter(|step| !self.skipped.contains(step)) {
            let mut rng = Rng::new(self.seed, step);
            world.note(|| format!("#{step}"));
            Turn { mood, world, rng: &mut rng }.any()?;
        }
        end(world, &mut Rng::new(self.seed, ENDING))
    }
}

/// Every case ends with a complete device; on the way there may be a crash, and one after it.
fn end(world: &mut World, rng: &mut Rng) -> Checked {
    if rng.percent(50) && !world.disk.has_untold_error() {
        world.silence(rng)?;
    }
    let crash = rng.below(8);
    if crash == 1 || world.engine.failed().is_some() || world.disk.has_untold_error() {
        // A device that has failed is not trusted before its machine was started anew.
        world.drain(rng)?;
        world.cut_power(survivors(rng), rng)?;
    } else if crash == 0 {
        world.kill()?;
    } else if crash == 2 {
        world.cut_power(survivors(rng), rng)?;
    }
    world.complete_the_device(rng)?;
    if crash < 4 { world.prove_durability(rng) } else { Ok(()) }
}

fn crash(world: &mut World, rng: &mut Rng) -> Checked {
    if rng.percent(50) { world.kill() } else { world.cut_power(survivors(rng), rng) }
}

fn survivors(rng: &mut Rng) -> Survives {
    rng.one_of(&[Survives::None, Survives::All, Survives::Percent(50), Survives::Percent(90)])
}

/// One random step.
struct Turn<'a> {
    mood: &'a Mood,
    world: &'a mut World,
    rng: &'a mut Rng,
}

impl Turn<'_> {
    fn any(&mut self) -> Checked {
        let world = &mut *self.world;
        if world.engine.failed().is_some() && self.rng.percent(10) {
            // Only a new start makes anything of a device that has failed.
            return world.cut_power(survivors(self.rng), self.rng);
        }
        if self.mood.write_back_errors > 0 && self.rng.percent(self.mood.write_back_errors) {
            return world.write_back_fails(survivors(self.rng), self.rng);
        }
        match self.rng.weighted(&self.mood.moves) {
            0 if world.open.len() < self.mood.max_open => self.request(),
            1 if world.open.len() < self.mood.max_open => world.flush(),
            2 => world.feed(Event::Hydrate).map(drop),
            3 => world.feed(Event::CommitDue).map(drop),
            // Nothing is to fail while the source is silent.
            4 if !world.disk.has_untold_error() => world.silence(self.rng),
            5 if world.engine.failed().is_none() => world.kill(),
            5 | 6 => world.cut_power(survivors(self.rng), self.rng),
            _ => self.work(),
        }
    }

    fn request(&mut self) -> Checked {
        let range = self.range();
        let fua = self.rng.percent(self.mood.fua);
        let kind = match self.rng.weighted(&self.mood.kinds) {
            0 => OpKind::Read,
            1 => OpKind::Write { fua },
            2 => OpKind::Zero { fua, keep_allocated: self.rng.percent(50), fast_only: self.rng.percent(20) },
            3 => OpKind::Trim { fua },
            _ => OpKind::Prefetch,
        };
        let world = &mut *self.world;
        let can_hit = matches!(kind, OpKind::Read | OpKind::Write { .. }) && world.engine.failed().is_none();
        let present = world.maps().all_present(world.setup.geometry.covering(range));
        if can_hit && present && self.rng.percent(self.mood.direct_hits) {
            world.hit(kind, range)
        } else {
            world.submit(kind, range)?;
            // Half of all misses are followed by a look ahead; which ones does not use up chance.
            let looks_ahead = kind == OpKind::Read && !present && (range.start / 4096).is_multiple_of(2);
            if looks_ahead {
                world.feed(Event::Ahead { range })?;
            }
            // As do some that hear what is hot at the source, in any order, and more than once.
            if (range.start / 4096) % 5 == 3 {
                let blocks = world.setup.geometry.covering(range);
                world.hot[blocks.start as usize..blocks.end as usize].fill(true);
                let mut ranges = HotRanges::default();
                let was_used = (range.start / 4096).is_multiple_of(2);
                if was_used { &mut ranges.used } else { &mut ranges.in_memory }.push(range);
                world.feed(Event::Hot { ranges })?;
            }
            Ok(())
        }
    }

    /// Whole blocks, a part of one block, any sectors, or everything.
    fn range(&mut self) -> ByteRange {
        let (geometry, rng) = (self.world.setup.geometry, &mut *self.rng);
        let first = geometry.blocks() - 1 - rng.below(geometry.blocks().min(200));
        let last = (first + rng.one_of(&[0, 0, 1, 2, 5])).min(geometry.blocks() - 1);
        let blocks = geometry.bytes_of(BlockRun::new(first, last + 1));
        match rng.below(8) {
            0..4 => blocks,
            4..7 => {
                let sectors = sectors_of(blocks);
                let start = rng.between(sectors.start, sectors.end - 1);
                let end = rng.between(start + 1, sectors.end);
                ByteRange { start: start * SECTOR, end: end * SECTOR }
            }
            _ => ByteRange::new(0, geometry.size_bytes()),
        }
    }

    /// Some work on some task.
    fn work(&mut self) -> Checked {
        if self.world.tasks.is_empty() {
            return Ok(());
        }
        let (world, rng) = (&mut *self.world, &mut *self.rng);
        let at = rng.below(world.tasks.len() as u64) as usize;
        let fails = rng.percent(self.mood.failures);
        match &world.tasks[at].what {
            What::Query(run) => {
                let extents = told_extents(&world.setup, *run, rng);
                return world.answer(at, extents);
            }
            What::Commit(stage) if stage.may_fail() && fails && rng.percent(30) => {
                return world.commit_fails(at, survivors(rng), rng);
            }
            What::Commit(_) if rng.percent(self.mood.crashes_in_commits) => return crash(world, rng),
            What::Commit(_) => return world.commit_step(at),
            _ => {}
        }
        let left = world.tasks[at].left();
        if left > 0 {
            let sectors = if rng.percent(self.mood.whole) { left } else { rng.between(1, left) };
            world.progress(at, sectors, rng.percent(50))?;
        }
        let no_room = world.cache_is_full && matches!(world.tasks[at].what, What::Store(..));
        if fails || no_room {
            let errno = rng.one_of(&[Errno::EIO, Errno::ENOSPC]);
            world.finish(at, Err(errno))
        } else if world.tasks[at].left() == 0 && rng.percent(self.mood.whole) {
            world.finish(at, Ok(()))
        } else {
            Ok(())
        }
    }
}

/// The source's holes and data from the start of a run to its end.
pub fn honest_extents(setup: &Setup, run: BlockRun) -> Vec<Extent> {
    let sectors = sectors_of(setup.geometry.bytes_of(run));
    let mut extents: Vec<Extent> = Vec::new();
    for &zero in &setup.source_zero[sectors.start as usize..sectors.end as usize] {
        match extents.last_mut() {
            Some(last) if last.zero == zero => last.len_bytes += SECTOR,
            _ => extents.push(Extent { len_bytes: SECTOR, zero }),
        }
    }
    extents
}

/// The same as a source may tell it: cut short, beyond the end, in pieces, zeros called data, or nothing.
fn told_extents(setup: &Setup, run: BlockRun, rng: &mut Rng) -> Vec<Extent> {
    let mut extents = honest_extents(setup, run);
    match rng.below(8) {
        0 => extents.clear(),
        1 => {
            extents.truncate(rng.between(1, extents.len() as u64) as usize);
            let last = extents.last_mut().expect("at least one is left");
            last.len_bytes = SECTOR * rng.between(1, last.len_bytes / SECTOR);
        }
        2 => extents.last_mut().expect("no run is empty").len_bytes += 1 << 40,
        3 => extents = extents.into_iter().flat_map(|e| in_two(e, rng)).collect(),
        4 => extents.iter_mut().for_each(|e| e.zero &= rng.percent(50)),
        _ => {}
    }
    extents
}

fn in_two(extent: Extent, rng: &mut Rng) -> Vec<Extent> {
    let sectors = extent.len_bytes / SECTOR;
    let first = rng.below(sectors);
    let piece = |sectors| Extent { len_bytes: sectors * SECTOR, zero: extent.zero };
    [first, sectors - first].into_iter().filter(|&n| n > 0).map(piece).collect()
}

/// Runs the whole case of a seed and says what happened.
pub fn run_seed(seed: u64, options: Options) -> Checked<Stats> {
    let (world, outcome) = Plan::of(seed).run(options);
    outcome.map(|()| Stats { cases: 1, ..world.stats })
}
