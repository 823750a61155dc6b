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
        self.survives_with(cruelty, 32 << 10, act);
    }

    /// The same; the allocator may keep `spare_kib` of what is needed only while it lasts.
    pub fn survives_with(&self, cruelty: &str, spare_kib: u64, act: impl Fn(&Self)) {
        self.assert_good_client("a good one");
        let before = self.usage();
        let mut first = None;
        for _ in 0..3 {
            act(self);
            self.assert_good_client(cruelty);
            // What was needed once may stay, but not more each time.
            let most_kib = first.map_or(u64::MAX, |first: Usage| first.memory_kib + spare_kib);
            let now = self.usage_within(before.descriptors + 2, most_kib);
            first.get_or_insert(now);
        }
    }

    /// Waits until what a client left behind is gone: it may be finished after the client has left.
    pub fn usage_within(&self, descriptors: usize, memory_kib: u64) -> Usage {
        let started = Instant::now();
        loop {
            let now = self.usage();
            if now.descriptors <= descriptors && now.memory_kib < memory_kib {
                return now;
            }
            let waited = started.elapsed();
            assert!(waited < Duration::from_secs(20), "{now:?}, and {descriptors}, {memory_kib} are the limits");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn in_transmission(&self) -> UnixStream {
        let mut stream = dial(self.uri);
        shake_hands(&mut stream, "", Wants { structured: true, ..Wants::default() });
        stream
    }
}
