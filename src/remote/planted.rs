//! Faults planted on purpose, to prove that the tests would see them. They count for one thread: that of the test.

use std::cell::Cell;

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlantedFault {
    /// An answer is taken for that of another read of the same length.
    AnswerOfAnother,
    /// A read whose link died is not asked again.
    WaiterDropped,
    /// A source that comes back is taken for the same one.
    IdentityUnchecked,
    /// Those who wait are told once that the source is given up, and never again.
    GivenUpOnce,
    /// A link that says nothing is waited for.
    SilenceUnnoticed,
    /// What a failed fetch holds of the buffers is not given back.
    BufferKept,
}

thread_local! {
    static PLANTED: Cell<Option<PlantedFault>> = const { Cell::new(None) };
}

/// Breaks the fetch layer of this thread, or repairs it.
pub fn plant(fault: Option<PlantedFault>) {
    PLANTED.set(fault);
}

/// Is it broken in this way?
pub(crate) fn is_planted(fault: PlantedFault) -> bool {
    PLANTED.get() == Some(fault)
}
