//! What the tests stand on: tools with a deadline, images of every kind of content, devices in each phase.

use std::fs::File;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::{Device, World, noise, tool_output};

/// The unit in which the wire is held to account.
pub const GRANULE: usize = 4096;
/// A tool that takes longer hangs.
const TOOL_SECONDS: &str = "120";

/// Waits for something that must come.
pub fn poll(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(60), "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a tool that must be there and end in time; the caller judges.
pub fn try_run(program: &str, args: &[&str]) -> Output {
    let mut all = vec!["--kill-after=5", TOOL_SECONDS, program];
    all.extend(args);
    let out = tool_output("timeout", all);
    match out.status.code() {
        Some(124 | 137) => panic!("{program} {args:?} hangs: {}", String::from_utf8_lossy(&out.stderr)),
        Some(127) => panic!("{program} is missing: `scripts/test` installs all that the tests need"),
        _ => out,
    }
}

/// Runs a tool that must succeed; gives what it printed.
pub fn run(program: &str, args: &[&str]) -> String {
    let out = try_run(program, args);
    let (said, cried) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{program} {args:?} failed ({}):\n{said}{cried}", out.status);
    said.into_owned()
}

/// Runs a tool that must fail, by itself and in order; gives all that it said.
pub fn run_fails(program: &str, args: &[&str]) -> String {
    let out = try_run(program, args);
    let said = [out.stdout, out.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert_eq!(out.status.code(), Some(1), "{program} {args:?} should have failed:\n{said}");
    said
}

/// Runs a tool that prints JSON.
pub fn run_json(program: &str, args: &[&str]) -> Value {
    serde_json::from_str(&run(program, args)).expect("it prints JSON")
}

/// `qemu-io` on a raw disk; `commands` must all succeed.
pub fn qemu_io(uri: &str, commands: &[&str]) {
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(uri);
    run("qemu-io", &args);
}

/// What the content of an image is made of, over and over, one stripe after the other.
const STRIPES: [(Kind, u64); 6] = [
    (Kind::Noise, 384 << 10),
    (Kind::Zeros, 128 << 10),
    (Kind::Hole, 256 << 10),
    (Kind::Mixed, 64 << 10),
    (Kind::Noise, 60 << 10),
    (Kind::Hole, 132 << 10),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Noise,
    /// Allocated, yet nothing but zeros.
    Zeros,
    Hole,
    /// One granule of noise, three of written zeros.
    Mixed,
}

/// The stripes of a mixed image of this size: offset, length, kind.
pub fn stripes(size: u64) -> Vec<(u64, u64, Kind)> {
    let mut at = 0;
    let mut all = Vec::new();
    for (kind, len) in STRIPES.into_iter().cycle() {
        if at == size {
            return all;
        }
        let len = len.min(size - at);
        all.push((at, len, kind));
        at += len;
    }
    all
}

/// An image with data, written zeros and holes. Every byte of data is of its own place: a misplaced block shows.
pub fn mixed_image(path: &Path, size: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (offset, len, kind) in stripes(size) {
        let mut bytes = match kind {
            Kind::Hole => continue,
            Kind::Zeros => vec![0; len as usize],
            Kind::Noise | Kind::Mixed => noise(offset ^ size, len as usize),
        };
        if kind == Kind::Mixed {
            let granules = bytes.chunks_mut(GRANULE).enumerate();
            granules.filter(|(i, _)| i % 4 != 0).for_each(|(_, granule)| granule.fill(0));
        }
        file.write_all_at(&bytes, offset).unwrap();
    }
    file.sync_all().unwrap();
}

/// Offsets of the granules of an image that hold anything but zeros, with their lengths.
pub fn granules_of_data(image: &[u8]) -> Vec<(u64, u64)> {
    let granules = image.chunks(GRANULE).enumerate();
    let data = granules.filter(|(_, granule)| granule.iter().any(|&byte| byte != 0));
    data.map(|(i, granule)| ((i * GRANULE) as u64, granule.len() as u64)).collect()
}

/// How far hydration is when a test looks at a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing is here, and nothing comes by itself.
    Before,
    /// Blocks come, slowly enough that a tool meets blocks of both kinds.
    During,
    /// Everything is here and committed.
    After,
}

impl Phase {
    pub const ALL: [Self; 3] = [Self::Before, Self::During, Self::After];
}

/// A device of its own in this phase.
pub fn attach_in<'w>(world: &'w World, phase: Phase, source: &str, cache: &Path, more: &[&str]) -> Device<'w> {
    let hydrate = match phase {
        Phase::Before => "off",
        Phase::During => "4M",
        Phase::After => "auto",
    };
    let name = format!("d{}", unique());
    let mut args = vec!["--hydrate", hydrate];
    args.extend(more);
    let device = world.attach(source, cache, &name, &args);
    match phase {
        Phase::Before => assert_eq!(device.status()["blocks"]["present"], 0),
        Phase::During => {
            let status = device.wait_for(|status| status["blocks"]["present"] != 0);
            if status["wire"]["data_bytes"].as_u64().unwrap() > 1 << 20 {
                // (Zeros that the source tells are here at once; samples for the identity are data too.)
                assert_ne!(status["blocks"]["absent"], 0, "{status}");
                assert_eq!(status["hydrate"]["state"], "running", "{status}");
            }
        }
        Phase::After => drop(device.wait_complete()),
    }
    device
}

/// Lets a device become complete, in whatever phase it is, and ends it.
pub fn finish(device: Device<'_>) {
    device.set("hydrate=auto");
    device.wait_complete();
    device.detach();
}
