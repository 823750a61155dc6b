//! The commit protocol on a simulated disk: at every step the power may be cut, and every cut is looked at.

mod bits;
mod host;
mod platter;
mod superblock;

use blkferry::cache::Committer;
use blkferry::engine::{Errno, Event, Geometry};

use crate::rng::Rng;
use host::{Fault, Host};

/// Generations of one disk: each ends with a power cut.
const GENERATIONS: u64 = 12;

#[derive(Default)]
struct Tally {
    commits: u64,
    cuts_in_commits: u64,
    errors: u64,
    flushes: u64,
    states: u64,
}

/// Runs the commit that the engine wants, and tells it how it ended.
fn commit(host: &mut Host, committer: &mut Committer, tally: &mut Tally) {
    let maps = host.maps();
    host.wants_commit = false;
    let had_uncommitted = maps.has_uncommitted();
    let result = committer.commit(&maps, host);
    assert!(result.is_ok() || !had_uncommitted || maps.has_uncommitted(), "a commit that failed counts as done");
    match result {
        Ok(_) => {
            tally.commits += 1;
            host.apply(Event::Committed { result: Ok(()) });
        }
        Err(_) if host.has_lost_power => tally.cuts_in_commits += 1,
        Err(error) => {
            assert!(matches!(host.fault, Some((0, _))), "only what failed may fail");
            assert_eq!(error.raw_os_error(), Some(5), "the error is the disk's");
            tally.errors += 1;
            host.apply(Event::Committed { result: Err(Errno::EIO) });
        }
    }
}

/// One disk, from its first commit through some power cuts.
fn run(seed: u64, pages: u64, every_outcome: bool, tally: &mut Tally) {
    let mut rng = Rng::new(seed, 200);
    let blocks = (pages - 1) * 15_872 + rng.between(8_000, 15_872);
    let geometry = Geometry::new(blocks * 4096 - rng.below(8) * 512, 4096).unwrap();
    let (mut host, mut recovered) = Host::new(geometry, Rng::new(seed, 201), every_outcome);
    for _ in 0..GENERATIONS {
        let mut committer = Committer::new(&recovered);
        let fault = if rng.percent(25) { Fault::Error } else { Fault::PowerCut };
        host.fault = Some((rng.below(16), fault));
        for _ in 0..rng.between(20, 200) {
            host.guest();
            if host.wants_commit {
                commit(&mut host, &mut committer, tally);
            }
            if host.has_lost_power {
                break;
            }
            if host.engine.failed().is_some() {
                assert!(!host.wants_commit, "after an error no commit is tried again");
            }
        }
        recovered = host.lose_power();
    }
    tally.flushes += host.flushes_answered;
    tally.states += host.states_looked_at;
}

#[test]
fn no_power_cut_breaks_a_promise() {
    let first = crate::from_env("BLKFERRY_CRASH_FIRST").unwrap_or(0);
    let disks = crate::from_env("BLKFERRY_CRASH_DISKS").unwrap_or(200);
    let mut tally = Tally::default();
    for seed in first..first + disks {
        println!("disk {seed}");
        let pages = 1 + seed % 3;
        run(seed, pages, seed % 12 == 0, &mut tally);
    }
    let Tally { commits, cuts_in_commits, errors, flushes, states } = tally;
    println!("{commits} commits, {cuts_in_commits} cut, {errors} failed; {flushes} flushes; {states} states");
    assert!(disks < 100 || (commits > 1000 && cuts_in_commits > 500 && errors > 100 && flushes > 1000));
}
