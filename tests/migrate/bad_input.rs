//! What does not fit is said in one clear line, before anything has happened. The QEMUs are a few lines that they say.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::common::{Export, World, make_image};
use crate::site::serve;

const SIZE: u64 = 1 << 20;

/// A QEMU that says how it is, and notes what it was told to do.
struct Fake {
    told: Arc<Mutex<Vec<String>>>,
}

fn block(device: &str, file: &str, size: u64) -> Value {
    json!({ "device": device, "qdev": format!("/machine/peripheral/{device}/virtio-backend"), "inserted":
        { "node-name": format!("#{device}"), "ro": false, "file": file, "image": { "virtual-size": size } } })
}

impl Fake {
    fn start(path: &Path, status: &str, blocks: &[Value], capabilities: &[&str]) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let answers = json!({
            "qmp_capabilities": {},
            "query-status": { "status": status },
            "query-migrate": {},
            "query-block": blocks,
            "query-migrate-capabilities":
                capabilities.iter().map(|name| json!({ "capability": name, "state": false })).collect::<Vec<_>>(),
        });
        let told = Arc::new(Mutex::new(Vec::new()));
        let note = told.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                talk(stream, &answers, &note);
            }
        });
        Self { told }
    }

    /// It was asked, and nothing else.
    fn assert_unchanged(&self) {
        let told = self.told.lock().unwrap();
        assert!(told.iter().all(|command| command.starts_with("query-") || command == "qmp_capabilities"), "{told:?}");
        assert!(!told.is_empty());
    }
}

fn talk(mut stream: std::os::unix::net::UnixStream, answers: &Value, note: &Mutex<Vec<String>>) {
    let greeting = json!({ "QMP": { "version": { "qemu": { "major": 2, "minor": 11 } } } });
    let heard = BufReader::new(stream.try_clone().unwrap());
    let mut say = |line: &Value| writeln!(stream, "{line}").is_ok();
    say(&greeting);
    for line in heard.lines().map_while(Result::ok) {
        let asked: Value = serde_json::from_str(&line).unwrap();
        let command = asked["execute"].as_str().unwrap();
        note.lock().unwrap().push(command.to_owned());
        if !say(&json!({ "return": answers[command], "id": asked["id"] })) {
            return;
        }
    }
}

/// An image that is served, and a device in standby for it.
fn ferried(world: &World) -> (Export, String) {
    let image = world.path("image.raw");
    make_image(&image, SIZE, &[(0, 4096)]);
    let export = serve(world, &image, 0);
    let status: Value = serde_json::from_str(&world.ok([
        "attach",
        "--standby",
        &export.uri,
        world.path("cache.raw").to_str().unwrap(),
        "--name",
        "web",
        "--json",
    ]))
    .unwrap();
    (export, status["frontend"]["uri"].as_str().unwrap().to_owned())
}

/// How a QEMU is: its state, its disks, what its migrations can do.
type Machine<'a> = (&'a str, &'a [Value], &'a [&'a str]);

const ALL: &[&str] = &["events", "pause-before-switchover", "late-block-activate"];

#[test]
fn what_does_not_fit_is_said_before_anything_has_happened() {
    let world = World::new();
    let (_export, uri) = ferried(&world);
    let good_a = [block("disk0", "/a/disk.raw", SIZE)];
    let good_b = [block("disk0", &uri, SIZE)];
    let two = [good_a[0].clone(), block("disk1", "/a/other.raw", SIZE)];
    let large = [block("disk0", "/a/disk.raw", 2 * SIZE)];
    let elsewhere = [block("disk0", "/b/disk.raw", SIZE)];
    let foreign = [block("other", &uri, SIZE)];
    let cases: [(Machine<'_>, Machine<'_>, &str, &str); 9] = [
        (("running", &good_a, &["events"]), ("inmigrate", &good_b, ALL), "disk0=web", "QEMU 2.12 or later is needed"),
        (("running", &good_a, ALL), ("inmigrate", &good_b, &["events"]), "disk0=web", "QEMU 3.0 or later is needed"),
        (("running", &good_a, ALL), ("running", &good_b, ALL), "disk0=web", "start it with -incoming defer -S"),
        (("inmigrate", &good_a, ALL), ("inmigrate", &good_b, ALL), "disk0=web", "it has no guest to move"),
        (("running", &large, ALL), ("inmigrate", &good_b, ALL), "disk0=web", "that is another disk"),
        (("running", &good_a, ALL), ("inmigrate", &elsewhere, ALL), "disk0=web", "and not device web"),
        (("running", &good_a, ALL), ("inmigrate", &foreign, ALL), "disk0=web", "has no disk that corresponds to disk0"),
        (("running", &two, ALL), ("inmigrate", &good_b, ALL), "disk0=web", "disk disk1 of the source's machine"),
        (("running", &good_a, ALL), ("inmigrate", &good_b, ALL), "disk0=nobody", "no device named nobody is running"),
    ];
    for (i, ((run_a, blocks_a, can_a), (run_b, blocks_b, can_b), disk, wanted)) in cases.into_iter().enumerate() {
        let (at_a, at_b) = (world.path(&format!("a{i}")), world.path(&format!("b{i}")));
        let a = Fake::start(&at_a, run_a, blocks_a, can_a);
        let b = Fake::start(&at_b, run_b, blocks_b, can_b);
        let (at_a, at_b) = (at_a.to_str().unwrap(), at_b.to_str().unwrap());
        let line = world.refused(["migrate", "--from", at_a, "--to", at_b, "--uri", "tcp:localhost:1", "--disk", disk]);
        assert!(line.contains(wanted), "case {i}: {line}");
        a.assert_unchanged();
        b.assert_unchanged();
    }
    // Everything fits, so that each of them failed for its own reason.
    let (at_a, at_b) = (world.path("a"), world.path("b"));
    let a = Fake::start(&at_a, "running", &good_a, ALL);
    let b = Fake::start(&at_b, "inmigrate", &good_b, ALL);
    let (at_a, at_b) = (at_a.to_str().unwrap(), at_b.to_str().unwrap());
    let uri = "tcp:localhost:1";
    let fits = ["migrate", "--from", at_a, "--to", at_b, "--uri", uri, "--disk", "disk0=web", "--dry-run"];
    assert!(world.ok(fits).contains("all fits"));
    a.assert_unchanged();
    b.assert_unchanged();

    let line = world.refused(["migrate", "--from", at_a, "--to", at_a, "--disk", "disk0=web"]);
    assert!(line.contains("cannot move to itself"), "{line}");
    let line = world.refused(["migrate", "--from", "/nobody/a", "--to", "/nobody/b", "--disk", "disk0=web"]);
    assert!(line.contains("cannot be reached") && line.contains("does it run"), "{line}");
    let line = world.refused(["migrate", "--from", at_a, "--to", at_b, "--disk", "disk0=web"]);
    assert!(line.contains("--uri is missing"), "{line}");
}

/// By hand: all or none, twice is once, and nothing is given back once it is in use.
#[test]
fn disks_are_activated_and_called_off_by_hand() {
    let world = World::new();
    let (export, _) = ferried(&world);
    let line = world.refused(["activate", "web", "nobody"]);
    assert!(line.contains("no device named nobody"), "{line}");
    let state = || serde_json::from_str::<Value>(&world.ok(["status", "web", "--json"])).unwrap()["state"].clone();
    assert_eq!(state(), "standby", "all or none");
    let said = world.ok(["activate", "web", "--wait", "1s"]);
    assert!(said.contains("web: active, in epoch 2"), "{said}");
    // A small disk is here in no time.
    assert!(["active", "complete"].contains(&state().as_str().unwrap()), "{}", state());
    let said = world.ok(["activate", "web"]);
    assert!(said.contains("already active, in epoch 2"), "{said}");
    let line = world.refused(["abort", "web"]);
    assert!(line.contains("is active"), "{line}");
    // It may be immutable, and has to go with the test.
    export.stop();
    world.ok(["reclaim", "--force", world.path("image.raw").to_str().unwrap()]);
}

#[test]
fn a_device_in_standby_is_called_off() {
    let world = World::new();
    let (_export, _) = ferried(&world);
    assert!(world.ok(["abort", "web"]).contains("the disk is the source's"));
    let line = world.refused(["status", "web"]);
    assert!(line.contains("no device named web"), "{line}");
}
