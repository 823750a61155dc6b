//! A connection to a QEMU.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde_json::{Value, json};

use super::address::Address;

/// Longest wait for a connection, a greeting or an answer. QEMU answers at once unless its main loop is stuck.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest line: a list of all block nodes of a machine with hundreds of disks is some megabytes.
const MAX_LINE_BYTES: u64 = 32 << 20;
/// Most events that are kept for somebody who does not look.
const MAX_EVENTS: usize = 4096;

/// Why a QEMU did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// No connection.
    #[error("{who} cannot be reached: {source}; does it run, with -qmp there?")]
    Unreachable {
        /// Which QEMU.
        who: String,
        /// What the system said.
        source: io::Error,
    },
    /// No greeting.
    #[error("{0} does not greet: is another program connected to this QMP socket? It serves one at a time")]
    Silent(String),
    /// The connection ended.
    #[error("{0} hung up: it has ended, or the way to it is broken")]
    Closed(String),
    /// No answer.
    #[error("{who} did not answer {command} within {} s", PATIENCE.as_secs())]
    NoAnswer {
        /// Which QEMU.
        who: String,
        /// What it was asked.
        command: String,
    },
    /// It said no.
    #[error("{who} refused {command}: {why}")]
    Refused {
        /// Which QEMU.
        who: String,
        /// What it was asked.
        command: String,
        /// In its words.
        why: String,
    },
    /// Not QMP.
    #[error("{who} does not speak QMP: {what}")]
    Garbage {
        /// Which address.
        who: String,
        /// What it said.
        what: String,
    },
}

impl QmpError {
    /// Is QEMU there and well, and only unwilling?
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// QEMU's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The first number.
    pub major: u64,
    /// The second.
    pub minor: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Something that happened in a QEMU.
#[derive(Clone, Debug)]
pub struct Event {
    /// What.
    pub name: String,
    /// More about it.
    pub data: Value,
    /// When, by the clock of QEMU's host, since 1970.
    pub stamp: Duration,
    /// When we heard of it.
    pub heard: Instant,
}

enum Line {
    Event(Event),
    Answer { id: Value, result: Result<Value, String> },
    Garbage(String),
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// A connection to a QEMU.
pub struct Qmp {
    who: String,
    version: Version,
    stream: Stream,
    lines: Receiver<Line>,
    events: VecDeque<Event>,
    next_id: u64,
}

impl Qmp {
    /// Connects; `who` is how errors call it.
    pub fn connect(address: &Address, who: &str) -> Result<Self, QmpError> {
        let who = format!("{who} ({address})");
        let unreachable = |source| QmpError::Unreachable { who: who.clone(), source };
        let stream = Stream::connect(address).map_err(unreachable)?;
        let mut reader = BufReader::new(stream.reader().map_err(unreachable)?);
        let version = greeting(&mut reader, &who)?;
        let (send, lines) = bounded(1024);
        stream.set_read_timeout(None).map_err(unreachable)?;
        // It ends with the connection, or when nobody listens any more.
        let read = move || read_lines(reader, &send);
        std::thread::Builder::new().name("qmp".into()).spawn(read).map_err(unreachable)?;
        let mut qmp = Self { who, version, stream, lines, events: VecDeque::new(), next_id: 0 };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Has it do something, and waits for the answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let id = self.send(command, &arguments)?;
        self.answer(command, id)
    }

    /// Asks several things at once, in one round trip.
    pub fn ask<const N: usize>(&mut self, commands: [&str; N]) -> Result<[Value; N], QmpError> {
        let mut ids = [0; N];
        for (id, command) in ids.iter_mut().zip(commands) {
            *id = self.send(command, &json!({}))?;
        }
        let mut answers = [const { Value::Null }; N];
        for ((answer, command), id) in answers.iter_mut().zip(commands).zip(ids) {
            *answer = self.answer(command, id)?;
        }
        Ok(answers)
    }

    fn send(&mut self, command: &str, arguments: &Value) -> Result<u64, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        self.stream.write_all(line.as_bytes()).map_err(|_| QmpError::Closed(self.who.clone()))?;
        Ok(id)
    }

    fn answer(&mut self, command: &str, wanted: u64) -> Result<Value, QmpError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_deadline(deadline) {
                Ok(Line::Event(event)) => self.keep(event),
                Ok(Line::Answer { id, result }) if id == wanted => {
                    let (who, command) = (self.who.clone(), command.to_owned());
                    return result.map_err(|why| QmpError::Refused { who, command, why });
                }
                // To something that was not waited for any longer.
                Ok(Line::Answer { .. }) => {}
                Ok(Line::Garbage(what)) => return Err(QmpError::Garbage { who: self.who.clone(), what }),
                Err(RecvTimeoutError::Disconnected) => return Err(QmpError::Closed(self.who.clone())),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(QmpError::NoAnswer { who: self.who.clone(), command: command.into() });
                }
            }
        }
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// What has happened since this was last asked.
    pub fn events(&mut self) -> Result<Vec<Event>, QmpError> {
        loop {
            match self.lines.try_recv() {
                Ok(Line::Event(event)) => self.keep(event),
                Ok(Line::Answer { .. }) => {}
                Ok(Line::Garbage(what)) => return Err(QmpError::Garbage { who: self.who.clone(), what }),
                Err(e) if e.is_disconnected() && self.events.is_empty() => {
                    return Err(QmpError::Closed(self.who.clone()));
                }
                Err(_) => return Ok(self.events.drain(..).collect()),
            }
        }
    }

    /// Waits until one of two QEMUs, which may be out of reach, has something to say. Takes nothing away.
    pub fn wait_for_either(a: Option<&Self>, b: Option<&Self>, timeout: Duration) {
        if [a, b].into_iter().flatten().any(|qmp| !qmp.events.is_empty()) {
            return;
        }
        let mut select = crossbeam::channel::Select::new();
        for qmp in [a, b].into_iter().flatten() {
            select.recv(&qmp.lines);
        }
        // Too late is as good: the caller looks for itself.
        let _ = select.ready_timeout(timeout);
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.stream.shutdown();
    }
}

impl Stream {
    fn connect(address: &Address) -> io::Result<Self> {
        let stream = match address {
            Address::Unix(path) => Self::Unix(UnixStream::connect(path)?),
            Address::Tcp(place) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                let connected = place
                    .to_socket_addrs()?
                    .find_map(|to| TcpStream::connect_timeout(&to, PATIENCE).map_err(|e| last = e).ok());
                let stream = connected.ok_or(last)?;
                stream.set_nodelay(true)?;
                Self::Tcp(stream)
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        match &stream {
            Self::Unix(stream) => stream.set_write_timeout(Some(PATIENCE))?,
            Self::Tcp(stream) => stream.set_write_timeout(Some(PATIENCE))?,
        }
        Ok(stream)
    }

    fn reader(&self) -> io::Result<Box<dyn Read + Send>> {
        Ok(match self {
            Self::Unix(stream) => Box::new(stream.try_clone()?),
            Self::Tcp(stream) => Box::new(stream.try_clone()?),
        })
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(timeout),
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.write_all(bytes),
            Self::Tcp(stream) => stream.write_all(bytes),
        }
    }

    fn shutdown(&self) {
        // Gone already is as good.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

/// A line; `Ok("")` is the end.
fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = Vec::new();
    reader.take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
    if line.len() as u64 == MAX_LINE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "an endless line"));
    }
    String::from_utf8(line).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not text"))
}

fn greeting(reader: &mut impl BufRead, who: &str) -> Result<Version, QmpError> {
    let line = read_line(reader).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => QmpError::Silent(who.into()),
        io::ErrorKind::InvalidData => QmpError::Garbage { who: who.into(), what: source.to_string() },
        _ => QmpError::Closed(who.into()),
    })?;
    if line.is_empty() {
        return Err(QmpError::Closed(who.into()));
    }
    let said: Value = serde_json::from_str(&line).unwrap_or_default();
    let version = &said["QMP"]["version"]["qemu"];
    match (version["major"].as_u64(), version["minor"].as_u64()) {
        (Some(major), Some(minor)) => Ok(Version { major, minor }),
        _ => Err(QmpError::Garbage { who: who.into(), what: shorten(&line) }),
    }
}

fn read_lines(mut reader: impl BufRead, send: &Sender<Line>) {
    loop {
        let line = match read_line(&mut reader) {
            Ok(line) if line.is_empty() => return,
            Ok(line) => parse(&line, Instant::now()),
            Err(e) if e.kind() == io::ErrorKind::InvalidData => Line::Garbage(e.to_string()),
            Err(_) => return,
        };
        let is_bad = matches!(line, Line::Garbage(_));
        if send.send(line).is_err() || is_bad {
            return;
        }
    }
}

fn parse(line: &str, heard: Instant) -> Line {
    let mut said: Value = serde_json::from_str(line).unwrap_or_default();
    if let Some(name) = said["event"].as_str() {
        let part = |name| said["timestamp"][name].as_u64().unwrap_or_default();
        let stamp = Duration::from_secs(part("seconds")) + Duration::from_micros(part("microseconds"));
        return Line::Event(Event { name: name.into(), data: said["data"].clone(), stamp, heard });
    }
    let (id, error) = (said["id"].clone(), said["error"]["desc"].as_str().map(shorten));
    match (error, said.get_mut("return")) {
        (Some(why), _) => Line::Answer { id, result: Err(why) },
        (None, Some(value)) => Line::Answer { id, result: Ok(value.take()) },
        (None, None) => Line::Garbage(shorten(line)),
    }
}

/// A foreign text as a part of one line.
fn shorten(text: &str) -> String {
    let clean = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c });
    clean.take(300).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A QEMU that says these lines: the first ones at once, the next ones after each line that it hears.
    fn qemu(script: &'static [&'static str]) -> (tempfile::TempDir, Address) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut heard = BufReader::new(stream.try_clone().unwrap()).lines();
            for said in script {
                stream.write_all(said.as_bytes()).unwrap();
                if heard.next().is_none() {
                    return;
                }
            }
        });
        (dir, Address::Unix(path))
    }

    #[test]
    fn commands_are_answered_and_events_are_kept() {
        const SCRIPT: &[&str] = &[
            r#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7},"package":""},"capabilities":["oob"]}}
"#,
            "{\"return\":{},\"id\":0}\n",
            "{\"event\":\"STOP\",\"timestamp\":{\"seconds\":5,\"microseconds\":7000}}\n{\"return\":{\"status\":\"paused\"},\"id\":1}\n",
            "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\\nway\"},\"id\":2}\n",
        ];
        let (_dir, address) = qemu(SCRIPT);
        let mut qmp = Qmp::connect(&address, "QEMU").unwrap();
        assert_eq!(qmp.version(), Version { major: 7, minor: 2 });
        assert_eq!(qmp.execute("query-status", json!({})).unwrap()["status"], "paused");
        let error = qmp.execute("stop", json!({})).unwrap_err();
        assert!(error.is_refusal());
        assert_eq!(error.to_string(), format!("QEMU ({address}) refused stop: no way"));
        let events = qmp.events().unwrap();
        assert_eq!((events.len(), events[0].name.as_str()), (1, "STOP"));
        assert_eq!(events[0].stamp, Duration::from_millis(5007));
        // Whoever hangs up is noticed by the next command.
        assert!(matches!(qmp.execute("cont", json!({})), Err(QmpError::Closed(_))));
    }

    #[test]
    fn what_is_no_qemu_is_said_in_one_line() {
        let (_dir, address) = qemu(&["SSH-2.0-OpenSSH\r\n"]);
        let error = Qmp::connect(&address, "QEMU").err().unwrap().to_string();
        assert_eq!(error, format!("QEMU ({address}) does not speak QMP: SSH-2.0-OpenSSH"));
        let (_dir, address) = qemu(&[]);
        assert!(matches!(Qmp::connect(&address, "QEMU"), Err(QmpError::Closed(_))));
        let nobody = Address::Unix("/nobody/listens/here".into());
        assert!(matches!(Qmp::connect(&nobody, "QEMU"), Err(QmpError::Unreachable { .. })));
    }
}
