//! The disk between hosts: taking it over from the source, and giving it to the next host. Carries out what the rules
//! of [`crate::handoff`] decide; one step at a time. `taking` is the destination's side, `giving` the source's.

mod giving;
mod taking;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::cache::{CacheState, DataFile, Gift, Superblock};
use crate::control::HandoffStatus;
use crate::device::{Core, Phase, SourceSide};
use crate::export::Home;
use crate::handoff::{Deed, Right, Taker};
use crate::nbd::Standing;

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
    landing: Option<Landing>,
}

/// The image that the disk comes home to.
pub(super) struct Landing {
    pub(super) home: Home,
    pub(super) data: DataFile,
    pub(super) path: PathBuf,
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
            landing: None,
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

    /// The disk comes home: what was not written since is in this image.
    pub(super) fn set_landing(&self, landing: Landing) {
        self.lock().landing = Some(landing);
    }

    pub(super) fn set_export(&self, uri: Option<String>) {
        self.lock().export = uri;
    }

    fn record(&self, change: impl FnOnce(&mut Superblock) + Send + 'static) -> Result<(), String> {
        self.core.record(change).map_err(|e| format!("{}: the metadata cannot be written: {e}", self.name))
    }
}
