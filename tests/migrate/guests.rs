//! Two real QEMUs, and a guest that writes all the while.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use blkferry::migrate::plan::{Step, Stuck};
use blkferry::migrate::{Driver, Limits, Memory, Outcome, Real, Watcher};
use serde_json::Value;

use crate::common::tool_output;
use crate::site::{LIMITS, NAME, Qemu, Silence, Site};
use crate::writer::{data_of, poll};

fn migrate(site: &Site) -> Value {
    let said = site.world.ok(site.command(&["--json"]));
    serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"))
}

fn data_bytes(site: &Site) -> u64 {
    site.status()["wire"]["data_bytes"].as_u64().unwrap()
}

/// The move, and all that has to hold after it.
fn move_it(size: &str) {
    let mut site = Site::new(size, "");
    site.a.wait_stamps(20);
    let checked = site.world.ok(site.command(&["--dry-run"]));
    assert!(checked.contains("all fits"), "{checked}");
    let before = data_bytes(&site);
    let silence = Silence::between(&site.a, &site.b);
    let report = migrate(&site);
    println!("{size}: {report:#}");
    assert_eq!(report["outcome"], "moved");
    assert!(report["downtime_ms"].as_f64().unwrap() > 0.0, "{report}");
    assert_eq!(report["disks"][0]["epoch"], 2);

    // The guest is here, and it is here only.
    assert!(site.b.runs());
    site.b.wait_stamps(10);
    let (gap, downtime) = (silence.end(), &report["downtime_ms"]);
    println!("{size}: no stamp for {} ms by the clock; the guest stood still for {downtime} ms", gap.as_millis());
    println!("{size}: of that, {} ms by QEMU's own account", report["downtime_by_qemu_ms"]);
    assert!(!site.a.runs());
    let refused = site.a.ask("cont");
    assert!(refused.is_err() && !site.a.runs(), "it must not run at the source any more: {refused:?}");
    // Once more is once.
    let again = site.world.ok(site.command(&[]));
    assert!(again.contains("runs here"), "{again}");
    assert!(site.world.ok(["activate", NAME]).contains("already active"));
    let line = site.world.refused(["abort", NAME]);
    assert!(line.contains("is active"), "{line}");

    // Its blocks follow, each once.
    site.world.ok(["set", NAME, "hydrate=auto"]);
    poll("all blocks", || site.status()["source_needed"] == false);
    site.b.wait_stamps(1);
    let crossed = data_bytes(&site) - before;
    let (data, on_link) = (data_of(&site.image), site.link.received());
    println!("{crossed} bytes of data crossed, the image has {data}; {on_link} on the link in all");
    assert!(crossed <= data, "some of it crossed twice: {crossed} of {data}");
    assert!(on_link <= before + data + data / 50, "more than it admits: {on_link}");

    // A power cut, as far as the guest is concerned.
    site.b.kill();
    site.world.ok(["detach", NAME]);
    site.assert_nothing_is_lost(&site.cache);
}

#[test]
fn a_guest_moves_while_it_writes() {
    move_it("1G");
}

#[test]
fn a_large_disk_moves_as_fast() {
    move_it("64G");
}

/// Ends the driver before or after a step, once.
struct EndAt(&'static str, bool);

pub fn is_step(step: &Step, name: &str) -> bool {
    format!("{step:?}").split('(').next() == Some(name)
}

impl Watcher for EndAt {
    fn before(&mut self, step: &Step, _: Memory) -> ControlFlow<()> {
        if self.1 || !is_step(step, self.0) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn after(&mut self, step: &Step) -> ControlFlow<()> {
        if self.1 && is_step(step, self.0) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// A fresh orchestrator.
fn drive(site: &Site, watcher: &mut dyn Watcher) -> Outcome {
    let (mut real, prepared) = Real::prepare(site.run_dir(), site.places()).unwrap();
    assert!(prepared.problems.is_empty(), "{:?}", prepared.problems);
    Driver::new(&mut real, LIMITS, prepared.is_to_run, Arc::default()).run(watcher)
}

/// Another orchestrator, where something has died: what it finds is no reason not to begin.
fn drive_on(site: &Site) -> Outcome {
    let (mut real, prepared) = Real::prepare(site.run_dir(), site.places()).unwrap();
    assert!(prepared.midway && prepared.problems.is_empty(), "{:?}", prepared.problems);
    Driver::new(&mut real, LIMITS, prepared.is_to_run, Arc::default()).run(&mut ())
}

/// Its orchestrator is killed again and again, before and after every step.
#[test]
fn an_orchestrator_that_dies_at_every_step_is_followed_by_another() {
    let site = Site::new("256M", "");
    site.a.wait_stamps(5);
    // The memory is still on its way when the next orchestrator comes, however busy this machine is.
    site.a.limit_memory(1 << 20);
    for (step, after) in [("Start", false), ("Start", true), ("WaitMemory", true)] {
        assert_eq!(drive(&site, &mut EndAt(step, after)), Outcome::Abandoned, "{step} never came");
    }
    site.a.limit_memory(1 << 30);
    for (step, after) in [
        ("Continue", false),
        ("Continue", true),
        ("Take", false),
        ("Take", true),
        ("Activate", false),
        ("Activate", true),
        ("StartGuest", false),
        ("StartGuest", true),
    ] {
        assert_eq!(drive(&site, &mut EndAt(step, after)), Outcome::Abandoned, "{step} never came");
    }
    assert_eq!(drive(&site, &mut ()), Outcome::Moved);
    assert!(site.b.runs() && !site.a.runs());
    site.b.wait_stamps(3);
}

/// Somebody else has the image open for writing: the source keeps it, and the guest goes on there.
#[test]
fn a_source_that_keeps_its_image_keeps_its_guest() {
    // QEMU's own lock would be in the way of the one that stands for somebody else.
    let site = Site::new("256M", ",file.locking=off");
    let writer = std::fs::OpenOptions::new().read(true).write(true).open(&site.image).unwrap();
    let lock = libc_lock(101);
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    site.a.wait_stamps(5);
    let out = site.world.blkferry(site.command(&["--json"]));
    let line = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success());
    assert!(line.contains("stays at the source"), "{line}");
    println!("{line}");
    assert!(site.a.runs());
    site.a.wait_stamps(5);
    poll("the destination's QEMU to end", || site.b.ask("query-status").is_err());
    assert_eq!(site.status()["state"], "standby");
}

/// A shared lock on a byte: QEMU's way to say that somebody writes.
fn libc_lock(byte: i64) -> nix::libc::flock {
    nix::libc::flock {
        l_type: nix::libc::F_RDLCK as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// The export dies before the disks are taken: the guest stands still until it is back, and goes on from there.
#[test]
fn an_export_that_dies_is_waited_for() {
    let mut site = Site::new("256M", "");
    site.a.wait_stamps(5);
    assert_eq!(drive(&site, &mut EndAt("Take", false)), Outcome::Abandoned);
    site.kill_export();
    let outcome = drive(&site, &mut ());
    assert!(!site.a.runs() && (!site.b.runs()), "{outcome:?}");
    println!("{outcome:?}");
    site.restart_export();
    let outcome = drive(&site, &mut ());
    println!("{outcome:?}");
    assert!(site.a.runs() != site.b.runs(), "it runs on one side: {outcome:?}");
    let here = if site.a.runs() { &site.a } else { &site.b };
    here.wait_stamps(3);
}

/// The destination's daemon dies with the disk taken and not activated.
#[test]
fn a_daemon_that_dies_with_the_disk_taken_finds_it_again() {
    let site = Site::new("256M", "");
    site.a.wait_stamps(5);
    assert_eq!(drive(&site, &mut EndAt("Take", true)), Outcome::Abandoned);
    site.kill_daemon();
    // QEMU's client has lost its disk: what it does then is its own affair. The disk itself is not lost.
    site.restart_daemon();
    let outcome = drive(&site, &mut ());
    println!("{outcome:?}");
    assert!(!site.a.runs(), "{outcome:?}");
    assert!(matches!(outcome, Outcome::Moved | Outcome::Stuck(Stuck::DestinationLost(_) | Stuck::NotStarted(_))));
    assert_eq!(site.status()["state"], "active");
}

/// The destination's QEMU dies with the disk taken: the guest goes on at the source.
#[test]
fn a_destination_that_dies_before_the_point_of_no_return_costs_nothing() {
    let mut site = Site::new("256M", "");
    site.a.wait_stamps(5);
    assert_eq!(drive(&site, &mut EndAt("Take", true)), Outcome::Abandoned);
    site.b.kill();
    let outcome = drive(&site, &mut ());
    assert!(matches!(outcome, Outcome::Stayed(_)), "{outcome:?}");
    assert!(site.a.runs());
    site.a.wait_stamps(5);
    assert!(tool_output("cat", [site.image.to_str().unwrap()]).status.success());
    site.a.kill();
    site.assert_nothing_is_lost(&site.image);
}

/// The source's QEMU dies with everything sent: the guest goes on at the destination.
#[test]
fn a_source_that_dies_after_it_has_sent_everything_is_not_missed() {
    let mut site = Site::new("256M", "");
    site.a.wait_stamps(5);
    assert_eq!(drive(&site, &mut EndAt("Take", false)), Outcome::Abandoned);
    site.a.kill();
    assert_eq!(drive(&site, &mut ()), Outcome::Moved);
    assert!(site.b.runs());
    site.b.wait_stamps(5);
}

type Fault = fn(&mut Site);

/// Has something die at a step, once.
struct Saboteur<'a> {
    step: &'static str,
    fault: Option<Fault>,
    site: &'a mut Site,
}

impl Watcher for Saboteur<'_> {
    fn before(&mut self, step: &Step, _: Memory) -> ControlFlow<()> {
        if is_step(step, self.step)
            && let Some(fault) = self.fault.take()
        {
            fault(self.site);
        }
        ControlFlow::Continue(())
    }
}

/// Whatever dies before the source has let go of its image: the guest goes on there, and so does its writer.
#[test]
fn what_dies_before_the_switchover_leaves_the_guest_at_the_source() {
    let faults: [(&str, Fault); 4] = [
        ("WaitMemory", |site| site.b.kill()),
        ("WaitMemory", |site| site.link.cut()),
        ("Continue", |site| site.kill_daemon()),
        ("Continue", Site::kill_export),
    ];
    for (number, (step, fault)) in faults.into_iter().enumerate() {
        let mut site = Site::new("256M", "");
        site.a.wait_stamps(3);
        let (mut real, prepared) = Real::prepare(site.run_dir(), site.places()).unwrap();
        let mut saboteur = Saboteur { step, fault: Some(fault), site: &mut site };
        let outcome = Driver::new(&mut real, LIMITS, prepared.is_to_run, Arc::default()).run(&mut saboteur);
        assert!(saboteur.fault.is_none(), "{step} never came");
        drop(real);
        println!("fault {number}: {outcome:?}");
        assert!(matches!(outcome, Outcome::Stayed(_)), "fault {number}: {outcome:?}");
        assert!(site.a.runs() && !site.b.runs());
        site.a.wait_stamps(3);
    }
}

/// Nothing breaks, and nothing arrives: QEMU would wait for ever, and the guest goes on at the source all the while.
#[test]
fn a_network_that_falls_silent_leaves_the_guest_at_the_source() {
    let mut site = Site::new("256M", "");
    site.a.limit_memory(1 << 20);
    site.a.wait_stamps(3);
    let (mut real, prepared) = Real::prepare(site.run_dir(), site.places()).unwrap();
    let mut saboteur = Saboteur { step: "WaitMemory", fault: Some(|site| site.memory.freeze()), site: &mut site };
    let limits = Limits { memory: None, stall: Duration::from_secs(5), ..LIMITS };
    let outcome = Driver::new(&mut real, limits, prepared.is_to_run, Arc::default()).run(&mut saboteur);
    drop(real);
    println!("{outcome:?}");
    assert!(matches!(&outcome, Outcome::Stayed(why) if why.contains("could be sent for 5 s")), "{outcome:?}");
    assert!(site.a.runs() && !site.b.runs());
    site.a.wait_stamps(3);
}

/// The destination's QEMU dies with its disk active: the guest can be started there, and there only.
#[test]
fn a_destination_that_dies_after_the_point_of_no_return_is_started_there() {
    let mut site = Site::new("256M", "");
    site.a.wait_stamps(5);
    assert_eq!(drive(&site, &mut EndAt("Activate", true)), Outcome::Abandoned);
    site.b.kill();
    let outcome = drive_on(&site);
    let Outcome::Stuck(stuck @ Stuck::DestinationLost(_)) = &outcome else { panic!("{outcome:?}") };
    let line = stuck.advice(&site.places());
    assert!(
        line.contains("start the machine at the destination from these disks; never again at the source"),
        "{line}"
    );
    let refused = site.a.ask("cont");
    assert!(refused.is_err() && !site.a.runs(), "{refused:?}");
    let drive = format!("file={}", site.status()["frontend"]["uri"].as_str().unwrap());
    let b = Qemu::start(&site.world, "b2", &drive, &[]);
    b.wait_stamps(3);
    site.a.kill();
}

/// Of two disks one cannot be had: the other is not kept, and both come once it can.
#[test]
fn two_disks_change_hands_together_or_not_at_all() {
    let mut site = Site::with("256M", "", &["disk1"]);
    site.a.wait_stamps(5);
    assert_eq!(drive(&site, &mut EndAt("Take", false)), Outcome::Abandoned);
    site.others[0].export = None;
    let outcome = drive(&site, &mut ());
    println!("{outcome:?}");
    assert!(!matches!(outcome, Outcome::Moved | Outcome::Abandoned), "{outcome:?}");
    assert_eq!([site.status(), site.status_of("disk1")].map(|status| status["state"].clone()), ["standby", "standby"]);
    site.restart_other(0);
    let was_stuck = matches!(outcome, Outcome::Stuck(_));
    let outcome = if was_stuck { drive(&site, &mut ()) } else { outcome };
    println!("{outcome:?}");
    let states = [site.status(), site.status_of("disk1")].map(|status| status["state"].clone());
    if site.b.runs() {
        assert!(!site.a.runs());
        assert_eq!(states, ["active", "active"]);
    } else {
        assert!(site.a.runs(), "it runs on one side: {outcome:?}");
        assert_eq!(states, ["standby", "standby"]);
    }
    let here = if site.a.runs() { &site.a } else { &site.b };
    here.wait_stamps(3);
}
