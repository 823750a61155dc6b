//! The background: one step after the other, as the engine plans them, at the pace that the user set.

use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{Either, select};

use super::fetch_bytes::{MAX_FETCH_BYTES, SMALL_FETCH_BYTES};
use super::fetcher::Fetcher;
use super::gate::Phase;
use super::hydration::{HydrationState, Mode, Pacer};
use crate::engine::{Action, Event};
use crate::uring::{Buffer, Lent, now, sleep};

/// Pause after a failure, before it tries again.
const RETRY_PAUSE: Duration = Duration::from_secs(2);

impl Fetcher {
    /// Hydrates until everything is here.
    pub(super) async fn hydrate(self: Rc<Self>) {
        let mut pacer = Pacer::new(now());
        let hydration = &self.core.hydration;
        let mut asks_what_is_hot = None;
        loop {
            let changed = hydration.changed.listen();
            if self.core.health.is_complete() {
                hydration.set_state(HydrationState::Done);
                self.hang_up().await;
                return;
            }
            if self.core.gate.phase() == Phase::Standby {
                hydration.set_state(HydrationState::Paused("in standby: nothing is fetched before the handoff".into()));
                changed.await;
                continue;
            }
            let mode = hydration.mode();
            if mode == Mode::Off {
                hydration.set_state(HydrationState::Off);
                changed.await;
                continue;
            }
            if self.core.health.has_failed() {
                hydration.set_state(HydrationState::Paused("the device has stopped".into()));
                changed.await;
                continue;
            }
            let trouble = self.trouble.borrow_mut().take();
            if let Some(reason) = trouble {
                hydration.set_state(HydrationState::Paused(reason));
                select(sleep(RETRY_PAUSE).boxed_local(), changed).await;
                continue;
            }
            let progress = self.progress.listen();
            if !self.window.has_room() {
                select(progress, changed).await;
                continue;
            }
            if let Some(source) = self.source() {
                match select(source.takes_bulk().boxed_local(), changed).await {
                    Either::Left((true, _)) => {}
                    Either::Left((false, _)) => {
                        *self.trouble.borrow_mut() = Some("the source is lost".into());
                        continue;
                    }
                    Either::Right(_) => continue,
                }
            }
            let share = self.bulk.take(MAX_FETCH_BYTES as usize).await;
            if hydration.mode() != mode {
                continue;
            }
            hydration.set_state(HydrationState::Running);
            if !self.core.maps().lacks_little() {
                asks_what_is_hot.get_or_insert_with(|| {
                    self.source().iter().for_each(|source| self.window.begin(source.round_trip()));
                    self.ask_what_is_hot()
                });
            }
            self.hydrate_step(share, mode, &mut pacer).await;
        }
    }

    /// Starts one fetch (or waits until there is one to start), and keeps to the rate.
    async fn hydrate_step(self: &Rc<Self>, mut share: Lent, mode: Mode, pacer: &mut Pacer) {
        let progress = self.progress.listen();
        let mut actions = Vec::new();
        self.core.apply_into(Event::Hydrate, &mut actions);
        debug_assert!(actions.len() <= 1, "one step, one action");
        match actions.pop() {
            Some(Action::Fetch { fetch, run, lane }) => {
                let bytes = self.core.geometry().bytes_of(run).len();
                share.keep(bytes.max(SMALL_FETCH_BYTES) as usize);
                self.start_fetch(fetch, run, lane, Some(share));
                if let Mode::Rate(rate) = mode {
                    // Reading ahead is not held back: who reads there would ask for it anyway. But it counts, for a
                    // second's worth each time, so that hydration goes on beside the fastest reader.
                    let ahead_bytes = self.ahead_bytes.take().min(rate);
                    let wait = pacer.spend(now(), rate, bytes + ahead_bytes);
                    let changed = self.core.hydration.changed.listen();
                    select(sleep(wait).boxed_local(), changed).await;
                }
            }
            Some(Action::StoreZero { fetch, run }) => self.start_store_zero(fetch, run, share),
            Some(Action::QueryExtents { run }) => {
                drop(share);
                self.start_query(run);
            }
            Some(Action::HydrationWaits) => {
                drop(share);
                select(progress, sleep(RETRY_PAUSE).boxed_local()).await;
            }
            Some(Action::HydrationRests) => {
                drop(share);
                let reason = self.unreadable.borrow_mut().take();
                *self.trouble.borrow_mut() = Some(reason.unwrap_or_else(|| "some blocks cannot be read".into()));
            }
            Some(Action::HydrationDone) => {
                drop(share);
                self.core.hydration.set_state(HydrationState::Done);
                // The commit thread records completion, and rings. Not when its clock says so: at once.
                let changed = self.core.hydration.changed.listen();
                self.core.apply(Event::CommitDue);
                if !self.core.health.is_complete() {
                    select(changed, sleep(RETRY_PAUSE).boxed_local()).await;
                }
            }
            other => unreachable!("hydration is answered with a step, not {other:?}"),
        }
    }

    /// The source is no longer needed: close its connections, so that it may be switched off unnoticed. Reads that wait
    /// for it began before the guest wrote their blocks; they end as unreachable, and find them in the cache.
    async fn hang_up(&self) {
        let source = self.source.borrow_mut().take();
        if let Some(source) = source {
            source.say_done().await;
            source.hang_up();
            self.core.health.set_found();
        }
        Buffer::forget_kept();
    }
}
