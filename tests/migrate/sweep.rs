//! Everything that can die, at every step of a move, with real QEMUs: in the end the guest runs on exactly one side, or can
//! be started on exactly one side by the command that the documentation names; and there it is started, and nothing that it
//! was told was durable is missing.
//!
//! CI runs a few of them. All of them: `BLKFERRY_SWEEP=all cargo test --test migrate sweep -- --nocapture`; some, by the
//! names of steps and victims: `BLKFERRY_SWEEP='Take Activate'`, `BLKFERRY_SWEEP=Export`.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blkferry::migrate::plan::{Step, Stuck};
use blkferry::migrate::{Driver, Limits, Memory, Outcome, Real, Watcher};

use crate::guests::is_step;
use crate::site::{NAME, Qemu, Site};
use crate::writer::poll;

const LIMITS: Limits = Limits {
    memory: Some(Duration::from_secs(120)),
    stall: Duration::from_secs(30),
    switchover: Duration::from_secs(10),
};
/// The same command again, after what died runs again; more than that is no way that a person would go.
const ATTEMPTS: usize = 3;

const STEPS: [&str; 7] = ["Start", "WaitMemory", "Continue", "WaitSwitchover", "Take", "Activate", "StartGuest"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Orchestrator,
    Source,
    Destination,
    Export,
    Daemon,
    DiskLink,
    MemoryLink,
}

const VICTIMS: [Victim; 7] = [
    Victim::Orchestrator,
    Victim::Source,
    Victim::Destination,
    Victim::Export,
    Victim::Daemon,
    Victim::DiskLink,
    Victim::MemoryLink,
];

/// What CI has time for: two that no other test has, between take and activate, and after the switchover.
const SAMPLE: [(&str, Victim); 2] = [("Activate", Victim::Export), ("Take", Victim::DiskLink)];
/// So many sites at a time: each has two machines, of which one runs.
const AT_ONCE: usize = 2;

impl Victim {
    fn strike(self, site: &mut Site) {
        match self {
            Self::Orchestrator => {}
            Self::Source => site.a.kill(),
            Self::Destination => site.b.kill(),
            Self::Export => site.kill_export(),
            Self::Daemon => site.kill_daemon(),
            Self::DiskLink => site.link.freeze(),
            Self::MemoryLink => site.memory.cut(),
        }
    }

    /// What can run again does.
    fn repair(self, site: &mut Site) {
        match self {
            Self::Export if site.export.is_none() => site.restart_export(),
            Self::Daemon if !site.world.blkferry(["status", NAME]).status.success() => site.restart_daemon(),
            Self::DiskLink => site.link.thaw(),
            _ => {}
        }
    }
}

/// Has something die before a step, once.
struct Saboteur<'a> {
    step: &'static str,
    victim: Option<Victim>,
    site: &'a mut Site,
}

impl Watcher for Saboteur<'_> {
    fn before(&mut self, step: &Step, _: Memory) -> ControlFlow<()> {
        if !is_step(step, self.step) {
            return ControlFlow::Continue(());
        }
        let Some(victim) = self.victim.take() else { return ControlFlow::Continue(()) };
        victim.strike(self.site);
        if victim == Victim::Orchestrator { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// Where the guest was in the end.
#[derive(Debug)]
enum End {
    RunsAtSource,
    RunsAtDestination,
    StartedAtSource,
    StartedAtDestination,
}

fn attempt(site: &mut Site, step: &'static str, victim: Option<Victim>) -> Outcome {
    let prepared = Real::prepare(site.run_dir(), site.places());
    let (mut real, prepared) = match prepared {
        Ok(prepared) => prepared,
        // One of the QEMUs is gone: nothing is changed by looking.
        Err(e) => return Outcome::Stuck(Stuck::SourceStands(e.to_string())),
    };
    let mut saboteur = Saboteur { step, victim, site };
    let outcome = Driver::new(&mut real, LIMITS, prepared.is_to_run, Arc::default()).run(&mut saboteur);
    assert!(saboteur.victim.is_none(), "{step} never came: {outcome:?}");
    outcome
}

fn state(site: &Site) -> String {
    site.status()["state"].as_str().unwrap().to_owned()
}

/// The guest's disk where it is now, with all that the destination still lacks.
fn whole_disk(site: &Site) -> PathBuf {
    if state(site) == "standby" {
        return site.image.clone();
    }
    site.world.ok(["set", NAME, "hydrate=auto"]);
    poll("all blocks", || site.status()["source_needed"] == false);
    site.cache.clone()
}

/// The machine is started at the destination from its device, as after a power cut there; and not at the source.
fn start_at_destination(site: &mut Site) -> End {
    assert_ne!(state(site), "standby");
    assert!(site.a.ask("cont").is_err() || !site.a.runs(), "it must not run at the source");
    site.b.kill();
    site.a.kill();
    site.assert_nothing_is_lost(&whole_disk(site));
    let drive = format!("file={}", site.status()["frontend"]["uri"].as_str().unwrap());
    let b = Qemu::start(&site.world, "b2", &drive, &[]);
    b.wait_stamps(2);
    End::StartedAtDestination
}

/// The same at the source, after `abort`.
fn start_at_source(site: &mut Site) -> End {
    site.b.kill();
    site.world.ok(["abort", NAME]);
    site.a.kill();
    site.assert_nothing_is_lost(&site.image);
    let a = Qemu::start(&site.world, "a2", &format!("file.driver=file,file.filename={}", site.image.display()), &[]);
    a.wait_stamps(2);
    End::StartedAtSource
}

/// By the book from there on.
fn settle(site: &mut Site, victim: Victim, first: Outcome, case: &str) -> End {
    let mut outcome = first;
    for _ in 0..ATTEMPTS {
        assert!(!(site.a.runs() && site.b.runs()), "it runs twice");
        match &outcome {
            Outcome::Moved => {
                victim.repair(site);
                assert!(!site.a.runs(), "it must not run at the source any more");
                assert_ne!(state(site), "standby");
                // A QEMU whose device died may have lost its disk: it is restarted from the device.
                if site.b.runs() && site.b.writes_on() {
                    site.b.kill();
                    site.assert_nothing_is_lost(&whole_disk(site));
                    return End::RunsAtDestination;
                }
                return start_at_destination(site);
            }
            Outcome::Stayed(_) => {
                assert!(!site.b.runs() && site.a.runs());
                site.a.wait_stamps(2);
                victim.repair(site);
                assert_eq!(state(site), "standby");
                site.a.kill();
                site.assert_nothing_is_lost(&site.image);
                return End::RunsAtSource;
            }
            Outcome::Stuck(Stuck::DestinationLost(_) | Stuck::ActiveTooEarly | Stuck::NotStarted(_)) => {
                victim.repair(site);
                return start_at_destination(site);
            }
            Outcome::Stuck(Stuck::SourceLost(_)) => {
                victim.repair(site);
                return start_at_source(site);
            }
            Outcome::Stuck(stuck) => {
                println!("{case}: {}", stuck.advice(&site.places()));
                // Whose device died after it was activated may run at the destination, and wait for it.
                let may_run_there = matches!(stuck, Stuck::NotActive(_));
                assert!(!site.a.runs() && (may_run_there || !site.b.runs()), "stuck, and yet it runs: {stuck:?}");
                victim.repair(site);
                outcome = attempt(site, "", None);
            }
            Outcome::Abandoned => outcome = attempt(site, "", None),
        }
        println!("{case}, again: {outcome:?}");
    }
    // Both QEMUs are gone, or one is and the other waits for it: the disk says where the machine is to be started.
    assert!(!site.a.runs() && !site.b.runs(), "{outcome:?}");
    if state(site) == "standby" { start_at_source(site) } else { start_at_destination(site) }
}

fn cases() -> Vec<(&'static str, Victim)> {
    let Some(wanted) = std::env::var_os("BLKFERRY_SWEEP") else { return SAMPLE.to_vec() };
    let wanted = wanted.into_string().unwrap();
    let (steps, victims): (Vec<&str>, Vec<&str>) = wanted.split_whitespace().partition(|word| STEPS.contains(word));
    let all = STEPS.iter().flat_map(|step| VICTIMS.iter().map(move |victim| (*step, *victim)));
    let is_wanted = |step: &str, victim: Victim| {
        let named = format!("{victim:?}");
        (steps.is_empty() || steps.contains(&step)) && (victims.is_empty() || victims.contains(&named.as_str()))
    };
    all.filter(|(step, victim)| wanted == "all" || is_wanted(step, *victim)).collect()
}

fn run(step: &'static str, victim: Victim) {
    let mut site = Site::new("256M", "");
    site.a.wait_stamps(3);
    let outcome = attempt(&mut site, step, Some(victim));
    let case = format!("{victim:?} before {step}");
    println!("{case}: {outcome:?}");
    let end = settle(&mut site, victim, outcome, &case);
    println!("{case}: {end:?}");
}

#[test]
fn sweep() {
    let todo = Mutex::new(cases().into_iter());
    let next = || todo.lock().unwrap().next();
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((step, victim)) = next() {
                    // The others are of interest all the same.
                    if std::thread::spawn(move || run(step, victim)).join().is_err() {
                        failed.lock().unwrap().push(format!("{victim:?} before {step}"));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{}", failed.join(", "));
}
