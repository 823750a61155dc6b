//! Backpressure: an amount that is lent out and comes back.

use std::cell::Cell;
use std::rc::Rc;

use event_listener::Event;

/// A bounded amount of something (bytes, requests), shared by the tasks of one thread.
#[derive(Clone, Debug)]
pub struct Budget {
    inner: Rc<Inner>,
}

#[derive(Debug)]
struct Inner {
    limit: usize,
    free: Cell<usize>,
    returned: Event,
}

/// A part of a [`Budget`]; it goes back when this is dropped.
#[derive(Debug)]
pub struct Lent {
    budget: Rc<Inner>,
    amount: usize,
}

impl Budget {
    /// `limit` in all.
    pub fn new(limit: usize) -> Self {
        Self { inner: Rc::new(Inner { limit, free: Cell::new(limit), returned: Event::new() }) }
    }

    /// Takes `amount` if it is there now. More than the limit counts as the limit: one too large waits
    /// until all else is done, rather than for ever.
    pub fn try_take(&self, amount: usize) -> Option<Lent> {
        let amount = amount.min(self.inner.limit);
        let left = self.inner.free.get().checked_sub(amount)?;
        self.inner.free.set(left);
        Some(Lent { budget: self.inner.clone(), amount })
    }

    /// Takes `amount`, waiting for it.
    pub async fn take(&self, amount: usize) -> Lent {
        loop {
            let returned = self.inner.returned.listen();
            if let Some(lent) = self.try_take(amount) {
                return lent;
            }
            returned.await;
        }
    }

    /// How much is lent out.
    #[cfg(feature = "simulation")]
    pub fn lent(&self) -> usize {
        self.inner.limit - self.inner.free.get()
    }

    /// Waits until all is back.
    pub async fn all_back(&self) {
        drop(self.take(self.inner.limit).await);
    }
}

impl Lent {
    /// Gives back what is more than this.
    pub fn keep(&mut self, amount: usize) {
        let rest = self.amount.saturating_sub(amount);
        self.amount -= rest;
        self.budget.give_back(rest);
    }
}

impl Inner {
    fn give_back(&self, amount: usize) {
        self.free.set(self.free.get() + amount);
        self.returned.notify(usize::MAX);
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.budget.give_back(self.amount);
    }
}
