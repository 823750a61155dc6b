//! Looking out for a moment before going to sleep.
//!
//! To sleep and to be woken costs more than a small request: under a hypervisor, tens of microseconds each time. A
//! guest with one request in flight sends the next one sooner than that. So a thread that was woken soon after it
//! fell asleep stays awake that long the next time; one that slept longer does not (the rule is that of KVM's halt
//! polling). Only threads that a guest waits for do this: others would take processors from them. A thread with many
//! requests in flight sleeps: while it does, more of them come, and are done together.

use std::cell::Cell;
use std::time::Duration;

/// Longest time awake for nothing. About two wake-ups in a virtual machine, ours and that of who asks us.
const MAX_WINDOW: Duration = Duration::from_micros(50);
/// More tasks than this since the last wait are a batch.
const MAX_TASKS: usize = 4;

/// What one thread learnt about its waits.
#[derive(Debug)]
pub(super) struct Lookout {
    window: Cell<Duration>,
}

impl Lookout {
    /// `None` on a single processor: whoever is waited for could not run meanwhile.
    pub(super) fn new() -> Option<Self> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        (processors > 1).then(|| Self { window: Cell::default() })
    }

    /// How long to stay awake, after that many tasks were run.
    pub(super) fn window(&self, tasks: usize) -> Duration {
        if tasks <= MAX_TASKS { self.window.get() } else { Duration::ZERO }
    }

    /// After a wait that took that long in all.
    pub(super) fn learn(&self, waited: Duration) {
        self.window.set(if waited <= MAX_WINDOW { MAX_WINDOW } else { Duration::ZERO });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_waits_are_spent_awake_and_long_ones_are_not() {
        let lookout = Lookout { window: Cell::default() };
        assert_eq!(lookout.window(1), Duration::ZERO, "nothing is known yet");
        lookout.learn(MAX_WINDOW);
        assert_eq!(lookout.window(1), MAX_WINDOW);
        assert_eq!(lookout.window(MAX_TASKS + 1), Duration::ZERO, "a batch");
        lookout.learn(Duration::from_millis(1));
        assert_eq!(lookout.window(1), Duration::ZERO);
    }
}
