//! The source's side.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::nbd::{Ask, Told};

/// What a source has on record about its disk. Durable before anybody hears of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Deed {
    /// The disk's own name.
    pub disk: Uuid,
    /// Its epoch: grows by one each time it changes hands, and each time that was called off.
    pub epoch: u64,
    /// Who it was given to; `None`: it is here, and may be written here.
    pub given_to: Option<Uuid>,
}

/// What a source does about a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Move {
    /// Says this; nothing changes.
    Say(Told),
    /// Keeps all writers out, syncs, records this, and says [`Told::Given`]; [`Told::No`] if writers are still there.
    Give(Deed),
    /// Records this, lets writers in again, and says [`Told::Back`].
    TakeBack(Deed),
    /// Notes that nobody needs it any more, and says [`Told::Noted`].
    Retire,
}

impl Deed {
    /// The deed of a disk that never changed hands.
    pub fn new(disk: Uuid) -> Self {
        Self { disk, epoch: 1, given_to: None }
    }

    /// May the disk be written here?
    pub fn is_here(&self) -> bool {
        self.given_to.is_none()
    }

    /// The deed after a person took the disk back by force: a new epoch, so that whoever has it is recognised as stale.
    pub fn reclaimed(&self) -> Self {
        Self { disk: self.disk, epoch: self.epoch + 1, given_to: None }
    }

    /// What is to be done about a request.
    pub fn on(&self, ask: &Ask) -> Move {
        let (Ask::Take { disk, to, epoch, .. } | Ask::GiveBack { disk, to, epoch } | Ask::Done { disk, to, epoch }) =
            ask;
        if *disk != self.disk {
            return self.no(format!("this is disk {}, not {disk}", self.disk));
        }
        match ask {
            Ask::Take { .. } => self.on_take(*to, *epoch),
            Ask::GiveBack { .. } => self.on_give_back(*to, *epoch),
            Ask::Done { .. } if self.given_to == Some(*to) && self.epoch == *epoch => Move::Retire,
            Ask::Done { .. } => self.no(format!("disk {to} does not have it in epoch {epoch}")),
        }
    }

    fn on_take(&self, to: Uuid, epoch: u64) -> Move {
        match self.given_to {
            None if epoch == self.epoch + 1 => Move::Give(Self { disk: self.disk, epoch, given_to: Some(to) }),
            None => self.no(format!("the disk is in epoch {}, so that {epoch} cannot begin", self.epoch)),
            // It asks again: our answer, or its memory of it, was lost.
            Some(holder) if holder == to && epoch == self.epoch => Move::Give(self.clone()),
            Some(holder) => self.no(format!(
                "it was given to {holder} in epoch {}, and is there; attach it from the host that has it",
                self.epoch
            )),
        }
    }

    fn on_give_back(&self, to: Uuid, epoch: u64) -> Move {
        match self.given_to {
            Some(holder) if holder == to && self.epoch == epoch => Move::TakeBack(self.reclaimed()),
            // A Take of that epoch may still be on its way: it must come too late.
            None if self.epoch + 1 == epoch => Move::TakeBack(self.reclaimed()),
            _ if self.epoch >= epoch => Move::Say(Told::Back { epoch: self.epoch }),
            // Somebody else's: when it comes back here, that epoch is over.
            Some(_) if self.epoch + 1 == epoch => Move::Say(Told::Back { epoch: self.epoch }),
            _ => self.no(format!("the disk is in epoch {}, before {epoch}", self.epoch)),
        }
    }

    fn no(&self, why: String) -> Move {
        Move::Say(Told::No { why, epoch: self.epoch, later: false })
    }
}
