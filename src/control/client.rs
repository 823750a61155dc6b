//! The command line's end of the control socket.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::protocol::{Answer, Request};
use super::rundir::RunDir;
use crate::uring::{connect_to_living, is_dying};

/// A daemon answers quickly, but a last commit of a slow disk may take its time.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why a daemon did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No such device.
    #[error("no device named {0} is running; see `blkferry list`")]
    NotRunning(String),
    /// Somebody else's.
    #[error("{path}: permission denied: the daemon of {name} answers the user that runs it, and root")]
    Forbidden {
        /// Name of the device.
        name: String,
        /// The control socket.
        path: PathBuf,
    },
    /// The connection broke.
    #[error("the daemon of {0} does not answer: {1}")]
    Broken(String, #[source] io::Error),
    /// It said no.
    #[error("{0}")]
    Refused(String),
}

/// A connection to a daemon.
pub struct Client {
    name: String,
    pid: i32,
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the daemon of a device.
    pub fn connect(run: &RunDir, name: &str) -> Result<Self, ControlError> {
        Self::connect_to(&run.control_socket(name), name)
    }

    fn connect_to(path: &Path, name: &str) -> Result<Self, ControlError> {
        let (stream, pid) = connect_to_living(path).map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied => ControlError::Forbidden { name: name.into(), path: path.into() },
            _ => ControlError::NotRunning(name.into()),
        })?;
        Ok(Self { name: name.into(), pid, reader: BufReader::new(stream) })
    }

    /// Asks, and waits for the answer; progress goes to `progress`.
    pub fn ask<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        mut progress: impl FnMut(serde_json::Value),
    ) -> Result<T, ControlError> {
        let (name, pid) = (self.name.clone(), self.pid);
        let broken = |e: io::Error| match e.kind() {
            // Killed, and its socket outlives it by a moment.
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof
                if is_dying(pid) =>
            {
                ControlError::NotRunning(name.clone())
            }
            _ => ControlError::Broken(name.clone(), e),
        };
        let mut line = serde_json::to_vec(request).expect("plain data serializes");
        line.push(b'\n');
        let patience = PATIENCE + request.may_wait();
        self.reader.get_ref().set_read_timeout(Some(patience)).map_err(broken)?;
        self.reader.get_mut().write_all(&line).map_err(broken)?;
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line).map_err(broken)? == 0 {
                return Err(broken(io::ErrorKind::UnexpectedEof.into()));
            }
            match serde_json::from_str(&line).map_err(|e| broken(e.into()))? {
                Answer::Ok(value) => return Ok(value),
                Answer::Error(line) => return Err(ControlError::Refused(line)),
                Answer::Progress(value) => progress(value),
            }
        }
    }
}
