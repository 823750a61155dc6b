//! Processes of a simulated world: tasks that die together.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::world::Inner;

/// A process. Tasks belong to that of the task that spawned them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId(pub(super) u64);

/// What a task does, until it is taken away.
type Body<T> = RefCell<Option<Pin<Box<dyn Future<Output = T>>>>>;

/// A future that can be taken away from its task.
pub(super) struct Mortal<T> {
    number: u64,
    process: ProcessId,
    future: Rc<Body<T>>,
    world: Rc<Inner>,
}

/// The means to do so.
pub(super) trait Kill {
    /// Drops the future, and with it all that it owns. Its task never ends then.
    fn kill(&self);
}

impl<T> Kill for Body<T> {
    fn kill(&self) {
        let future = self.borrow_mut().take();
        drop(future);
    }
}

impl<T: 'static> Mortal<T> {
    pub(super) fn new(
        world: Rc<Inner>,
        number: u64,
        process: ProcessId,
        future: impl Future<Output = T> + 'static,
    ) -> Self {
        let future: Pin<Box<dyn Future<Output = T>>> = Box::pin(future);
        let future = Rc::new(RefCell::new(Some(future)));
        world.born(number, process, future.clone());
        Self { number, process, future, world }
    }
}

impl<T> Future for Mortal<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let before = self.world.running.replace(self.process);
        // Whoever is killed by a task of its own process would find itself borrowed here: the dead do not kill.
        let result = match &mut *self.future.borrow_mut() {
            Some(future) => future.as_mut().poll(context),
            None => Poll::Pending,
        };
        self.world.running.set(before);
        result
    }
}

impl<T> Drop for Mortal<T> {
    fn drop(&mut self) {
        self.world.gone(self.number);
    }
}
