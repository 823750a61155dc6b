//! Who may change the disk now: nobody in standby, the guest while it is ours, nobody once it was given away.
//!
//! Invariant: when [`Gate::freeze`] has returned `Ok`, no change of the guest's is under way and none begins.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use crossbeam::utils::CachePadded;
use event_listener::Event;

use crate::engine::Errno;

/// How the disk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// The source's: reads pass through, nothing is kept.
    Standby,
    /// Ours.
    Active,
    /// Ours, about to be given away.
    Frozen,
    /// Somebody else's.
    Away,
}

const PHASES: [Phase; 4] = [Phase::Standby, Phase::Active, Phase::Frozen, Phase::Away];
/// How often those inside are looked for.
const LOOK_PERIOD: Duration = Duration::from_micros(200);

/// See the module's page.
pub struct Gate {
    phase: AtomicU8,
    /// Changes under way, for each queue.
    inside: Vec<CachePadded<AtomicU64>>,
    moved: Event,
    /// Where a write in standby is reported, if it is to make the device active.
    bell: Option<Sender<()>>,
}

/// A change that is under way.
pub struct Pass<'a>(&'a AtomicU64);

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Gate {
    /// A gate for so many queues. With a `bell`, a write in standby rings it and waits until the gate opens.
    pub fn new(phase: Phase, queues: usize, bell: Option<Sender<()>>) -> Self {
        let inside = (0..queues).map(|_| CachePadded::default()).collect();
        Self { phase: AtomicU8::new(phase as u8), inside, moved: Event::new(), bell }
    }

    /// How the disk stands.
    pub fn phase(&self) -> Phase {
        PHASES[usize::from(self.phase.load(Ordering::SeqCst))]
    }

    /// Rings the bell of standby once more.
    pub fn ring(&self) {
        if let Some(bell) = &self.bell {
            // It has rung already, or rings now.
            let _ = bell.try_send(());
        }
    }

    /// Moves on.
    pub fn set(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::SeqCst);
        self.moved.notify(usize::MAX);
    }

    /// Lets a change in, if the disk is ours.
    pub(super) fn enter(&self, queue: u16) -> Option<Pass<'_>> {
        let inside = &self.inside[usize::from(queue)];
        // First in, then the look: whoever freezes does it the other way round, so that one sees the other.
        inside.fetch_add(1, Ordering::SeqCst);
        let pass = Pass(inside);
        (self.phase() == Phase::Active).then_some(pass)
    }

    /// Those who wait look again, at whether the device has failed.
    pub(super) fn wake(&self) {
        self.moved.notify(usize::MAX);
    }

    /// For one that was not let in: waits until it is worth another try. An error: the disk is not ours to write, or the
    /// device has failed.
    pub(super) async fn wait(&self, has_failed: impl Fn() -> bool) -> Result<(), Errno> {
        let moved = self.moved.listen();
        // Nobody moves on from there.
        if has_failed() {
            return Err(Errno::EIO);
        }
        match (self.phase(), &self.bell) {
            (Phase::Active, _) => {}
            // It may come to nothing, and the guest should not notice.
            (Phase::Frozen, _) => moved.await,
            (Phase::Standby, Some(_)) => {
                self.ring();
                moved.await;
            }
            (Phase::Standby, None) | (Phase::Away, _) => return Err(Errno::EPERM),
        }
        Ok(())
    }

    /// Lets nobody in any more and waits for those inside; after `patience` it is open again, and the error says how
    /// many there were.
    pub fn freeze(&self, patience: Duration) -> Result<(), u64> {
        let deadline = Instant::now() + patience;
        self.set(Phase::Frozen);
        loop {
            let inside: u64 = self.inside.iter().map(|count| count.load(Ordering::SeqCst)).sum();
            if inside == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                self.set(Phase::Active);
                return Err(inside);
            }
            std::thread::sleep(LOOK_PERIOD);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn nobody_is_inside_a_frozen_gate() {
        let gate = Gate::new(Phase::Active, 2, None);
        let pass = gate.enter(1).unwrap();
        assert_eq!(gate.freeze(Duration::ZERO), Err(1));
        assert_eq!(gate.phase(), Phase::Active);
        drop(pass);
        gate.freeze(Duration::ZERO).unwrap();
        assert!(gate.enter(0).is_none());
        let mut waiting = Box::pin(gate.wait(|| false));
        assert_eq!((&mut waiting).now_or_never(), None, "it may come to nothing");
        gate.set(Phase::Active);
        assert_eq!(waiting.now_or_never(), Some(Ok(())));
        assert!(gate.enter(0).is_some());
        gate.set(Phase::Away);
        assert!(gate.enter(0).is_none());
        assert_eq!(gate.wait(|| false).now_or_never(), Some(Err(Errno::EPERM)));
    }

    #[test]
    fn who_waits_is_told_that_nobody_moves_on() {
        let gate = Gate::new(Phase::Active, 1, None);
        gate.freeze(Duration::ZERO).unwrap();
        let failed = std::cell::Cell::new(false);
        let mut waiting = Box::pin(gate.wait(|| failed.get()));
        assert_eq!((&mut waiting).now_or_never(), None);
        failed.set(true);
        gate.wake();
        assert_eq!(waiting.now_or_never(), Some(Ok(())), "it looks again");
        assert!(gate.enter(0).is_none());
        assert_eq!(gate.wait(|| failed.get()).now_or_never(), Some(Err(Errno::EIO)));
    }

    #[test]
    fn freezing_races_with_those_who_enter() {
        for _ in 0..200 {
            let gate = Gate::new(Phase::Active, 1, None);
            let (frozen, seen) = (std::sync::atomic::AtomicBool::new(false), AtomicU64::new(0));
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    while let Some(_pass) = gate.enter(0) {
                        assert!(!frozen.load(Ordering::SeqCst), "inside although frozen");
                        seen.fetch_add(1, Ordering::SeqCst);
                    }
                });
                while seen.load(Ordering::SeqCst) == 0 {}
                gate.freeze(Duration::from_secs(10)).unwrap();
                frozen.store(true, Ordering::SeqCst);
                writer.join().unwrap();
            });
        }
    }

    #[test]
    fn a_write_in_standby_is_refused_or_rings() {
        let gate = Gate::new(Phase::Standby, 1, None);
        assert!(gate.enter(0).is_none());
        assert_eq!(gate.wait(|| false).now_or_never(), Some(Err(Errno::EPERM)));
        let (bell, rung) = crossbeam::channel::bounded(1);
        let gate = Gate::new(Phase::Standby, 1, Some(bell));
        assert!(gate.enter(0).is_none());
        let mut waiting = Box::pin(gate.wait(|| false));
        assert_eq!((&mut waiting).now_or_never(), None);
        assert!(rung.try_recv().is_ok());
        gate.set(Phase::Active);
        assert_eq!(waiting.now_or_never(), Some(Ok(())));
        assert!(gate.enter(0).is_some());
    }
}
