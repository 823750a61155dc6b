//! Every pair of requests in every order of events: what chance might miss, on a device of two blocks.
//!
//! A depth-first search over choices. The engine cannot be copied, so each path is run from the start with the
//! choices written down; then the last choice that has another possibility left is changed. A choice is: the
//! next request comes, a task does its work, a task ends, or (if the search has one to spend) a task fails, or
//! the process or the machine dies. Work and end of a task are two choices: what happens in between is the point.

use blkferry::engine::{ByteRange, Errno, Event, OpKind};

use crate::check::Checked;
use crate::disk::Survives;
use crate::rng::Rng;
use crate::runner::without_panic;
use crate::setup::{Initial, Setup};
use crate::task::{Act, Stage, What};
use crate::world::{Options, World};

/// What comes from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// A request.
    Request(OpKind, ByteRange),
    /// A flush.
    Flush,
    /// A step of hydration.
    Fetch,
}

/// One bad thing that may happen, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    None,
    Failure,
    Crash,
}

const BOTH: ByteRange = ByteRange { start: 0, end: 8192 };
const FIRST: ByteRange = ByteRange { start: 0, end: 4096 };
/// The end of the first block and the beginning of the second.
const EDGES: ByteRange = ByteRange { start: 3584, end: 4608 };
const PART: ByteRange = ByteRange { start: 512, end: 1536 };

/// The requests of which every pair is tried.
pub const INPUTS: [Input; 9] = [
    Input::Fetch,
    Input::Flush,
    Input::Request(OpKind::Read, BOTH),
    Input::Request(OpKind::Write { fua: false }, FIRST),
    Input::Request(OpKind::Write { fua: true }, BOTH),
    Input::Request(OpKind::Write { fua: false }, PART),
    Input::Request(OpKind::Write { fua: false }, EDGES),
    Input::Request(OpKind::Trim { fua: false }, BOTH),
    Input::Request(OpKind::Zero { fua: false, keep_allocated: true, fast_only: false }, FIRST),
];

/// The choices of a path: which one was taken, of how many.
#[derive(Default)]
struct Path {
    choices: Vec<(usize, usize)>,
    at: usize,
}

impl Path {
    fn pick(&mut self, of: usize) -> usize {
        if self.at == self.choices.len() {
            self.choices.push((0, of));
        }
        let (taken, known) = self.choices[self.at];
        assert_eq!(known, of, "a path must run the same way each time");
        self.at += 1;
        taken
    }

    /// The next path; false if this was the last.
    fn advance(&mut self) -> bool {
        self.at = 0;
        while let Some((taken, of)) = self.choices.pop() {
            if taken + 1 < of {
                self.choices.push((taken + 1, of));
                return true;
            }
        }
        false
    }
}

#[derive(Clone, Copy, Debug)]
enum Choice {
    Input,
    Work(usize),
    End(usize),
    Fail(usize),
    Kill,
    PowerCut(Survives),
}

/// Runs all paths; returns how many they were, or the first violation with its path.
pub fn explore(setup: &Setup, inputs: &[Input], trouble: Trouble, options: Options) -> Result<u64, String> {
    let mut path = Path::default();
    let mut paths = 0;
    loop {
        paths += 1;
        if let Err(violation) = without_panic(|| run(setup, inputs, trouble, options, &mut path).1) {
            path.at = 0;
            let mut trace = Vec::new();
            let _ = without_panic(|| {
                let options = Options { trace: true, ..options };
                trace = run(setup, inputs, trouble, options, &mut path).0.trace;
                Ok(())
            });
            return Err(format!("{inputs:?} {trouble:?}\n{}\n{violation}", trace.join("\n")));
        }
        if !path.advance() {
            return Ok(paths);
        }
    }
}

fn run(setup: &Setup, inputs: &[Input], trouble: Trouble, options: Options, path: &mut Path) -> (World, Checked) {
    let mut world = World::new(setup.clone(), options);
    let outcome = walk(&mut world, inputs, trouble, path);
    (world, outcome)
}

fn walk(world: &mut World, inputs: &[Input], mut trouble: Trouble, path: &mut Path) -> Checked {
    let mut inputs = inputs.iter();
    let rng = &mut Rng::new(0, 0);
    loop {
        let choices = possible(world, inputs.len() > 0, trouble);
        if choices.is_empty() {
            return world.complete_the_device(rng);
        }
        match choices[path.pick(choices.len())] {
            Choice::Input => input(world, *inputs.next().expect("one is left"))?,
            Choice::Work(at) => world.progress(at, u64::MAX, true)?,
            Choice::End(at) => end(world, at, trouble)?,
            Choice::Fail(at) => {
                trouble = Trouble::None;
                fail(world, at, rng)?;
            }
            Choice::Kill => {
                world.kill();
                return world.complete_the_device(rng);
            }
            Choice::PowerCut(survives) => {
                world.cut_power(survives, rng)?;
                return world.complete_the_device(rng);
            }
        }
    }
}

fn possible(world: &World, has_input: bool, trouble: Trouble) -> Vec<Choice> {
    let mut choices = Vec::new();
    if has_input {
        choices.push(Choice::Input);
    }
    for (at, task) in world.tasks.iter().enumerate() {
        // Nobody changes fetched data: when it is copied makes no difference.
        let one_step = task.left() == 0 || matches!(task.what, What::Local(_, _, Act::Deliver));
        choices.push(if one_step { Choice::End(at) } else { Choice::Work(at) });
        if trouble == Trouble::Failure && one_step {
            choices.push(Choice::Fail(at));
        }
    }
    if trouble == Trouble::Crash && !choices.is_empty() {
        choices.extend([Choice::Kill, Choice::PowerCut(Survives::None), Choice::PowerCut(Survives::All)]);
    }
    choices
}

fn input(world: &mut World, input: Input) -> Checked {
    match input {
        Input::Request(kind, range) => world.submit(kind, range),
        Input::Flush => world.flush(),
        Input::Fetch => world.feed(Event::Hydrate).map(drop),
    }
}

fn end(world: &mut World, at: usize, trouble: Trouble) -> Checked {
    loop {
        world.carry_out(at)?;
        // Steps of a commit that commute with all that may come between them are one step: a write that falls
        // between the beginning and the end of a sync might as well come after it; and while no crash can come,
        // it does not matter when something becomes durable.
        let goes_on = match world.tasks.get(at).map(|task| &task.what) {
            Some(What::Commit(Stage::DataSynced(..) | Stage::SyncPages)) => true,
            Some(What::Commit(Stage::SyncData(_) | Stage::WritePages(_))) => trouble != Trouble::Crash,
            _ => false,
        };
        if !goes_on {
            return Ok(());
        }
    }
}

fn fail(world: &mut World, at: usize, rng: &mut Rng) -> Checked {
    if !matches!(world.tasks[at].what, What::Commit(_)) {
        return world.finish(at, Err(Errno::EIO));
    }
    world.commit_fails(at)?;
    world.drain(rng)?;
    world.cut_power(Survives::None, rng)
}

fn devices() -> [Setup; 3] {
    [
        Setup::plain(vec![Initial::Absent, Initial::Absent], 2),
        Setup::plain(vec![Initial::Absent, Initial::Absent], 1),
        Setup::plain(vec![Initial::Absent, Initial::Fetched], 2),
    ]
}

fn explore_all(groups: impl Iterator<Item = Vec<Input>> + Clone, trouble: Trouble) {
    let mut paths = 0;
    for setup in devices() {
        for inputs in groups.clone() {
            match explore(&setup, &inputs, trouble, Options::default()) {
                Ok(more) => paths += more,
                Err(text) => panic!("{text}"),
            }
        }
    }
    println!("{paths} paths, trouble: {trouble:?}");
}

fn pairs() -> impl Iterator<Item = Vec<Input>> + Clone {
    INPUTS.into_iter().flat_map(|a| INPUTS.into_iter().map(move |b| vec![a, b]))
}

#[test]
fn every_pair_in_every_order() {
    explore_all(pairs(), Trouble::None);
}

#[test]
fn every_pair_with_one_failure_anywhere() {
    explore_all(pairs(), Trouble::Failure);
}

#[test]
fn every_pair_with_a_crash_anywhere() {
    explore_all(pairs(), Trouble::Crash);
}

#[test]
#[ignore]
fn count() {
    for setup in devices() {
        for inputs in pairs() {
            for trouble in [Trouble::None, Trouble::Failure, Trouble::Crash] {
                let mut path = Path::default();
                let mut n = 0u64;
                while n < 1_000_000 {
                    n += 1;
                    run(&setup, &inputs, trouble, Options::default(), &mut path).1.unwrap();
                    if !path.advance() {
                        break;
                    }
                }
                println!("{n} {trouble:?} {inputs:?}");
            }
        }
    }
}
