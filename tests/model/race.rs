//! The one thing that the simulator cannot do, because it has one thread: two of them at the maps at once.

use std::sync::atomic::{AtomicU64, Ordering};

use blkferry::engine::{BlockRun, Geometry, Maps, PAGE_BLOCKS};

const PAGES: u64 = 1000;
const ROUNDS: u64 = 50;

/// Whoever sees a bit is told that it is not committed, before any commit has run. (A frontend that is told
/// otherwise answers a FUA write whose bits are not durable.) Each page is tried once a round, as the
/// flag of a page is set only once.
#[test]
fn a_bit_that_is_seen_is_not_committed_before_a_commit() {
    let geometry = Geometry::new(PAGES * PAGE_BLOCKS * 4096, 4096).expect("a valid size");
    let mut wrong = 0;
    for _ in 0..ROUNDS {
        let maps = Maps::in_memory(geometry);
        // The marker waits for the one who looks, so that they meet at every page.
        let looking_at = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| (0..PAGES).for_each(|page| mark(&maps, page, &looking_at)));
            wrong += (0..PAGES).filter(|&page| look(&maps, page, &looking_at)).count();
        });
    }
    assert_eq!(wrong, 0, "of {}", PAGES * ROUNDS);
}

fn first_block(page: u64) -> BlockRun {
    BlockRun::new(page * PAGE_BLOCKS, page * PAGE_BLOCKS + 1)
}

fn mark(maps: &Maps, page: u64, looking_at: &AtomicU64) {
    while looking_at.load(Ordering::Acquire) < page {
        std::hint::spin_loop();
    }
    maps.mark_dirty(first_block(page));
}

fn look(maps: &Maps, page: u64, looking_at: &AtomicU64) -> bool {
    looking_at.store(page, Ordering::Release);
    while !maps.any_dirty(first_block(page)) {
        std::hint::spin_loop();
    }
    maps.is_committed(first_block(page))
}
