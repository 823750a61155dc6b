//! The executor and the clock.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use async_task::Runnable;

use super::Surroundings;
use super::network::Network;
use super::process::{Kill, Mortal, ProcessId};
use crate::uring::Task;
use crate::uring::reactor;

/// More polls than this without time passing are a task that spins.
const MAX_POLLS_AT_ONCE: u64 = 2_000_000;

thread_local! {
    static CURRENT: RefCell<Option<Rc<Inner>>> = const { RefCell::new(None) };
}

/// Tasks that can go on, by their number: the order in which they were woken does not count.
type Ready = Arc<Mutex<BTreeMap<u64, Runnable>>>;

/// A world. Clones are the same.
#[derive(Clone)]
pub struct World {
    inner: Rc<Inner>,
}

/// A task that has not ended: whose it is, and how to end it.
type Living = (ProcessId, Rc<dyn Kill>);

pub(super) struct Inner {
    start: Instant,
    elapsed: Cell<Duration>,
    pub(super) surroundings: Rc<dyn Surroundings>,
    pub(super) network: Network,
    ready: Ready,
    timers: RefCell<BTreeMap<(Duration, u64), Waker>>,
    alive: RefCell<BTreeMap<u64, Living>>,
    next: Cell<u64>,
    processes: Cell<u64>,
    pub(super) running: Cell<ProcessId>,
}

/// Why a world came to a halt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stuck {
    /// Nothing will ever happen again, and the main task is not done.
    Asleep,
    /// It goes on and on, and no time passes.
    Spinning,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Asleep => "nothing will ever happen again",
            Self::Spinning => "tasks wake each other for ever, and no time passes",
        })
    }
}

/// What there is in a world.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Tasks that have not ended.
    pub tasks: usize,
    /// Tasks that sleep.
    pub timers: usize,
    /// Connections that one side at least still holds.
    pub connections: usize,
    /// Bytes sent and not received.
    pub bytes: usize,
}

impl World {
    /// An empty world at time zero.
    pub fn new(surroundings: Rc<dyn Surroundings>) -> Self {
        let inner = Inner {
            start: Instant::now(),
            elapsed: Cell::default(),
            surroundings,
            network: Network::default(),
            ready: Ready::default(),
            timers: RefCell::default(),
            alive: RefCell::default(),
            next: Cell::default(),
            processes: Cell::default(),
            running: Cell::default(),
        };
        Self { inner: Rc::new(inner) }
    }

    /// Runs `main` and all that it starts until it ends. What is left then stays, for the next one.
    pub fn block_on<T: 'static>(&self, main: impl Future<Output = T> + 'static) -> Result<T, Stuck> {
        let _inside = Inside::enter(&self.inner);
        let mut main = std::pin::pin!(spawn(main));
        let mut polls = 0;
        loop {
            if let Poll::Ready(value) = main.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return Ok(value);
            }
            if self.inner.run_one() {
                polls += 1;
                if polls > MAX_POLLS_AT_ONCE {
                    return Err(Stuck::Spinning);
                }
                continue;
            }
            polls = 0;
            if !self.inner.move_clock() {
                return Err(Stuck::Asleep);
            }
        }
    }

    /// The network.
    pub fn network(&self) -> &Network {
        &self.inner.network
    }

    /// When its time began.
    pub fn start(&self) -> Instant {
        self.inner.start
    }

    /// A new process that runs `future`, and whatever that starts.
    pub fn start_process<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> (ProcessId, Task<T>) {
        let process = ProcessId(self.inner.processes.get() + 1);
        self.inner.processes.set(process.0);
        (process, self.inner.spawn(process, future))
    }

    /// Ends a process at once: none of its tasks runs again, and what they own goes. Not from one of its own tasks.
    pub fn kill(&self, process: ProcessId) {
        assert_ne!(self.inner.running.get(), process, "a process does not kill itself");
        let theirs = |(number, (owner, task)): (&u64, &(ProcessId, Rc<dyn Kill>))| {
            (*owner == process).then(|| (*number, task.clone()))
        };
        let dying: Vec<_> = self.inner.alive.borrow().iter().filter_map(theirs).collect();
        for (number, task) in dying {
            self.inner.gone(number);
            task.kill();
        }
    }

    /// Ends all processes and breaks all connections: tasks hold the world that holds them.
    pub fn end(&self) {
        let all = std::mem::take(&mut *self.inner.alive.borrow_mut());
        all.values().for_each(|(_, task)| task.kill());
        self.inner.network.end();
        let timers = std::mem::take(&mut *self.inner.timers.borrow_mut());
        drop(timers);
        // Those that go may wake others.
        while !self.inner.lock().is_empty() {
            let ready = std::mem::take(&mut *self.inner.lock());
            drop(ready);
        }
    }

    /// Tasks of a process.
    pub fn tasks_of(&self, process: ProcessId) -> usize {
        self.inner.alive.borrow().values().filter(|(owner, _)| *owner == process).count()
    }

    /// Starts a task in a process that is there.
    pub fn spawn_in<T: 'static>(&self, process: ProcessId, future: impl Future<Output = T> + 'static) -> Task<T> {
        self.inner.spawn(process, future)
    }

    /// What there is.
    pub fn census(&self) -> Census {
        let (connections, bytes) = self.inner.network.count();
        let (tasks, timers) = (self.inner.alive.borrow().len(), self.inner.timers.borrow().len());
        Census { tasks, timers, connections, bytes }
    }
}

/// This thread is in a world, until this is dropped; also by a panic of a task.
struct Inside {
    before: Option<Rc<Inner>>,
    world: Rc<Inner>,
}

impl Inside {
    fn enter(world: &Rc<Inner>) -> Self {
        let before = CURRENT.with(|current| current.replace(Some(world.clone())));
        Self { before, world: world.clone() }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.world.running.set(ProcessId::default());
        let world = CURRENT.with(|current| current.replace(self.before.take()));
        drop(world);
    }
}

impl Inner {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Runnable>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run_one(&self) -> bool {
        let mut ready = self.lock();
        if ready.is_empty() {
            return false;
        }
        let index = self.surroundings.below(ready.len() as u64) as usize;
        let number = *ready.keys().nth(index).expect("the index is below the length");
        let task = ready.remove(&number);
        drop(ready);
        if let Some(task) = task {
            task.run();
        }
        true
    }

    /// To the next timer. False: there is none.
    fn move_clock(&self) -> bool {
        let Some((&(at, _), _)) = self.timers.borrow().first_key_value() else { return false };
        self.elapsed.set(at.max(self.elapsed.get()));
        loop {
            let mut timers = self.timers.borrow_mut();
            let Some(entry) = timers.first_entry().filter(|entry| entry.key().0 <= at) else { return true };
            let waker = entry.remove();
            drop(timers);
            waker.wake();
        }
    }

    fn fresh_number(&self) -> u64 {
        self.next.set(self.next.get() + 1);
        self.next.get()
    }

    fn spawn<T: 'static>(self: &Rc<Self>, process: ProcessId, future: impl Future<Output = T> + 'static) -> Task<T> {
        let number = self.fresh_number();
        let future = Mortal::new(self.clone(), number, process, future);
        let ready = self.ready.clone();
        let schedule = move |runnable| {
            ready.lock().unwrap_or_else(PoisonError::into_inner).insert(number, runnable);
        };
        let (runnable, task) = async_task::spawn_local(future, schedule);
        runnable.schedule();
        task
    }

    pub(super) fn born(&self, number: u64, process: ProcessId, task: Rc<dyn Kill>) {
        self.alive.borrow_mut().insert(number, (process, task));
    }

    pub(super) fn gone(&self, number: u64) {
        let was = self.alive.borrow_mut().remove(&number);
        drop(was);
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.elapsed.get()
    }
}

/// The world that this thread is in, if it is in one.
pub(super) fn current() -> Option<Rc<Inner>> {
    CURRENT.with(|current| current.borrow().clone())
}

/// The time.
pub fn now() -> Instant {
    current().map_or_else(Instant::now, |world| world.start + world.elapsed.get())
}

/// A number below `n`.
pub fn lot(n: u32) -> u32 {
    current().map_or(0, |world| world.surroundings.below(u64::from(n)) as u32)
}

/// Starts a task in this thread's world, or on its reactor.
pub fn spawn<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    match current() {
        Some(world) => world.spawn(world.running.get(), future),
        None => reactor::spawn(future),
    }
}

/// Waits for `duration`.
pub async fn sleep(duration: Duration) {
    match current() {
        Some(world) => sleep_until(world.clone(), world.elapsed.get() + duration).await,
        None => reactor::sleep(duration).await,
    }
}

pub(super) async fn sleep_until(world: Rc<Inner>, at: Duration) {
    Sleep { at, begun: false, key: None, world }.await;
}

struct Sleep {
    at: Duration,
    /// As in a ring, also a sleep of no length lets others go first.
    begun: bool,
    key: Option<(Duration, u64)>,
    world: Rc<Inner>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.forget();
        if self.begun && self.world.elapsed.get() >= self.at {
            return Poll::Ready(());
        }
        let key = (self.at, self.world.fresh_number());
        self.world.timers.borrow_mut().insert(key, context.waker().clone());
        (self.key, self.begun) = (Some(key), true);
        Poll::Pending
    }
}

impl Sleep {
    fn forget(&mut self) {
        if let Some(key) = self.key.take() {
            // What it wakes may go with it, and have timers of its own.
            let waker = self.world.timers.borrow_mut().remove(&key);
            drop(waker);
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.forget();
    }
}
