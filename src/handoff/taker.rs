//! The destination's side.

use uuid::Uuid;

use crate::nbd::{Ask, Standing, Told};

/// What a destination has on record: may its guest write?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Right {
    /// Not yet.
    Standby,
    /// Yes: the source has given the disk.
    Active,
    /// No, for ever: it was called off.
    Declined,
}

/// What a destination knows when it wants the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Taker {
    /// Its own disk.
    pub me: Uuid,
    /// The source's disk.
    pub disk: Uuid,
    /// On record.
    pub right: Right,
    /// On record: what was or will be given in an earlier epoch than this is never acted upon. A word that it is given
    /// back may still be on its way, and must find nobody who relies on the gift.
    pub floor: u64,
    /// The epoch that is to begin, as far as it is known.
    pub epoch: u64,
}

/// What a destination does about an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Records that it is active in this epoch, with contents known by this; then lets the guest write.
    Activate {
        /// The epoch that has begun.
        epoch: u64,
        /// What the source's contents are known by.
        identity: String,
    },
    /// Asks again at once: what it knew was old.
    AskAgain(Taker),
    /// Gives up for now.
    Refused {
        /// Why: one clear line.
        why: String,
        /// May it be otherwise in a moment?
        later: bool,
    },
}

impl Taker {
    /// The same, after the source said how its disk stands.
    pub fn seen(&self, standing: &Standing) -> Self {
        let mine = standing.given_to == Some(self.me);
        Self { epoch: if mine { standing.epoch } else { standing.epoch + 1 }, ..*self }
    }

    /// The same, after the source said that the disk is not ours in an epoch.
    pub fn back(&self, epoch: u64) -> Self {
        Self { epoch: epoch + 1, ..*self }
    }

    /// The same, with the epoch that was to begin called off. To be on record before [`Taker::give_back`] is sent.
    pub fn called_off(&self) -> Self {
        Self { floor: self.floor.max(self.epoch + 1), ..*self }
    }

    /// The same, never to have the disk.
    pub fn declined(&self) -> Self {
        Self { right: Right::Declined, ..self.called_off() }
    }

    /// The request for the disk. `None`: it is not to be had any more, or had already, or has to be given back first.
    pub fn take(&self, wait_ms: u64) -> Option<Ask> {
        let Self { me, disk, right, floor, epoch } = *self;
        (right == Right::Standby && epoch >= floor).then_some(Ask::Take { disk, to: me, epoch, wait_ms })
    }

    /// The word that what was given, or may have been given, will never be used; `None` if that is not on record.
    pub fn give_back(&self) -> Option<Ask> {
        let Self { me, disk, right, floor, epoch } = *self;
        (right != Right::Active && epoch < floor).then_some(Ask::GiveBack { disk, to: me, epoch })
    }

    /// What follows from the answer to [`Taker::take`].
    pub fn on_told(&self, told: Told) -> Step {
        match told {
            Told::Given { epoch, identity }
                if self.right == Right::Standby && epoch == self.epoch && epoch >= self.floor =>
            {
                Step::Activate { epoch, identity }
            }
            Told::No { epoch, .. } if epoch >= self.epoch && self.right == Right::Standby => {
                // It was given and came back meanwhile, or is somebody else's now, which the next answer says.
                Step::AskAgain(self.back(epoch))
            }
            Told::No { why, later, .. } => Step::Refused { why, later },
            Told::Given { epoch, .. } | Told::Back { epoch } => {
                let why = format!("the source answered for epoch {epoch}, and was asked for {}", self.epoch);
                Step::Refused { why, later: false }
            }
            Told::Noted => {
                Step::Refused { why: "the source did not say whether it gave the disk".into(), later: false }
            }
        }
    }
}
