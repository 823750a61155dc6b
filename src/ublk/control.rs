//! Commands to /dev/ublk-control.
//!
//! Each runs on a thread of its own with a ring of its own. They are rare, some wait for the queues or for
//! the disk's users, and in some kernels one may hang where no signal reaches it: whoever asked can go on
//! and say so.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::UblkError;
use super::abi::{Command, FEATURES_BYTES, Features};
use crate::uring::CommandRing;

/// Where commands go.
const CONTROL_PATH: &str = "/dev/ublk-control";
/// How long a command that waits for nobody may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// A command under way.
pub(super) struct Pending {
    command: Command,
    answer: Receiver<Result<Vec<u8>, UblkError>>,
}

impl Pending {
    /// The answer, or nothing if there is none in time. The command goes on.
    pub(super) fn wait(&self, patience: Duration) -> Option<Result<Vec<u8>, UblkError>> {
        match self.answer.recv_timeout(patience) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(self.died())),
        }
    }

    /// The answer, in time or not at all.
    pub(super) fn expect_within(self, patience: Duration) -> Result<Vec<u8>, UblkError> {
        self.wait(patience).unwrap_or_else(|| Err(self.hangs(patience)))
    }

    /// The error of a command that does not end.
    pub(super) fn hangs(&self, patience: Duration) -> UblkError {
        UblkError::Hangs { command: self.command.name(), seconds: patience.as_secs() }
    }

    /// The answer with other things that may happen before it.
    pub(super) fn answer(&self) -> &Receiver<Result<Vec<u8>, UblkError>> {
        &self.answer
    }

    pub(super) fn died(&self) -> UblkError {
        UblkError::Thread(io::Error::other("the thread of a control command died"))
    }
}

/// Sends a command about a device. `buffer` is what the driver reads or fills; it comes back as the answer.
pub(super) fn begin(command: Command, device: u32, buffer: Vec<u8>, data: u64) -> Result<Pending, UblkError> {
    let control = open()?;
    let (said, answer) = crossbeam::channel::bounded(1);
    let run = move || {
        // Whoever asked may have given up.
        let _ = said.send(run(&control, command, device, buffer, data));
    };
    std::thread::Builder::new().name("ublk-control".into()).spawn(run).map_err(UblkError::Thread)?;
    Ok(Pending { command, answer })
}

/// Sends a command and waits for its end.
pub(super) fn call(command: Command, device: u32, buffer: Vec<u8>, data: u64) -> Result<Vec<u8>, UblkError> {
    begin(command, device, buffer, data)?.expect_within(PATIENCE)
}

fn run(control: &File, command: Command, device: u32, mut buffer: Vec<u8>, data: u64) -> Result<Vec<u8>, UblkError> {
    let mut ring = CommandRing::new()?;
    let place = match buffer.len() {
        0 => (0, 0),
        len => (buffer.as_mut_ptr() as u64, len as u16),
    };
    let payload = Command::payload(device, place, data);
    // SAFETY: the driver reads and writes `buffer` only, and at most its length, which the payload names;
    // it is this function's own, and `run` returns when the driver is done with it.
    let result = unsafe { ring.run(control.as_fd(), command.code(), payload) };
    match result {
        Ok(_) => Ok(buffer),
        Err(source) => Err(UblkError::Command { command: command.name(), source }),
    }
}

fn open() -> Result<File, UblkError> {
    OpenOptions::new().read(true).write(true).open(CONTROL_PATH).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => UblkError::NoDriver,
        io::ErrorKind::PermissionDenied => UblkError::Denied,
        _ => UblkError::Open { path: CONTROL_PATH.into(), source: e },
    })
}

/// What the driver can do; nothing is known about drivers before Linux 6.5.
pub(super) fn driver_features() -> Result<Features, UblkError> {
    match call(Command::GetFeatures, 0, vec![0; FEATURES_BYTES], 0) {
        Ok(bytes) => Ok(Features::from_bits_retain(u64::from_ne_bytes(super::abi::take(&bytes, 0)))),
        Err(UblkError::Command { .. }) => Ok(Features::empty()),
        Err(e) => Err(e),
    }
}

/// Can this process make ublk devices? The error says why not.
pub fn probe() -> Result<(), UblkError> {
    open()?;
    if nix::unistd::geteuid().is_root() { Ok(()) } else { Err(UblkError::Denied) }
}
