//! The handoff record of an image: who has the disk, written beside it (docs/FORMAT.md).

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::beside::{beside, make_device_dir, sync_dir_of};
use crate::handoff::Deed;

/// Version of the record's format.
const RECORD_VERSION: u32 = 1;
/// Extension of the record's file.
const EXTENSION: &str = "handoff";
/// A record is much shorter.
const MAX_RECORD_BYTES: u64 = 64 << 10;

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The system refused.
    #[error("handoff record {path}: {action}: {source}")]
    Io {
        /// The record.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Its contents make no sense.
    #[error(
        "handoff record {path} is damaged ({what}): it cannot be known whether the image was given away. If you know \
         that no other host uses this disk, remove the file"
    )]
    Damaged {
        /// The record.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// A later version.
    #[error("handoff record {path} is of version {version}, which this blkferry does not know: use a later one")]
    Version {
        /// The record.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// The contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub(super) version: u32,
    /// Who has it.
    #[serde(flatten)]
    pub deed: Deed,
    /// What the contents were known by when the disk was given away.
    pub identity: Option<String>,
    /// Permission bits of the image before it was made read-only.
    pub mode: Option<u32>,
}

impl Record {
    /// The record of an image that never changed hands.
    pub fn of_new_disk() -> Self {
        Self { version: RECORD_VERSION, deed: Deed::new(Uuid::new_v4()), identity: None, mode: None }
    }

    /// Where the record of an image lies.
    pub fn path_of(image: &Path) -> PathBuf {
        beside(image, EXTENSION)
    }

    /// Reads a record; `None`: there is none.
    pub fn read(path: &Path) -> Result<Option<Self>, RecordError> {
        let io = |source| RecordError::Io { path: path.into(), action: "read", source };
        let text = match fs::metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(e)),
            Ok(meta) if meta.len() > MAX_RECORD_BYTES => {
                return Err(RecordError::Damaged { path: path.into(), what: "it is too long" });
            }
            Ok(_) => fs::read(path).map_err(io)?,
        };
        Self::decode(&text, path).map(Some)
    }

    /// Removes the record of an image that is gone, durably: whatever is made in its place is another disk. Was there one?
    pub fn forget_gone(image: &Path) -> Result<bool, RecordError> {
        let path = Self::path_of(image);
        if fs::symlink_metadata(image).is_ok() || !path.exists() {
            return Ok(false);
        }
        let removed = fs::remove_file(&path).and_then(|()| sync_dir_of(&path));
        removed.map_err(|source| RecordError::Io { path, action: "remove", source })?;
        Ok(true)
    }

    fn decode(text: &[u8], path: &Path) -> Result<Self, RecordError> {
        let damaged = |what| RecordError::Damaged { path: path.into(), what };
        let body = text.strip_suffix(b"\n").ok_or(damaged("its end is missing"))?;
        let at = body.iter().rposition(|byte| *byte == b'\n').ok_or(damaged("its checksum is missing"))?;
        let (json, sum) = (&body[..at], &body[at + 1..]);
        if format!("{:08x}", crc32c::crc32c(json)).as_bytes() != sum {
            return Err(damaged("its checksum is wrong"));
        }
        let record: serde_json::Value = serde_json::from_slice(json).map_err(|_| damaged("it is not JSON"))?;
        let version = record["version"].as_u64().and_then(|version| u32::try_from(version).ok());
        match version.ok_or(damaged("it has no version"))? {
            RECORD_VERSION => serde_json::from_value(record).map_err(|_| damaged("a field is missing")),
            version => Err(RecordError::Version { path: path.into(), version }),
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec(self).expect("plain data always has a JSON form");
        let sum = crc32c::crc32c(&text);
        text.extend_from_slice(format!("\n{sum:08x}\n").as_bytes());
        text
    }

    /// Writes it in the place of what was there, durably: after a crash there is the one or the other.
    pub fn write(&self, path: &Path) -> Result<(), RecordError> {
        let io = |action| move |source| RecordError::Io { path: path.into(), action, source };
        make_device_dir(path).map_err(io("make the directory"))?;
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(".new");
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&fresh).map_err(io("write"))?;
        file.write_all(&self.encode()).map_err(io("write"))?;
        file.sync_all().map_err(io("sync"))?;
        fs::rename(&fresh, path).map_err(io("rename into place"))?;
        sync_dir_of(path).map_err(io("sync the directory"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_the_documented_form_and_damage_is_noticed() {
        let deed = Deed { disk: Uuid::from_u128(1), epoch: 2, given_to: Some(Uuid::from_u128(3)) };
        let record = Record { version: 1, deed, identity: Some("image:ab".into()), mode: Some(0o644) };
        let text = record.encode();
        let json = r#"{"version":1,"disk":"00000000-0000-0000-0000-000000000001","epoch":2,"given_to":"00000000-0000-0000-0000-000000000003","identity":"image:ab","mode":420}"#;
        assert_eq!(
            String::from_utf8(text.clone()).unwrap(),
            format!("{json}\n{:08x}\n", crc32c::crc32c(json.as_bytes()))
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.handoff");
        assert_eq!(Record::read(&path).unwrap(), None);
        record.write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), Some(record));
        for at in 0..text.len() {
            let mut bad = text.clone();
            bad[at] ^= 0x11;
            assert!(Record::decode(&bad, &path).is_err(), "byte {at}");
            assert!(Record::decode(&text[..at], &path).is_err(), "cut at {at}");
        }
        let later = br#"{"version":2}"#;
        let later = [&later[..], format!("\n{:08x}\n", crc32c::crc32c(later)).as_bytes()].concat();
        assert!(matches!(Record::decode(&later, &path), Err(RecordError::Version { version: 2, .. })));
    }
}
