//! Handing a disk over, with the real program: who may write, what is refused, what a crash at each step leaves.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/mod.rs"]
mod common;

mod back;
#[path = "../common/client.rs"]
mod client;
mod image;
mod onward;

use serde_json::{Value, json};

use common::Device;

/// Asks a daemon on its control socket; what it answers.
pub fn control(device: &Device<'_>, request: &Value) -> Result<Value, String> {
    use std::io::{BufRead, BufReader, Write};
    let path = device.world.run_dir().join(format!("{}.ctl", device.name));
    let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    writeln!(stream, "{request}").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    let answer: Value = serde_json::from_str(&line).unwrap();
    match answer.get("error") {
        Some(error) => Err(error.as_str().unwrap().to_owned()),
        None => Ok(answer["ok"].clone()),
    }
}

pub fn activate(device: &Device<'_>) -> Result<Value, String> {
    control(device, &json!({ "do": "activate", "wait_ms": 2000 }))
}
