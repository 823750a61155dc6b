//! Giving the disk to the next host.

use std::time::Duration;

use super::Hands;
use crate::cache::CacheState;
use crate::device::{Mode, Phase};
use crate::frontend::Owner;
use crate::handoff::{Deed, Move, Right};
use crate::nbd::{Ask, Base, HANDOFF_VERSION, NbdError, Standing, Told};

/// Longest wait for requests under way when the disk is given away.
const MAX_DRAIN: Duration = Duration::from_secs(10);

/// What the contents of a device are known by: nobody but we write it, and not in an epoch in which it is away.
fn identity_of(deed: &Deed) -> String {
    format!("device:{}:{}", deed.disk, deed.epoch)
}

impl Owner for Hands {
    fn standing(&self) -> Option<Standing> {
        let shown = self.shown();
        let Deed { disk, epoch, given_to } = shown.deed;
        let base = shown.gift.filter(|gift| gift.epoch > 0 && shown.dirty_exact);
        let base = base.map(|gift| Base { disk: gift.disk, epoch: gift.epoch });
        let complete = self.core.health.is_complete();
        let standing = Standing { version: HANDOFF_VERSION, disk, epoch, given_to, base, complete };
        (shown.right == Right::Active).then_some(standing)
    }

    fn identity(&self) -> String {
        identity_of(&self.shown().deed)
    }

    fn hand_off(&self, ask: &Ask) -> Result<Told, NbdError> {
        let mut state = self.step();
        let epoch = state.deed.epoch;
        let no = |why: String, later| Ok(Told::No { why, epoch, later });
        if state.right != Right::Active {
            return no("the device is in standby itself".into(), false);
        }
        if state.landing.is_some() {
            return no("the disk is still coming home".into(), true);
        }
        if let Some(reason) = self.core.health.failed() {
            return no(format!("the device has failed: {reason}"), false);
        }
        match state.deed.on(ask) {
            Move::Say(told) => Ok(told),
            Move::Retire => {
                if !state.released {
                    // Who comes after us is to know, too.
                    self.record(|s| s.released = true).map_err(|_| NbdError::Io)?;
                }
                state.released = true;
                // Nobody wants what is not here.
                self.core.hydration.set_mode(Mode::Off);
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
                        s.released = false;
                    });
                    // If it could not be recorded the device has failed, and nobody writes to it any more.
                    recorded.map_err(|_| NbdError::Io)?;
                    self.core.gate.set(Phase::Away);
                    log::info!("given to {} in epoch {}", deed.given_to.unwrap_or_default(), deed.epoch);
                    (state.deed, state.released) = (deed, false);
                }
                Ok(Told::Given { epoch: state.deed.epoch, identity: identity_of(&state.deed) })
            }
            Move::TakeBack(deed) => {
                let complete = self.core.health.is_complete();
                let on_record = deed.clone();
                let recorded = self.record(move |s| {
                    s.state = if complete { CacheState::Complete } else { CacheState::Active };
                    (s.epoch, s.given_to, s.released) = (on_record.epoch, None, false);
                });
                recorded.map_err(|_| NbdError::Io)?;
                (state.deed, state.released) = (deed, false);
                self.core.gate.set(Phase::Active);
                log::info!("called off: the disk is here in epoch {}", state.deed.epoch);
                Ok(Told::Back { epoch: state.deed.epoch })
            }
        }
    }
}
