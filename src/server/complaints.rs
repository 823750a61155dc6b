//! What the log says about clients: each of a few, and of a crowd how many.

use std::cell::Cell;
use std::fmt::Display;
use std::rc::Rc;

use super::{COMPLAINTS, COMPLAINTS_PERIOD};
use crate::uring::{sleep, spawn};

/// A bounded number of lines in each period. Clones count together.
#[derive(Clone)]
pub(super) struct Complaints {
    inner: Rc<Inner>,
}

struct Inner {
    /// Where the clients came from.
    local: String,
    /// A period has begun and not ended.
    running: Cell<bool>,
    said: Cell<u64>,
    left_out: Cell<u64>,
}

impl Complaints {
    pub(super) fn new(local: &str) -> Self {
        let (said, left_out) = (Cell::new(0), Cell::new(0));
        Self { inner: Rc::new(Inner { local: local.to_owned(), running: Cell::new(false), said, left_out }) }
    }

    /// Says it, or counts it.
    pub(super) fn say(&self, what: impl Display) {
        if !self.inner.running.replace(true) {
            let complaints = self.clone();
            spawn(async move {
                sleep(COMPLAINTS_PERIOD).await;
                complaints.conclude();
            })
            .detach();
        }
        if self.inner.said.get() == COMPLAINTS {
            self.inner.left_out.set(self.inner.left_out.get() + 1);
            return;
        }
        self.inner.said.set(self.inner.said.get() + 1);
        log::warn!("{}: {what}", self.inner.local);
    }

    /// Ends the period, and says how much was left out.
    pub(super) fn conclude(&self) {
        self.inner.running.set(false);
        self.inner.said.set(0);
        let left_out = self.inner.left_out.replace(0);
        if left_out > 0 {
            log::warn!("{}: {left_out} more lines like these were left out", self.inner.local);
        }
    }
}
