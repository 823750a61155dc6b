//! One of the two QEMUs: what is known of it, and a connection that is made again when it breaks.

use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use super::plan::{Machine, Migration, Run};
use crate::qmp::{Address, Event, Qmp, QmpError};

/// How long a broken way to a QEMU is tried again. One that ended is known at once: nobody listens there.
const RECONNECT: Duration = Duration::from_secs(5);
const PACE: Duration = Duration::from_millis(300);
/// What is heard may be old by then.
const FRESH: Duration = Duration::from_millis(200);

/// How far a guest's memory is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Memory {
    /// What was sent.
    pub transferred_bytes: u64,
    /// What is still to be sent; the guest makes more of it.
    pub remaining_bytes: u64,
    /// All of it.
    pub total_bytes: u64,
    /// How fast it goes.
    pub rate_bytes_per_s: f64,
}

/// A moment, by two clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    pub(super) heard: Instant,
    pub(super) stamp: Duration,
}

impl From<&Event> for Moment {
    fn from(event: &Event) -> Self {
        Self { heard: event.heard, stamp: event.stamp }
    }
}

/// A QEMU.
pub(super) struct Side {
    role: &'static str,
    address: Address,
    qmp: Result<Qmp, String>,
    machine: Machine,
    looked: Option<Instant>,
    pub(super) memory: Memory,
    /// What it takes for the time that the guest stood still.
    pub(super) downtime_ms: Option<f64>,
    pub(super) stopped: Option<Moment>,
    pub(super) resumed: Option<Moment>,
}

impl Side {
    pub(super) fn connect(role: &'static str, address: &Address) -> Result<Self, QmpError> {
        let qmp = Qmp::connect(address, role)?;
        let mut side = Self::lost(role, address, String::new());
        side.qmp = Ok(qmp);
        side.refresh();
        Ok(side)
    }

    /// One that is out of reach.
    pub(super) fn lost(role: &'static str, address: &Address, why: String) -> Self {
        let machine = Machine { run: Run::Other("unknown".into()), migration: Migration::None };
        Self {
            role,
            address: address.clone(),
            qmp: Err(why),
            machine,
            looked: None,
            memory: Memory::default(),
            downtime_ms: None,
            stopped: None,
            resumed: None,
        }
    }

    /// The connection, for somebody who waits.
    pub(super) fn qmp(&self) -> Option<&Qmp> {
        self.qmp.as_ref().ok()
    }

    /// Has it do something.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let qmp = self.qmp.as_mut().map_err(|why| why.clone())?;
        self.looked = None;
        let error = match qmp.execute(command, arguments) {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if !error.is_refusal() {
            self.reconnect(error.to_string());
        }
        Err(error.to_string())
    }

    /// How it is; asks only if what was heard may be old.
    pub(super) fn look(&mut self) -> Result<Machine, String> {
        match self.qmp.as_mut().map(Qmp::events) {
            Ok(Ok(events)) => events.iter().for_each(|event| self.hear(event)),
            Ok(Err(error)) => self.reconnect(error.to_string()),
            Err(_) => {}
        }
        if self.looked.is_none_or(|looked| looked.elapsed() > FRESH) {
            self.refresh();
        }
        self.qmp.as_ref().map(|_| self.machine.clone()).map_err(|why| why.clone())
    }

    /// Asks how it is, however fresh what is known.
    pub(super) fn ask_again(&mut self) {
        self.looked = None;
        // If it is out of reach, what was known last stays.
        let _ = self.look();
    }

    fn refresh(&mut self) {
        let Ok(qmp) = &mut self.qmp else { return };
        match qmp.ask(["query-status", "query-migrate"]) {
            Ok([status, migration]) => {
                self.machine = machine(&status, &migration);
                self.memory = memory(&migration).unwrap_or(self.memory);
                self.downtime_ms = migration["downtime"].as_f64().or(self.downtime_ms);
                self.looked = Some(Instant::now());
            }
            Err(error) => self.reconnect(error.to_string()),
        }
    }

    fn hear(&mut self, event: &Event) {
        match event.name.as_str() {
            "STOP" => {
                self.stopped = Some(event.into());
                self.machine.run = Run::Stopped;
            }
            "RESUME" => {
                self.resumed = Some(event.into());
                self.machine.run = Run::Running;
            }
            "MIGRATION" => {
                let status = event.data["status"].as_str().unwrap_or_default();
                self.machine.migration = migration(status);
                // The state that follows from it has no event of its own.
                if self.machine.run == Run::Incoming || self.machine.migration == Migration::None {
                    self.looked = None;
                }
            }
            "SHUTDOWN" => self.looked = None,
            _ => {}
        }
    }

    fn reconnect(&mut self, why: String) {
        let began = Instant::now();
        self.looked = None;
        loop {
            match Qmp::connect(&self.address, self.role) {
                Ok(qmp) => {
                    self.qmp = Ok(qmp);
                    self.refresh();
                    return;
                }
                Err(QmpError::Unreachable { source, .. })
                    if matches!(self.address, Address::Unix(_))
                        && matches!(
                            source.kind(),
                            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
                        ) =>
                {
                    self.qmp = Err(format!("{} ({}) has ended", self.role, self.address));
                    return;
                }
                Err(_) if began.elapsed() > RECONNECT => {
                    self.qmp = Err(why);
                    return;
                }
                Err(_) => sleep(PACE),
            }
        }
    }

    /// Asks what it takes to see whether all fits.
    pub(super) fn capabilities(&mut self) -> Result<Vec<(String, bool)>, String> {
        let list = self.execute("query-migrate-capabilities", json!({}))?;
        let each = list.as_array().into_iter().flatten();
        Ok(each
            .filter_map(|c| Some((c["capability"].as_str()?.to_owned(), c["state"].as_bool().unwrap_or_default())))
            .collect())
    }

    pub(super) fn version(&self) -> String {
        self.qmp().map_or_else(String::new, |qmp| qmp.version().to_string())
    }
}

fn machine(status: &Value, migrate: &Value) -> Machine {
    let run = match status["status"].as_str().unwrap_or_default() {
        "running" => Run::Running,
        "inmigrate" => Run::Incoming,
        "postmigrate" => Run::MovedAway,
        "finish-migrate" => Run::Stopped,
        "paused" | "prelaunch" => Run::Paused,
        other => Run::Other(other.into()),
    };
    Machine { run, migration: migration(migrate["status"].as_str().unwrap_or_default()) }
}

fn migration(status: &str) -> Migration {
    match status {
        "" | "none" => Migration::None,
        "pre-switchover" => Migration::PreSwitchover,
        "device" => Migration::Switching,
        "completed" => Migration::Completed,
        "failed" => Migration::Failed("failed".into()),
        "cancelled" => Migration::Failed("was cancelled".into()),
        "cancelling" => Migration::Cancelling,
        // setup, active, wait-unplug, postcopy-…: something is on its way.
        _ => Migration::Moving,
    }
}

fn memory(migrate: &Value) -> Option<Memory> {
    let ram = migrate.get("ram")?;
    let bytes = |name: &str| ram[name].as_u64().unwrap_or_default();
    Some(Memory {
        transferred_bytes: bytes("transferred"),
        remaining_bytes: bytes("remaining"),
        total_bytes: bytes("total"),
        rate_bytes_per_s: ram["mbps"].as_f64().unwrap_or_default() * 1e6 / 8.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_of_old_and_new_qemus_are_understood() {
        let at = |status: &str, migrate: Value| machine(&json!({ "status": status }), &migrate);
        assert_eq!(at("running", json!({})), Machine { run: Run::Running, migration: Migration::None });
        assert_eq!(
            at("finish-migrate", json!({ "status": "pre-switchover" })),
            Machine { run: Run::Stopped, migration: Migration::PreSwitchover }
        );
        assert_eq!(
            at("postmigrate", json!({ "status": "completed" })),
            Machine { run: Run::MovedAway, migration: Migration::Completed }
        );
        // A state that is not known yet is a migration under way, which is never interfered with.
        assert_eq!(at("inmigrate", json!({ "status": "warming-up" })).migration, Migration::Moving);
    }
}
