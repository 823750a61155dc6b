//! The disk between hosts: taking it over from the source, and giving it to the next host. Carries out what the rules
//! of [`crate::handoff`] decide; one step at a time. `taking` is the destination's side, `giving` the source's.

mod giving;
mod taking;

use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use uuid::Uuid;

use super::lock;
use crate::cache::{CacheState, DataFile, Gift, Superblock};
use crate::control::HandoffStatus;
use crate::device::{Core, Phase, SourceSide};
use crate::export::Home;
use crate::handoff::{Deed, Right, Taker};
use crate::nbd::Standing;
use crate::remote::Changed;

/// What the source gave, and what is not on record here yet.
#[derive(Clone, Debug)]
struct Granted {
    epoch: u64,
    identity: Option<String>,
    /// What was written there, if it was told with that. The source is frozen: it stays true.
    changed: Option<Changed>,
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
    /// What the source's contents are known by: while it has the disk, what they were known by at attach.
    source_identity: String,
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
    /// As the last step left it: whoever only looks does not wait for the one that is under way.
    shown: Mutex<Shown>,
    /// Where it is offered to others.
    export: Mutex<Option<String>>,
}

/// What can be seen of the state.
#[derive(Clone, Debug)]
struct Shown {
    right: Right,
    deed: Deed,
    source_disk: Option<Uuid>,
    gift: Option<Gift>,
    dirty_exact: bool,
    released: bool,
    source_identity: String,
}

impl Shown {
    fn of(state: &State) -> Self {
        Self {
            right: state.right,
            deed: state.deed.clone(),
            source_disk: state.taker.map(|taker| taker.disk),
            gift: state.gift,
            dirty_exact: state.dirty_exact,
            released: state.released,
            source_identity: state.source_identity.clone(),
        }
    }
}

/// The state while a step is done. When it is let go, everybody sees what came of it.
struct Held<'a> {
    state: MutexGuard<'a, State>,
    shown: &'a Mutex<Shown>,
}

impl Deref for Held<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        *lock(self.shown) = Shown::of(&self.state);
    }
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
        source_identity: String,
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
            released: superblock.released,
            source_identity,
            landing: None,
        };
        let shown = Mutex::new(Shown::of(&state));
        Self { name, core, source, me, state: Mutex::new(state), shown, export: Mutex::default() }
    }

    /// Is it in standby?
    pub(super) fn waits(&self) -> bool {
        self.shown().right == Right::Standby
    }

    /// Has the device stopped for good?
    pub(super) fn has_failed(&self) -> bool {
        self.core.health.has_failed()
    }

    /// Was the disk given to us, whatever became of it since?
    pub(super) fn is_ours(&self) -> bool {
        self.shown().right == Right::Active
    }

    /// Of a disk that was given away: does whoever has it have all of it?
    pub(super) fn is_released(&self) -> bool {
        self.shown().released
    }

    /// What the source's contents are known by. Another one once it gave its disk away.
    pub(super) fn source_identity(&self) -> String {
        self.shown().source_identity
    }

    /// As if the guest had written.
    pub(super) fn ring(&self) {
        self.core.gate.ring();
    }

    /// Waits for the step that is under way, and begins the next.
    fn step(&self) -> Held<'_> {
        Held { state: lock(&self.state), shown: &self.shown }
    }

    fn shown(&self) -> Shown {
        lock(&self.shown).clone()
    }

    pub(super) fn status(&self) -> HandoffStatus {
        let Shown { deed, source_disk, released, .. } = self.shown();
        HandoffStatus {
            disk: self.me.to_string(),
            epoch: deed.epoch,
            source_disk: source_disk.map(|disk| disk.to_string()),
            given_to: deed.given_to.map(|to| to.to_string()),
            released,
            export: lock(&self.export).clone(),
        }
    }

    /// The disk comes home: what was not written since is in this image.
    pub(super) fn set_landing(&self, landing: Landing) {
        self.step().landing = Some(landing);
    }

    pub(super) fn set_export(&self, uri: Option<String>) {
        *lock(&self.export) = uri;
    }

    fn record(&self, change: impl FnOnce(&mut Superblock) + Send + 'static) -> Result<(), String> {
        self.core.record(change).map_err(|e| format!("{}: the metadata cannot be written: {e}", self.name))
    }
}
