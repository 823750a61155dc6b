//! What a crowd of hostile clients leaves in the log: a few lines, and how many were left out. A disk, or the memory
//! that a run directory lies in, must not fill up with them.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use crate::client::dial;
use crate::common::{Export, World, make_image, wait_for_socket};

const CROWD: u64 = 10_000;
/// Lines about clients in a minute, the one about those that were left out included.
const LINES_A_MINUTE: u64 = 21;

/// Each one talks garbage, and waits to be thrown out.
fn crowd_at(uri: &str) {
    for _ in 0..CROWD {
        let mut stream = dial(uri);
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        // Reset, since not all of it was read: as good as an end.
        let _ = stream.read_to_end(&mut Vec::new());
    }
}

fn lines_about(log: &Path, what: &str) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap();
    text.lines().filter(|line| line.contains(what)).map(str::to_owned).collect()
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
    let minutes = started.elapsed().as_secs() / 60 + 1;
    export.stop();

    let said = lines_about(&log, "a client was dropped").len() as u64;
    let left_out = lines_about(&log, "were left out");
    assert!(said + left_out.len() as u64 <= minutes * LINES_A_MINUTE, "{said} lines in {minutes} min");
    let count = |line: &String| line.split_whitespace().find_map(|word| word.parse::<u64>().ok()).unwrap();
    assert_eq!(said + left_out.iter().map(count).sum::<u64>(), CROWD, "each one is said or counted: {left_out:?}");
}

#[test]
fn a_daemon_writes_a_few_lines() {
    let world = World::new();
    make_image(&world.path("image"), 4 << 20, &[(0, 4 << 20)]);
    let export = world.export(&world.path("image"));
    let device = world.attach(&export.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    let started = Instant::now();
    crowd_at(&device.uri);
    let lines = lines_about(&world.run_dir().join("disk.log"), "a client was dropped").len() as u64;
    let minutes = started.elapsed().as_secs() / 60 + 1;
    assert!((1..=minutes * LINES_A_MINUTE).contains(&lines), "{lines} lines in {minutes} min");
    world.ok(["detach", "disk", "--incomplete"]);
}
