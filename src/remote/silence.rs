//! Since when a source has said nothing although something is asked of it, on whichever of its connections.
//!
//! A connection may break and hand its requests on to the next, which then has been asked only just now; whoever waits
//! for their answers has waited all the while.

use std::cell::Cell;
use std::time::Instant;

/// What is asked of a source, and when it was heard.
#[derive(Debug)]
pub(super) struct Silence {
    /// Requests that were handed to a connection and are not answered yet.
    asking: Cell<usize>,
    /// When the first of them was made, of those that are left without a pause.
    asked: Cell<Instant>,
    heard: Cell<Instant>,
    received_bytes: Cell<u64>,
}

/// A request, until it is answered or nobody asks any more.
pub(super) struct Asking<'a>(&'a Silence);

impl Silence {
    pub(super) fn new(now: Instant) -> Self {
        Self { asking: Cell::new(0), asked: Cell::new(now), heard: Cell::new(now), received_bytes: Cell::new(0) }
    }

    /// A request is made.
    pub(super) fn ask(&self, now: Instant) -> Asking<'_> {
        if self.asking.replace(self.asking.get() + 1) == 0 {
            self.asked.set(now);
        }
        Asking(self)
    }

    /// The source was heard then.
    pub(super) fn hear(&self, when: Instant) {
        self.heard.set(self.heard.get().max(when));
    }

    /// So many bytes have come in all, handshakes included.
    pub(super) fn count(&self, received_bytes: u64, now: Instant) {
        if self.received_bytes.replace(received_bytes) != received_bytes {
            self.hear(now);
        }
    }

    /// Since when it has said nothing; `None`: nothing is asked of it.
    pub(super) fn since(&self) -> Option<Instant> {
        (self.asking.get() > 0).then(|| self.heard.get().max(self.asked.get()))
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.asking.set(self.0.asking.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn silence_begins_with_what_is_asked_and_ends_with_what_is_heard() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let silence = Silence::new(start);
        assert_eq!(silence.since(), None, "nothing is asked");
        let first = silence.ask(at(10));
        assert_eq!(silence.since(), Some(at(10)), "nobody could have answered before that");
        let second = silence.ask(at(20));
        drop(first);
        assert_eq!(silence.since(), Some(at(10)), "somebody has been asking all the while");
        silence.count(100, at(30));
        assert_eq!(silence.since(), Some(at(30)));
        silence.count(100, at(40));
        silence.hear(at(25));
        assert_eq!(silence.since(), Some(at(30)), "nothing new");
        drop(second);
        assert_eq!(silence.since(), None);
        let _third = silence.ask(at(50));
        assert_eq!(silence.since(), Some(at(50)));
    }
}
