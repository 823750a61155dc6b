//! Many cases; and what a person needs when one fails.

use crate::random::{Plan, run_seed};
pub use crate::search::from_env;
use crate::search::{self, Search, leave_out_steps, without_panic};
use crate::stats::Stats;
use crate::world::Options;

/// Runs the seeds from `first` on, until one fails or `cases` have passed.
pub fn search(first: u64, cases: u64, options: Options) -> Search<Stats> {
    search::search(first, cases, |seed| run_seed(seed, options))
}

/// All that happens in the case of a seed; if it fails, made as short as leaving out steps can make it.
pub fn explain(seed: u64, options: Options) -> String {
    let fails = |plan: &Plan| without_panic(|| plan.run(options).1).is_err();
    let mut plan = Plan::of(seed);
    let steps = Plan::steps(seed);
    plan.last = (0..=steps).find(|&last| fails(&Plan { last: Some(last), ..plan.clone() }));
    let whole = plan.clone();
    if let Some(last) = plan.last {
        let without = |skipped: &[u64]| Plan { skipped: skipped.to_vec(), ..whole.clone() };
        leave_out_steps(&mut plan.skipped, last, |skipped| fails(&without(skipped)));
    }
    let (trace, violation) = traced(&plan, options);
    let kept = plan.last.unwrap_or(steps) - plan.skipped.len() as u64;
    format!(
        "seed {seed}, {kept} of its {steps} steps:\n{}\n{violation}\n\
         again: BLKFERRY_MODEL_SEED={seed} cargo test --test model random -- --nocapture\n",
        trace.join("\n")
    )
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

/// How many cases a search runs.
pub fn cases() -> u64 {
    from_env("BLKFERRY_MODEL_CASES").unwrap_or(100_000)
}
