//! Two QEMUs, two disks, exports and daemons, as little of each as the driver can see. What must never happen is looked
//! for after every change.

use std::time::{Duration, Instant};

use blkferry::migrate::plan::{Disk, Machine, Migration, Run, View};
use blkferry::migrate::{Memory, NotActive, World};

/// What dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Orchestrator,
    Export,
    Daemon,
    /// Its QEMU: the kernel still delivers what that had sent.
    Source,
    /// The whole host: nothing more arrives from there, and nobody is told.
    SourceHost,
    Destination,
    Link,
    /// For a moment, in which requests fail.
    LinkBriefly,
    /// The answer to what is asked next is lost; it is done all the same.
    LostAnswer,
}

impl Fault {
    pub const ALL: [Self; 9] = [
        Self::Orchestrator,
        Self::Export,
        Self::Daemon,
        Self::Source,
        Self::SourceHost,
        Self::Destination,
        Self::Link,
        Self::LinkBriefly,
        Self::LostAnswer,
    ];
}

/// A disk of the machine.
#[derive(Clone, Debug)]
pub struct Ferried {
    pub export_runs: bool,
    /// On record at the source.
    pub given: bool,
    pub daemon_runs: bool,
    /// On record at the destination.
    pub active: bool,
}

#[derive(Clone, Debug)]
pub struct Qemu {
    pub lives: bool,
    pub run: Run,
    pub migration: Migration,
}

#[derive(Clone, Debug)]
pub struct Sim {
    pub source: Qemu,
    /// The source's QEMU has its images open for writing.
    pub holds: bool,
    pub destination: Qemu,
    pub disks: Vec<Ferried>,
    pub link: bool,
    brief: u32,
    is_silent: bool,
    /// How many looks the destination takes to load what it was sent.
    pub loads_for: u32,
    lose_answer: bool,
    /// Planted: giving back is said to be done, and is not.
    pub lies: bool,
    /// Nothing of the memory arrives after so many bytes, and nothing breaks.
    pub stalls_at: Option<u64>,
    /// The memory takes ten minutes, and every ten seconds some of it arrives.
    pub crawls: bool,
    /// The destination's QEMU says nothing for so long while a disk of it cannot be read.
    pub hangs: Duration,
    sent_bytes: u64,
    moving: Duration,
    began: Instant,
    passed: Duration,
    waits: u32,
}

const CRAWL: Duration = Duration::from_secs(600);
const AWAY: &str = "the way to the source is broken";

impl Sim {
    pub fn new(disks: usize) -> Self {
        let disk = Ferried { export_runs: true, given: false, daemon_runs: true, active: false };
        Self {
            source: Qemu { lives: true, run: Run::Running, migration: Migration::None },
            holds: true,
            destination: Qemu { lives: true, run: Run::Incoming, migration: Migration::None },
            disks: vec![disk; disks],
            link: true,
            brief: 0,
            is_silent: false,
            loads_for: 1,
            lose_answer: false,
            lies: false,
            stalls_at: None,
            crawls: false,
            hangs: Duration::ZERO,
            sent_bytes: 0,
            moving: Duration::ZERO,
            began: Instant::now(),
            passed: Duration::ZERO,
            waits: 0,
        }
    }

    pub fn inject(&mut self, fault: Fault) {
        match fault {
            Fault::Orchestrator => {}
            Fault::Export => self.disks[0].export_runs = false,
            Fault::Daemon => self.disks[0].daemon_runs = false,
            Fault::Source => self.kill_source(),
            Fault::SourceHost => {
                self.kill_source();
                self.is_silent = true;
                self.disks.iter_mut().for_each(|disk| disk.export_runs = false);
            }
            Fault::Destination => self.destination.lives = false,
            Fault::Link => self.link = false,
            Fault::LinkBriefly => (self.link, self.brief) = (false, 3),
            Fault::LostAnswer => self.lose_answer = true,
        }
        self.check();
    }

    fn kill_source(&mut self) {
        self.source.lives = false;
        self.holds = false;
    }

    /// The destination has all that was sent.
    pub fn loads_without_source(&mut self) {
        (self.destination.run, self.destination.migration) = (Run::Paused, Migration::Completed);
    }

    /// Somebody restarts what is not a QEMU, and mends the link.
    pub fn repair(&mut self) {
        self.link = true;
        self.lose_answer = false;
        for disk in &mut self.disks {
            (disk.export_runs, disk.daemon_runs) = (true, true);
        }
    }

    pub fn runs_at_source(&self) -> bool {
        self.source.lives && self.source.run == Run::Running
    }

    pub fn runs_at_destination(&self) -> bool {
        self.destination.lives && self.destination.run == Run::Running
    }

    /// What must never be.
    fn check(&self) {
        assert!(!(self.runs_at_source() && self.runs_at_destination()), "it runs twice: {self:?}");
        for disk in &self.disks {
            assert!(!(self.holds && disk.given), "the source may write to what it gave: {self:?}");
            assert!(!disk.active || disk.given, "used at the destination without having been given: {self:?}");
        }
        if self.runs_at_destination() {
            assert!(self.disks.iter().all(|disk| disk.active), "it runs without its disks: {self:?}");
        }
    }

    fn tick(&mut self) {
        if self.brief > 0 {
            self.brief -= 1;
            self.link |= self.brief == 0;
        }
        // A migration needs both ends and the link.
        let is_broken = !self.destination.lives || !self.link;
        let source = &mut self.source;
        if source.lives {
            match source.migration {
                Migration::Cancelling => {
                    source.migration = Migration::Failed("was cancelled".into());
                    source.run = Run::Running;
                }
                Migration::Moving | Migration::Switching if is_broken => {
                    source.migration = Migration::Failed("failed".into());
                    source.run = Run::Running;
                }
                Migration::Moving if self.stalls_at.is_some_and(|at| self.sent_bytes >= at) => {}
                Migration::Moving if self.crawls && self.passed - self.moving < CRAWL => {
                    self.sent_bytes = (self.passed - self.moving).as_secs() / 10;
                }
                Migration::Moving if self.waits.is_multiple_of(2) && self.stalls_at.is_none() => {
                    (source.run, source.migration) = (Run::Stopped, Migration::PreSwitchover);
                }
                Migration::Moving => self.sent_bytes += 1 << 20,
                Migration::Switching => {
                    (source.run, source.migration) = (Run::MovedAway, Migration::Completed);
                    self.holds = false;
                    self.waits = 0;
                }
                _ => {}
            }
        }
        // A destination whose source ends in the middle ends too, if it hears of it; one that was sent everything loads it.
        let is_loading = self.destination.run == Run::Incoming && self.destination.migration == Migration::Moving;
        match self.source.migration {
            _ if !is_loading || self.is_silent => {}
            Migration::Completed if self.waits > self.loads_for => {
                self.loads_without_source();
            }
            Migration::Completed => {}
            Migration::Failed(_) => self.destination.lives = false,
            _ => self.destination.lives &= self.source.lives,
        }
        self.waits += 1;
        self.passed += Duration::from_millis(100);
        self.check();
    }

    fn seen(&self, qemu: &Qemu, is_source: bool) -> Result<Machine, String> {
        if is_source && !self.link {
            return Err(AWAY.into());
        }
        let machine = Machine { run: qemu.run.clone(), migration: qemu.migration.clone() };
        if qemu.lives { Ok(machine) } else { Err("it has ended".into()) }
    }

    fn at_source(&self) -> Result<(), String> {
        self.seen(&self.source, true).map(drop)
    }

    /// The answer to something that was done.
    fn answer<T>(&mut self, value: T) -> Result<T, String> {
        if std::mem::take(&mut self.lose_answer) { Err("no answer".into()) } else { Ok(value) }
    }

    /// Asks the source of each disk for something, as far as that goes; the first failure counts.
    fn each_source(&mut self, mut work: impl FnMut(&mut Ferried, bool) -> Result<(), String>) -> Result<(), String> {
        let (link, holds) = (self.link, self.holds);
        let results: Vec<_> = self
            .disks
            .iter_mut()
            .map(|disk| match disk {
                Ferried { daemon_runs: false, .. } => Err("no daemon".to_owned()),
                Ferried { export_runs: false, .. } => Err("no export".to_owned()),
                _ if !link => Err(AWAY.to_owned()),
                disk => work(disk, holds),
            })
            .collect();
        self.check();
        results.into_iter().collect()
    }
}

impl World for Sim {
    fn look(&mut self) -> View {
        self.tick();
        if self.disks.iter().any(|disk| !disk.export_runs) {
            self.passed += self.hangs;
        }
        let disks = self.disks.iter().map(|disk| match disk {
            Ferried { daemon_runs: false, .. } => Disk::Gone("no daemon".into()),
            Ferried { active: true, .. } => Disk::Active,
            Ferried { export_runs: false, .. } => Disk::Unready("no export".into()),
            _ if !self.link => Disk::Unready(AWAY.into()),
            _ => Disk::Ready,
        });
        let disks = disks.collect();
        View { source: self.seen(&self.source, true), destination: self.seen(&self.destination, false), disks }
    }

    fn now(&self) -> Instant {
        self.began + self.passed
    }

    fn wait(&mut self, at_most: Duration) {
        self.passed += at_most;
        self.tick();
    }

    fn memory(&self) -> Memory {
        Memory { transferred_bytes: self.sent_bytes, ..Memory::default() }
    }

    fn start(&mut self) -> Result<(), String> {
        self.at_source()?;
        self.seen(&self.destination, false)?;
        self.source.migration = Migration::Moving;
        self.destination.migration = Migration::Moving;
        self.moving = self.passed;
        self.answer(())
    }

    fn go_on(&mut self) -> Result<(), String> {
        self.at_source()?;
        assert_eq!(self.source.migration, Migration::PreSwitchover);
        self.source.migration = Migration::Switching;
        self.answer(())
    }

    fn cancel(&mut self) -> Result<(), String> {
        self.at_source()?;
        self.source.migration = Migration::Cancelling;
        self.answer(())
    }

    fn take(&mut self) -> Result<(), String> {
        self.each_source(|disk, holds| {
            if holds {
                return Err("the image is open for writing".into());
            }
            disk.given = true;
            Ok(())
        })?;
        self.answer(())
    }

    fn activate(&mut self) -> Result<(), NotActive> {
        for disk in self.disks.iter_mut().filter(|disk| disk.daemon_runs && disk.given) {
            disk.active = true;
        }
        self.check();
        let none = self.disks.iter().all(|disk| disk.daemon_runs && !disk.active);
        if !self.disks.iter().all(|disk| disk.active && disk.daemon_runs) {
            return Err(NotActive { why: "no daemon".into(), none });
        }
        self.answer(()).map_err(|why| NotActive { why, none: false })
    }

    fn call_off(&mut self) -> Result<(), String> {
        if self.lies {
            return Ok(());
        }
        self.each_source(|disk, _| {
            assert!(!disk.active, "called off although it is in use");
            disk.given = false;
            Ok(())
        })?;
        self.answer(())
    }

    fn quit_destination(&mut self) {
        assert!(!self.runs_at_destination(), "a guest that runs is ended");
        self.destination.lives = false;
    }

    fn run_source(&mut self) -> Result<(), String> {
        self.at_source()?;
        assert!(
            !self.disks.iter().any(|disk| disk.given),
            "it is let go at the source, whose disks were given: {self:?}"
        );
        self.source.run = Run::Running;
        self.holds = true;
        self.check();
        self.answer(())
    }

    fn run_destination(&mut self) -> Result<(), String> {
        self.seen(&self.destination, false)?;
        self.destination.run = Run::Running;
        self.check();
        self.answer(())
    }

    fn restore(&mut self) {}
}
