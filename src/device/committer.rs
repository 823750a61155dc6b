//! The commit thread: the one place that waits for the disk to say "durable".

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::core::Core;
use super::messages::CommitRequest;
use crate::cache::{CacheState, Store, Superblock};
use crate::engine::{Errno, Event};
use crate::uring::now;

/// Bits of merely fetched blocks are committed at this pace.
const COMMIT_PERIOD: Duration = Duration::from_secs(1);

/// The running thread.
pub struct CommitThread {
    handle: JoinHandle<()>,
}

impl CommitThread {
    /// Starts it; it owns the metadata from now on.
    pub(crate) fn start(core: Arc<Core>, store: Store, requests: Receiver<CommitRequest>) -> io::Result<Self> {
        let thread = Thread::new(core, store);
        let run = move || thread.run(&requests);
        Ok(Self { handle: std::thread::Builder::new().name("commit".into()).spawn(run)? })
    }

    /// Commits a last time and ends the thread. An error: the cache was not left in order.
    pub fn stop(self, core: &Core) -> io::Result<()> {
        let (sender, answer) = crossbeam::channel::bounded(1);
        core.request_commit(CommitRequest::Stop(sender));
        let result = answer.recv().unwrap_or_else(|_| Err(io::Error::other("the commit thread died")));
        // It ends right after its answer.
        let _ = self.handle.join();
        result
    }
}

/// What the thread does, and when the next thing is due that nobody asks for.
pub(super) struct Thread {
    core: Arc<Core>,
    store: Store,
    due: Instant,
}

impl Thread {
    pub(super) fn new(core: Arc<Core>, store: Store) -> Self {
        let all_committed = core.maps().absent_count() == 0 && !core.maps().has_uncommitted();
        let state = store.superblock().state;
        if state == CacheState::Complete || (state == CacheState::Away && all_committed) {
            core.health.set_complete();
        }
        Self { core, store, due: now() + COMMIT_PERIOD }
    }

    fn run(mut self, requests: &Receiver<CommitRequest>) {
        loop {
            match requests.recv_deadline(self.look_at_clock()) {
                Ok(request) => {
                    if self.carry_out(request).is_break() {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// By the clock, not by silence: a guest that flushes all the time must not put this off. When to look again.
    pub(super) fn look_at_clock(&mut self) -> Instant {
        if now() >= self.due {
            self.core.apply(Event::CommitDue);
            // In this order: a block that comes in between would be present and not committed.
            if self.core.maps().absent_count() == 0 && !self.core.maps().has_uncommitted() {
                self.record_complete();
            }
            self.due = now() + COMMIT_PERIOD;
        }
        self.due
    }

    /// Break: that was the last one.
    pub(super) fn carry_out(&mut self, request: CommitRequest) -> ControlFlow<()> {
        match request {
            CommitRequest::Commit => {
                let result = self.commit();
                self.core.apply(Event::Committed { result });
                // The last blocks came during this commit: one more, and it is complete.
                if self.core.maps().absent_count() == 0 && !self.core.health.is_complete() {
                    self.due = now();
                }
            }
            CommitRequest::Record { change, answer } => {
                // Whoever asked waits for this.
                let _ = answer.send(self.record(change));
            }
            CommitRequest::Stop(answer) => {
                // Whoever asked waits for this.
                let _ = answer.send(self.stop());
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    fn commit(&mut self) -> Result<(), Errno> {
        // The kernel tells of what it dropped once, and that was it: the next sync would succeed, and its map pages would
        // promise what is gone (I11).
        if self.core.health.has_failed() {
            return Err(Errno::EIO);
        }
        // Before the commit takes its pages: what is present now is what it commits, whatever comes meanwhile.
        let all_here = self.core.maps().absent_count() == 0;
        match self.store.commit(self.core.maps()) {
            Ok(_) => {
                self.core.counters.commits.fetch_add(1, Ordering::Relaxed);
                if all_here {
                    self.record_complete();
                }
                if self.core.health.has_failed() { Err(Errno::EIO) } else { Ok(()) }
            }
            Err(e) => {
                self.fail(&format!("a commit failed: {e}"));
                Err(Errno::from(&e))
            }
        }
    }

    /// What a handoff says must be as durable as what it says it about.
    fn record(&mut self, change: impl FnOnce(&mut Superblock)) -> io::Result<()> {
        if let Some(reason) = self.core.health.failed() {
            return Err(io::Error::other(reason));
        }
        self.store.commit(self.core.maps()).inspect_err(|e| self.fail(&format!("a commit failed: {e}")))?;
        // If this fails it may be on disk or not: nobody can go on from here.
        self.store.record(change).inspect_err(|e| self.fail(&format!("the superblock cannot be written: {e}")))
    }

    fn fail(&self, reason: &str) {
        log::error!("{reason}: the device stops for good; what was not flushed before may be lost");
        self.core.fail(reason.into());
        if let Err(e) = self.store.distrust_live_map() {
            log::error!("the live map cannot be removed: {e}; remove it by hand before the cache is attached again");
        }
    }

    /// The caller has seen all present bits committed: if those are all there are, says so on disk, once.
    fn record_complete(&mut self) {
        let (maps, health) = (self.core.maps(), &self.core.health);
        if health.is_complete() || health.has_failed() || maps.absent_count() > 0 {
            return;
        }
        let recorded = match self.store.superblock().state {
            // One that was given away stays so; that all is here shows in the maps.
            CacheState::Away => Ok(()),
            CacheState::Active | CacheState::Complete => self.store.record_complete(),
            CacheState::Standby | CacheState::Declined => return,
        };
        match recorded {
            Ok(()) => {
                health.set_complete();
                log::info!("complete: all blocks are here and committed, the source is no longer needed");
                self.core.hydration.changed.notify(usize::MAX);
            }
            Err(e) => self.fail(&format!("the superblock cannot be written: {e}")),
        }
    }

    fn stop(&mut self) -> io::Result<()> {
        if let Some(reason) = self.core.health.failed() {
            return Err(io::Error::other(reason));
        }
        self.store.commit(self.core.maps()).inspect_err(|e| self.fail(&format!("the last commit failed: {e}")))?;
        // Nothing runs any more that could set a bit after the commit took its pages.
        self.record_complete();
        self.store.record_clean()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::engine::BlockRun;

    #[test]
    fn after_a_failure_nothing_is_committed_whatever_the_disk_says() {
        let dir = tempfile::tempdir().unwrap();
        let cache = testing::cache(dir.path());
        let mut thread = Thread::new(testing::core(&cache), cache.store);
        assert_eq!(thread.commit(), Ok(()));
        thread.core.adopt(&[BlockRun::new(3, 5)]);
        // As a commit that was made for a handoff does: the engine has not heard of it.
        thread.fail("the disk has dropped something");
        for _ in 0..2 {
            assert_eq!(thread.commit(), Err(Errno::EIO));
            assert!(thread.core.maps().has_uncommitted(), "nothing is promised");
        }
        assert!(thread.record(|_| {}).is_err() && thread.stop().is_err());
    }
}
