//! The daemon's end of the control socket. Plain threads: nothing here is fast, and nothing waits for it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::protocol::{Answer, Detached, Request, Taken};
use super::status::Status;
use crate::device::{VerifyProgress, VerifyReport};

/// Clients served at a time; others wait for their turn.
const MAX_CLIENTS: usize = 16;
/// How long a client may think before its next line, and take to read an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest request.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// What the daemon can do for a client. An error is one clear line.
pub trait Handler: Send + Sync + 'static {
    /// How is the device?
    fn status(&self) -> Status;
    /// Changes a setting; returns its value as it is now.
    fn set(&self, key: &str, value: &str) -> Result<String, String>;
    /// Ends the device.
    fn detach(&self, incomplete: bool) -> Result<Detached, String>;
    /// The answer to `detach` or `abort` has been sent.
    fn detach_answered(&self);
    /// Gets the disk from the source.
    fn take(&self, wait: Duration) -> Result<Taken, String>;
    /// Gets the disk from the source and lets the guest write.
    fn activate(&self, wait: Duration) -> Result<Taken, String>;
    /// Gives back what was taken.
    fn call_off(&self) -> Result<(), String>;
    /// Gives back what was taken, for good, and ends the device.
    fn abort(&self) -> Result<(), String>;
    /// Compares with the source; `progress` says whether to go on.
    fn verify(&self, progress: &mut dyn FnMut(VerifyProgress) -> bool) -> Result<VerifyReport, String>;
}

/// The listening socket and its threads. They end with the process.
pub struct ControlServer;

impl ControlServer {
    /// Answers whoever connects to `listener`.
    pub fn start(listener: UnixListener, handler: Arc<dyn Handler>) -> io::Result<Self> {
        let accept = move || accept(&listener, &handler);
        std::thread::Builder::new().name("control".into()).spawn(accept)?;
        Ok(Self)
    }
}

fn accept(listener: &UnixListener, handler: &Arc<dyn Handler>) {
    let (take, places) = crossbeam::channel::bounded(MAX_CLIENTS);
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        // Those inside leave in bounded time: see PATIENCE.
        take.send(()).expect("both ends live here");
        let (handler, place) = (handler.clone(), places.clone());
        let serve = move || {
            if let Err(e) = serve(stream, &*handler) {
                log::debug!("control: a client was dropped: {e}");
            }
            let _ = place.try_recv();
        };
        if std::thread::Builder::new().name("control-client".into()).spawn(serve).is_err() {
            let _ = places.try_recv();
        }
    }
}

fn serve(stream: UnixStream, handler: &dyn Handler) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.by_ref().take(MAX_LINE_BYTES).read_line(&mut line)? == 0 {
            return Ok(());
        }
        if !line.ends_with('\n') {
            return answer(&mut writer, &Answer::<()>::Error("a request is one line of at most 64 KiB".into()));
        }
        match serde_json::from_str(&line) {
            Ok(request) => perform(request, handler, &mut writer)?,
            Err(e) => answer(&mut writer, &Answer::<()>::Error(format!("not a request: {e}")))?,
        }
    }
}

fn perform(request: Request, handler: &dyn Handler, writer: &mut UnixStream) -> io::Result<()> {
    match request {
        Request::Status => answer(writer, &Answer::Ok(handler.status())),
        Request::Set { key, value } => answer(writer, &handler.set(&key, &value).into()),
        Request::Detach { incomplete } => {
            let result = answer(writer, &handler.detach(incomplete).into());
            handler.detach_answered();
            result
        }
        Request::Take { wait_ms } => answer(writer, &handler.take(Duration::from_millis(wait_ms)).into()),
        Request::Activate { wait_ms } => answer(writer, &handler.activate(Duration::from_millis(wait_ms)).into()),
        Request::CallOff => answer(writer, &handler.call_off().into()),
        Request::Abort => {
            let result = answer(writer, &handler.abort().into());
            handler.detach_answered();
            result
        }
        Request::Verify => {
            let mut progress = |progress: VerifyProgress| {
                let value = serde_json::to_value(&progress).unwrap_or_default();
                answer(writer, &Answer::<()>::Progress(value)).is_ok()
            };
            let result = handler.verify(&mut progress);
            answer(writer, &result.into())
        }
    }
}

fn answer<T: Serialize>(writer: &mut UnixStream, answer: &Answer<T>) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    writer.write_all(&line)
}

impl<T> From<Result<T, String>> for Answer<T> {
    fn from(result: Result<T, String>) -> Self {
        match result {
            Ok(value) => Self::Ok(value),
            Err(line) => Self::Error(line),
        }
    }
}
