//! One thread's ring, its slab of operations, and its tasks.

use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use async_task::Runnable;
use crossbeam::queue::SegQueue;
use io_uring::{IoUring, opcode, squeue, types};
use nix::sys::eventfd::{EfdFlags, EventFd};
use slab::Slab;

use super::idle::Lookout;
use super::probe::{UringError, uring_error};

/// Submission queue entries of a ring; a full queue is submitted and refilled, so this bounds a batch only.
const SQ_ENTRIES: u32 = 256;
/// Completion queue entries: room for a burst of everything that may be in flight.
const CQ_ENTRIES: u32 = 8192;
/// Tasks run between two looks at the completion queue, so that a busy task list cannot starve I/O.
const TASKS_PER_TURN: usize = 256;
/// io_uring_enter(2): let the kernel complete what it can. Without it, it only takes submissions.
const IORING_ENTER_GETEVENTS: u32 = 1;
/// `user_data` of cancel requests, whose completion nobody waits for.
const NOBODY: u64 = u64::MAX;

/// A handle to a spawned task. Dropping it cancels the task; [`async_task::Task::detach`] lets it run.
pub type Task<T> = async_task::Task<T>;

thread_local! {
    static CURRENT: RefCell<Option<Rc<Inner>>> = const { RefCell::new(None) };
}

enum OpState {
    Waiting {
        waker: Option<Waker>,
        resource: Box<dyn Any>,
    },
    Done {
        result: i32,
        resource: Box<dyn Any>,
    },
    /// The future went away; the resource stays until the kernel is done with it.
    Orphan {
        _resource: Box<dyn Any>,
    },
}

/// What other threads may touch: the run queue and the bell that ends a wait in the kernel.
struct Shared {
    owner: ThreadId,
    ready: SegQueue<Runnable>,
    bell: EventFd,
    rung: AtomicBool,
}

impl Shared {
    fn schedule(&self, runnable: Runnable) {
        self.ready.push(runnable);
        if std::thread::current().id() != self.owner && !self.rung.swap(true, Ordering::AcqRel) {
            // An eventfd write fails only at u64::MAX, which one outstanding ring cannot reach.
            let _ = self.bell.write(1);
        }
    }
}

struct Inner {
    ring: RefCell<IoUring>,
    ops: RefCell<Slab<OpState>>,
    shared: Arc<Shared>,
    lookout: Option<Lookout>,
}

/// One thread's event loop on its own ring.
pub struct Reactor {
    inner: Rc<Inner>,
    /// Listens to the bell from the first main task on, for as long as the reactor lives. Were there one listener after
    /// the other, the former's read, not cancelled yet, could take the ring that the next one waits for.
    bell: RefCell<Option<Task<()>>>,
}

impl Reactor {
    /// A ring for this thread. Fails where the kernel has no io_uring or forbids it, and says which sysctl does.
    pub fn new() -> Result<Self, UringError> {
        Self::with(None)
    }

    /// The same for a thread that a guest waits for: between requests that follow each other closely, it stays awake.
    pub fn watchful() -> Result<Self, UringError> {
        Self::with(Lookout::new())
    }

    fn with(lookout: Option<Lookout>) -> Result<Self, UringError> {
        let ring = build_ring().map_err(uring_error)?;
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).map_err(|e| uring_error(e.into()))?;
        let shared = Arc::new(Shared {
            owner: std::thread::current().id(),
            ready: SegQueue::new(),
            bell,
            rung: AtomicBool::new(false),
        });
        let (ring, ops) = (RefCell::new(ring), RefCell::default());
        let inner = Rc::new(Inner { ring, ops, shared, lookout });
        Ok(Self { inner, bell: RefCell::default() })
    }

    /// Runs `main` and everything that it spawned on this thread until `main` ends.
    /// Tasks still running then are dropped with the reactor.
    pub fn block_on<T: 'static>(&self, main: impl Future<Output = T> + 'static) -> io::Result<T> {
        CURRENT.with(|c| *c.borrow_mut() = Some(self.inner.clone()));
        self.bell.borrow_mut().get_or_insert_with(|| spawn(listen_to_bell(self.inner.shared.clone())));
        let mut main = std::pin::pin!(spawn(main));
        let result = loop {
            let tasks = self.inner.run_ready();
            // Looked at after every round of tasks and before every wait, so that it needs no waker.
            let mut context = Context::from_waker(Waker::noop());
            if let Poll::Ready(value) = main.as_mut().poll(&mut context) {
                break Ok(value);
            }
            if let Err(e) = self.inner.turn(tasks) {
                break Err(e);
            }
        };
        CURRENT.with(|c| *c.borrow_mut() = None);
        result
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        drop(self.bell.take());
        self.inner.drain();
    }
}

fn build_ring() -> io::Result<IoUring> {
    let mut best = IoUring::builder();
    best.setup_cqsize(CQ_ENTRIES).setup_clamp().setup_submit_all();
    best.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    match best.build(SQ_ENTRIES) {
        // Linux 6.0 has no DEFER_TASKRUN.
        Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) => {
            let mut plain = IoUring::builder();
            plain.setup_cqsize(CQ_ENTRIES).setup_clamp().setup_coop_taskrun().setup_taskrun_flag();
            plain.build(SQ_ENTRIES)
        }
        other => other,
    }
}

impl Inner {
    /// How many tasks it was.
    fn run_ready(&self) -> usize {
        for tasks in 0..TASKS_PER_TURN {
            match self.shared.ready.pop() {
                Some(task) => task.run(),
                None => return tasks,
            };
        }
        TASKS_PER_TURN
    }

    /// Submits what the tasks queued, and waits for a completion if there is nothing to run.
    fn turn(&self, tasks: usize) -> io::Result<()> {
        if self.shared.ready.is_empty() {
            self.wait(tasks)?;
        } else if self.has_news() || !self.ring.borrow_mut().submission().is_empty() {
            self.enter(0)?;
        }
        self.reap();
        Ok(())
    }

    fn wait(&self, tasks: usize) -> io::Result<()> {
        let Some(lookout) = &self.lookout else { return self.enter(1) };
        let before = Instant::now();
        let window = lookout.window(tasks);
        if !window.is_zero() {
            self.enter(0)?;
            while !self.has_news() && self.shared.ready.is_empty() && before.elapsed() < window {
                std::hint::spin_loop();
            }
        }
        let want = u32::from(self.shared.ready.is_empty() && self.ring.borrow_mut().completion().is_empty());
        self.enter(want)?;
        lookout.learn(before.elapsed());
        Ok(())
    }

    /// Has the kernel completions, or work that will become some when it is entered?
    fn has_news(&self) -> bool {
        let mut ring = self.ring.borrow_mut();
        ring.submission().taskrun() || !ring.completion().is_empty()
    }

    /// Hands over what is queued, lets the kernel do its share of this thread's work, and waits for `want`
    /// completions.
    fn enter(&self, want: u32) -> io::Result<()> {
        let mut ring = self.ring.borrow_mut();
        let queued = ring.submission().len() as u32;
        // SAFETY: the submitter's own parameters: as many entries as are queued, and no argument.
        let outcome = unsafe { ring.submitter().enter::<()>(queued, want, IORING_ENTER_GETEVENTS, None) };
        match outcome {
            Ok(_) => Ok(()),
            // EBUSY: the completion queue overflowed; reaping makes room.
            Err(e) if matches!(e.raw_os_error(), Some(nix::libc::EINTR | nix::libc::EBUSY | nix::libc::EAGAIN)) => {
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    fn reap(&self) {
        loop {
            let mut ring = self.ring.borrow_mut();
            let Some(cqe) = ring.completion().next() else {
                break;
            };
            drop(ring);
            if cqe.user_data() != NOBODY {
                self.complete(cqe.user_data() as usize, cqe.result());
            }
        }
    }

    fn complete(&self, key: usize, result: i32) {
        let mut ops = self.ops.borrow_mut();
        let Some(slot) = ops.get_mut(key) else { return };
        match std::mem::replace(slot, OpState::Done { result, resource: Box::new(()) }) {
            OpState::Waiting { waker, resource } => {
                *slot = OpState::Done { result, resource };
                drop(ops);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            OpState::Orphan { .. } => {
                ops.remove(key);
            }
            OpState::Done { .. } => {
                unreachable!("one completion an operation: no multishot requests are used")
            }
        }
    }

    fn push(&self, entry: &squeue::Entry) {
        loop {
            let mut ring = self.ring.borrow_mut();
            // SAFETY: the entry's pointers and descriptor are owned by the slab entry that its
            // user_data names (see `submit`), which outlives the operation.
            if unsafe { ring.submission().push(entry) }.is_ok() {
                return;
            }
            // The queue is full: hand it to the kernel. An error here comes again from `wait`.
            let _ = ring.submit();
            drop(ring);
        }
    }

    fn cancel(&self, key: usize) {
        self.push(&opcode::AsyncCancel::new(key as u64).build().user_data(NOBODY));
    }

    /// Cancels all operations and waits until the kernel has let go of their memory.
    fn drain(&self) {
        while let Some(task) = self.shared.ready.pop() {
            drop(task);
        }
        let keys: Vec<usize> = self.ops.borrow().iter().map(|(key, _)| key).collect();
        for key in keys {
            self.cancel(key);
        }
        let waiting = |ops: &Slab<OpState>| ops.iter().any(|(_, op)| !matches!(op, OpState::Done { .. }));
        while waiting(&self.ops.borrow()) {
            let done = self.ring.borrow().submit_and_wait(1);
            if done.is_err_and(|e| e.kind() != io::ErrorKind::Interrupted) {
                // The ring is broken: leak the resources rather than free memory under the kernel.
                std::mem::forget(std::mem::take(&mut *self.ops.borrow_mut()));
                return;
            }
            self.reap();
        }
    }
}

fn current() -> Rc<Inner> {
    CURRENT.with(|c| c.borrow().clone()).expect("I/O is only started by tasks of a running reactor")
}

/// Starts a task on this thread's reactor.
pub fn spawn<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    let shared = current().shared.clone();
    let (runnable, task) = async_task::spawn_local(future, move |runnable| shared.schedule(runnable));
    runnable.schedule();
    task
}

/// An operation in flight; resolves to the kernel's result and the resource that it used.
pub(super) struct Op<R: 'static> {
    inner: Rc<Inner>,
    key: Option<usize>,
    resource: PhantomData<R>,
}

impl<R> Unpin for Op<R> {}

/// Queues an operation. `entry` builds the SQE from the resource at its final address.
///
/// # Safety
/// Every pointer and descriptor in the built entry must be owned by `resource` (or be 'static).
pub(super) unsafe fn submit<R: 'static>(resource: R, entry: impl FnOnce(&mut R) -> squeue::Entry) -> Op<R> {
    let inner = current();
    let mut boxed = Box::new(resource);
    let sqe = entry(&mut boxed);
    let key = inner.ops.borrow_mut().insert(OpState::Waiting { waker: None, resource: boxed });
    inner.push(&sqe.user_data(key as u64));
    Op { inner, key: Some(key), resource: PhantomData }
}

impl<R: 'static> Future for Op<R> {
    type Output = (io::Result<u32>, R);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key.expect("a completed operation is not polled again");
        let mut ops = self.inner.ops.borrow_mut();
        match &mut ops[key] {
            OpState::Waiting { waker, .. } => {
                *waker = Some(context.waker().clone());
                Poll::Pending
            }
            OpState::Done { .. } => {
                let OpState::Done { result, resource } = ops.remove(key) else { unreachable!("matched above") };
                drop(ops);
                self.key = None;
                let resource = *resource.downcast::<R>().expect("the slab keeps what this operation put in");
                let result = if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as u32) };
                Poll::Ready((result, resource))
            }
            OpState::Orphan { .. } => unreachable!("an orphan has no future"),
        }
    }
}

impl<R: 'static> Drop for Op<R> {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut ops = self.inner.ops.borrow_mut();
        let slot = &mut ops[key];
        if matches!(slot, OpState::Done { .. }) {
            ops.remove(key);
            return;
        }
        let taken = std::mem::replace(slot, OpState::Orphan { _resource: Box::new(()) });
        if let OpState::Waiting { resource, .. } = taken {
            *slot = OpState::Orphan { _resource: resource };
        }
        drop(ops);
        self.inner.cancel(key);
    }
}

/// Waits for `duration` in the ring.
pub async fn sleep(duration: Duration) {
    let spec = types::Timespec::from(duration);
    // SAFETY: the entry points at the timespec, which the slab entry owns.
    let op = unsafe { submit(spec, |spec| opcode::Timeout::new(spec).build()) };
    op.await.0.ok();
}

async fn listen_to_bell(shared: Arc<Shared>) {
    struct Bell {
        _shared: Arc<Shared>,
        value: [u8; 8],
    }
    loop {
        let fd: RawFd = shared.bell.as_raw_fd();
        let bell = Bell { _shared: shared.clone(), value: [0; 8] };
        // SAFETY: buffer and eventfd are owned by the resource.
        let op = unsafe {
            submit(bell, |b| opcode::Read::new(types::Fd(fd), b.value.as_mut_ptr(), b.value.len() as u32).build())
        };
        let (result, _) = op.await;
        shared.rung.store(false, Ordering::Release);
        if result.is_err_and(|e| e.raw_os_error() == Some(nix::libc::ECANCELED)) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Mailbox;
    use super::*;

    use futures_util::FutureExt;
    use futures_util::future::{Either, select};

    #[test]
    fn tasks_timers_and_mail_from_another_thread() {
        let reactor = Reactor::new().unwrap();
        let mail = Mailbox::<u32>::default();
        let sender = mail.clone();
        let thread = std::thread::spawn(move || (0..1000).for_each(|n| sender.send(n)));
        let sum = reactor
            .block_on(async move {
                let slow = spawn(async {
                    sleep(Duration::from_millis(5)).await;
                    7
                });
                let mut sum = 0;
                for _ in 0..1000 {
                    sum += mail.recv().await;
                }
                sum + slow.await
            })
            .unwrap();
        assert_eq!(sum, 499_500 + 7);
        thread.join().unwrap();
    }

    /// Found by a fuzz target that uses one reactor for all its inputs.
    #[test]
    fn each_of_many_main_tasks_hears_the_other_thread() {
        let reactor = Reactor::new().unwrap();
        let (jobs, to_do) = std::sync::mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let thread = std::thread::spawn(move || to_do.iter().for_each(|job| job()));
        for round in 0..2000 {
            let mail = Mailbox::<u32>::default();
            let sender = mail.clone();
            let job = move || {
                sender.send(1);
                // The main task may be gone by the time of the second one.
                sender.send(2);
            };
            jobs.send(Box::new(job)).unwrap();
            let heard = async move {
                let too_late = sleep(Duration::from_secs(30)).boxed_local();
                matches!(select(mail.recv().boxed_local(), too_late).await, Either::Left(_))
            };
            assert!(reactor.block_on(heard).unwrap(), "main task {round} was not woken");
        }
        drop(jobs);
        thread.join().unwrap();
    }

    #[test]
    fn a_dropped_operation_gives_its_slot_back() {
        let reactor = Reactor::new().unwrap();
        let inner = reactor.inner.clone();
        reactor
            .block_on(async {
                for _ in 0..100 {
                    drop(spawn(sleep(Duration::from_secs(3600))));
                    let waiting = spawn(sleep(Duration::from_secs(3600)));
                    sleep(Duration::from_micros(10)).await;
                    drop(waiting);
                }
                sleep(Duration::from_millis(20)).await;
            })
            .unwrap();
        // What is left is the bell's read and nothing else.
        assert!(inner.ops.borrow().len() <= 1, "{} operations left", inner.ops.borrow().len());
    }
}
