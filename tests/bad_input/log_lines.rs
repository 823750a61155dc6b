//! What a flood leaves in the log, of hostile clients, of a disk that fails or of a source that hangs up: a few lines,
//! and how many were left out. A disk, or the memory that a run directory lies in, must not fill up with them.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use blkferry::nbd::NbdError;

use crate::client::{Client, dial};
use crate::common::{Export, World, make_image, noise, wait_for_socket};
use crate::manners::Manners;
use crate::namespace::{Mounted, alone};
use crate::source::Source;

const CROWD: u64 = 10_000;
/// Lines of one reason in the first minute and in any other one, the one about those that were left out included.
const LINES: (u64, u64) = (6, 1);

/// Most lines about one thing since then.
fn most_since(started: Instant) -> u64 {
    LINES.0 + started.elapsed().as_secs() / 60 * LINES.1
}

/// Each one talks garbage, and waits to be thrown out.
fn crowd_at(uri: &str) {
    for _ in 0..CROWD {
        let mut stream = dial(uri);
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        // Reset, since not all of it was read: as good as an end.
        let _ = stream.read_to_end(&mut Vec::new());
    }
}

/// Lines about something: those that say it, and the numbers of those that say how many were left out.
fn lines_about(log: &Path, what: &str) -> (Vec<String>, Vec<u64>) {
    let text = std::fs::read_to_string(log).unwrap();
    let lines = text.lines().filter(|line| line.contains(what)).map(str::to_owned);
    let (summed_up, said): (Vec<String>, Vec<String>) = lines.partition(|line| line.contains("were left out"));
    let count = |line: &String| line.split_whitespace().find_map(|word| word.parse().ok()).unwrap();
    (said, summed_up.iter().map(count).collect())
}

/// Some lines are about it, and no more than so many.
fn assert_few_lines(log: &Path, what: &str, most: u64) {
    let (said, left_out) = lines_about(log, what);
    let lines = (said.len() + left_out.len()) as u64;
    assert!((1..=most).contains(&lines), "{lines} lines: {what}: {said:?}");
}

#[test]
fn an_export_counts_whom_it_drops() {
    let world = World::new();
    let (image, socket, log) = (world.path("image"), world.path("socket"), world.path("log"));
    make_image(&image, 4 << 20, &[(0, 4 << 20)]);
    let listen = format!("unix:{}", socket.display());
    let mut command = world.command(["export", image.to_str().unwrap(), "--listen", &listen]);
    let child = command.stdout(Stdio::null()).stderr(File::create(&log).unwrap()).spawn().unwrap();
    wait_for_socket(&socket);
    let export = Export { child, uri: format!("nbd+unix:///?socket={}", socket.display()) };
    let started = Instant::now();
    crowd_at(&export.uri);
    export.stop();

    let (said, left_out) = lines_about(&log, "a client was dropped");
    let lines = (said.len() + left_out.len()) as u64;
    assert!(lines <= most_since(started), "{lines} lines");
    assert!(said[0].contains("handshake flags"), "the first one says why: {}", said[0]);
    assert_eq!(said.len() as u64 + left_out.iter().sum::<u64>(), CROWD, "each one is said or counted: {left_out:?}");
}

#[test]
fn a_daemon_writes_a_few_lines() {
    let world = World::new();
    make_image(&world.path("image"), 4 << 20, &[(0, 4 << 20)]);
    let export = world.export(&world.path("image"));
    let device = world.attach(&export.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    let started = Instant::now();
    crowd_at(&device.uri);
    assert_few_lines(&world.run_dir().join("disk.log"), "a client was dropped", most_since(started));
    world.ok(["detach", "disk", "--incomplete"]);
}

/// The guest's writes fail, one after the other, and so does everything that is stored of what it reads.
#[test]
fn a_disk_that_fails_each_request() {
    const REQUESTS: u64 = 3000;
    alone("log_lines::a_disk_that_fails_each_request", || {
        let world = World::new();
        let data = noise(3, 64 << 20);
        let source = Source::start(&world.path("source"), data.clone(), Manners::default());
        let small = world.path("small");
        let _mounted = Mounted::tmpfs(&small, "1M");
        let device = world.attach(&source.uri, &small.join("cache"), "disk", &["--hydrate", "off"]);
        let mut client = Client::connect(&device.uri);
        let mut ballast = File::create(small.join("ballast")).unwrap();
        while ballast.write_all(&[1; 4096]).is_ok() {}
        let started = Instant::now();
        for at in 0..REQUESTS {
            assert_eq!(client.try_write(at << 14, &[1; 4096]), Err(NbdError::NoSpc));
            let missed = (at << 14) + 8192;
            assert!(client.read(missed, 4096) == data[missed as usize..][..4096], "what is not stored is delivered");
        }
        let log = world.run_dir().join("disk.log");
        for what in ["cache: write: No space left", "cache: cannot store what was fetched: No space left"] {
            assert_few_lines(&log, what, most_since(started));
        }
        world.ok(["detach", "disk", "--incomplete"]);
    });
}

/// Links that are made again at once, since they have answered something, and break again.
#[test]
fn a_source_that_hangs_up_again_and_again() {
    const CUTS: usize = 200;
    let world = World::new();
    let data = noise(3, 4 << 20);
    let source = Source::start(&world.path("source"), data.clone(), Manners::default());
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    let mut client = Client::connect(&device.uri);
    let started = Instant::now();
    for at in 0..CUTS {
        assert!(client.read(at as u64 * 8192, 4096) == data[at * 8192..][..4096]);
        source.cut();
    }
    let log = world.run_dir().join("disk.log");
    for what in ["lost", "source is back"] {
        // "connection N lost", and "source lost" for each of two reasons.
        assert_few_lines(&log, what, 3 * most_since(started));
    }
    drop(client);
    world.ok(["detach", "disk", "--incomplete"]);
}
