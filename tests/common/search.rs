//! Many cases on two threads, for tests that draw lots.
#![allow(dead_code)] // Each test uses its part.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::check::{Checked, Violation};

const THREADS: u64 = 2;

/// What is counted in cases, and added up.
pub trait Counts: Default + Send {
    /// Adds another run's counts.
    fn add(&mut self, other: &Self);
}

/// What a search through many seeds has found.
pub struct Search<S> {
    /// Of the cases that were run.
    pub stats: S,
    /// The first seed that failed, by number.
    pub failure: Option<(u64, Violation)>,
}

/// Runs the seeds from `first` on, until one fails or `cases` have passed.
pub fn search<S: Counts>(first: u64, cases: u64, run_seed: impl Fn(u64) -> Checked<S> + Sync) -> Search<S> {
    let failed_at = AtomicU64::new(u64::MAX);
    let lane = |thread: u64| {
        let mut stats = S::default();
        let mut failure = None;
        for seed in (first + thread..first + cases).step_by(THREADS as usize) {
            if seed > failed_at.load(Ordering::Relaxed) {
                break;
            }
            match without_panic(|| run_seed(seed)) {
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
    let mut search = Search { stats: S::default(), failure: None };
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

/// A panic of what is tested is a violation like others; nothing is printed for it here.
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

/// Leaves out every step, of those up to `last`, without which it fails as well. `fails` is asked with those left out.
pub fn leave_out_steps(skipped: &mut Vec<u64>, last: u64, fails: impl Fn(&[u64]) -> bool) {
    loop {
        let before = skipped.len();
        for step in (0..last).rev() {
            if !skipped.contains(&step) {
                skipped.push(step);
                if !fails(skipped) {
                    skipped.pop();
                }
            }
        }
        if skipped.len() == before {
            return;
        }
    }
}

/// A number from the environment.
pub fn from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}
