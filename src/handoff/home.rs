//! The way back: an older copy of a disk, and what was written elsewhere since.

use super::Deed;
use crate::nbd::{Base, Standing};

/// Why what an older copy holds cannot be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// The copy was given to somebody else.
    Stranger,
    /// It was given to this one, who does not know what was written since.
    Unknown,
}

impl Deed {
    /// May the copy of a disk that was given away as this deed says be taken for what the source has, but for what was
    /// written there since? The copy has to be whole; the source need not be: what it lacks, it would fetch from the copy.
    pub fn is_base_of(&self, source: Option<&Standing>) -> Result<(), Doubt> {
        let Some(source) = source.filter(|source| Some(source.disk) == self.given_to) else {
            return Err(Doubt::Stranger);
        };
        if source.base == Some(self.as_base()) { Ok(()) } else { Err(Doubt::Unknown) }
    }

    /// The disk as it was when it was given away as this deed says.
    pub fn as_base(&self) -> Base {
        Base { disk: self.disk, epoch: self.epoch }
    }
}

/// Has a block other contents than in the base? One that is marked as written but not present was never written: a
/// write that came to nothing, whose block is still the base's. Nobody could fetch it anywhere else.
pub fn differs_from_base(present: bool, dirty: bool) -> bool {
    present && dirty
}
