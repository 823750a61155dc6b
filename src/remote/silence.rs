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
    /// The same on a connection that serves requests: one that is being made is no answer to them.
    heard_in_service: Cell<Instant>,
    greeted_bytes: Cell<u64>,
}

/// A request, until it is answered or nobody asks any more.
pub(super) struct Asking<'a>(&'a Silence);

impl Silence {
    pub(super) fn new(now: Instant) -> Self {
        let now = || Cell::new(now);
        Self { asking: Cell::new(0), asked: now(), heard: now(), heard_in_service: now(), greeted_bytes: Cell::new(0) }
    }

    /// A request is made.
    pub(super) fn ask(&self, now: Instant) -> Asking<'_> {
        if self.asking.replace(self.asking.get() + 1) == 0 {
            self.asked.set(now);
        }
        Asking(self)
    }

    /// The source was heard then on a connection that serves requests.
    pub(super) fn hear(&self, when: Instant) {
        self.heard_in_service.set(self.heard_in_service.get().max(when));
        self.heard.set(self.heard.get().max(when));
    }

    /// So many bytes have come in all handshakes together.
    pub(super) fn count(&self, greeted_bytes: u64, now: Instant) {
        if self.greeted_bytes.replace(greeted_bytes) != greeted_bytes {
            self.heard.set(self.heard.get().max(now));
        }
    }

    /// Since when it has said nothing; `None`: nothing is asked of it.
    pub(super) fn since(&self) -> Option<Instant> {
        (self.asking.get() > 0).then(|| self.heard.get().max(self.asked.get()))
    }

    /// Since when a source is lost whose loss is noticed now, or that was silent since then on its last connection:
    /// whoever waited in silence before has waited already, if it was silent on all of them.
    pub(super) fn lost_since(&self, noticed: Instant) -> Instant {
        noticed.min(self.since().unwrap_or(noticed)).max(self.heard_in_service.get())
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

    #[test]
    fn a_loss_dates_from_what_was_heard_last_where_it_could_have_been_answered() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let silence = Silence::new(start);
        assert_eq!(silence.lost_since(at(10)), at(10), "nobody waited");
        let _asking = silence.ask(at(20));
        assert_eq!(silence.lost_since(at(30)), at(20));
        silence.hear(at(25));
        assert_eq!(silence.lost_since(at(22)), at(25), "another connection was heard after the one that ended last");
        silence.count(1, at(28));
        assert_eq!(silence.lost_since(at(25)), at(25), "a handshake answers nobody");
        assert_eq!(silence.lost_since(at(35)), at(28), "but something was there");
    }
}
