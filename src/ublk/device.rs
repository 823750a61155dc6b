//! A device from ADD_DEV to DEL_DEV, and what a daemon takes over from one that died.
//!
//! ```text
//!   add ──► set_params ──► (queues fetch) ──► start ──► live ──► stop ──► delete
//!                                                        │ daemon dies
//!                         (queues fetch) ◄── take_over ◄─┘ quiesced
//! ```
//! Invariant: a device that never went live does not outlive this value.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;
use nix::libc;

use super::abi::{ANY_ID, Command, DeviceInfo, DeviceState, Features, INFO_BYTES, take};
use super::control::{self, PATIENCE};
use super::params::{PARAMS_BYTES, Params};
use super::{UblkError, users};

/// Largest read or write: the size of a tag's buffer.
pub const MAX_IO_BYTES: u32 = 512 << 10;
/// Most queues that a device may be asked for; the kernel makes no more than there are CPUs.
pub const MAX_QUEUES: u16 = 16;
/// Most tags that a queue may be asked for.
pub const MAX_DEPTH: u16 = 1024;
/// START_DEV looks for partitions, which reads blocks that may still be far away.
const START_PATIENCE: Duration = Duration::from_secs(120);
/// How long the requests under way may take before those that wait for something else are let go.
const STOP_GRACE: Duration = Duration::from_secs(3);
/// DEL_DEV waits for the last one who has the device open.
const DELETE_PATIENCE: Duration = Duration::from_secs(5);
/// A daemon that was just killed is let go of by the kernel in its own time, which it tells nobody.
const QUIESCE_PATIENCE: Duration = Duration::from_secs(20);
const QUIESCE_PACE: Duration = Duration::from_millis(20);

/// What a device is asked to be.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// The N of /dev/ublkbN; the first free one if there is none.
    pub id: Option<u32>,
    /// Hardware queues.
    pub queues: u16,
    /// Tags of a queue.
    pub depth: u16,
    /// A word by which the device is known again.
    pub mark: u64,
}

/// A device that this process serves.
pub struct Device {
    info: DeviceInfo,
    driver: Features,
    recovered: bool,
    /// Made here, and to be deleted again unless it goes live.
    fresh: bool,
}

impl Device {
    /// Makes a device. It is not there for anybody until [`Device::start`].
    pub fn add(wanted: &Wanted) -> Result<Self, UblkError> {
        let driver = control::driver_features()?;
        let features = Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE | Features::CMD_IOCTL_ENCODE;
        let id = wanted.id.unwrap_or(ANY_ID);
        let asked = DeviceInfo {
            id,
            queues: wanted.queues,
            depth: wanted.depth,
            state: DeviceState::Dead,
            max_io_bytes: MAX_IO_BYTES,
            daemon_pid: 0,
            features,
            mark: wanted.mark,
        };
        let answer = control::call(Command::Add, id, asked.encode().into(), 0).map_err(|e| match e.errno() {
            Some(libc::EEXIST) => UblkError::Taken(id),
            Some(libc::EPERM | libc::EACCES) => UblkError::Denied,
            Some(libc::EOPNOTSUPP | libc::ENOTTY) => UblkError::TooOld,
            _ => e,
        })?;
        let info = DeviceInfo::decode(&take::<INFO_BYTES>(&answer, 0));
        let device = Self { info, driver, recovered: false, fresh: true };
        let cleared = features.difference(info.features);
        if !cleared.is_empty() {
            log::warn!("ublk: this kernel does not offer {}", cleared.names().join(", "));
        }
        if info.queues < wanted.queues {
            log::warn!("ublk: {} queues instead of {}: one a CPU is the most", info.queues, wanted.queues);
        }
        Ok(device)
    }

    /// Takes a device over from a daemon that died: it must be the one with this mark, and quiesced, or
    /// about to be.
    pub fn take_over(id: u32, mark: u64) -> Result<Self, UblkError> {
        let started = Instant::now();
        loop {
            let info = look(id, mark)?;
            let ended = match info.state {
                DeviceState::Quiesced | DeviceState::FailIo => {
                    match control::call(Command::StartRecovery, id, Vec::new(), 0) {
                        Ok(_) => {
                            let driver = control::driver_features()?;
                            return Ok(Self { info, driver, recovered: true, fresh: false });
                        }
                        // The dead daemon's last file descriptor is still being closed.
                        Err(e) if e.errno() == Some(libc::EBUSY) => e,
                        Err(e) => return Err(e),
                    }
                }
                DeviceState::Live => UblkError::NotQuiesced { id, state: "live".into() },
                other => return Err(UblkError::NotQuiesced { id, state: format!("{other:?}").to_lowercase() }),
            };
            if started.elapsed() > QUIESCE_PATIENCE {
                return Err(ended);
            }
            std::thread::sleep(QUIESCE_PACE);
        }
    }

    /// What the driver says about it.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// What its users open.
    pub fn path(&self) -> PathBuf {
        block_path(self.info.id)
    }

    /// Is it one that a dead daemon left?
    pub fn is_recovered(&self) -> bool {
        self.recovered
    }

    /// Can another daemon take over if this one dies?
    pub fn is_recoverable(&self) -> bool {
        self.info.features.contains(Features::USER_RECOVERY)
    }

    /// Tells sizes and limits. A device that was taken over keeps those it has.
    pub fn set_params(&self, params: &Params) -> Result<(), UblkError> {
        control::call(Command::SetParams, self.info.id, params.encode().into(), 0).map(drop)
    }

    /// Size in bytes and logical block size as they are.
    pub fn sizes(&self) -> Result<(u64, u64), UblkError> {
        let answer = control::call(Command::GetParams, self.info.id, Params::question().into(), 0)?;
        Ok(Params::sizes(&take::<PARAMS_BYTES>(&answer, 0)))
    }

    /// Goes live: all queues must be fetching, or about to. An error of a queue ends the wait.
    pub fn start(&mut self, queue_errors: &Receiver<UblkError>) -> Result<(), UblkError> {
        let command = if self.recovered { Command::EndRecovery } else { Command::Start };
        let pending = control::begin(command, self.info.id, Vec::new(), u64::from(std::process::id()))?;
        let outcome = crossbeam::select! {
            recv(pending.answer()) -> answer => answer.unwrap_or_else(|_| Err(pending.died())).map(drop),
            recv(queue_errors) -> error => Err(error.unwrap_or_else(|_| pending.died())),
            default(START_PATIENCE) => Err(pending.hangs(START_PATIENCE)),
        };
        if outcome.is_ok() {
            self.fresh = false;
        }
        outcome
    }

    /// Stops it on the condition that nobody has it open. A driver before Linux 7.0 cannot promise that
    /// nobody opens it between the look and the stop.
    pub fn close(&self) -> Result<(), UblkError> {
        let id = self.info.id;
        let busy = |by| Err(UblkError::Busy { id, by });
        if let Some(by) = users::of(id) {
            return busy(by);
        }
        if !self.driver.contains(Features::SAFE_STOP_DEV) {
            return Ok(());
        }
        match control::call(Command::TryStop, id, Vec::new(), 0) {
            Err(e) if e.errno() == Some(libc::EBUSY) => busy("somebody has it open".into()),
            other => other.map(drop),
        }
    }

    /// Stops it: its users get errors from now on, the queues end. Requests under way are finished;
    /// `let_go` is called if that takes long, and must see to it that they end.
    pub fn stop(&self, let_go: impl FnOnce()) -> Result<(), UblkError> {
        let pending = control::begin(Command::Stop, self.info.id, Vec::new(), 0)?;
        let answer = pending.wait(STOP_GRACE).unwrap_or_else(|| {
            let_go();
            pending.expect_within(PATIENCE)
        });
        match answer {
            // Somebody else has removed it.
            Err(e) if e.errno() == Some(libc::ENODEV) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Removes it. The queues must have ended and let go of the character device.
    pub fn delete(mut self) -> Result<(), UblkError> {
        self.fresh = false;
        delete(self.info.id)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.fresh
            && let Err(e) = delete(self.info.id)
        {
            log::warn!("ublk device {} stays behind: {e}", self.info.id);
        }
    }
}

/// The node that users of a device open.
pub fn block_path(id: u32) -> PathBuf {
    format!("/dev/ublkb{id}").into()
}

fn delete(id: u32) -> Result<(), UblkError> {
    match control::begin(Command::Delete, id, Vec::new(), 0)?.expect_within(DELETE_PATIENCE) {
        // Somebody else was faster.
        Err(e) if e.errno() == Some(libc::ENODEV) => Ok(()),
        other => other.map(drop),
    }
}

/// How a device is, if it is the one with this mark.
fn look(id: u32, mark: u64) -> Result<DeviceInfo, UblkError> {
    let answer = control::call(Command::GetInfo, id, vec![0; INFO_BYTES], 0).map_err(|e| match e.errno() {
        Some(libc::ENODEV | libc::EINVAL | libc::ENOENT) => UblkError::Gone(id),
        _ => e,
    })?;
    let info = DeviceInfo::decode(&take::<INFO_BYTES>(&answer, 0));
    if info.mark == mark { Ok(info) } else { Err(UblkError::Foreign(id)) }
}

/// Is the device with this mark still there, without a daemon?
pub fn is_orphan(id: u32, mark: u64) -> bool {
    look(id, mark).is_ok()
}

/// Removes what a dead daemon left; its users get errors. A device that is gone already is as good.
pub fn remove_orphan(id: u32, mark: u64) -> Result<(), UblkError> {
    match look(id, mark) {
        Ok(_) => {}
        // Gone, or the id was given to somebody else after a boot.
        Err(UblkError::Gone(_) | UblkError::Foreign(_) | UblkError::NoDriver) => return Ok(()),
        Err(e) => return Err(e),
    }
    control::call(Command::Stop, id, Vec::new(), 0)?;
    delete(id)
}
