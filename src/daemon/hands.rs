//! The disk between hosts: taking it over from the source, and giving it to the next host. Carries out what the rules
//! of [`crate::handoff`] decide; one step at a time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::cache::{CacheState, Gift, Superblock};
use crate::control::{HandoffStatus, Taken};
use crate::device::{Core, Phase, SourceSide};
use crate::handoff::{Deed, Move, Right, Step, Taker};
use crate::nbd::{Ask, Base, HANDOFF_VERSION, NbdError, Standing, Told};
use crate::remote::{Expect, HandOffError};

/// Pause before the source is asked again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// How much longer than it may take the source's answer is waited for.
const ANSWER_MARGIN: Duration = Duration::from_secs(15);
/// Answers that only correct what we know, one after the other.
const MAX_CORRECTIONS: u32 = 4;
/// Longest wait for requests under way when the disk is given away.
const MAX_DRAIN: Duration = Duration::from_secs(10);

/// What the source gave, and what is not on record here yet.
#[derive(Clone, Debug)]
struct Granted {
    epoch: u64,
    identity: Option<String>,
}

struct State {
    right: Right,
    /// Of a source that can give its disk away.
    taker: Option<Taker>,
    granted: Option<Granted>,
    /// Our own disk's, once it is ours.
    deed: Deed,
    gift: Option<Gift>,
    dirty_exact: bool,
    released: bool,
    export: Option<String>,
}

/// See the module's page.
pub(super) struct Hands {
    name: String,
    core: Arc<Core>,
    source: SourceSide,
    me: Uuid,
    state: Mutex<State>,
}

/// Is the disk ours by what is on record?
pub(super) fn right_of(superblock: &Superblock) -> Right {
    match superblock.state {
        CacheState::Standby => Right::Standby,
        CacheState::Declined => Right::Declined,
        CacheState::Active | CacheState::Complete | CacheState::Away => Right::Active,
    }
}

/// How the gate stands when a cache is opened.
pub(super) fn phase_of(superblock: &Superblock) -> Phase {
    match superblock.state {
        CacheState::Standby | CacheState::Declined => Phase::Standby,
        CacheState::Active | CacheState::Complete => Phase::Active,
        CacheState::Away => Phase::Away,
    }
}

/// What the contents of a device are known by: nobody but we write it, and not in an epoch in which it is away.
fn identity_of(deed: &Deed) -> String {
    format!("device:{}:{}", deed.disk, deed.epoch)
}

impl Hands {
    pub(super) fn new(
        name: String,
        core: Arc<Core>,
        source: SourceSide,
        superblock: &Superblock,
        standing: Option<&Standing>,
    ) -> Self {
        let (me, right) = (superblock.uuid, right_of(superblock));
        let taker = superblock.gift.map(|gift| {
            let taker = Taker { me, disk: gift.disk, right, floor: superblock.floor, epoch: gift.epoch + 1 };
            standing.map_or(taker, |standing| taker.seen(standing))
        });
        let state = State {
            right,
            taker,
            granted: None,
            deed: Deed { disk: me, epoch: superblock.epoch, given_to: superblock.given_to },
            gift: superblock.gift,
            dirty_exact: superblock.dirty_exact,
            released: false,
            export: None,
        };
        Self { name, core, source, me, state: Mutex::new(state) }
    }

    /// Is it in standby?
    pub(super) fn waits(&self) -> bool {
        self.lock().right == Right::Standby
    }

    /// As if the guest had written.
    pub(super) fn ring(&self) {
        self.core.gate.ring();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn status(&self) -> HandoffStatus {
        let state = self.lock();
        HandoffStatus {
            disk: self.me.to_string(),
            epoch: state.deed.epoch,
            source_disk: state.taker.map(|taker| taker.disk.to_string()),
            given_to: state.deed.given_to.map(|to| to.to_string()),
            released: state.released,
            export: state.export.clone(),
        }
    }

    pub(super) fn set_export(&self, uri: Option<String>) {
        self.lock().export = uri;
    }

    fn record(&self, change: impl FnOnce(&mut Superblock) + Send + 'static) -> Result<(), String> {
        self.core.record(change).map_err(|e| format!("{}: the metadata cannot be written: {e}", self.name))
    }

    // ---- from the source -----------------------------------------------------------------------------

    /// Gets the disk from the source. Nothing changes here yet.
    pub(super) fn take(&self, wait: Duration) -> Result<Taken, String> {
        self.take_locked(&mut self.lock(), wait)
    }

    fn take_locked(&self, state: &mut State, wait: Duration) -> Result<Taken, String> {
        let taken = |epoch, already| Taken { epoch, already, warning: None };
        match state.right {
            Right::Active => return Ok(taken(state.deed.epoch, true)),
            Right::Declined => return Err(format!("{} was aborted and can never be active; detach it", self.name)),
            Right::Standby => {}
        }
        if let Some(granted) = &state.granted {
            return Ok(taken(granted.epoch, true));
        }
        let Some(mut taker) = state.taker else {
            state.granted = Some(Granted { epoch: 1, identity: None });
            let warning =
                "the source cannot be asked to keep its writers out: see to it that nobody writes there".into();
            return Ok(Taken { warning: Some(warning), ..taken(1, false) });
        };
        let deadline = Instant::now() + wait;
        let mut corrections = 0;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let ask = taker.take(left.as_millis() as u64).or_else(|| taker.give_back());
            let ask = ask.ok_or_else(|| format!("{} cannot take the disk as it stands", self.name))?;
            let told = match self.source.hand_off(ask.clone(), left + ANSWER_MARGIN) {
                Err(HandOffError::Lost) if !left.is_zero() => {
                    std::thread::sleep(RETRY_PAUSE);
                    continue;
                }
                told => told.map_err(|e| format!("{}: {e}", self.name))?,
            };
            let step = match (ask, told) {
                (Ask::GiveBack { .. }, Told::Back { epoch }) => Step::AskAgain(taker.back(epoch)),
                (_, told) => taker.on_told(told),
            };
            match step {
                Step::Activate { epoch, identity } => {
                    state.taker = Some(taker);
                    state.granted = Some(Granted { epoch, identity: Some(identity) });
                    return Ok(taken(epoch, false));
                }
                Step::AskAgain(now) if corrections < MAX_CORRECTIONS => {
                    corrections += 1;
                    taker = now;
                    state.taker = Some(now);
                }
                Step::AskAgain(_) => return Err(format!("{}: the source's epoch does not stand still", self.name)),
                Step::Refused { later: true, .. } if !left.is_zero() => std::thread::sleep(RETRY_PAUSE),
                Step::Refused { why, .. } => return Err(format!("{}: the source keeps its disk: {why}", self.name)),
            }
        }
    }

    /// Gets the disk from the source, if that was not done, and lets the guest write.
    pub(super) fn activate(&self, wait: Duration) -> Result<Taken, String> {
        let mut state = self.lock();
        let taken = self.take_locked(&mut state, wait)?;
        let Some(Granted { epoch, identity }) = state.granted.clone() else { return Ok(taken) };
        let gift = state.gift.map(|gift| Gift { epoch, ..gift });
        let known_by = identity.clone();
        self.record(move |s| {
            s.state = CacheState::Active;
            s.epoch = epoch;
            s.gift = gift;
            if let Some(identity) = known_by {
                s.source_identity = identity;
            }
        })?;
        if let Some(identity) = identity {
            self.source.expect(Expect::Gift { to: self.me, epoch }, identity);
        }
        state.granted = None;
        state.right = Right::Active;
        state.deed = Deed { disk: self.me, epoch, given_to: None };
        state.gift = gift;
        self.core.gate.set(Phase::Active);
        self.core.hydration.wake();
        log::info!("active in epoch {epoch}: the disk is here");
        Ok(Taken { already: false, ..taken })
    }

    /// Gives back what was taken; the device stays in standby.
    pub(super) fn call_off(&self) -> Result<(), String> {
        let mut state = self.lock();
        if state.right == Right::Active {
            return Err(self.too_late());
        }
        self.give_back(&mut state, Right::Standby)
    }

    /// Gives back what was taken; the device will never be active.
    pub(super) fn abort(&self) -> Result<(), String> {
        let mut state = self.lock();
        if state.right == Right::Active {
            return Err(self.too_late());
        }
        self.give_back(&mut state, Right::Declined)
    }

    fn too_late(&self) -> String {
        format!(
            "{} is active: its guest may have written here, and nothing else has that. To go back, migrate it back",
            self.name
        )
    }

    /// First it is on record that nothing will come of it, then the source is told.
    fn give_back(&self, state: &mut State, right: Right) -> Result<(), String> {
        state.granted = None;
        let state_on_record = if right == Right::Declined { CacheState::Declined } else { CacheState::Standby };
        let taker = state.taker.map(|taker| Taker { right, ..taker.called_off() });
        let floor = taker.map_or(0, |taker| taker.floor);
        self.record(move |s| (s.state, s.floor) = (state_on_record, floor))?;
        (state.taker, state.right) = (taker, right);
        let Some(taker) = taker else { return Ok(()) };
        let Some(ask) = taker.give_back() else { return Ok(()) };
        match self.source.hand_off(ask, ANSWER_MARGIN) {
            Ok(Told::Back { epoch }) => {
                state.taker = Some(taker.back(epoch));
                Ok(())
            }
            Ok(Told::No { why, .. }) => Err(format!("{}: the source says: {why}", self.name)),
            Ok(_) => Err(format!("{}: the source's answer makes no sense", self.name)),
            Err(e) => Err(format!(
                "{} will not use the disk, but the source could not be told ({e}): try again when it answers, or use \
                 `blkferry reclaim --force` there",
                self.name
            )),
        }
    }
}

impl crate::frontend::Owner for Hands {
    fn standing(&self) -> Option<Standing> {
        let state = self.lock();
        let Deed { disk, epoch, given_to } = state.deed;
        let base = state.gift.filter(|gift| gift.epoch > 0 && state.dirty_exact && self.core.health.is_complete());
        let base = base.map(|gift| Base { disk: gift.disk, epoch: gift.epoch });
        (state.right == Right::Active).then_some(Standing { version: HANDOFF_VERSION, disk, epoch, given_to, base })
    }

    fn identity(&self) -> String {
        identity_of(&self.lock().deed)
    }

    fn hand_off(&self, ask: &Ask) -> Result<Told, NbdError> {
        let mut state = self.lock();
        let epoch = state.deed.epoch;
        let no = |why: String, later| Ok(Told::No { why, epoch, later });
        if state.right != Right::Active {
            return no("the device is in standby itself".into(), false);
        }
        if let Some(reason) = self.core.health.failed() {
            return no(format!("the device has failed: {reason}"), false);
        }
        match state.deed.on(ask) {
            Move::Say(told) => Ok(told),
            Move::Retire => {
                state.released = true;
                log::info!("whoever has the disk now has all of it: this device is not needed any more");
                Ok(Told::Noted)
            }
            Move::Give(deed) => {
                let wait_ms = if let Ask::Take { wait_ms, .. } = ask { *wait_ms } else { 0 };
                if deed != state.deed {
                    if let Err(inside) = self.core.gate.freeze(Duration::from_millis(wait_ms).min(MAX_DRAIN)) {
                        return no(format!("{inside} writes of its guest are still under way"), true);
                    }
                    let on_record = deed.clone();
                    let recorded = self.record(move |s| {
                        (s.state, s.epoch, s.given_to) = (CacheState::Away, on_record.epoch, on_record.given_to);
                    });
                    // If it could not be recorded the device has failed, and nobody writes to it any more.
                    recorded.map_err(|_| NbdError::Io)?;
                    self.core.gate.set(Phase::Away);
                    log::info!("given to {} in epoch {}", deed.given_to.unwrap_or_default(), deed.epoch);
                    state.deed = deed;
                }
                Ok(Told::Given { epoch: state.deed.epoch, identity: identity_of(&state.deed) })
            }
            Move::TakeBack(deed) => {
                let complete = self.core.health.is_complete();
                let on_record = deed.clone();
                let recorded = self.record(move |s| {
                    s.state = if complete { CacheState::Complete } else { CacheState::Active };
                    (s.epoch, s.given_to) = (on_record.epoch, None);
                });
                recorded.map_err(|_| NbdError::Io)?;
                state.deed = deed;
                self.core.gate.set(Phase::Active);
                log::info!("called off: the disk is here in epoch {}", state.deed.epoch);
                Ok(Told::Back { epoch: state.deed.epoch })
            }
        }
    }
}
