//! The file by which ublksrv's `ublk list`, `ublk recover` and `ublk del` know a device: /run/ublksrvd/N.pid.
//!
//! 32 bytes with the daemon's process id as text, then JSON that ends with a zero byte.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::ublk::DeviceInfo;

const DIRECTORY: &str = "/run/ublksrvd";
/// Where the JSON begins.
const JSON_OFFSET: usize = 32;

fn path_of(id: u32) -> PathBuf {
    PathBuf::from(DIRECTORY).join(format!("{id}.pid"))
}

fn contents(info: &DeviceInfo, size_bytes: u64, pid: u32) -> Vec<u8> {
    let queue = |index: u16| (index.to_string(), json!({ "qid": index, "tid": pid, "affinity": "" }));
    let queues: Map<String, Value> = (0..info.queues).map(queue).collect();
    let json = json!({
        "dev_info": {
            "dev_id": info.id,
            "nr_hw_queues": info.queues,
            "queue_depth": info.depth,
            "max_io_buf_bytes": info.max_io_bytes,
            "flags": info.features.bits(),
            "ublksrv_flags": info.mark,
            "ublksrv_pid": pid,
        },
        "target": { "name": "ferry", "type": 0, "dev_size": size_bytes },
        "queues": queues,
    });
    let mut bytes = format!("{pid}\n").into_bytes();
    bytes.resize(JSON_OFFSET, 0);
    bytes.extend(json.to_string().into_bytes());
    bytes.push(0);
    bytes
}

/// Writes it, for the process that calls.
pub(super) fn write(info: &DeviceInfo, size_bytes: u64) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY)?;
    let path = path_of(info.id);
    let part = path.with_extension("pid.new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
    io::Write::write_all(&mut file, &contents(info, size_bytes, std::process::id()))?;
    fs::rename(part, path)
}

/// Removes it; gone already is as good.
pub(super) fn remove(id: u32) {
    let _ = fs::remove_file(path_of(id));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ublk::{DeviceState, Features};

    #[test]
    fn the_file_is_as_ublksrv_reads_it() {
        let info = DeviceInfo {
            id: 4,
            queues: 2,
            depth: 64,
            state: DeviceState::Live,
            max_io_bytes: 1 << 19,
            daemon_pid: 0,
            features: Features::USER_RECOVERY,
            mark: 0,
        };
        let bytes = contents(&info, 1 << 30, 4711);
        assert!(bytes.starts_with(b"4711\n\0"));
        assert_eq!(bytes.last(), Some(&0));
        let json: Value = serde_json::from_slice(&bytes[JSON_OFFSET..bytes.len() - 1]).unwrap();
        assert_eq!(json["target"]["name"], "ferry");
        assert_eq!(json["queues"]["1"]["tid"], 4711);
        assert_eq!(json["dev_info"]["dev_id"], 4);
    }
}
