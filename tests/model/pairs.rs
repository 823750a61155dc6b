//! Few requests on one or two blocks, in every order of events: what chance might miss.
//!
//! A depth-first search over choices. The engine cannot be copied, so each path is run from the start with the
//! choices written down; then the last choice that has another possibility left is changed. A choice is: the
//! next request comes, a task does its work, a task ends, or (if the search has one to spend) a task fails, or
//! the process or the machine dies.

use blkferry::engine::{ByteRange, Errno, Event, OpKind};

use crate::check::Checked;
use crate::disk::Survives;
use crate::rng::Rng;
use crate::search::without_panic;
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

/// How closely the search looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    /// Work and end of a task are two choices: things may happen in between.
    Fine,
    /// They are one.
    Coarse,
}

const BLOCK: ByteRange = ByteRange { start: 0, end: 4096 };
const PART: ByteRange = ByteRange { start: 512, end: 1536 };
const BOTH: ByteRange = ByteRange { start: 0, end: 8192 };
/// The end of the first block and the beginning of the second.
const EDGES: ByteRange = ByteRange { start: 3584, end: 4608 };

/// What can happen to one block.
const TO_ONE_BLOCK: [Input; 8] = [
    Input::Fetch,
    Input::Flush,
    Input::Request(OpKind::Read, BLOCK),
    Input::Request(OpKind::Write { fua: false }, BLOCK),
    Input::Request(OpKind::Write { fua: true }, BLOCK),
    Input::Request(OpKind::Write { fua: false }, PART),
    Input::Request(OpKind::Trim { fua: false }, BLOCK),
    Input::Request(OpKind::Zero { fua: true, keep_allocated: true, fast_only: false }, PART),
];

/// What can happen to two blocks at once.
const TO_TWO_BLOCKS: [Input; 8] = [
    Input::Fetch,
    Input::Flush,
    Input::Request(OpKind::Read, BOTH),
    Input::Request(OpKind::Write { fua: true }, BOTH),
    Input::Request(OpKind::Write { fua: false }, BLOCK),
    Input::Request(OpKind::Write { fua: false }, EDGES),
    Input::Request(OpKind::Trim { fua: true }, BOTH),
    Input::Request(OpKind::Prefetch, BOTH),
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

/// Which paths to run.
#[derive(Clone, Copy, Debug)]
pub struct Search<'a> {
    setup: &'a Setup,
    inputs: &'a [Input],
    grain: Grain,
    trouble: Trouble,
}

impl Search<'_> {
    /// Runs all paths; returns how many they were, or the first violation with its path.
    pub fn explore(&self, options: Options) -> Result<u64, String> {
        let mut path = Path::default();
        let mut paths = 0;
        loop {
            paths += 1;
            if let Err(violation) = without_panic(|| self.run(options, &mut path).1) {
                let trace = self.trace(options, &mut path);
                return Err(format!("{:?}, {:?}\n{trace}\n{violation}", self.inputs, self.trouble));
            }
            if !path.advance() {
                return Ok(paths);
            }
        }
    }

    /// The same path once more, written down.
    fn trace(&self, options: Options, path: &mut Path) -> String {
        path.at = 0;
        let mut lines = Vec::new();
        // What it finds is known.
        let _ = without_panic(|| {
            lines = self.run(Options { trace: true, ..options }, path).0.trace;
            Ok(())
        });
        lines.join("\n")
    }

    fn run(&self, options: Options, path: &mut Path) -> (World, Checked) {
        let mut world = World::new(self.setup.clone(), options);
        let outcome = self.walk(&mut world, path);
        (world, outcome)
    }

    fn walk(&self, world: &mut World, path: &mut Path) -> Checked {
        let mut inputs = self.inputs.iter();
        let mut trouble = self.trouble;
        let rng = &mut Rng::new(0, 0);
        loop {
            let choices = possible(world, inputs.len() > 0, self.grain, trouble);
            if choices.is_empty() {
                return world.complete_the_device(rng);
            }
            match choices[path.pick(choices.len())] {
                Choice::Input => input(world, *inputs.next().expect("one is left"))?,
                Choice::Work(at) => world.progress(at, u64::MAX, true)?,
                Choice::End(at) => end(world, at, self.grain, trouble)?,
                Choice::Fail(at) => {
                    trouble = Trouble::None;
                    fail(world, at, rng)?;
                }
                Choice::Kill => {
                    world.kill()?;
                    return world.complete_the_device(rng);
                }
                Choice::PowerCut(survives) => {
                    world.cut_power(survives, rng)?;
                    return world.complete_the_device(rng);
                }
            }
        }
    }
}

fn possible(world: &World, has_input: bool, grain: Grain, trouble: Trouble) -> Vec<Choice> {
    let mut choices = Vec::new();
    if has_input {
        choices.push(Choice::Input);
    }
    for (at, task) in world.tasks.iter().enumerate() {
        // Nobody changes fetched data: when it is copied makes no difference.
        let one_step =
            grain == Grain::Coarse || task.left() == 0 || matches!(task.what, What::Local(_, _, Act::Deliver));
        choices.push(if one_step { Choice::End(at) } else { Choice::Work(at) });
        let may_fail = !matches!(task.what, What::Commit(stage) if !stage.may_fail());
        if trouble == Trouble::Failure && one_step && may_fail {
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

fn end(world: &mut World, at: usize, grain: Grain, trouble: Trouble) -> Checked {
    loop {
        world.carry_out(at)?;
        // Steps of a commit that commute with all that may come between them are one step: a write that falls
        // between the beginning and the end of a sync might as well come after it; and while no crash can come,
        // it does not matter when something becomes durable.
        let goes_on = match world.tasks.get(at).map(|task| &task.what) {
            Some(What::Commit(Stage::DataSynced(_) | Stage::SyncMetadata)) => true,
            Some(What::Commit(Stage::SyncData)) => trouble == Trouble::None,
            Some(What::Commit(Stage::WriteMap)) => match trouble {
                Trouble::None => true,
                Trouble::Failure => grain == Grain::Coarse,
                Trouble::Crash => false,
            },
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
    world.commit_fails(at, Survives::None, rng)?;
    world.drain(rng)?;
    world.cut_power(Survives::None, rng)
}

/// All lists of so many inputs.
fn lists(of: &[Input], len: u32) -> Vec<Vec<Input>> {
    let list = |mut number: usize| {
        let mut next = || {
            let input = of[number % of.len()];
            number /= of.len();
            input
        };
        (0..len).map(|_| next()).collect()
    };
    (0..of.len().pow(len)).map(list).collect()
}

fn explore_all(setups: &[Setup], lists: &[Vec<Input>], grain: Grain, trouble: Trouble) {
    let mut paths = 0;
    for setup in setups {
        for inputs in lists {
            let search = Search { setup, inputs, grain, trouble };
            match search.explore(Options::default()) {
                Ok(more) => paths += more,
                Err(text) => panic!("{text}"),
            }
        }
    }
    println!("{} lists of inputs on {} devices, {trouble:?}: {paths} paths", lists.len(), setups.len());
}

fn one_block() -> Setup {
    Setup::plain(vec![Initial::Absent], 1)
}

/// Two blocks in one fetch, in one fetch each, and one of them present.
fn two_blocks() -> [Setup; 3] {
    [
        Setup::plain(vec![Initial::Absent, Initial::Absent], 2),
        Setup::plain(vec![Initial::Absent, Initial::Absent], 1),
        Setup::plain(vec![Initial::Absent, Initial::Fetched], 2),
    ]
}

#[test]
fn three_requests_on_one_block_in_every_order() {
    explore_all(&[one_block()], &lists(&TO_ONE_BLOCK, 3), Grain::Fine, Trouble::None);
}

#[test]
fn two_requests_on_one_block_with_trouble_anywhere() {
    let pairs = lists(&TO_ONE_BLOCK, 2);
    explore_all(&[one_block()], &pairs, Grain::Fine, Trouble::Failure);
    explore_all(&[one_block()], &pairs, Grain::Fine, Trouble::Crash);
}

#[test]
fn two_requests_on_two_blocks_with_a_failure_anywhere() {
    explore_all(&two_blocks(), &lists(&TO_TWO_BLOCKS, 2), Grain::Coarse, Trouble::Failure);
}

#[test]
fn two_requests_on_two_blocks_with_a_crash_anywhere() {
    explore_all(&two_blocks(), &lists(&TO_TWO_BLOCKS, 2), Grain::Coarse, Trouble::Crash);
}
