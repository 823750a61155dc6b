//! A link that is lost for longer than requests are to wait (`on-source-loss=fail-after:5s`), under fio that verifies.
//!
//! ```text
//!   disk:   here             written           absent
//!           fio: any size    fio: whole        fio: reads, errors counted
//!           reads + writes   blocks, verified  requests made by hand, timed
//! ```
//! Only the last part may see errors: EIO, not before 5 s after the source was last heard, and none once it is back.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blkferry::nbd::{Command, CommandFlags, NbdError};

use crate::bench::{poll, run, text, try_run};
use crate::client::Client;
use crate::common::{Device, World, make_image};
use crate::fio::written;
use crate::relay::Relay;

const SIZE: u64 = 96 << 20;
/// Where the parts begin that are absent, and stay so but for what is read.
const WRITTEN_AT: u64 = 16 << 20;
const ABSENT_AT: u64 = 32 << 20;
/// The last blocks are for the requests made by hand, of which fio knows nothing.
const BY_HAND_AT: u64 = SIZE - (4 << 20);

/// What one run of fio reads of the absent part, in a second and a half, and how many such pieces there are.
const WINDOW_BYTES: u64 = 300 * 4096;
const WINDOWS: u64 = (BY_HAND_AT - ABSENT_AT) / WINDOW_BYTES;

/// What the policy says.
const PATIENCE: Duration = Duration::from_secs(5);
/// The promise is 6 s, of which 0.2 s are needed: the source is looked after five times a second. On two cores that
/// build something else meanwhile, whoever is to be woken may wait for its turn.
const LATEST: Duration = Duration::from_secs(6 + 2);

/// What the guests share.
struct Ward<'a> {
    world: &'a World,
    uri: &'a str,
    over: AtomicBool,
    /// Runs of fio that ended well, of each of the two that need no source.
    runs: [AtomicU64; 2],
    /// Errors that the third has seen.
    errors: AtomicU64,
}

/// Ends the guests, also when the test fails.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn fio_args(uri: &str, rest: &[&str]) -> Vec<String> {
    let common = ["--name=guest", "--ioengine=nbd", "--iodepth=16"];
    common.iter().chain(rest).map(|arg| (*arg).to_owned()).chain([format!("--uri={uri}")]).collect()
}

impl Ward<'_> {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// A guest that needs no source, again and again; gives the logs of what it wrote.
    fn untroubled(&self, which: usize, offset: u64, more: &[&str]) -> Vec<PathBuf> {
        let mut logs = Vec::new();
        while !self.is_over() {
            let log = self.world.path(&format!("{which}-{}.log", logs.len()));
            let mut args = fio_args(self.uri, &["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]);
            args.extend(["--fsync=32", "--io_size=2M"].map(str::to_owned));
            args.extend(more.iter().map(|arg| (*arg).to_owned()));
            args.extend([format!("--offset={offset}"), format!("--size={}", 16 << 20)]);
            args.extend([format!("--randseed={}", logs.len()), format!("--write_iolog={}", text(&log))]);
            args.push(format!("--aux-path={}", text(&self.world.path(""))));
            run("fio", &args.iter().map(String::as_str).collect::<Vec<_>>());
            self.runs[which].fetch_add(1, Ordering::SeqCst);
            logs.push(log);
        }
        logs
    }

    /// A guest that reads what is absent, slowly enough that there is always something left; errors are counted.
    fn troubled(&self) {
        for window in 0.. {
            if self.is_over() {
                return;
            }
            self.errors.fetch_add(read_absent(self.uri, window), Ordering::SeqCst);
        }
    }

    /// Waits until both guests without a source have come to an end and to another one.
    fn wait_for_progress(&self) {
        let count = || self.runs.each_ref().map(|runs| runs.load(Ordering::SeqCst));
        let before = count();
        poll("fio to go on without a source", || count().iter().zip(before).all(|(now, before)| *now >= before + 2));
    }
}

/// One run of fio that reads absent blocks, in a window that no other run has read; how many of the reads failed. All
/// that fail do so with EIO.
fn read_absent(uri: &str, window: u64) -> u64 {
    let offset = ABSENT_AT + window % WINDOWS * WINDOW_BYTES;
    let mut args = fio_args(uri, &["--rw=read", "--bs=4k", "--rate_iops=200", "--continue_on_error=read"]);
    args.extend([format!("--offset={offset}"), format!("--size={WINDOW_BYTES}"), "--output-format=json".to_owned()]);
    let out = try_run("fio", &args.iter().map(String::as_str).collect::<Vec<_>>());
    let said = String::from_utf8_lossy(&out.stdout);
    let json = said.find('{').map_or("", |at| &said[at..]);
    let report: serde_json::Value = serde_json::from_str(json).unwrap_or_else(|e| panic!("{e}: {out:?}"));
    let job = &report["jobs"][0];
    let (errors, first) = (job["total_err"].as_u64().unwrap(), job["first_error"].as_u64().unwrap());
    assert!(errors == 0 || first == 5, "not EIO: {first}");
    println!("fio has read absent blocks for {} ms, {errors} errors", job["job_runtime"]);
    errors
}

/// Reads absent blocks while the source is lost: those that were asked for at once, and those of two seconds later,
/// fail together. (Whoever waits is told when the *source* was silent for too long.)
fn fails_in_time(relay: &Relay, device: &Device<'_>, at: u64, lose: impl Fn(&Relay)) {
    let mut client = Client::connect(&device.uri);
    let read = |client: &mut Client, block: u64| {
        client.send(Command::Read, CommandFlags::empty(), at + block * 4096, 4096, &[])
    };
    lose(relay);
    let mut waiting = vec![read(&mut client, 0), read(&mut client, 7)];
    std::thread::sleep(Duration::from_secs(2));
    waiting.push(read(&mut client, 9));
    while !waiting.is_empty() {
        let (cookie, answer) = client.receive();
        let (now, heard) = (Instant::now(), relay.last_heard());
        let after = now.duration_since(heard);
        println!("failed {} ms after the source was last heard", after.as_millis());
        assert_eq!(answer.err(), Some(NbdError::Io));
        assert!(after >= PATIENCE, "too early: {after:?}");
        assert!(after < LATEST, "too late: {after:?}");
        waiting.retain(|other| *other != cookie);
    }
    // Later ones do not wait at all: the source was not heard since, so the time is up.
    assert_eq!(client.read(at + 11 * 4096, 4096).err(), Some(NbdError::Io));
    assert_eq!(device.status()["state"], "degraded");
}

#[test]
fn who_needs_the_source_gets_eio_in_time_and_nobody_else() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    make_image(&image, SIZE, &[(0, SIZE)]);
    let export = world.export_at(&image, "127.0.0.1:0");
    let relay = Relay::before(&export.uri);
    let more = ["--hydrate", "off", "--on-source-loss", "fail-after:5s"];
    let device = world.attach(&relay.uri(), &cache, "disk", &more);
    let mut client = Client::connect(&device.uri);
    for at in (0..WRITTEN_AT).step_by(1 << 20) {
        client.read(at, 1 << 20).unwrap();
    }
    device.wait_for(|status| status["bytes"]["present"] == WRITTEN_AT);

    let none = || AtomicU64::new(0);
    let ward = Ward { world: &world, uri: &device.uri, over: false.into(), runs: [none(), none()], errors: none() };
    let logs: Vec<PathBuf> = std::thread::scope(|scope| {
        let ending = Ending(&ward.over);
        let here = scope.spawn(|| ward.untroubled(0, 0, &["--rw=randrw", "--bsrange=512-64k", "--bs_unaligned"]));
        let whole = scope.spawn(|| ward.untroubled(1, WRITTEN_AT, &["--rw=randwrite", "--bs=4k"]));
        let absent = scope.spawn(|| ward.troubled());
        ward.wait_for_progress();
        assert_eq!(ward.errors.load(Ordering::SeqCst), 0, "nothing is wrong yet");
        // Broken off, and then silent with open connections.
        for (round, lose) in [Relay::cut, Relay::fall_silent].into_iter().enumerate() {
            let at = BY_HAND_AT + ((round as u64) << 20);
            fails_in_time(&relay, &device, at, lose);
            ward.wait_for_progress();
            relay.mend();
            device.wait_for(|status| status["state"] == "active");
            // Clean again: what failed before is read now.
            let mut want = vec![0; 16 * 4096];
            File::open(&image).unwrap().read_exact_at(&mut want, at).unwrap();
            assert!(client.read(at, 16 * 4096).unwrap() == want);
            assert_eq!(read_absent(&device.uri, WINDOWS - 1 - round as u64), 0, "errors, and the source is back");
        }
        drop(ending);
        absent.join().unwrap();
        [here, whole].into_iter().flat_map(|guest| guest.join().unwrap()).collect()
    });
    assert!(ward.errors.load(Ordering::SeqCst) > 0, "fio has read absent blocks all the time and saw no error");

    device.set("hydrate=auto");
    device.wait_complete();
    device.detach();
    let (mut want, got) = (std::fs::read(&image).unwrap(), std::fs::read(&cache).unwrap());
    for (offset, len) in logs.iter().flat_map(|log| written(log)) {
        let range = offset as usize..(offset + len) as usize;
        want[range.clone()].copy_from_slice(&got[range]);
    }
    if let Some(at) = (0..want.len()).find(|&i| want[i] != got[i]) {
        panic!("the image differs from its source at {at}, where fio wrote nothing");
    }
}
