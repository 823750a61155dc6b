//! A link of 1 Gbit/s.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::common::{BLKFERRY, kill};

/// A link; ends when dropped.
pub struct Link {
    child: Child,
    pub address: String,
}

impl Link {
    /// One of 20 ms.
    pub fn to(address: &str) -> Self {
        Self::with_rtt(address, 20)
    }

    pub fn with_rtt(address: &str, rtt_ms: u64) -> Self {
        let program = Path::new(BLKFERRY).with_file_name("examples/relay");
        if !program.exists() {
            // Cargo builds examples for all tests, but not for one that is named.
            let built = Command::new(env!("CARGO")).args(["build", "--locked", "--example", "relay"]).status().unwrap();
            assert!(built.success());
        }
        let mut child = Command::new(program)
            .args([address, "--mbit", "1000", "--rtt-ms", &rtt_ms.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        Self { child, address: line.trim().to_owned() }
    }

    /// Bytes that came from the server so far.
    pub fn received(&mut self) -> u64 {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        let mut line = String::new();
        BufReader::new(self.child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Link {
    /// Nothing gets through until [`Link::thaw`], and no connection breaks.
    pub fn freeze(&self) {
        kill(self.child.id() as i32, nix::sys::signal::Signal::SIGSTOP);
    }

    /// See [`Link::freeze`].
    pub fn thaw(&self) {
        kill(self.child.id() as i32, nix::sys::signal::Signal::SIGCONT);
    }

    /// Nobody gets through any more.
    pub fn cut(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.cut();
    }
}
