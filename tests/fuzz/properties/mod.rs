//! What must hold for any input: one file a target. The fuzzer looks for inputs that break it; the test of the same
//! name replays those that are kept in corpus/.
#![allow(missing_docs, clippy::unwrap_used)]

pub mod client_handshake;
pub mod client_replies;
pub mod control;
pub mod lots;
pub mod metadata;
pub mod server_handshake;
pub mod server_requests;
pub mod site;
pub mod uri;

mod replies_model;
mod requests_model;

pub struct Target {
    /// Also the name of its directory in corpus/.
    pub name: &'static str,
    /// Panics if the input breaks what must hold.
    pub check: fn(&[u8]),
    /// Where the fuzzer begins: inputs made from real sessions.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

pub const TARGETS: [Target; 7] = [
    Target { name: "server_handshake", check: server_handshake::check, seeds: server_handshake::seeds },
    Target { name: "server_requests", check: server_requests::check, seeds: server_requests::seeds },
    Target { name: "client_handshake", check: client_handshake::check, seeds: client_handshake::seeds },
    Target { name: "client_replies", check: client_replies::check, seeds: client_replies::seeds },
    Target { name: "metadata", check: metadata::check, seeds: metadata::seeds },
    Target { name: "control", check: control::check, seeds: control::seeds },
    Target { name: "uri", check: uri::check, seeds: uri::seeds },
];
