//! The fuzz targets' properties, on the inputs that are kept: the corpus, what was found once, and the seeds.
//!
//! `scripts/fuzz` looks for more. The properties are in `properties/`, one file a target; `corpus/TARGET` has inputs
//! that reach all that was reached, and `found/TARGET` has each input that ever broke something, by the name of what
//! it broke.
#![allow(clippy::unwrap_used)]

mod properties;

use std::fs;
use std::path::{Path, PathBuf};

use properties::{TARGETS, Target};

fn home() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz")
}

fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).unwrap()
}

fn inputs(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Says which input it was, if that breaks something.
struct Replayed<'a>(&'a str);

impl Drop for Replayed<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the input: {}", self.0);
        }
    }
}

fn replay(name: &str) {
    let target = target(name);
    for (index, seed) in (target.seeds)().iter().enumerate() {
        let _input = Replayed(&format!("seed {index}"));
        (target.check)(seed);
    }
    let kept = inputs(&home().join("corpus").join(name));
    assert!(!kept.is_empty(), "the corpus of {name} is empty: every input would pass");
    let found = home().join("found").join(name);
    let found = if found.is_dir() { inputs(&found) } else { Vec::new() };
    for path in kept.into_iter().chain(found) {
        let _input = Replayed(&path.display().to_string());
        (target.check)(&fs::read(&path).unwrap());
    }
}

#[test]
fn server_handshake() {
    replay("server_handshake");
}

#[test]
fn server_requests() {
    replay("server_requests");
}

#[test]
fn client_handshake() {
    replay("client_handshake");
}

#[test]
fn client_replies() {
    replay("client_replies");
}

#[test]
fn metadata() {
    replay("metadata");
}

#[test]
fn control() {
    replay("control");
}

#[test]
fn uri() {
    replay("uri");
}
