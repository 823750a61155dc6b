//! Engine, commit and recovery against a naive disk.
//!
//! A simulator plays the shell around the engine: it sends requests, and carries out what the engine orders,
//! in any order, in pieces, with failures, with the source silent, with the process killed or the power cut
//! in between. Commits are those of the real committer, step by step with anything between two steps; what a power
//! cut leaves of data and metadata, sector by sector, is read by the real recovery. The guest's reads are compared
//! with the history of its writes ([`history`]); each order of the engine is checked against the rules ([`orders`]).
//! One number, the seed, decides everything.
//!
//! ```text
//!   random.rs  pairs.rs     who decides what happens next: chance, or every possibility in turn
//!        └────┬────┘
//!         world.rs          requests in, events to the engine
//!         orders.rs         actions of the engine: rules on each of them, then a task
//!         carry.rs          tasks: piece by piece, and how they end
//!         commit.rs         the commit that runs, and how it fails
//!         power.rs ending.rs  crashes; how a case ends and what must hold then
//!        ┌────┴────┐
//!    history.rs  disk.rs    the naive disk; a disk with its page cache and platter
//!                metadata.rs  the metadata file on one, the cache's data on another
//! ```
//!
//! | to                          | set                                               |
//! |-----------------------------|---------------------------------------------------|
//! | run more or fewer cases     | `BLKFERRY_MODEL_CASES=n` (100 000)                |
//! | run other seeds             | `BLKFERRY_MODEL_FIRST=n` (0)                      |
//! | run one seed, with a trace  | `BLKFERRY_MODEL_SEED=n`                           |

mod carry;
#[path = "../common/check.rs"]
mod check;
mod commit;
mod disk;
mod ending;
mod guest;
#[path = "../common/history.rs"]
mod history;
mod metadata;
mod orders;
mod pairs;
#[cfg(feature = "planted-faults")]
mod planted;
mod power;
mod race;
mod random;
#[path = "../common/rng.rs"]
mod rng;
mod runner;
#[path = "../common/search.rs"]
mod search;
mod setup;
#[path = "../common/stamp.rs"]
mod stamp;
mod stats;
mod task;
mod world;

use world::Options;

/// Seeds that have found something once, run before all others.
const KEPT_SEEDS: &[u64] = &[533, 1378, 4978, 8678, 17563, 61873, 136_249_505_812];

#[test]
fn random_cases_match_the_naive_disk() {
    if let Some(seed) = runner::from_env("BLKFERRY_MODEL_SEED") {
        let text = runner::explain(seed, Options::default());
        println!("{text}");
        return assert!(runner::search(seed, 1, Options::default()).failure.is_none(), "seed {seed} fails");
    }
    let (first, cases) = (runner::from_env("BLKFERRY_MODEL_FIRST").unwrap_or(0), runner::cases());
    println!("seeds {KEPT_SEEDS:?} and {first}..{}", first + cases);
    for &seed in KEPT_SEEDS {
        let search = runner::search(seed, 1, Options::default());
        assert!(search.failure.is_none(), "{}", runner::explain(seed, Options::default()));
    }
    let search = runner::search(first, cases, Options::default());
    println!("{:#?}", search.stats);
    if let Some((seed, violation)) = search.failure {
        panic!("{violation}\n{}", runner::explain(seed, Options::default()));
    }
    assert!(cases < 10_000 || search.stats.saw_everything(), "the cases are about less than they should be");
}
