//! What a person needs when a seed fails.

use crate::case::Plan;
use crate::search::leave_out_steps;
use crate::setup::Setup;

/// Lines of a trace that are shown when nobody asked for all: the last ones.
pub const LAST_LINES: usize = 120;

/// What happens in the case of a seed, in its last lines, with as few steps of trouble as it takes to fail.
pub fn explain(seed: u64, lines: usize) -> String {
    let steps = Setup::random(seed).steps;
    let mut plan = Plan::of(seed);
    let whole = plan.clone();
    if whole.run().checked.is_err() {
        let fails = |skipped: &[u64]| Plan { skipped: skipped.to_vec(), ..whole.clone() }.run().checked.is_err();
        leave_out_steps(&mut plan.skipped, steps, fails);
    }
    plan.trace = true;
    let outcome = plan.run();
    let end = outcome.checked.err().map_or("passes".into(), |violation| violation.to_string());
    let first = outcome.trace.len().saturating_sub(lines);
    format!(
        "seed {seed}, {} of its {steps} steps of trouble, the last {} of {} lines:\n{:?}\n{}\n{end}\n\
         again: BLKFERRY_NETWORK_SEED={seed} cargo test --features simulation --test network random -- --nocapture\n",
        steps - plan.skipped.len() as u64,
        outcome.trace.len() - first,
        outcome.trace.len(),
        Setup::random(seed),
        outcome.trace[first..].join("\n"),
    )
}
