//! A server that hostile clients are let loose on, and how it bears that.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use blkferry::nbd::Wants;

use crate::client::{Client, dial, shake_hands};

/// A server to be cruel to.
pub struct Target<'a> {
    pub uri: &'a str,
    pub pid: i32,
    /// What a good client reads from it at the start of the disk.
    pub expected: &'a [u8],
}

#[derive(Clone, Copy, Debug)]
pub struct Usage {
    pub descriptors: usize,
    pub memory_kib: u64,
}

impl Target<'_> {
    pub fn usage(&self) -> Usage {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.pid)).unwrap().count();
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        let memory_kib = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        Usage { descriptors, memory_kib }
    }

    pub fn assert_good_client(&self, after: &str) {
        let mut client = Client::connect(self.uri);
        for (at, piece) in self.expected.chunks(65536).enumerate() {
            assert!(client.read(at as u64 * 65536, piece.len() as u32) == piece, "after {after}");
        }
        client.disconnect();
    }

    /// Does its worst more than once, and sees to it that nobody else notices.
    pub fn survives(&self, cruelty: &str, act: impl Fn(&Self)) {
        self.assert_good_client("a good one");
        let before = self.usage();
        let mut first = None;
        for _ in 0..3 {
            act(self);
            self.assert_good_client(cruelty);
            let now = self.usage_with(before.descriptors);
            // The allocator may keep what was needed once, but not more each time.
            let first = *first.get_or_insert(now);
            assert!(now.memory_kib < first.memory_kib + (32 << 10), "{cruelty}: {before:?}, {first:?}, then {now:?}");
        }
    }

    /// Waits until the descriptors are as many as before (or a few more: of the good client, perhaps).
    fn usage_with(&self, descriptors: usize) -> Usage {
        let started = Instant::now();
        loop {
            let now = self.usage();
            if now.descriptors <= descriptors + 2 {
                return now;
            }
            let waited = started.elapsed();
            assert!(waited < Duration::from_secs(20), "{} descriptors, before {descriptors}", now.descriptors);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn in_transmission(&self) -> UnixStream {
        let mut stream = dial(self.uri);
        shake_hands(&mut stream, "", Wants { structured: true, ..Wants::default() });
        stream
    }
}
