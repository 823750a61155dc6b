//! One case from one seed: trouble, then a good day on which everything has to come right.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use blkferry::device::{HydrationState, Mode};
use blkferry::engine::ByteRange;
use blkferry::remote::OnLoss;
use blkferry::uring::simulation::World;
use blkferry::uring::{sleep, spawn};
use futures_util::FutureExt;
use futures_util::future::{Either, select};

use crate::check::{Checked, Violation};
use crate::guest::Guests;
use crate::judge::{Judge, Stats};
use crate::machine::Machine;
use crate::search::without_panic;
use crate::setup::Setup;
use crate::source::Source;
use crate::stamp::SECTOR;
use crate::trouble::Troubles;
use crate::weather::Weather;

/// On a good day all that waits is answered within this: silence is noticed after 30 s, connecting given up after 10 s,
/// the longest pause is 7.5 s, and what comes then crosses a link that may be far.
const LIVENESS: Duration = Duration::from_secs(100);
/// A read of absent blocks takes no longer than this, then.
const PROMPT: Duration = Duration::from_secs(10);
/// Within this, what the network has forgotten is forgotten by the server, too.
const QUIET: Duration = Duration::from_secs(240);
/// No case takes longer than this.
const LIMIT: Duration = Duration::from_secs(2 * 3600);
/// A device that has all: its commits, its queue, and who waits for requests to the source.
const TASKS_OF_DEVICE: usize = 3;
/// A server without clients: who holds it, and who waits for them.
const TASKS_OF_SOURCE: usize = 2;

/// How to run a case.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub seed: u64,
    /// Steps of trouble that are left out.
    pub skipped: Vec<u64>,
    pub trace: bool,
}

/// What is left of a case.
pub struct Outcome {
    pub checked: Checked,
    pub stats: Stats,
    pub trace: Vec<String>,
}

/// A world with everything in it.
pub struct Rig {
    pub world: World,
    pub setup: Rc<Setup>,
    pub judge: Rc<Judge>,
    pub weather: Rc<Weather>,
    pub source: Rc<Source>,
    pub machine: Rc<Machine>,
    pub guests: Rc<Guests>,
    pub troubles: Troubles,
}

impl Rig {
    pub fn new(setup: Setup, trace: bool) -> Self {
        let setup = Rc::new(setup);
        let judge = Rc::new(Judge::new(&setup, trace));
        let weather = Weather::new(setup.seed, judge.clone());
        let world = World::new(weather.clone());
        judge.set_start(world.start());
        weather.delay.set(setup.delay_us);
        weather.piece.set(setup.piece);
        let source = Source::new(setup.clone(), weather.clone());
        let machine = Machine::new(setup.clone(), weather.clone(), judge.clone());
        let guests = Guests::new(world.clone(), setup.clone(), machine.clone(), judge.clone());
        let troubles = Troubles {
            world: world.clone(),
            setup: setup.clone(),
            weather: weather.clone(),
            source: source.clone(),
            machine: machine.clone(),
            dying: Rc::new(Cell::new(0)),
        };
        Self { world, setup, judge, weather, source, machine, guests, troubles }
    }
}

impl Plan {
    pub fn of(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// Runs it. A panic in it is a violation.
    pub fn run(&self) -> Outcome {
        let rig = Rc::new(Rig::new(Setup::random(self.seed), self.trace));
        let (steps, main) = (self.steps(), rig.clone());
        let result = without_panic(|| {
            let result = rig.world.block_on(async move {
                let live = async {
                    main.begin().await;
                    main.go_through(&steps).await;
                    main.good_day().await;
                };
                if let Either::Right(_) = select(live.boxed_local(), sleep(LIMIT).boxed_local()).await {
                    main.judge.broken("no halt", format!("after {LIMIT:?} the case has not come to its end"));
                }
            });
            result.map_err(|stuck| Violation { rule: "no halt", what: stuck.to_string() })
        });
        rig.close(result)
    }

    fn steps(&self) -> Vec<u64> {
        (0..Setup::random(self.seed).steps).filter(|step| !self.skipped.contains(step)).collect()
    }
}

impl Rig {
    /// Runs the world until `main` is over, and takes it apart: for a test of one thing, in which no rule is broken.
    pub fn live<T: 'static>(&self, main: impl Future<Output = T> + 'static) -> T {
        let mut end = None;
        let result = without_panic(|| {
            end = Some(self.world.block_on(main).expect("time goes on"));
            Ok(())
        });
        self.close(result).checked.unwrap();
        end.expect("it came to its end")
    }

    /// Takes the world apart and says how it went.
    pub fn close(&self, result: Checked) -> Outcome {
        let torn_down = without_panic(|| {
            self.machine.kill(&self.world);
            self.world.end();
            Ok(())
        });
        self.judge.count(|stats| stats.cases = 1);
        let checked = self.judge.verdict.borrow_mut().take().map_or(result.and(torn_down), Err);
        let trace = self.judge.trace.as_ref().map(RefCell::take).unwrap_or_default();
        Outcome { checked, stats: self.judge.stats.get(), trace }
    }

    /// The source, the device, its guests, and who looks at them.
    pub async fn begin(self: &Rc<Self>) {
        self.source.start(&self.world, false);
        self.machine.start(&self.world);
        while self.machine.device().is_none() && !self.judge.is_over() {
            sleep(Duration::from_millis(10)).await;
        }
        (0..self.setup.guests).for_each(|number| spawn(self.guests.clone().live(number)).detach());
        let this = self.clone();
        spawn(async move {
            while !this.judge.is_over() {
                sleep(Duration::from_millis(250)).await;
                this.judge.look_for_laggards();
            }
        })
        .detach();
    }

    async fn go_through(self: &Rc<Self>, steps: &[u64]) {
        for step in steps {
            if self.judge.is_over() {
                return;
            }
            self.troubles.step(*step).await;
        }
        sleep(Duration::from_secs(1)).await;
    }

    /// Waits until something is so; false: for too long, or a rule is broken.
    pub async fn wait_for(&self, patience: Duration, mut holds: impl FnMut() -> bool) -> bool {
        let deadline = self.judge.now() + patience;
        while !holds() {
            if self.judge.now() >= deadline || self.judge.is_over() {
                return false;
            }
            sleep(Duration::from_millis(20)).await;
        }
        true
    }

    pub fn demand(&self, rule: &'static str, holds: bool, what: impl FnOnce() -> String) {
        if !holds && !self.judge.is_over() {
            self.judge.broken(rule, what());
        }
    }

    async fn good_day(self: &Rc<Self>) {
        self.troubles.clear_up();
        self.judge.note(|| "the good day begins".into());
        self.set_policy(OnLoss::Wait);
        self.guests.stopped.set(true);
        let is_back = || self.machine.device().is_some_and(|device| device.core.health.lost().is_none());
        let calm = self.wait_for(LIVENESS, || self.judge.open() == 0 && is_back()).await;
        self.demand("liveness", calm, || format!("{} operations wait still after {LIVENESS:?}", self.judge.open()));
        if !self.judge.is_over() {
            self.nothing_sticky().await;
        }
        if !self.judge.is_over() {
            self.all_comes().await;
        }
        if !self.judge.is_over() {
            self.nothing_left().await;
        }
        self.judge.count(|stats| stats.simulated_s = self.judge.now().as_secs());
    }

    fn set_policy(&self, policy: OnLoss) {
        self.machine.policy.set(policy);
        self.judge.set_policy(policy);
    }

    async fn nothing_sticky(&self) {
        self.set_policy(OnLoss::FailAfter(PROMPT));
        for place in 0..4 {
            let start = self.setup.size_bytes() / SECTOR / 4 * place * SECTOR;
            let (Some(device), Some(process)) = (self.machine.device(), self.machine.process()) else { return };
            let begin = self.judge.now();
            let result = self.guests.read(device, process, ByteRange::new(start, SECTOR)).await;
            let took = self.judge.now() - begin;
            self.demand("nothing sticky", result == Some(Ok(())) && took <= PROMPT, || {
                format!("a read at {start} ended with {result:?} after {took:?}, on a good day")
            });
        }
        self.set_policy(OnLoss::Wait);
    }

    pub async fn all_comes(&self) {
        let Some(device) = self.machine.device() else { return };
        self.machine.mode.set(Mode::Auto);
        device.core.hydration.set_mode(Mode::Auto);
        let complete = self.wait_for(LIVENESS, || device.has_hung_up() && device.core.health.is_complete()).await;
        self.demand("liveness", complete, || {
            let (absent, state) = (device.core.maps().absent_count(), device.core.hydration.state());
            format!("{absent} blocks are absent still after {LIVENESS:?}; hydration is {state:?}")
        });
        let state = device.core.hydration.state();
        self.demand("liveness", state == HydrationState::Done, || {
            format!("it is complete, and hydration is {state:?}")
        });
        let Some(process) = self.machine.process() else { return };
        let step = 256 * SECTOR;
        for start in (0..self.setup.size_bytes()).step_by(step as usize) {
            let range = ByteRange { start, end: self.setup.size_bytes().min(start + step) };
            let result = self.guests.read(device.clone(), process, range).await;
            self.demand("data", result == Some(Ok(())), || format!("a read of {range:?} ended with {result:?}"));
        }
    }

    async fn nothing_left(&self) {
        let Some(device) = self.machine.device() else { return };
        let tasks = || (self.machine.tasks(&self.world), self.source.tasks(&self.world));
        let quiet = self.wait_for(QUIET, || {
            let census = self.world.census();
            tasks() == (TASKS_OF_DEVICE, TASKS_OF_SOURCE) && census.connections == 0 && self.troubles.dying.get() == 0
        });
        let quiet = quiet.await;
        self.demand("nothing left", quiet, || {
            format!("{:?} tasks of the device and of the source are left, and {:?}", tasks(), self.world.census())
        });
        let open = device.core.open_requests();
        let waiting = device.core.counters.waiting.load(std::sync::atomic::Ordering::Relaxed);
        self.demand("nothing left", open == 0 && waiting == 0, || format!("{open} requests are open, {waiting} wait"));
        let held = device.held();
        self.demand("nothing left", held == (0, 0), || format!("{} fetches hold {} bytes of buffers", held.0, held.1));
        drop(device);
        self.machine.stop(&self.world).await;
    }
}

/// Runs the case of a seed.
pub fn run_seed(seed: u64) -> Checked<Stats> {
    let outcome = Plan::of(seed).run();
    outcome.checked.map(|()| outcome.stats)
}
