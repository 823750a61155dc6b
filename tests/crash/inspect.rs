//! Compares every sector of an attached device with the record, without disturbing it more than it must.
//!
//! Present blocks are read through the device. Absent ones come from the source whenever somebody reads them:
//! for those the record must allow the source's data, and none is fetched unless asked for.

use blkferry::engine::Geometry;

use crate::client::Client;
use crate::record::{Crash, Record, SECTOR};
use crate::site::Present;

const PIECE_BYTES: usize = 1 << 20;

/// How much is read through the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// What was present.
    Present,
    /// Everything: whatever is absent is fetched.
    Everything,
}

/// After a crash: every sector must hold what the record allows, and is taken at its word from then on.
/// `present` is the map as it was when nothing but hydration could change it any more.
pub fn inspect(uri: &str, record: &mut Record, geometry: Geometry, present: &Present, depth: Depth, crash: Crash) {
    let mut client = Client::connect(uri, true).unwrap();
    for (run, is_present) in present.runs(geometry) {
        let range = geometry.bytes_of(run);
        for start in (range.start..range.end).step_by(PIECE_BYTES) {
            let end = range.end.min(start + PIECE_BYTES as u64);
            let found = if is_present || depth == Depth::Everything {
                client.read(start, (end - start) as u32)
            } else {
                record.source_bytes(start, end).to_vec()
            };
            settle(record, start, &found, crash, is_present);
        }
    }
    record.settled(crash);
}

fn settle(record: &mut Record, start: u64, found: &[u8], crash: Crash, is_present: bool) {
    let end = start + found.len() as u64;
    if record.is_certain(start, end, crash) && record.bytes(start, end) == found {
        return;
    }
    for (at, sector) in found.chunks_exact(SECTOR as usize).enumerate() {
        let index = start / SECTOR + at as u64;
        let may = record.settle(index, sector, crash);
        assert!(may, "after {crash:?}, in a block that was present: {is_present}: {}", record.tell(index, sector));
    }
}
