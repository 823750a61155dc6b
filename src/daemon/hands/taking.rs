//! Taking the disk over from the source.

use std::time::{Duration, Instant};

use super::{Granted, Hands, Landing, State};
use crate::cache::{CacheState, Gift};
use crate::control::Taken;
use crate::device::Phase;
use crate::engine::{BlockRun, Geometry};
use crate::handoff::{Deed, Right, Step, Taker};
use crate::nbd::{Ask, Told};
use crate::remote::{Changed, Expect, HandOffError};

/// Pause before the source is asked again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// How much longer than it may take the source's answer is waited for.
const ANSWER_MARGIN: Duration = Duration::from_secs(15);
/// Answers that only correct what we know, one after the other.
const MAX_CORRECTIONS: u32 = 4;

impl Hands {
    /// Gets the disk from the source. Nothing changes here yet.
    pub(in crate::daemon) fn take(&self, wait: Duration) -> Result<Taken, String> {
        self.take_in(&mut self.step(), wait)
    }

    fn take_in(&self, state: &mut State, wait: Duration) -> Result<Taken, String> {
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
            state.granted = Some(Granted { epoch: 1, identity: None, changed: None });
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
            let (told, changed) = match self.ask(&ask, state.landing.is_some(), left + ANSWER_MARGIN) {
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
                    state.granted = Some(Granted { epoch, identity: Some(identity), changed });
                    return Ok(taken(epoch, false));
                }
                Step::AskAgain(now) if corrections < MAX_CORRECTIONS => {
                    corrections += 1;
                    taker = now;
                    state.taker = Some(now);
                }
                Step::AskAgain(_) => return Err(format!("{}: the source's epoch does not stand still", self.name)),
                Step::Refused { later: true, .. } if !left.is_zero() => std::thread::sleep(RETRY_PAUSE),
                Step::Refused { why, .. } => {
                    return Err(format!("{}: the source does not give the disk: {why}", self.name));
                }
            }
        }
    }

    /// A step of a handoff, for a disk that comes home together with what was written at the source.
    fn ask(&self, ask: &Ask, comes_home: bool, patience: Duration) -> Result<(Told, Option<Changed>), HandOffError> {
        if comes_home && matches!(ask, Ask::Take { .. }) {
            return self.source.hand_off_and_tell(ask.clone(), patience);
        }
        Ok((self.source.hand_off(ask.clone(), patience)?, None))
    }

    /// Gets the disk from the source, if that was not done, and lets the guest write.
    pub(in crate::daemon) fn activate(&self, wait: Duration) -> Result<Taken, String> {
        let mut state = self.step();
        let taken = self.take_in(&mut state, wait)?;
        let Some(Granted { epoch, identity, changed }) = state.granted.clone() else { return Ok(taken) };
        let mut kept = Vec::new();
        if let Some(landing) = &mut state.landing {
            // The source is frozen: what it says now stays true.
            let changed = changed.map_or_else(|| self.changed(), Ok)?;
            // It may have been fetched from there until now.
            let claimed = landing.home.claim().and_then(|()| landing.home.confirm(changed.base));
            claimed.map_err(|e| format!("{}: {e}", self.name))?;
            kept = kept_blocks(&changed.stretches, self.core.geometry());
        }
        let gift = state.gift.map(|gift| Gift { epoch, ..gift });
        let identity = match identity {
            Some(identity) => identity,
            // It may have been written to until now.
            None => self.source.identify(ANSWER_MARGIN).map_err(|e| format!("{}: {e}", self.name))?,
        };
        let known_by = identity.clone();
        self.record(move |s| {
            s.state = CacheState::Active;
            s.epoch = epoch;
            s.gift = gift;
            s.source_identity = known_by;
        })?;
        let expected = if gift.is_some() { Expect::Gift { to: self.me, epoch } } else { Expect::Contents };
        state.source_identity.clone_from(&identity);
        self.source.expect(expected, identity);
        if let Some(landing) = state.landing.take() {
            self.land(landing, &kept)?;
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

    /// The disk is ours by what is on record. Not before that: the source might have gone on writing it. What it kept has
    /// to be known durably before the record beside the image goes: nobody else may have it any more.
    fn land(&self, mut landing: Landing, kept: &[BlockRun]) -> Result<(), String> {
        self.core.adopt(kept);
        let landed = self
            .record(|_| {})
            .and_then(|()| landing.home.lower().map_err(|e| e.to_string()))
            .and_then(|()| landing.data.come_home(&landing.path).map_err(|e| e.to_string()))
            .and_then(|()| landing.home.clear().map_err(|e| e.to_string()));
        landed.map_err(|why| {
            // Another attach goes on from here.
            let why = format!("the disk has come home, but {why}; attach it again");
            self.core.fail(why.clone());
            format!("{}: {why}", self.name)
        })
    }

    /// The same for a predecessor, who died before it was done.
    pub(in crate::daemon) fn finish_homecoming(&self) -> Result<(), String> {
        // All of it is one step: the disk is nobody else's before it is all home, and nobody writes to it before.
        let mut state = self.step();
        if state.landing.is_none() {
            return Ok(());
        }
        // The source is frozen still. Who is complete needs none, and may have none.
        if !self.core.health.is_complete() {
            // It committed what was written before it gave the disk away: that it lost power since changes nothing.
            self.core.adopt(&kept_blocks(&self.changed()?.stretches, self.core.geometry()));
        }
        self.record(|_| {})?;
        if let Some(landing) = state.landing.take() {
            landing.home.clear().map_err(|e| format!("{}: {e}", self.name))?;
        }
        self.core.gate.set(Phase::Active);
        self.core.hydration.wake();
        Ok(())
    }

    /// What was written at the source since it had the disk from here.
    fn changed(&self) -> Result<Changed, String> {
        let changed = self.source.changed(ANSWER_MARGIN);
        changed.map_err(|e| format!("{}: what was written at the source is not known: {e}", self.name))
    }

    /// Gives back what was taken; the device stays in standby.
    pub(in crate::daemon) fn call_off(&self) -> Result<(), String> {
        let mut state = self.step();
        if state.right == Right::Active {
            return Err(self.too_late());
        }
        self.give_back(&mut state, Right::Standby)
    }

    /// Gives back what was taken; the device will never be active.
    pub(in crate::daemon) fn abort(&self) -> Result<(), String> {
        let mut state = self.step();
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

/// The whole blocks in what was not written, of stretches from the start of the disk on.
fn kept_blocks(stretches: &[(u64, bool)], geometry: Geometry) -> Vec<BlockRun> {
    let (block_bytes, size_bytes) = (geometry.block_bytes(), geometry.size_bytes());
    let mut at = 0;
    let mut runs = Vec::new();
    for &(len_bytes, written) in stretches {
        let (start, end) = (at, at + len_bytes);
        at = end;
        let first = start.div_ceil(block_bytes);
        let last = if end == size_bytes { geometry.blocks() } else { end / block_bytes };
        if !written && first < last {
            runs.push(BlockRun::new(first, last));
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_are_kept() {
        let geometry = Geometry::new(5 * 8192 + 512, 8192).unwrap();
        let stretches = [(4096, false), (4096, true), (3 * 8192 + 512, false), (8192 - 512, true), (512, false)];
        assert_eq!(kept_blocks(&stretches, geometry), [BlockRun::new(1, 4), BlockRun::new(5, 6)]);
        assert_eq!(kept_blocks(&[(5 * 8192 + 512, false)], geometry), [BlockRun::new(0, 6)]);
        assert_eq!(kept_blocks(&[], geometry), []);
    }
}
