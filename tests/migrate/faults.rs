//! Everything dies, at every step: the guest is on one side in the end, or can be started on one side by the command
//! that the advice names.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use blkferry::migrate::plan::{Machine, Migration, Run, Step, Stuck, View};
use blkferry::migrate::{Driver, Limits, Memory, Outcome, Watcher};

use crate::sim::{Fault, Qemu, Sim};

const LIMITS: Limits = Limits {
    memory: Some(Duration::from_secs(60)),
    stall: Duration::from_secs(20),
    switchover: Duration::from_secs(10),
};

/// Counts the moments before and after steps, and has faults happen at some of them.
struct Saboteur<'a> {
    /// What the driver works in, as seen from outside.
    faults: &'a [(usize, Fault)],
    moment: usize,
    seen: Vec<&'static str>,
    due: Vec<Fault>,
}

impl Saboteur<'_> {
    fn pass(&mut self, word: &'static str) -> ControlFlow<()> {
        self.seen.push(word);
        let due = self.faults.iter().filter(|(at, _)| *at == self.moment).map(|(_, fault)| *fault);
        self.due.extend(due);
        self.moment += 1;
        // The world belongs to the driver at this moment: it is left, sabotaged, and driven on by its successor, or by
        // a driver that knows the same.
        if self.due.is_empty() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

impl Watcher for Saboteur<'_> {
    fn before(&mut self, step: &Step, _: Memory) -> ControlFlow<()> {
        self.pass(word(step))
    }

    fn after(&mut self, _: &Step) -> ControlFlow<()> {
        self.pass("after")
    }
}

/// Leaves after each step.
struct Once;

impl Watcher for Once {
    fn after(&mut self, _: &Step) -> ControlFlow<()> {
        ControlFlow::Break(())
    }
}

fn word(step: &Step) -> &'static str {
    match step {
        Step::Start => "start",
        Step::WaitMemory => "memory",
        Step::Continue => "continue",
        Step::WaitSwitchover => "switchover",
        Step::WaitDisks(_) => "disks",
        Step::Cancel(_) => "cancel",
        Step::Take => "take",
        Step::Activate => "activate",
        Step::StartGuest => "start-guest",
        Step::Done => "done",
        Step::Back(_) => "back",
        Step::Stuck(_) => "stuck",
    }
}

/// Drives with these faults; a killed orchestrator is started again, with everything else as it was left.
fn drive(sim: &mut Sim, faults: &[(usize, Fault)]) -> (Outcome, usize) {
    let mut saboteur = Saboteur { faults, moment: 0, seen: Vec::new(), due: Vec::new() };
    let mut own = None;
    loop {
        let mut driver = Driver::resume(sim, LIMITS, true, Arc::default(), own.take());
        let outcome = driver.run(&mut saboteur);
        let knows = driver.into_state();
        if outcome != Outcome::Abandoned {
            return (outcome, saboteur.moment);
        }
        let due = std::mem::take(&mut saboteur.due);
        if !due.contains(&Fault::Orchestrator) {
            own = Some(knows);
        }
        due.into_iter().for_each(|fault| sim.inject(fault));
    }
}

/// What a person does after that, by the book; where the guest is in the end.
fn settle(sim: &mut Sim, first: Outcome) -> &'static str {
    let mut outcome = first;
    for _ in 0..3 {
        match &outcome {
            Outcome::Moved => {
                assert!(sim.runs_at_destination() || !sim.destination.lives, "{sim:?}");
                assert!(!sim.runs_at_source());
                assert!(sim.disks.iter().all(|disk| disk.active));
                return "at the destination";
            }
            Outcome::Stayed(_) => {
                assert!(sim.runs_at_source() || !sim.source.lives, "{sim:?}");
                assert!(!sim.disks.iter().any(|disk| disk.active || disk.given), "{sim:?}");
                return "at the source";
            }
            Outcome::Stuck(Stuck::DestinationLost(_)) => {
                assert!(sim.disks.iter().all(|disk| disk.active), "not all of it can be started there: {sim:?}");
                assert!(!sim.runs_at_source());
                return "to be started at the destination";
            }
            Outcome::Stuck(Stuck::SourceLost(_)) if !sim.source.lives => {
                // `abort` gives back what was taken.
                assert!(!sim.disks.iter().any(|disk| disk.active), "{sim:?}");
                assert!(!sim.runs_at_destination());
                return "to be started at the source";
            }
            Outcome::Stuck(_) | Outcome::Abandoned => {
                sim.repair();
                outcome = drive(sim, &[]).0;
            }
        }
    }
    // Both QEMUs are gone: the disks say where it is to be started.
    assert!(!sim.source.lives && !sim.destination.lives, "{outcome:?} has no end: {sim:?}");
    if sim.disks.iter().any(|disk| disk.active) {
        assert!(sim.disks.iter().all(|disk| disk.active), "{outcome:?}: {sim:?}");
        return "to be started at the destination";
    }
    "to be started at the source"
}

#[test]
fn a_move_without_faults_is_a_move() {
    let mut sim = Sim::new(2);
    let (outcome, moments) = drive(&mut sim, &[]);
    assert_eq!(outcome, Outcome::Moved);
    assert!(sim.runs_at_destination());
    assert_eq!(sim.source.run, Run::MovedAway);
    assert!(moments > 14, "each step has a moment before and one after it: {moments}");
}

#[test]
fn anything_may_die_at_any_step() {
    let (_, moments) = drive(&mut Sim::new(2), &[]);
    let mut ends: BTreeMap<(String, &str), u32> = BTreeMap::new();
    for fault in Fault::ALL {
        for at in 0..moments {
            let mut sim = Sim::new(2);
            let (outcome, _) = drive(&mut sim, &[(at, fault)]);
            let end = settle(&mut sim, outcome.clone());
            *ends.entry((format!("{fault:?}"), end)).or_default() += 1;
            if fault == Fault::Orchestrator {
                // Run again, it goes on as if nothing had been.
                assert_eq!(outcome, Outcome::Moved, "killed at {at}");
            }
        }
    }
    ends.iter().for_each(|((fault, end), times)| println!("{fault} killed: {times:>2} times {end}"));
    let all: Vec<&str> = ends.keys().map(|(_, end)| *end).collect();
    for end in
        ["at the destination", "at the source", "to be started at the destination", "to be started at the source"]
    {
        assert!(all.contains(&end), "no fault led to {end}: they are not what they should be");
    }
}

#[test]
fn any_two_may_die_at_any_two_steps() {
    let (_, moments) = drive(&mut Sim::new(2), &[]);
    let mut runs = 0;
    for first in Fault::ALL {
        for second in Fault::ALL {
            for at in 0..moments {
                for later in at..moments + 6 {
                    let mut sim = Sim::new(2);
                    let (outcome, _) = drive(&mut sim, &[(at, first), (later, second)]);
                    settle(&mut sim, outcome);
                    runs += 1;
                }
            }
        }
    }
    println!("{runs} moves with two faults");
    assert!(runs > 10_000);
}

#[test]
fn whoever_interrupts_it_keeps_the_guest_at_the_source() {
    let mut sim = Sim::new(2);
    let outcome = Driver::new(&mut sim, LIMITS, true, Arc::new(AtomicBool::new(true))).run(&mut ());
    assert_eq!(outcome, Outcome::Stayed("interrupted".into()));
    assert!(sim.runs_at_source());
    assert!(sim.destination.lives, "nothing had begun: it waits for the next attempt");
}

#[test]
fn memory_that_never_arrives_is_given_up() {
    let mut sim = Sim::new(2);
    let limits = Limits { memory: Some(Duration::ZERO), ..LIMITS };
    let outcome = Driver::new(&mut sim, limits, true, Arc::default()).run(&mut ());
    assert!(matches!(&outcome, Outcome::Stayed(why) if why.contains("did not arrive in 0 s")), "{outcome:?}");
    assert!(sim.runs_at_source() && !sim.runs_at_destination());
}

/// While it is found out, the time for the switchover runs out: what is told is the cause.
#[test]
fn an_export_that_dies_in_the_switchover_is_named() {
    let (_, moments) = drive(&mut Sim::new(2), &[]);
    let told = (0..moments).filter_map(|at| {
        let mut sim = Sim::new(2);
        sim.hangs = LIMITS.switchover * 2;
        match drive(&mut sim, &[(at, Fault::Export)]).0 {
            Outcome::Stayed(why) if why.contains("did not arrive") => Some(why),
            _ => None,
        }
    });
    let told: Vec<String> = told.collect();
    assert!(!told.is_empty() && told.iter().all(|why| why.ends_with("in 10 s: no export")), "{told:?}");
}

/// Nothing breaks, and nothing arrives: at first, or in the middle.
#[test]
fn memory_that_stalls_is_given_up() {
    for sent_bytes in [0, 5 << 20] {
        let mut sim = Sim::new(2);
        sim.stalls_at = Some(sent_bytes);
        let limits = Limits { memory: None, ..LIMITS };
        let mut driver = Driver::new(&mut sim, limits, true, Arc::default());
        let outcome = driver.run(&mut ());
        let memory_ms = driver.moments().durations_ms().into_iter().find(|(phase, _)| *phase == "memory").unwrap().1;
        assert!(
            matches!(&outcome, Outcome::Stayed(why) if why.contains("could be sent for 20 s: the network")),
            "{outcome:?}"
        );
        assert!((20_000.0..25_000.0).contains(&memory_ms), "{memory_ms}");
        assert!(sim.runs_at_source() && !sim.runs_at_destination());
    }
}

/// The source's QEMU dies when it has sent everything, and the destination still loads it: nothing is lost.
#[test]
fn a_source_that_dies_after_it_has_sent_everything_is_not_needed() {
    let died = || {
        let mut sim = Sim::new(2);
        sim.loads_for = 20;
        let mut own = None;
        while sim.source.migration != Migration::Completed {
            let mut driver = Driver::resume(&mut sim, LIMITS, true, Arc::default(), own.take());
            assert_eq!(driver.run(&mut Once), Outcome::Abandoned);
            own = Some(driver.into_state());
        }
        assert_eq!(sim.destination.run, Run::Incoming, "it still loads");
        sim.inject(Fault::Source);
        (sim, own)
    };
    let (mut sim, own) = died();
    assert_eq!(Driver::resume(&mut sim, LIMITS, true, Arc::default(), own).run(&mut ()), Outcome::Moved);
    // Somebody interrupts it: the memory is at the destination, and is not told to be thrown away.
    let (mut sim, own) = died();
    let outcome = Driver::resume(&mut sim, LIMITS, true, Arc::new(AtomicBool::new(true)), own).run(&mut ());
    assert!(matches!(&outcome, Outcome::Stuck(Stuck::NobodyGives(_))), "{outcome:?}");
    assert_eq!(settle(&mut sim, outcome), "at the destination");
    // Somebody starts the source's QEMU anew, without its guest.
    let (mut sim, own) = died();
    sim.source = Qemu { lives: true, run: Run::Paused, migration: Migration::None };
    sim.loads_without_source();
    let outcome = Driver::resume(&mut sim, LIMITS, true, Arc::default(), own).run(&mut ());
    assert!(matches!(&outcome, Outcome::Stuck(Stuck::NobodyGives(why)) if why.contains("anew")), "{outcome:?}");
    assert!(sim.destination.lives);
    // The orchestrator with it: another one finds a destination that loads.
    let (mut sim, _) = died();
    assert_eq!(drive(&mut sim, &[]).0, Outcome::Moved);
    assert!(sim.runs_at_destination());
}

/// What it had not sent never comes, and nobody tells the destination's QEMU.
#[test]
fn a_source_whose_host_dies_in_the_switchover_is_given_up() {
    let (_, moments) = drive(&mut Sim::new(2), &[]);
    let lost = (0..moments).filter(|at| {
        let mut sim = Sim::new(2);
        let (outcome, _) = drive(&mut sim, &[(*at, Fault::SourceHost)]);
        let is_lost = matches!(&outcome, Outcome::Stuck(Stuck::SourceLost(_)));
        assert!(!is_lost || sim.disks.iter().all(|disk| !disk.given && !disk.active));
        settle(&mut sim, outcome);
        is_lost
    });
    assert!(lost.count() > 3);
}

/// What is slow is not silent.
#[test]
fn memory_that_crawls_is_waited_for() {
    let mut sim = Sim::new(2);
    sim.crawls = true;
    let limits = Limits { memory: None, ..LIMITS };
    assert_eq!(Driver::new(&mut sim, limits, true, Arc::default()).run(&mut ()), Outcome::Moved);
}

/// Would it be noticed?
#[test]
#[should_panic(expected = "let go at the source, whose disks were given")]
fn a_disk_that_was_not_really_given_back_is_noticed() {
    let (_, moments) = drive(&mut Sim::new(2), &[]);
    for at in 0..moments {
        let mut sim = Sim::new(2);
        sim.lies = true;
        drive(&mut sim, &[(at, Fault::Destination)]);
    }
}

/// QEMU says *completed* a moment before it says that its guest has been moved away: whoever looks then is midway.
#[test]
fn a_guest_that_stands_still_for_a_migration_is_midway() {
    let at = |run, migration| {
        let source = Ok(Machine { run, migration });
        View { source, destination: Err("it has ended".into()), disks: Vec::new() }.is_midway()
    };
    assert!(at(Run::Stopped, Migration::Completed));
    assert!(at(Run::MovedAway, Migration::Completed));
    assert!(at(Run::Running, Migration::Moving));
    assert!(!at(Run::Running, Migration::None));
    assert!(!at(Run::Running, Migration::Completed), "it was let go again after an earlier one");
}
