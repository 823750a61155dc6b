//! The same with fio as the guest: what it wrote before the kill must verify after it.
//!
//! One fio finishes (its last requests flushed, or only acknowledged); a second one is at work on the other half of
//! the device when the daemon is killed. The first one's blocks are then verified by a third.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{Device, World, make_image, tool};
use crate::killed::rounds;
use crate::rng::Rng;

const SIZE: u64 = 24 << 20;
const HALF: u64 = SIZE / 2;

struct Job {
    seed: u64,
    bsrange: &'static str,
    rw: &'static str,
    flush: bool,
}

impl Job {
    fn random(rng: &mut Rng) -> Self {
        Self {
            seed: rng.below(1 << 31),
            bsrange: rng.one_of(&["512-64k", "4k-4k", "16k-16k", "1k-256k"]),
            rw: rng.one_of(&["randwrite", "write", "randrw"]),
            flush: rng.percent(50),
        }
    }

    /// Arguments that make fio choose the same blocks and contents each time.
    fn arguments(&self, uri: &str, offset: u64, rw: &str) -> Vec<String> {
        [
            "--name=guest".to_owned(),
            "--ioengine=nbd".into(),
            format!("--uri={uri}"),
            format!("--rw={rw}"),
            format!("--bsrange={}", self.bsrange),
            format!("--offset={offset}"),
            format!("--size={HALF}"),
            "--iodepth=16".into(),
            format!("--randseed={}", self.seed),
            "--verify=crc32c".into(),
            "--verify_fatal=1".into(),
            "--verify_state_save=0".into(),
            "--thread=1".into(),
        ]
        .into()
    }

    fn write(&self, uri: &str) {
        let mut arguments = self.arguments(uri, 0, self.rw);
        arguments.push("--do_verify=0".into());
        arguments.push(format!("--end_fsync={}", u8::from(self.flush)));
        tool("fio", arguments);
    }

    fn verify(&self, uri: &str) {
        let mut arguments = self.arguments(uri, 0, self.rw);
        arguments.push("--verify_only".into());
        let said = tool("fio", arguments);
        assert!(said.contains("err= 0"), "{said}");
    }
}

fn kill_amid_writes<'a>(world: &'a World, source: &str, cache: &Path, device: Device<'a>, other: &Job) -> Device<'a> {
    let before = written(&device.status());
    let mut arguments = other.arguments(&device.uri, HALF, "randwrite");
    arguments.extend(["--do_verify=0", "--time_based", "--runtime=60"].map(String::from));
    let mut fio = Command::new("fio").args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    device.wait_for(|status| written(status) > before + 100_000);
    device.kill_daemon();
    assert!(!fio.wait().unwrap().success(), "fio was still at work when the daemon was killed");
    world.attach(source, cache, "disk", &["--hydrate", "10M"])
}

fn written(status: &serde_json::Value) -> u64 {
    status["frontend"]["written_bytes"].as_u64().unwrap()
}

#[test]
fn what_fio_wrote_before_a_kill_verifies_after_it() {
    let first = crate::from_env("BLKFERRY_CRASH_FIRST").unwrap_or(0);
    let rounds = rounds().div_ceil(10);
    for seed in first..first + rounds {
        let mut rng = Rng::new(seed, 100);
        let (job, other) = (Job::random(&mut rng), Job::random(&mut rng));
        println!("fio round {seed}: {} of {}, flushed: {}", job.rw, job.bsrange, job.flush);
        let world = World::new();
        let (image, cache) = (world.path("image"), world.path("cache"));
        make_image(&image, SIZE, &[(0, 5 << 20), (10 << 20, 9 << 20)]);
        let export = world.export(&image);
        let hydrate = rng.one_of(&["off", "auto", "10M"]);
        let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", hydrate]);
        job.write(&device.uri);
        let device = kill_amid_writes(&world, &export.uri, &cache, device, &other);
        job.verify(&device.uri);
        device.set("hydrate=auto");
        device.wait_complete();
        job.verify(&device.uri);
        device.detach();
    }
}
