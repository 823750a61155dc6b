//! One of the two QEMUs: what is known of it, and a connection that is made again when it breaks.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, bounded};
use serde::Serialize;
use serde_json::{Value, json};

use super::plan::{Machine, Migration, Run};
use crate::qmp::{Address, Event, Qmp, QmpError};

/// How long a broken way to a QEMU is waited for. One that ended is known at once: nobody listens there.
const RECONNECT: Duration = Duration::from_secs(5);
/// Pause between two attempts; after that they are made beside whatever else there is to do.
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
    dialling: Option<Receiver<Result<Qmp, QmpError>>>,
    /// It is not tried again.
    given_up: bool,
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
        (side.qmp, side.given_up) = (Ok(qmp), false);
        side.see();
        Ok(side)
    }

    /// One that is out of reach from the start, and stays so: it was not looked at, and must not be used unseen.
    pub(super) fn lost(role: &'static str, address: &Address, why: String) -> Self {
        let machine = Machine { run: Run::Other("unknown".into()), migration: Migration::None };
        Self {
            role,
            address: address.clone(),
            qmp: Err(why),
            dialling: None,
            given_up: true,
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
            Err(_) => self.dial(None),
        }
        if self.looked.is_none_or(|looked| looked.elapsed() > FRESH) {
            self.see();
        }
        self.qmp.as_ref().map(|_| self.machine.clone()).map_err(|why| why.clone())
    }

    /// Asks how it is, however fresh what is known.
    pub(super) fn ask_again(&mut self) {
        self.looked = None;
        // If it is out of reach, what was known last stays.
        let _ = self.look();
    }

    /// Asks, on another connection if this one turns out to be broken.
    fn see(&mut self) {
        if self.qmp.is_err() {
            return;
        }
        if let Err(why) = self.refresh() {
            self.reconnect(why);
            if let Err(why) = self.refresh() {
                self.qmp = Err(why);
            }
        }
    }

    fn refresh(&mut self) -> Result<(), String> {
        let qmp = self.qmp.as_mut().map_err(|why| why.clone())?;
        let [status, migration] = qmp.ask(["query-status", "query-migrate"]).map_err(|e| e.to_string())?;
        self.machine = machine(&status, &migration);
        self.memory = memory(&migration).unwrap_or(self.memory);
        self.downtime_ms = migration["downtime"].as_f64().or(self.downtime_ms);
        self.looked = Some(Instant::now());
        Ok(())
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

    /// Waits for another connection, for a while.
    fn reconnect(&mut self, why: String) {
        // The old one ends before: QEMU serves one at a time.
        self.qmp = Err(why);
        self.looked = None;
        let until = Instant::now() + RECONNECT;
        while self.qmp.is_err() && !self.given_up && Instant::now() < until {
            self.dial(Some(until));
        }
    }

    /// Sees what has become of the attempt to get through again, or begins one. Who waits is told when there is nothing
    /// more to wait for.
    fn dial(&mut self, until: Option<Instant>) {
        if self.given_up {
            return;
        }
        let dialling = self.dialling.take().unwrap_or_else(|| dialled(self.address.clone(), self.role));
        let result = match until {
            Some(until) => dialling.recv_deadline(until).ok(),
            None => dialling.try_recv().ok(),
        };
        match result {
            Some(Ok(qmp)) => self.qmp = Ok(qmp),
            Some(Err(error)) if is_nobody(&self.address, &error) => {
                self.given_up = true;
                self.qmp = Err(format!("{} ({}) has ended", self.role, self.address));
            }
            Some(Err(_)) => {}
            None => self.dialling = Some(dialling),
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

/// Connects, on a thread of its own; a failure is told after a pause.
fn dialled(address: Address, role: &'static str) -> Receiver<Result<Qmp, QmpError>> {
    let (send, receive) = bounded(1);
    std::thread::spawn(move || {
        let result = Qmp::connect(&address, role);
        if matches!(&result, Err(error) if !is_nobody(&address, error)) {
            sleep(PACE);
        }
        // Nobody may wait for it any more.
        let _ = send.send(result);
    });
    receive
}

/// Does nobody listen there any more? Of another host that cannot be told: its address may be a forwarded port.
fn is_nobody(address: &Address, error: &QmpError) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    let is_local = matches!(address, Address::Unix(_));
    is_local
        && matches!(error, QmpError::Unreachable { source, .. } if matches!(source.kind(), NotFound | ConnectionRefused))
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
    match migrate["status"].as_str().unwrap_or_default() {
        // It listens, and nothing has come yet.
        "setup" if run == Run::Incoming => Machine { run, migration: Migration::None },
        status => Machine { run, migration: migration(status) },
    }
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
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// A QEMU that serves one connection at a time, as real ones do. The first that is asked gets no sense.
    fn one_at_a_time(listener: TcpListener) {
        for (turn, stream) in listener.incoming().enumerate() {
            answer(&stream.unwrap(), usize::MAX, turn == 0);
        }
    }

    /// Greets, and answers at most so many commands.
    fn answer(mut stream: &TcpStream, commands: usize, is_mad: bool) {
        let greeting = json!({ "QMP": { "version": { "qemu": { "major": 9, "minor": 0 } }, "capabilities": [] } });
        writeln!(stream, "{greeting}").unwrap();
        for line in BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok).take(commands) {
            let asked: Value = serde_json::from_str(&line).unwrap();
            let answer = match asked["execute"].as_str().unwrap() {
                "query-status" if is_mad => "nonsense".to_owned(),
                "query-status" => json!({ "return": { "status": "running" }, "id": asked["id"] }).to_string(),
                _ => json!({ "return": {}, "id": asked["id"] }).to_string(),
            };
            if writeln!(stream, "{answer}").is_err() {
                break;
            }
        }
    }

    fn serve() -> (Address, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        (Address::Tcp(listener.local_addr().unwrap().to_string()), listener)
    }

    #[test]
    fn a_broken_connection_makes_room_for_the_next() {
        let (address, listener) = serve();
        std::thread::spawn(|| one_at_a_time(listener));
        let mut side = Side::connect("it", &address).unwrap();
        assert_eq!(side.look().map(|machine| machine.run), Ok(Run::Running));
    }

    #[test]
    fn a_side_that_comes_back_is_found_again() {
        let (address, listener) = serve();
        let server = std::thread::spawn(move || answer(&listener.accept().unwrap().0, 3, false));
        let mut side = Side::connect("it", &address).unwrap();
        server.join().unwrap();
        let lost = side.look().unwrap_err();
        assert!(lost.contains("hung up"), "{lost}");
        // Who looks again does not wait again.
        let began = Instant::now();
        assert_eq!((side.look(), side.look()), (Err(lost.clone()), Err(lost)));
        assert!(began.elapsed() < RECONNECT);
        let Address::Tcp(place) = &address else { unreachable!() };
        let listener = TcpListener::bind(place).unwrap();
        std::thread::spawn(|| one_at_a_time(listener));
        let deadline = Instant::now() + Duration::from_secs(60);
        while side.look().is_err() {
            assert!(Instant::now() < deadline, "it is never dialled again");
            sleep(PACE);
        }
        assert_eq!(side.look().map(|machine| machine.run), Ok(Run::Running));
    }

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
        assert_eq!(at("inmigrate", json!({ "status": "setup" })).migration, Migration::None);
        // A state that is not known yet is a migration under way, which is never interfered with.
        assert_eq!(at("inmigrate", json!({ "status": "warming-up" })).migration, Migration::Moving);
    }
}
