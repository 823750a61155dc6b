//! The real fetch layer, device, cache and server in a world whose network, time and order of tasks come from a seed.
//!
//! A source (the real server on a disk in memory) and a device (the real `Source`, links, fetcher, hydration, engine,
//! commits and cache files) talk over a simulated network, whose packets come late, in pieces, or not at all, and
//! whose connections break. Guests read and write, and check what they are told; either side is killed and comes back.
//! Then comes a good day, on which all that waits has to be answered, all blocks have to come, and nothing may be left.
//! The rules are in [`judge`]; one number, the seed, decides everything.
//!
//! ```text
//!   trouble.rs   what goes wrong, a step after the other     setup.rs   what the case is about
//!        └──────┬──────────────┐
//!   guest.rs ─► machine.rs     source.rs                     users, device, source: processes of the world
//!                  └─ weather.rs ─┘   wire.rs                the network, and what passes on it
//!               judge.rs                                     the rules
//!               case.rs  explain.rs                          a case, and a failed one in few lines
//!               hours.rs memory.rs                           a day of one device: nothing grows
//!               windows.rs                                   what is under way is bounded
//!               ahead.rs                                     what is asked for ahead is worth it
//!               doubt.rs                                     who is slow is not taken for dead
//! ```
//!
//! What it is not about: power cuts and failing disks (`model`), payload that is changed on the way (neither NBD nor
//! TCP's checksum would tell; here only framing is corrupted, which must end the connection and nothing worse).
//!
//! | to                          | set                                               |
//! |-----------------------------|---------------------------------------------------|
//! | run more or fewer cases     | `BLKFERRY_NETWORK_CASES=n` (300)                  |
//! | run other seeds             | `BLKFERRY_NETWORK_FIRST=n` (0)                    |
//! | run one seed, with a trace  | `BLKFERRY_NETWORK_SEED=n`                         |
//! | simulate more hours         | `BLKFERRY_NETWORK_HOURS=n` (2)                    |

#![allow(clippy::unwrap_used, missing_docs)]

mod ahead;
mod case;
#[path = "../common/check.rs"]
mod check;
mod doubt;
mod explain;
mod guest;
#[path = "../common/history.rs"]
mod history;
mod hours;
mod judge;
mod machine;
mod memory;
#[cfg(feature = "planted-faults")]
mod planted;
#[path = "../common/rng.rs"]
mod rng;
#[path = "../common/search.rs"]
mod search;
mod setup;
mod source;
#[path = "../common/stamp.rs"]
mod stamp;
mod trouble;
mod weather;
mod windows;
mod wire;

use explain::{LAST_LINES, explain};

/// Seeds that have found something once, run before all others.
/// 369: a read that joined a fetch of hydration waited with it for a connection of its own, up to 10 s, while the one for
/// demand was there. 178: a source found and lost again between two looks was given up, and nobody was told. 20,000,432 and
/// 20,001,105: a connection broke after a long silence, and the source was given as long again, on the next one or until
/// there was a next one. 30,000,117 to 30,005,422: connections died while nothing was asked, and whoever came then waited,
/// or failed, beside a source that was well. 30,001,870: a loss was dated before what had been heard on another connection.
/// 30,005,118: the end of a connection counted what it had received before as news.
const KEPT_SEEDS: &[u64] =
    &[178, 369, 20_000_432, 20_001_105, 30_000_117, 30_000_421, 30_001_870, 30_005_118, 30_005_128, 30_005_422];

/// How many cases a search runs.
fn cases() -> u64 {
    search::from_env("BLKFERRY_NETWORK_CASES").unwrap_or(300)
}

#[test]
fn random_cases_keep_the_rules() {
    if let Some(seed) = search::from_env("BLKFERRY_NETWORK_SEED") {
        println!("{}", explain(seed, usize::MAX));
        return assert!(case::run_seed(seed).is_ok(), "seed {seed} fails");
    }
    let (first, cases) = (search::from_env("BLKFERRY_NETWORK_FIRST").unwrap_or(0), cases());
    println!("seeds {KEPT_SEEDS:?} and {first}..{}", first + cases);
    for &seed in KEPT_SEEDS {
        assert!(case::run_seed(seed).is_ok(), "{}", explain(seed, LAST_LINES));
    }
    let found = search::search(first, cases, case::run_seed);
    println!("{:#?}", found.stats);
    if let Some((seed, violation)) = found.failure {
        panic!("{violation}\n{}", explain(seed, LAST_LINES));
    }
    assert!(cases < 200 || found.stats.saw_everything(), "the cases are about less than they should be");
}

#[test]
fn a_seed_is_one_case() {
    for seed in 0..20 {
        let trace = || case::Plan { trace: true, ..case::Plan::of(seed) }.run().trace;
        let (first, second) = (trace(), trace());
        if let Some(at) = (0..first.len().max(second.len())).find(|&at| first.get(at) != second.get(at)) {
            panic!("seed {seed} differs from itself at line {at}: {:?}, {:?}", first.get(at), second.get(at));
        }
    }
}
