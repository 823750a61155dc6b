//! Many cases on two threads; and what a person needs when one fails.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::check::{Checked, Violation};
use crate::random::{Plan, run_seed};
use crate::stats::Stats;
use crate::world::Options;

const THREADS: u64 = 2;

/// What a search through many seeds has found.
pub struct Search {
    /// Of the cases that were run.
    pub stats: Stats,
    /// The first seed that failed, by number.
    pub failure: Option<(u64, Violation)>,
}

/// Runs the seeds from `first` on, until one fails or `cases` have passed.
pub fn search(first: u64, cases: u64, options: Options) -> Search {
    let failed_at = AtomicU64::new(u64::MAX);
    let lane = |thread: u64| {
        let mut stats = Stats::default();
        let mut failure = None;
        for seed in (first + thread..first + cases).step_by(THREADS as usize) {
            if seed > failed_at.load(Ordering::Relaxed) {
                break;
            }
            match without_panic(|| run_seed(seed, options)) {
                Ok(more) => stats.add(&more),
                Err(violation) => {
                    failed_at.fetch_min(seed, Ordering::Relaxed);
                    failure = Some((seed, violation));
                    break;
                }
            }
        }
        (stats, failure)
    };
    let lane = &lane;
    let ends: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || lane(thread))).collect();
        threads.into_iter().map(|thread| thread.join().expect("panics are caught inside")).collect()
    });
    let mut search = Search { stats: Stats::default(), failure: None };
    for (stats, failure) in ends {
        search.stats.add(&stats);
        let earlier = |(seed, _): &(u64, Violation)| search.failure.as_ref().is_none_or(|(other, _)| seed < other);
        if failure.as_ref().is_some_and(earlier) {
            search.failure = failure;
        }
    }
    search
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// A panic of the engine is a violation like others; nothing is printed for it here.
pub fn without_panic<T>(run: impl FnOnce() -> Checked<T>) -> Checked<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    let before = QUIET.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(run));
    QUIET.set(before);
    outcome.unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        let text = text.or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(Violation { rule: "no panic", what: text.unwrap_or_else(|| "a panic without words".into()) })
    })
}

/// All that happens in the case of a seed; if it fails, made as short as leaving out steps can make it.
pub fn explain(seed: u64, options: Options) -> String {
    let fails = |plan: &Plan| without_panic(|| plan.run(options).1).is_err();
    let mut plan = Plan::of(seed);
    let steps = Plan::steps(seed);
    plan.last = (0..=steps).find(|&last| fails(&Plan { last: Some(last), ..plan.clone() }));
    while plan.last.is_some() {
        let before = plan.skipped.len();
        leave_out_steps(&mut plan, &fails);
        if plan.skipped.len() == before {
            break;
        }
    }
    let (trace, violation) = traced(&plan, options);
    let kept = plan.last.unwrap_or(steps) - plan.skipped.len() as u64;
    format!(
        "seed {seed}, {kept} of its {steps} steps:\n{}\n{violation}\n\
         again: BLKFERRY_MODEL_SEED={seed} cargo test --test model random -- --nocapture\n",
        trace.join("\n")
    )
}

/// Leaves out every step without which the plan fails as well.
fn leave_out_steps(plan: &mut Plan, fails: &impl Fn(&Plan) -> bool) {
    for step in (0..plan.last.unwrap_or(0)).rev() {
        if !plan.skipped.contains(&step) {
            plan.skipped.push(step);
            if !fails(plan) {
                plan.skipped.pop();
            }
        }
    }
}

/// The trace survives a panic of the engine, because the world is built outside of it.
fn traced(plan: &Plan, options: Options) -> (Vec<String>, String) {
    let options = Options { trace: true, ..options };
    let mut lines = Vec::new();
    let outcome = without_panic(|| {
        let (world, outcome) = plan.run(options);
        lines = world.trace;
        outcome
    });
    (lines, outcome.err().map_or("passes".into(), |violation| violation.to_string()))
}

/// A number from the environment.
pub fn from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// How many cases a search runs.
pub fn cases() -> u64 {
    from_env("BLKFERRY_MODEL_CASES").unwrap_or(100_000)
}
