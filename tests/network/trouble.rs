//! What goes wrong: one step after the other, each with a stream of chance of its own, so that steps can be left out.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use blkferry::uring::simulation::{ConnectionId, World};
use blkferry::uring::{sleep, spawn};

use crate::machine::Machine;
use crate::rng::Rng;
use crate::setup::{Setup, random_mode, random_policy};
use crate::source::Source;
use crate::stamp::SECTOR;
use crate::weather::{Door, Weather};

/// Kinds of trouble: see [`Troubles::step`].
const KINDS: u64 = 17;
/// The kernel gives up a connection whose other end acknowledges nothing after this, and a little more.
const DEAD_PEER: Duration = Duration::from_secs(15);

/// Everything that can be troubled.
#[derive(Clone)]
pub struct Troubles {
    pub world: World,
    pub setup: Rc<Setup>,
    pub weather: Rc<Weather>,
    pub source: Rc<Source>,
    pub machine: Rc<Machine>,
    /// Connections that are silent and will break by themselves.
    pub dying: Rc<Cell<usize>>,
}

impl Troubles {
    /// Whatever the step of this number throws. Returns when it is over.
    pub async fn step(&self, step: u64) {
        let rng = &mut Rng::new(self.setup.seed, step);
        sleep(Duration::from_millis(rng.one_of(&[1, 50, 500, 5000, 15_000]))).await;
        let duration = Duration::from_millis(rng.one_of(&[0, 30, 300, 2000, 8000, 20_000, 40_000]));
        let kind = if self.setup.kinds.is_empty() { rng.below(KINDS) } else { rng.one_of(&self.setup.kinds) };
        let judge = &self.weather.judge;
        judge.count(|stats| stats.troubles += 1);
        judge.note(|| format!("trouble {kind} for {duration:?} (step {step})"));
        match kind {
            0 => self.cut_all(rng, duration).await,
            1 => self.one(rng).into_iter().for_each(|id| self.cut(id, rng)),
            2 => self.half_open(duration, rng).await,
            3 => self.one(rng).into_iter().for_each(|id| self.silence(id, rng)),
            4 => {
                self.weather.held_until.set(judge.now() + duration);
                sleep(duration).await;
            }
            5 => self.slow(duration, rng).await,
            6 => {
                self.weather.flips.set(rng.one_of(&[1, 10, 100]));
                judge.excuse(duration);
                sleep(duration).await;
                self.weather.flips.set(0);
            }
            7 => self.restart_source(duration, rng).await,
            8 => self.replace_source(duration).await,
            9 => {
                self.source.mood.shuts_down.set(true);
                sleep(duration).await;
                self.source.mood.shuts_down.set(false);
            }
            10 => self.bad_blocks(duration, rng).await,
            11 => self.set_policy(rng),
            12 => self.set_mode(rng),
            13 => {
                judge.count(|stats| stats.device_kills += 1);
                self.machine.kill(&self.world);
                sleep(duration.min(Duration::from_secs(2))).await;
                self.machine.start(&self.world);
            }
            14 => {
                self.machine.stop(&self.world).await;
                sleep(duration.min(Duration::from_secs(2))).await;
                self.machine.start(&self.world);
            }
            15 => {
                self.source.mood.dawdles.set(Duration::from_millis(rng.one_of(&[500, 5000, 40_000])));
                sleep(duration).await;
                self.source.mood.dawdles.set(Duration::ZERO);
            }
            _ => {
                let before = self.weather.delay.replace(rng.one_of(&[(20_000, 50_000), (1, 900_000)]));
                sleep(duration).await;
                self.weather.delay.set(before);
            }
        }
    }

    /// A good day: the source is there and all is well.
    pub fn clear_up(&self) {
        self.weather.clear_up();
        self.source.mood.dawdles.set(Duration::ZERO);
    }

    fn one(&self, rng: &mut Rng) -> Option<ConnectionId> {
        let all = self.world.network().connections();
        (!all.is_empty()).then(|| rng.one_of(&all))
    }

    /// Both ends learn of it, perhaps not at once.
    fn cut(&self, id: ConnectionId, rng: &mut Rng) {
        for client in [true, false] {
            let delay = Duration::from_micros(rng.one_of(&[0, 0, 10, 1000, 100_000]));
            self.break_later(id, client, delay, io::ErrorKind::ConnectionReset);
        }
    }

    fn break_later(&self, id: ConnectionId, client: bool, delay: Duration, error: io::ErrorKind) {
        if delay.is_zero() {
            return self.world.network().break_end(id, client, error);
        }
        let (world, dying) = (self.world.clone(), self.dying.clone());
        dying.set(dying.get() + 1);
        spawn(async move {
            sleep(delay).await;
            world.network().break_end(id, client, error);
            dying.set(dying.get() - 1);
        })
        .detach();
    }

    async fn cut_all(&self, rng: &mut Rng, duration: Duration) {
        self.weather.door.set(rng.one_of(&[Door::Refuses, Door::Refuses, Door::Dead, Door::Open]));
        self.world.network().connections().into_iter().for_each(|id| self.cut(id, rng));
        sleep(duration).await;
        self.weather.door.set(Door::Open);
    }

    /// Nothing that is sent arrives any more. The kernels notice, or somebody between the two acknowledges it all the
    /// same, and gives up much later.
    fn silence(&self, id: ConnectionId, rng: &mut Rng) {
        self.world.network().fall_silent(id);
        for client in [true, false] {
            let delay = if rng.percent(50) { DEAD_PEER } else { Duration::from_secs(120) };
            let more = Duration::from_millis(rng.between(1, 5000));
            self.break_later(id, client, delay + more, io::ErrorKind::TimedOut);
        }
    }

    async fn half_open(&self, duration: Duration, rng: &mut Rng) {
        self.weather.door.set(Door::Dead);
        self.world.network().connections().into_iter().for_each(|id| self.silence(id, rng));
        sleep(duration).await;
        self.weather.door.set(Door::Open);
    }

    async fn slow(&self, duration: Duration, rng: &mut Rng) {
        self.weather.rate.set(rng.one_of(&[20 << 10, 100 << 10, 1 << 20]));
        sleep(duration).await;
        self.weather.rate.set(u64::MAX);
    }

    async fn restart_source(&self, duration: Duration, rng: &mut Rng) {
        self.weather.judge.count(|stats| stats.source_kills += 1);
        self.source.kill(&self.world);
        if rng.percent(50) {
            self.weather.door.set(Door::Refuses);
        }
        sleep(duration).await;
        self.weather.door.set(Door::Open);
        self.source.start(&self.world, false);
    }

    async fn replace_source(&self, duration: Duration) {
        self.weather.judge.count(|stats| stats.replaced += 1);
        self.source.kill(&self.world);
        self.source.start(&self.world, true);
        sleep(duration).await;
        self.source.kill(&self.world);
        self.source.start(&self.world, false);
    }

    async fn bad_blocks(&self, duration: Duration, rng: &mut Rng) {
        let sectors = self.setup.size_bytes() / SECTOR;
        let start = rng.below(sectors);
        let end = (start + rng.one_of(&[1, 8, 100])).min(sectors);
        self.source.mood.bad.set(Some((start * SECTOR, end * SECTOR)));
        self.weather.judge.excuse(duration);
        sleep(duration).await;
        // What is under way may fail still.
        self.weather.judge.excuse(Duration::from_secs(60));
        self.source.mood.bad.set(None);
    }

    fn set_policy(&self, rng: &mut Rng) {
        let policy = random_policy(rng);
        self.weather.judge.note(|| format!("on-source-loss={policy}"));
        self.machine.policy.set(policy);
        self.weather.judge.set_policy(policy);
    }

    fn set_mode(&self, rng: &mut Rng) {
        self.machine.mode.set(random_mode(rng));
        if let Some(device) = self.machine.device() {
            device.core.hydration.set_mode(self.machine.mode.get());
        }
    }
}
