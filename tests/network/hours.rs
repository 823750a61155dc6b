//! A day of one device: guests, a link that breaks, a source that is restarted. Nothing grows.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::Duration;

use blkferry::device::Mode;
use blkferry::remote::OnLoss;
use blkferry::uring::simulation::Census;
use blkferry::uring::sleep;

use crate::case::Rig;
use crate::check::Violation;
use crate::history::History;
use crate::memory::{allocated_bytes, descriptors_in, files_in};
use crate::rng::Rng;
use crate::search::{from_env, without_panic};
use crate::setup::Setup;
use crate::stamp::{SECTOR, Stamp};

/// So often the guests pause, and everything is counted.
const COUNT_PERIOD: Duration = Duration::from_secs(1800);
/// Longest time between two troubles.
const PEACE_S: u64 = 400;
/// Tables keep the room that they once needed: so much more may be in use than at the first count that is compared.
const SLACK_BYTES: i64 = 128 << 10;
/// Links that break or fall silent, a source that is slow, far, restarted, or says that it goes; another policy.
const KINDS: [u64; 12] = [0, 1, 2, 3, 4, 5, 7, 7, 9, 11, 15, 16];

/// What is in use at a quiet moment.
#[derive(Clone, Copy, Debug)]
struct Used {
    allocated: i64,
    descriptors: usize,
    files: usize,
    tasks: (usize, usize),
    open: usize,
    held: (usize, usize),
    census: Census,
}

impl Rig {
    fn used(&self) -> Used {
        let device = self.machine.device().expect("it is not killed in these hours");
        Used {
            allocated: allocated_bytes(),
            descriptors: descriptors_in(self.machine.path()),
            files: files_in(self.machine.path()),
            tasks: (self.machine.tasks(&self.world), self.source.tasks(&self.world)),
            open: device.core.open_requests(),
            held: device.held(),
            census: self.world.census(),
        }
    }

    /// The guests pause and the weather clears up until nothing is under way; then what stands in the cache is compared,
    /// and everything is counted.
    async fn pause_and_count(self: &Rc<Self>) -> Used {
        self.guests.paused.set(true);
        self.troubles.clear_up();
        self.machine.policy.set(OnLoss::Wait);
        self.judge.set_policy(OnLoss::Wait);
        let device = self.machine.device().expect("it is not killed in these hours");
        let hydration = &device.core.hydration;
        hydration.set_mode(Mode::Off);
        let is_quiet = || self.judge.open() == 0 && self.troubles.dying.get() == 0;
        let quiet = self.wait_for(Duration::from_secs(300), is_quiet).await;
        self.demand("liveness", quiet, || format!("{} operations wait still", self.judge.open()));
        // Complaints of the server are summed up for a minute; silence is noticed before that.
        sleep(Duration::from_secs(70)).await;
        self.compare_cache();
        let used = self.used();
        hydration.set_mode(self.setup.mode);
        self.guests.paused.set(false);
        used
    }

    /// What stands in the cache is what was written, or the source's; the history begins anew with it.
    fn compare_cache(&self) {
        let file = File::open(self.machine.path().join("cache")).expect("the cache is there");
        let device = self.machine.device().expect("it is not killed in these hours");
        let (begin, end) = (self.judge.tick(), self.judge.tick());
        let mut stamps: Vec<Stamp> = Vec::new();
        for block in 0..self.setup.blocks {
            let first = block * self.setup.block_bytes / SECTOR;
            let sectors = first..first + self.setup.block_bytes / SECTOR;
            if !device.core.maps().is_present(block) {
                stamps.extend(sectors.map(Stamp::source));
                continue;
            }
            let mut bytes = vec![0; self.setup.block_bytes as usize];
            file.read_exact_at(&mut bytes, block * self.setup.block_bytes).expect("a present block can be read");
            for (sector, bytes) in sectors.zip(bytes.chunks(SECTOR as usize)) {
                match self.setup.stamp_of(sector, bytes) {
                    Ok(stamp) => {
                        self.judge.check(self.judge.history.borrow_mut().read(sector, stamp, begin, end));
                        stamps.push(stamp);
                    }
                    Err(what) => self.judge.broken("data", format!("in the cache: {what}")),
                }
            }
        }
        self.judge.forget();
        self.weather.forget_all_but(&self.world.network().connections());
        *self.judge.history.borrow_mut() = History::new(std::iter::empty());
        stamps.shrink_to_fit();
        *self.judge.history.borrow_mut() = History::new(stamps.into_iter());
    }

    async fn live_for(self: &Rc<Self>, duration: Duration) -> Vec<Used> {
        let (mut counts, mut step, rng) = (Vec::new(), 0, &mut Rng::new(self.setup.seed, u64::MAX - 3));
        while self.judge.now() < duration && !self.judge.is_over() {
            let until = self.judge.now() + COUNT_PERIOD;
            while self.judge.now() < until && !self.judge.is_over() {
                let place = self.judge.now().as_secs() * 1000 / duration.as_secs().max(1);
                self.guests.near.set(Some(place.min(999)));
                sleep(Duration::from_secs(rng.below(PEACE_S))).await;
                self.troubles.step(step).await;
                step += 1;
            }
            let used = self.pause_and_count().await;
            println!("{:>6.1} h  {used:?}", self.judge.now().as_secs_f64() / 3600.0);
            counts.push(used);
        }
        self.judge.count(|stats| stats.simulated_s = self.judge.now().as_secs());
        counts
    }
}

fn setup() -> Setup {
    let seed = from_env("BLKFERRY_NETWORK_FIRST").unwrap_or(1);
    let mut setup = Setup::random(seed);
    setup.block_bytes = 4096;
    setup.set_blocks(16 << 10);
    (setup.single, setup.policy, setup.guests, setup.think_ms) = (false, OnLoss::Wait, 3, 400);
    // So slow that it is not done within a day; it takes part all the same.
    setup.mode = Mode::Rate(500);
    (setup.writes, setup.delay_us, setup.piece) = (20, (50, 2000), 64 << 10);
    setup.kinds = KINDS.to_vec();
    setup
}

#[test]
fn hours_of_one_device_grow_nothing() {
    let hours = from_env("BLKFERRY_NETWORK_HOURS").unwrap_or(2);
    let rig = Rc::new(Rig::new(setup(), false));
    let main = rig.clone();
    let mut counts = Vec::new();
    let result = without_panic(|| {
        let lived = rig.world.block_on(async move {
            main.begin().await;
            main.live_for(Duration::from_secs(hours * 3600)).await
        });
        counts = lived.map_err(|stuck| Violation { rule: "no halt", what: stuck.to_string() })?;
        Ok(())
    });
    let outcome = rig.close(result);
    println!("{:#?}", outcome.stats);
    if let Err(violation) = outcome.checked {
        panic!("{violation}");
    }
    // Before the first one, tables found their size.
    let first = counts[0];
    for used in &counts[1..] {
        // Less when all blocks have come, and the source is left alone.
        let all = |used: &Used| {
            let Census { tasks, timers, connections, bytes } = used.census;
            let (device, source) = used.tasks;
            [device, source, tasks, timers, connections, bytes, used.descriptors, used.files]
        };
        let grown = all(used).into_iter().zip(all(&first)).any(|(now, then)| now > then);
        assert!(!grown, "something has grown: {first:?}, later {used:?}");
        assert_eq!((used.open, used.held), (0, (0, 0)), "requests, and buffers");
        assert!(used.allocated <= first.allocated + SLACK_BYTES, "{first:?}, later {used:?}");
    }
    assert!(counts.len() as u64 >= hours, "{} counts in {hours} hours", counts.len());
}
