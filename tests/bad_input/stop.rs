//! Ctrl-C, SIGTERM and SIGHUP: a clean stop, with everything committed.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::client::{Client, dial};
use crate::common::{World, kill, make_image};
use crate::manners::Manners;
use crate::source::Source;
use crate::strangers::stranger;

const SIZE: u64 = 8 << 20;
/// Only ends a test that would hang.
const PATIENCE: Duration = Duration::from_secs(60);

fn wait(child: &mut Child) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(started.elapsed() < PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn wait_until_gone(pid: i32) {
    let started = Instant::now();
    while std::fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|mut fds| fds.next().is_some()) {
        assert!(started.elapsed() < PATIENCE, "the daemon does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn with_image() -> (World, Vec<u8>) {
    let world = World::new();
    make_image(&world.path("image"), SIZE, &[(0, SIZE)]);
    let contents = std::fs::read(world.path("image")).unwrap();
    (world, contents)
}

/// Reads some, writes some and flushes nothing; notes what was written.
fn use_it(uri: &str, expected: &mut [u8]) {
    let mut client = Client::connect(uri);
    client.read(0, 1 << 20);
    for (at, len, byte) in [(4096, 4096, 1), (1 << 21, 1 << 20, 2), ((1 << 22) + 1000, 5000, 3)] {
        client.write(at, &vec![byte; len]);
        expected[at as usize..at as usize + len].fill(byte);
    }
}

/// Nothing of the device is left but its cache; attached again it has everything.
fn assert_left_in_order(world: &World, expected: &[u8]) {
    assert_eq!(world.ok(["list", "--json"]).trim(), "[]");
    let left: Vec<_> = std::fs::read_dir(world.run_dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| Path::new(name).extension().is_some_and(|ext| ext == "log")), "left: {left:?}");
    // Its writes were committed: they do not depend on the live map, which is gone too.
    let export = world.export(&world.path("image"));
    let device = world.attach(&export.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    let present = device.status()["bytes"]["present"].as_u64().unwrap();
    assert!(present >= 2 << 20, "{present} bytes were remembered");
    let mut client = Client::connect(&device.uri);
    for (at, piece) in expected.chunks(1 << 20).enumerate() {
        assert!(client.read((at as u64) << 20, piece.len() as u32) == piece, "mebibyte {at}");
    }
    device.set("hydrate=auto");
    device.wait_complete();
    device.detach();
}

#[test]
fn a_daemon_in_the_background() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let (world, mut expected) = with_image();
        let export = world.export(&world.path("image"));
        let device = world.attach(&export.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
        use_it(&device.uri, &mut expected);
        let pid = device.pid;
        kill(pid, signal);
        wait_until_gone(pid);
        drop(export);
        assert_left_in_order(&world, &expected);
    }
}

#[test]
fn a_daemon_in_the_foreground() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let (world, mut expected) = with_image();
        let export = world.export(&world.path("image"));
        let cache = world.path("cache");
        let mut command = world.command(["attach", &export.uri, cache.to_str().unwrap(), "--name", "disk", "--json"]);
        let mut child = command.args(["--foreground", "--hydrate", "off"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let status: Value = serde_json::from_str(&line).unwrap();
        use_it(status["frontend"]["uri"].as_str().unwrap(), &mut expected);
        kill(child.id() as i32, signal);
        // As timeout(1) does, which means one.
        kill(child.id() as i32, Signal::SIGHUP);
        assert_eq!(wait(&mut child).code(), Some(0), "a clean stop");
        drop(export);
        assert_left_in_order(&world, &expected);
    }
}

#[test]
fn hydration_in_full_swing() {
    let (world, mut expected) = with_image();
    let source = Source::start(&world.path("source"), expected.clone(), Manners::default());
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &["--hydrate", "2M"]);
    use_it(&device.uri, &mut expected);
    source.wait_asked(3);
    kill(device.pid, Signal::SIGTERM);
    wait_until_gone(device.pid);
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &[]);
    device.wait_complete();
    device.detach();
    assert!(std::fs::read(world.path("cache")).unwrap() == expected);
}

#[test]
fn an_export_with_clients() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let (world, expected) = with_image();
        let mut export = world.export(&world.path("image"));
        let socket = crate::client::socket_of(&export.uri);
        let mut client = Client::connect(&export.uri);
        assert!(client.read(0, 1 << 20) == expected[..1 << 20]);
        // One in the middle of its handshake, one that has said nothing.
        let half = dial(&export.uri);
        kill(export.child.id() as i32, signal);
        assert_eq!(wait(&mut export.child).code(), Some(0), "a clean stop");
        assert!(!socket.exists());
        drop(half);
    }
}

/// Before the device is ready there is nothing to keep: an attach that is interrupted leaves nothing.
#[test]
fn an_attach_that_waits_for_its_source() {
    let (world, _) = with_image();
    let (greeted, waiting) = std::sync::mpsc::channel();
    let uri = stranger(&world.path("slow"), move |stream| {
        greeted.send(()).unwrap();
        std::io::copy(stream, &mut std::io::sink()).map(drop)
    });
    let cache = world.path("cache");
    for more in [&[][..], &["--foreground"]] {
        let mut command = world.command(["attach", &uri, cache.to_str().unwrap(), "--name", "disk"]);
        let mut child = command.args(more).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        waiting.recv_timeout(PATIENCE).unwrap();
        kill(child.id() as i32, Signal::SIGINT);
        assert!(!wait(&mut child).success());
        // The daemon gives up as well, at the latest when the source has not answered for too long.
        let started = Instant::now();
        while std::fs::read_dir(world.run_dir()).unwrap().next().is_some() {
            assert!(started.elapsed() < PATIENCE, "something is left in the run directory");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(!cache.exists());
    }
}

/// The same when the source answers after all: whoever asked for the device is gone.
#[test]
fn an_attach_that_is_interrupted_just_before_it_is_ready() {
    let (world, expected) = with_image();
    let manners = Manners { identity: None, ..Manners::default() };
    let source = Source::start(&world.path("source"), expected, manners);
    source.hold_all();
    let cache = world.path("cache");
    let mut command = world.command(["attach", &source.uri, cache.to_str().unwrap(), "--name", "disk"]);
    let mut child = command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    source.wait_held(1);
    kill(child.id() as i32, Signal::SIGINT);
    wait(&mut child);
    source.let_go();
    // Nobody knows of it: it may be gone or running, but it is not left for dead.
    let started = Instant::now();
    loop {
        let devices: Value = serde_json::from_str(&world.ok(["list", "--json"])).unwrap();
        let busy = std::fs::read_dir(world.run_dir()).unwrap().next().is_some();
        match devices[0]["state"].as_str() {
            None if !busy => break,
            Some("dead") => panic!("the device was left for dead: {devices}"),
            _ => assert!(started.elapsed() < PATIENCE, "it is still there: {devices}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Who started it in the background thinks better of it before it is ready: it does not come up behind their back, whatever
/// the source says then.
#[test]
fn ctrl_c_while_the_source_has_not_answered() {
    let world = World::new();
    let (dialled, dials) = mpsc::channel();
    let (answer, asked) = mpsc::channel::<()>();
    let asked = Mutex::new(asked);
    let silent = stranger(&world.path("silent"), move |_| {
        dialled.send(()).unwrap();
        // And then it hangs up.
        let _ = asked.lock().unwrap().recv();
        Ok(())
    });
    let cache = world.path("cache");
    let mut command = world.command(["attach", &silent, cache.to_str().unwrap(), "--name", "disk"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    dials.recv_timeout(PATIENCE).unwrap();
    kill(child.id() as i32, Signal::SIGINT);
    assert!(!wait(&mut child).success());
    let mut said = String::new();
    // To the end of the one in the background, which does not wait for the source either.
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.starts_with("blkferry: stopping\n"), "the one in the background has heard of it: {said}");
    assert!(said.lines().count() == 2 && said.contains("before the source had answered"), "{said}");
    answer.send(()).unwrap();
    assert_eq!(world.ok(["list", "--json"]).trim(), "[]");
    assert!(!cache.exists());
}
