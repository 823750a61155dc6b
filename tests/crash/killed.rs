//! SIGKILL at random moments: of a daemon under load, of one that starts, of one that stops.
//!
//! A *course* is one device from its first attach to its end: some rounds of attach, inspect, load, kill; then
//! it is hydrated to completion, detached, and its cache compared with the record as a plain file.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use blkferry::engine::Geometry;
use nix::sys::signal::Signal;

use crate::common::{self, Device, Export, World};
use crate::inspect::{Depth, inspect};
use crate::record::{Crash, Record};
use crate::rng::Rng;
use crate::site::{Present, live_path, quiet_cache, scribble_on_absent_blocks, superblock};
use crate::workload::{Habits, Workload};

/// Requests that a daemon under load answers before its end may come.
const MAX_ANSWERS: u64 = 400;

const HYDRATE: &[&str] = &["off", "auto", "2M", "20M"];

/// When the daemon is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    Load,
    Start,
    Stop,
}

/// One device and what it must hold.
pub struct Course<'a> {
    world: &'a World,
    export: Export,
    pub cache: PathBuf,
    pub metadata: PathBuf,
    pub record: Record,
    pub geometry: Geometry,
    pub rng: Rng,
    attaches: u64,
}

impl<'a> Course<'a> {
    pub fn new(world: &'a World, seed: u64) -> Self {
        let mut rng = Rng::new(seed, 0);
        let block_bytes = rng.one_of(&[4 << 10, 4 << 10, 4 << 10, 16 << 10, 64 << 10]);
        // Now and then with more than one map page.
        let size = if rng.percent(10) { rng.between(62 << 20, 70 << 20) } else { rng.between(2 << 20, 20 << 20) };
        let size = size / 512 * 512;
        let image = world.path(&format!("image-{seed}"));
        let data: Vec<(u64, u64)> = (0..rng.between(1, 12))
            .map(|_| {
                let start = rng.below(size);
                (start, rng.between(1, size - start).min(4 << 20))
            })
            .collect();
        common::make_image(&image, size, &data);
        let record = Record::new(std::fs::read(&image).unwrap());
        let cache = world.path(&format!("cache-{seed}"));
        let metadata = world.path(&format!("cache-{seed}.ferry"));
        let geometry = Geometry::new(size, block_bytes).unwrap();
        println!("course {seed}: {size} bytes in blocks of {block_bytes}");
        Self { world, export: world.export(&image), cache, metadata, record, geometry, rng, attaches: 0 }
    }

    pub fn source(&self) -> &str {
        &self.export.uri
    }

    /// Attaches, now and then with hydration on from the start.
    pub fn attach(&mut self) -> Device<'a> {
        let hydrate = if self.rng.percent(25) { self.rng.one_of(HYDRATE) } else { "off" };
        self.attach_with(&["--hydrate", hydrate])
    }

    pub fn attach_with(&mut self, more: &[&str]) -> Device<'a> {
        // A name of its own each time: the one of a daemon that is still dying is not free yet.
        self.attaches += 1;
        let name = format!("d{}", self.attaches);
        let block_size = self.geometry.block_bytes().to_string();
        let arguments = [&["--block-size", &block_size], more].concat();
        self.world.attach(&self.export.uri, &self.cache, &name, &arguments)
    }

    /// Tries to attach, which must fail with one line.
    pub fn refused(&self, more: &[&str]) -> String {
        let arguments = ["attach", &self.export.uri, self.cache.to_str().unwrap(), "--name", "refused"];
        self.world.refused([&arguments[..], more].concat())
    }

    pub fn inspect(&mut self, device: &Device, depth: Depth, crash: Crash) {
        let present = Present::from_live_map(&live_path(self.world, &self.metadata));
        inspect(&device.uri, &mut self.record, self.geometry, &present, depth, crash);
    }

    fn workload(&mut self, device: &Device) -> Workload<'_> {
        device.set(&format!("hydrate={}", self.rng.one_of(HYDRATE)));
        let habits = Habits::random(&mut self.rng);
        let rng = Rng::new(self.rng.below(u64::MAX), 1);
        println!("  {habits:?}");
        Workload::start(&mut self.record, &device.uri, self.geometry.block_bytes(), habits, rng).unwrap()
    }

    fn round(&mut self, round: u64) {
        let moment = [Moment::Load, Moment::Start, Moment::Stop][self.rng.weighted(&[80, 10, 10])];
        println!(" round {round}: killed in {moment:?}");
        match moment {
            Moment::Load => self.kill_under_load(Crash::Kill),
            Moment::Start => self.kill_at_start(),
            Moment::Stop => self.kill_at_stop(),
        }
        if self.rng.percent(30) && superblock(&self.metadata).is_some_and(|superblock| !superblock.clean) {
            println!("  absent blocks are scribbled on");
            drop(quiet_cache(&self.cache));
            let present = Present::from_live_map(&live_path(self.world, &self.metadata));
            scribble_on_absent_blocks(&self.cache, self.geometry, &present, round);
        }
    }

    /// Under load until some answers have come, then killed while the load goes on. `before` is what ended the
    /// daemon before.
    pub fn kill_under_load(&mut self, before: Crash) {
        let device = self.attach();
        self.inspect(&device, Depth::Present, before);
        let answers = self.rng.below(MAX_ANSWERS);
        let killer = Killer::new(device.pid, Duration::from_micros(self.rng.below(5_000)));
        let mut load = self.workload(&device);
        while load.answered < answers {
            load.step().expect("it lives");
        }
        killer.go();
        while load.step().is_ok() {}
        println!("  {} requests were answered", load.answered);
        load.bury();
        if self.rng.percent(50) {
            device.kill_daemon();
        }
    }

    fn kill_at_start(&mut self) {
        let block_size = self.geometry.block_bytes().to_string();
        let arguments = ["attach", "--foreground", "--name", "start", "--block-size", &block_size, &self.export.uri];
        let mut command = self.world.command(arguments);
        command.arg(&self.cache).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let killer = Killer::new(child.id() as i32, Duration::from_micros(self.rng.below(60_000)));
        killer.go();
        child.wait().unwrap();
    }

    fn kill_at_stop(&mut self) {
        let device = self.attach();
        self.inspect(&device, Depth::Present, Crash::Kill);
        let answers = self.rng.below(MAX_ANSWERS);
        let killer = Killer::new(device.pid, Duration::from_micros(self.rng.below(30_000)));
        let mut load = self.workload(&device);
        while load.answered < answers {
            load.step().expect("it lives");
        }
        load.drain().expect("it lives");
        drop(load);
        killer.go();
        // It ends in order, or it is killed before that.
        self.world.blkferry(["detach", &device.name, "--incomplete"]);
        device.kill_daemon();
    }

    /// Everything is read, everything is fetched, and what remains is a plain image.
    pub fn end(mut self) {
        let device = self.attach();
        self.inspect(&device, Depth::Present, Crash::Kill);
        device.set("hydrate=auto");
        device.wait_complete();
        self.inspect(&device, Depth::Everything, Crash::Kill);
        device.detach();
        let image = std::fs::read(&self.cache).unwrap();
        assert!(image == self.record.bytes(0, self.record.size()), "the image that remains differs from the record");
        let live = live_path(self.world, &self.metadata);
        assert!(!live.exists(), "a device that ended in order left its live map");
        std::fs::remove_file(&self.cache).unwrap();
    }
}

/// Kills a process a while after it is told to, from a thread that has nothing else to do.
struct Killer {
    go: mpsc::Sender<()>,
}

impl Killer {
    fn new(pid: i32, delay: Duration) -> Self {
        let (go, went) = mpsc::channel();
        std::thread::spawn(move || {
            if went.recv().is_ok() {
                let started = Instant::now();
                while started.elapsed() < delay {
                    std::hint::spin_loop();
                }
                common::kill(pid, Signal::SIGKILL);
            }
        });
        Self { go }
    }

    fn go(&self) {
        self.go.send(()).unwrap();
    }
}

/// Rounds of a run.
pub fn rounds() -> u64 {
    crate::from_env("BLKFERRY_CRASH_ROUNDS").unwrap_or(100)
}

#[test]
fn a_killed_daemon_loses_nothing() {
    let world = World::new();
    let first = crate::from_env("BLKFERRY_CRASH_FIRST").unwrap_or(0);
    let (mut done, mut seed) = (0, first);
    println!("{} rounds, courses from {first} on", rounds());
    while done < rounds() {
        let mut course = Course::new(&world, seed);
        let rounds = course.rng.between(1, 6);
        (1..=rounds).for_each(|round| course.round(round));
        course.end();
        done += rounds;
        seed += 1;
    }
}
