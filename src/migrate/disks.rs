//! The devices at the destination, each with a daemon of its own; all are asked at once.

use std::time::{Duration, Instant};

use crossbeam::channel::bounded;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::driver::NotActive;
use super::plan::Disk;
use crate::control::{Client, ControlError, Request, RunDir, State, Status, Taken};

/// How long a daemon may take to say how it is.
pub(super) const STATUS_PATIENCE: Duration = Duration::from_secs(5);
/// How long a daemon may take beyond what it waits for others.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a daemon made of a request.
#[derive(Debug)]
pub enum Asked<T> {
    /// Done.
    Done(T),
    /// Not done, and why.
    Refused(String),
    /// No daemon has heard it.
    NobodyThere(String),
    /// Perhaps done.
    Unknown(String),
}

impl<T> Asked<T> {
    /// One clear line if it was not done.
    pub fn result(self) -> Result<T, String> {
        match self {
            Self::Done(value) => Ok(value),
            Self::Refused(why) | Self::NobodyThere(why) | Self::Unknown(why) => Err(why),
        }
    }
}

/// Asks all devices at once; each answer in its place.
pub fn ask_all<T: DeserializeOwned>(
    run: &RunDir,
    names: &[String],
    request: &Request,
    patience: Duration,
) -> Vec<Asked<T>> {
    let deadline = Instant::now() + patience;
    let started: Vec<_> = names
        .iter()
        .map(|name| {
            let (answer, answered) = bounded(1);
            let (run, name, request) = (run.clone(), name.clone(), request.clone());
            // A thread each, which is left to itself if its daemon hangs.
            std::thread::spawn(move || {
                let asked = Client::connect(&run, &name).and_then(|mut c| c.ask::<Value>(&request, |_| {}));
                // Nobody waits any longer: as good.
                let _ = answer.send(asked);
            });
            answered
        })
        .collect();
    let each = names.iter().zip(started);
    each.map(|(name, answered)| match answered.recv_deadline(deadline) {
        Ok(Ok(value)) => match serde_json::from_value(value) {
            Ok(value) => Asked::Done(value),
            Err(e) => Asked::Unknown(format!("the daemon of {name} is of another version: {e}")),
        },
        Ok(Err(ControlError::Refused(why))) if why.contains(name.as_str()) => Asked::Refused(why),
        Ok(Err(ControlError::Refused(why))) => Asked::Refused(format!("{name}: {why}")),
        Ok(Err(error @ (ControlError::NotRunning(_) | ControlError::Forbidden { .. }))) => {
            Asked::NobodyThere(error.to_string())
        }
        Ok(Err(error @ ControlError::Broken(..))) => Asked::Unknown(error.to_string()),
        Err(_) => Asked::Unknown(format!("the daemon of {name} did not answer within {} s", patience.as_secs())),
    })
    .collect()
}

/// How all devices are.
pub(super) fn statuses(run: &RunDir, names: &[String]) -> Vec<Result<Status, String>> {
    ask_all(run, names, &Request::Status, STATUS_PATIENCE).into_iter().map(Asked::result).collect()
}

/// A device, as far as it matters for the plan.
pub(super) fn disk(name: &str, status: &Result<Status, String>) -> Disk {
    let status = match status {
        Ok(status) => status,
        Err(why) => return Disk::Gone(why.clone()),
    };
    match status.state {
        State::Active | State::Degraded | State::Complete => Disk::Active,
        State::Standby => match &status.source.lost_reason {
            Some(why) => Disk::Unready(format!("device {name} has lost its source: {why}")),
            None => Disk::Ready,
        },
        State::Away => Disk::Unready(format!("device {name} was given to another host")),
        State::Failed => {
            Disk::Unready(format!("device {name} has failed: {}", status.failure.as_deref().unwrap_or("see its log")))
        }
    }
}

fn first_error<T>(asked: Vec<Asked<T>>) -> Result<Vec<T>, String> {
    asked.into_iter().map(Asked::result).collect()
}

/// Takes all.
pub(super) fn take(run: &RunDir, names: &[String], wait: Duration) -> Result<Vec<Taken>, String> {
    let request = Request::Take { wait_ms: wait.as_millis() as u64 };
    first_error(ask_all(run, names, &request, wait + PATIENCE))
}

/// Gives back all.
pub(super) fn call_off(run: &RunDir, names: &[String]) -> Result<(), String> {
    first_error(ask_all::<()>(run, names, &Request::CallOff, PATIENCE)).map(drop)
}

/// Lets all be written.
pub(super) fn activate(run: &RunDir, names: &[String], wait: Duration) -> Result<Vec<Taken>, NotActive> {
    let request = Request::Activate { wait_ms: wait.as_millis() as u64 };
    let asked = ask_all(run, names, &request, wait + PATIENCE);
    let all_refused = asked.iter().all(|asked| matches!(asked, Asked::Refused(_)));
    first_error(asked).map_err(|why| {
        let in_standby = |status: &Result<Status, String>| status.as_ref().is_ok_and(|s| s.state == State::Standby);
        NotActive { why, none: all_refused && statuses(run, names).iter().all(in_standby) }
    })
}

/// Activates all or none, for somebody who drives QEMU by hand.
pub fn activate_all(run: &RunDir, names: &[String], wait: Duration) -> Result<Vec<Taken>, String> {
    let mut standby = Vec::new();
    let mut some_active = false;
    for (name, status) in names.iter().zip(statuses(run, names)) {
        match disk(name, &status) {
            Disk::Ready => standby.push(name.clone()),
            // Its daemon may have taken it before the source was lost, and knows better.
            Disk::Unready(_) if status.as_ref().is_ok_and(|s| s.state == State::Standby) => standby.push(name.clone()),
            Disk::Active => some_active = true,
            Disk::Unready(why) | Disk::Gone(why) => return Err(why),
        }
    }
    if let Err(why) = take(run, &standby, wait) {
        if some_active {
            return Err(format!("{why}; other disks of these are active already: try again"));
        }
        return Err(match call_off(run, &standby) {
            Ok(()) => format!("{why}; nothing was activated, and the disks are the source's"),
            Err(e) => format!("{why}; nothing was activated, but not all was given back either: {e}"),
        });
    }
    activate(run, names, wait).map_err(|NotActive { why, .. }| format!("{why}; run the same command again"))
}
