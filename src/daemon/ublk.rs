//! What a ublk device asks of its daemon besides serving it: to be known again by whoever comes after.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::{DaemonError, DaemonOptions, Standby, ublksrv};
use crate::control::{Claim, Entry, RunDir, UblkEntry};
use crate::ublk::{self, Device, UblkError, Wanted};

/// Where udev's rule looks for the name of /dev/ublkbN, in a file N, wherever the run directory is.
const NAMES: &str = "/run/blkferry/ublk";

/// How the block device is to be.
#[derive(Clone, Copy, Debug)]
pub struct UblkOptions {
    /// The N of /dev/ublkbN.
    pub id: Option<u32>,
    /// Hardware queues.
    pub queues: u16,
    /// Tags of a queue.
    pub depth: u16,
    /// Logical block size, if not as the source has it.
    pub logical_bytes: Option<u64>,
    /// Made by ublksrv's `ublk`, which wants to know of it.
    pub ublksrv: bool,
    /// The device of a daemon that died: its id, and the mark by which it is known.
    pub recover: Option<(u32, u64)>,
}

impl UblkOptions {
    /// Makes the device, or takes it over.
    pub(super) fn device(&self) -> Result<Device, UblkError> {
        match self.recover {
            Some((id, mark)) => Device::take_over(id, mark),
            None => {
                // The low half of the word is left to whoever else may use it.
                let mark = (Uuid::new_v4().as_u128() as u64) << 32;
                Device::add(&Wanted { id: self.id, queues: self.queues, depth: self.depth, mark })
            }
        }
    }

    /// What another daemon would need.
    pub(super) fn entry(&self, options: &DaemonOptions, device: &Device, metadata: &Path) -> UblkEntry {
        let info = device.info();
        UblkEntry {
            id: info.id,
            mark: info.mark,
            source: options.source.to_string(),
            metadata: metadata.into(),
            hydrate: options.hydrate.to_string(),
            on_source_loss: options.on_source_loss.to_string(),
            ublksrv: self.ublksrv,
            on_write: options.standby == Some(Standby::OnWrite),
            no_source: options.no_source,
            export: options.export.as_ref().map(ToString::to_string),
        }
    }
}

/// An attach must not bury a device that waits for its daemon: under this name, or over this cache.
pub(super) fn refuse_orphans(run_dir: &RunDir, claim: &Claim, options: &DaemonOptions) -> Result<(), DaemonError> {
    let cache = std::path::absolute(&options.cache).unwrap_or_else(|_| options.cache.clone());
    let dead = run_dir.entries().unwrap_or_default().into_iter().filter(|(_, alive)| !alive).map(|(entry, _)| entry);
    let same_cache = dead.filter(|entry| entry.cache == cache);
    for entry in claim.previous().into_iter().chain(same_cache) {
        if let Some(ublk) = entry.ublk.as_ref().filter(|ublk| ublk::is_orphan(ublk.id, ublk.mark)) {
            return Err(DaemonError::Orphan { name: entry.name, id: ublk.id });
        }
    }
    Ok(())
}

/// Does a block device of this name wait for another daemon?
pub fn waits_for_daemon(run_dir: &RunDir, name: &str) -> bool {
    let dead = run_dir.dead(name).ok().flatten();
    dead.and_then(|entry| entry.ublk).is_some_and(|ublk| ublk::is_orphan(ublk.id, ublk.mark))
}

/// What to run to take over the device of a daemon that died.
pub fn recovery_of(run_dir: &RunDir, name: &str) -> Result<DaemonOptions, DaemonError> {
    let unreadable = |e| DaemonError::Io("the run directory cannot be read", e);
    let unknown = || DaemonError::NothingToRecover(name.into());
    let Some(entry) = run_dir.dead(name).map_err(unreadable)? else {
        let is_there = run_dir.entries().map_err(unreadable)?.iter().any(|(entry, _)| entry.name == name);
        return Err(if is_there { DaemonError::Alive(name.into()) } else { unknown() });
    };
    let Entry { name, cache, ublk, .. } = entry;
    let ublk = ublk.ok_or_else(unknown)?;
    let damaged = |what: String| DaemonError::Entry { name: name.clone(), what };
    Ok(DaemonOptions {
        // One that was in standby stays so.
        standby: Some(if ublk.on_write { Standby::OnWrite } else { Standby::Manual }),
        export: ublk.export.map(|at| at.parse()).transpose().map_err(|e| damaged(format!("{e}")))?,
        source: ublk.source.parse().map_err(|e| damaged(format!("{e}")))?,
        cache,
        metadata: Some(ublk.metadata),
        hydrate: ublk.hydrate.parse().map_err(|e| damaged(format!("{e}")))?,
        on_source_loss: ublk.on_source_loss.parse().map_err(|e| damaged(format!("{e}")))?,
        socket: None,
        socket_owner: None,
        block_bytes: None,
        forget_unflushed: false,
        no_source: ublk.no_source,
        overwrite: false,
        ublk: Some(UblkOptions {
            id: None,
            queues: 0,
            depth: 0,
            logical_bytes: None,
            ublksrv: ublk.ublksrv,
            recover: Some((ublk.id, ublk.mark)),
        }),
        name,
    })
}

/// Removes what a dead daemon left: its block device too.
/// `Ok(false)`: there was nothing.
pub fn forget(run_dir: &RunDir, name: &str) -> Result<bool, DaemonError> {
    let dead = run_dir.dead(name).map_err(|e| DaemonError::Io("the run directory cannot be read", e))?;
    if let Some(ublk) = dead.and_then(|entry| entry.ublk) {
        ublk::remove_orphan(ublk.id, ublk.mark).map_err(|e| DaemonError::Orphaned { id: ublk.id, source: e })?;
        withdraw(&ublk);
    }
    Ok(run_dir.forget(name)?)
}

/// Writes the name down for udev, which makes it a link in /dev/blkferry when the device appears.
pub(super) fn announce(ublk: &UblkEntry, name: &str) -> io::Result<()> {
    let file = name_file(ublk.id);
    // Whatever the umask is: nobody else may write here.
    DirBuilder::new().recursive(true).mode(0o755).create(NAMES)?;
    std::fs::write(file, name)
}

/// Takes back what others were told of the device; gone already is as good.
pub(super) fn withdraw(ublk: &UblkEntry) {
    let _ = std::fs::remove_file(name_file(ublk.id));
    if ublk.ublksrv {
        ublksrv::remove(ublk.id);
    }
}

fn name_file(id: u32) -> PathBuf {
    Path::new(NAMES).join(id.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_takes_over_goes_on_as_it_was_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(dir.path().into());
        for (number, on_write) in [(0, true), (1, false)] {
            let name = format!("d{number}");
            let ublk = UblkEntry {
                id: 7,
                mark: 1,
                source: "nbd://a/".into(),
                metadata: "/m".into(),
                hydrate: "off".into(),
                on_source_loss: "fail-after:5s".into(),
                ublksrv: true,
                on_write,
                no_source: on_write,
                export: on_write.then(|| "[::1]:10809".into()),
            };
            let entry = Entry {
                name: name.clone(),
                pid: 1,
                cache: "/c".into(),
                control: "/s".into(),
                uri: "/dev/ublkb7".into(),
                ublk: Some(ublk),
            };
            let mut claim = run_dir.claim(&name).unwrap();
            claim.publish(&entry).unwrap();
            // Its daemon is dead.
            drop(claim);
            let options = recovery_of(&run_dir, &name).unwrap();
            let wanted = if on_write { Standby::OnWrite } else { Standby::Manual };
            assert_eq!(options.standby, Some(wanted));
            assert_eq!(
                (options.hydrate.to_string(), options.on_source_loss.to_string()),
                ("off".into(), "fail-after:5s".into())
            );
            assert_eq!((options.export.is_some(), options.no_source), (on_write, on_write));
            assert_eq!(options.ublk.unwrap().recover, Some((7, 1)));
        }
    }
}
