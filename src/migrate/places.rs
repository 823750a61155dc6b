//! What is to be moved, and between whom.

use crate::qmp::Address;

/// What is to be moved, and between whom.
#[derive(Clone, Debug)]
pub struct Places {
    /// The source's QEMU.
    pub from: Address,
    /// The destination's QEMU.
    pub to: Address,
    /// Where the source sends its memory.
    pub uri: Option<String>,
    /// Where the destination listens for it, if that is called otherwise there.
    pub listen: Option<String>,
    /// Each disk as the source's QEMU calls it, and the device in standby.
    pub disks: Vec<(String, String)>,
    /// Writable disks that need not be moved.
    pub leave: Vec<String>,
}

impl Places {
    /// The devices.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.disks.iter().map(|(_, name)| name.as_str())
    }
}
