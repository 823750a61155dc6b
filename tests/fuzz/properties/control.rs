//! A client of the control socket: any bytes.
//!
//! The real server reads them. Each line gets one final answer, and what can be read as a request can be written.

use std::io::Read;
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use blkferry::control::{ControlServer, Detached, Handler, Request, Status, Taken};
use blkferry::device::{VerifyProgress, VerifyReport};
use serde_json::{Value, json};

use super::lots::{Lots, pieces};
use super::site::send;

/// Longer inputs are not tried: that a line has a limit is tested elsewhere.
const MAX_INPUT: usize = 16 << 10;

struct Device;

impl Handler for Device {
    fn status(&self) -> Status {
        serde_json::from_value(status()).expect("all fields are there")
    }

    fn set(&self, key: &str, value: &str) -> Result<String, String> {
        if key == "hydrate" { Ok(value.to_owned()) } else { Err(format!("there is no {key:?}")) }
    }

    fn detach(&self, incomplete: bool) -> Result<Detached, String> {
        let detached = Detached { complete: false, cache: "/cache".into(), absent_bytes: 1, given_away: true };
        if incomplete { Ok(detached) } else { Err("blocks are absent".into()) }
    }

    fn detach_answered(&self) {}

    fn take(&self, wait: Duration) -> Result<Taken, String> {
        if wait.is_zero() { Err("somebody writes".into()) } else { Ok(taken()) }
    }

    fn activate(&self, _: Duration) -> Result<Taken, String> {
        Ok(taken())
    }

    fn call_off(&self) -> Result<(), String> {
        Ok(())
    }

    fn abort(&self) -> Result<(), String> {
        Err("it is active".into())
    }

    fn verify(&self, progress: &mut dyn FnMut(VerifyProgress) -> bool) -> Result<VerifyReport, String> {
        progress(VerifyProgress { done_bytes: 1, total_bytes: 2 });
        Ok(VerifyReport::default())
    }
}

fn taken() -> Taken {
    Taken { epoch: 2, already: false, warning: None }
}

fn status() -> Value {
    json!({
        "name": "disk", "state": "active", "failure": null, "source_needed": true, "pid": 1, "version": "0",
        "uptime_s": 0.5,
        "frontend": { "kind": "nbd", "uri": "nbd://", "clients": 0, "read_hits": 0, "read_misses": 0, "read_bytes": 0,
            "writes": 0, "written_bytes": 0, "waiting_requests": 0 },
        "source": { "uri": "nbd://host/", "identity": "image:0", "connections": 3, "on_loss": "wait", "lost_s": null,
            "lost_reason": null },
        "cache": { "path": "/cache", "metadata": "/cache.ferry", "commits": 0 },
        "blocks": { "size_bytes": 4096, "total": 2, "present": 1, "dirty": 0, "absent": 1 },
        "bytes": { "total": 8192, "present": 4096, "absent": 4096 },
        "wire": { "received_bytes": 0, "sent_bytes": 0, "data_bytes": 0 },
        "hydrate": { "mode": "off", "state": "off", "reason": null, "rate_bytes_per_s": 0.0, "eta_s": null },
    })
}

/// The socket of a server that runs as long as this process. It has no file that would be left behind.
fn socket() -> &'static SocketAddr {
    static SOCKET: OnceLock<SocketAddr> = OnceLock::new();
    SOCKET.get_or_init(|| {
        let name = format!("blkferry-fuzz-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        ControlServer::start(UnixListener::bind_addr(&address).unwrap(), Arc::new(Device)).unwrap();
        address
    })
}

/// What the answer to a line must be: the keys of its objects. None: the line is no text, and the client is dropped.
fn expected(line: &[u8]) -> Option<&'static [&'static str]> {
    let text = std::str::from_utf8(line).ok()?;
    if !text.ends_with('\n') {
        return Some(&["error"]);
    }
    let Ok(request) = serde_json::from_str::<Request>(text) else { return Some(&["error"]) };
    let written = serde_json::to_string(&request).unwrap();
    assert_eq!(serde_json::from_str::<Request>(&written).ok().as_ref(), Some(&request), "{written}");
    Some(match request {
        Request::Status => &["ok"],
        Request::Set { key, .. } if key == "hydrate" => &["ok"],
        Request::Set { .. } => &["error"],
        Request::Detach { incomplete: true } => &["ok"],
        Request::Detach { .. } => &["error"],
        Request::Verify => &["progress", "ok"],
        Request::Take { wait_ms: 0 } | Request::Abort => &["error"],
        Request::Take { .. } | Request::Activate { .. } | Request::CallOff => &["ok"],
    })
}

pub fn check(input: &[u8]) {
    let Some((&seed, stream)) = input.split_first() else { return };
    if stream.len() > MAX_INPUT {
        return;
    }
    let lines = stream.split_inclusive(|byte| *byte == b'\n');
    let want: Vec<&str> = lines.map_while(expected).flatten().copied().collect();
    let mut client = UnixStream::connect_addr(socket()).unwrap();
    // Sent by another thread: the answers may be longer than the socket holds.
    let sender = client.try_clone().unwrap();
    let answers = std::thread::scope(|scope| {
        scope.spawn(move || {
            send(&sender, &pieces(stream, Lots::new(seed)));
            // The server may have hung up before.
            let _ = sender.shutdown(Shutdown::Write);
        });
        let mut answers = Vec::new();
        // A server that hangs up on what it has not read resets the connection; what it said before is there.
        let _ = client.read_to_end(&mut answers);
        answers
    });
    let mut got = Vec::new();
    for line in String::from_utf8(answers).expect("answers are text").lines() {
        let answer: Value = serde_json::from_str(line).expect("answers are JSON");
        let object = answer.as_object().unwrap();
        assert_eq!(object.len(), 1, "{line}");
        got.push(object.keys().next().unwrap().clone());
    }
    assert_eq!(got, want);
}

pub fn seeds() -> Vec<Vec<u8>> {
    [
        "{\"do\":\"status\"}\n",
        "{\"do\":\"set\",\"key\":\"hydrate\",\"value\":\"10M\"}\n{\"do\":\"status\"}\n",
        "{\"do\":\"set\",\"key\":\"x\",\"value\":\"\\u0000\\ud83d\\ude00\"}\n",
        "{\"do\":\"detach\",\"incomplete\":true}\n{\"do\":\"detach\",\"incomplete\":false}\n",
        "{\"do\":\"verify\"}\n{\"do\":\"verify\"}",
        "{\"do\":\"take\",\"wait_ms\":0}\n{\"do\":\"activate\",\"wait_ms\":18446744073709551615}\n",
        "{\"do\":\"call-off\"}\n{\"do\":\"abort\"}\n{\"do\":\"take\",\"wait_ms\":1}\n",
        "{\"do\":\"unknown\"}\n{}\n[]\nnull\n\n",
        "GET / HTTP/1.1\r\n\r\n",
    ]
    .into_iter()
    .map(|text| [&[5], text.as_bytes()].concat())
    .collect()
}
