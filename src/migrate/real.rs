//! Two QEMUs and the devices at the destination, as they are.

use std::time::Duration;

use serde_json::{Value, json};

use super::check::{Block, Found, Problems, problems};
use super::disks;
use super::driver::{NotActive, Outcome, World};
use super::machine::{Memory, Side};
use super::places::Places;
use super::plan::{Machine, Migration, Run, View};
use super::report::{DiskReport, Moments, PhaseReport, Report, ms};
use crate::control::{RunDir, Status, Taken};
use crate::qmp::Qmp;

const SOURCE: &str = "the source's QEMU";
const DESTINATION: &str = "the destination's QEMU";
/// How long the source may take to let go of its images. It has said that it did.
const TAKE_WAIT: Duration = Duration::from_secs(5);

/// Everything is connected and looked at.
pub struct Real {
    run: RunDir,
    places: Places,
    names: Vec<String>,
    source: Side,
    destination: Side,
    statuses: Vec<Result<Status, String>>,
    taken: Vec<Taken>,
    /// What was set at the source before.
    before: Vec<(String, bool)>,
}

/// What the checks found.
pub struct Prepared {
    /// What does not fit.
    pub problems: Problems,
    /// A migration is under way already, or done and not used yet.
    pub midway: bool,
    /// Is the guest to run at the end?
    pub is_to_run: bool,
    /// What was looked at, a line each.
    pub lines: Vec<String>,
}

impl Real {
    /// Connects to everybody and looks at everything; changes nothing.
    pub fn prepare(run: RunDir, places: Places) -> Result<(Self, Prepared), String> {
        if places.from.is_same(&places.to) {
            return Err(format!(
                "--from and --to are the same QEMU ({}): a machine cannot move to itself",
                places.from
            ));
        }
        let source = Side::connect(SOURCE, &places.from);
        let destination = Side::connect(DESTINATION, &places.to);
        // One that is gone may be just what is to be cleaned up after; both are nothing to begin with.
        let (source, destination) = match (source, destination) {
            (Err(e), Err(_)) => return Err(e.to_string()),
            (source, destination) => (
                source.unwrap_or_else(|e| Side::lost(SOURCE, &places.from, e.to_string())),
                destination.unwrap_or_else(|e| Side::lost(DESTINATION, &places.to, e.to_string())),
            ),
        };
        let names: Vec<String> = places.names().map(str::to_owned).collect();
        let (statuses, taken, before) = (Vec::new(), Vec::new(), Vec::new());
        let mut real = Self { run, places, names, source, destination, statuses, taken, before };
        let prepared = real.check()?;
        Ok((real, prepared))
    }

    fn check(&mut self) -> Result<Prepared, String> {
        let view = self.look();
        let midway = view.is_midway();
        let is_fresh = |side: &Result<Machine, String>| side.as_ref().map(drop).map_err(Clone::clone);
        if !midway {
            is_fresh(&view.source)?;
            is_fresh(&view.destination)?;
        }
        let source = view.source.is_ok().then(|| found("source", &mut self.source)).transpose()?;
        let destination = view.destination.is_ok().then(|| found("destination", &mut self.destination)).transpose()?;
        let mut lines = Vec::new();
        for found in [&source, &destination].into_iter().flatten() {
            lines.push(format!("{}: QEMU {}, {:?}", found.role, found.version, found.machine.run).to_lowercase());
        }
        for ((drive, name), status) in self.places.disks.iter().zip(&self.statuses) {
            if let Ok(status) = status {
                let state = format!("{:?}", status.state).to_lowercase();
                lines.push(format!("disk {drive}: device {name}, {state}, {} bytes", status.bytes.total));
            }
        }
        let problems = match &source {
            Some(source) => {
                self.before.clone_from(&source.capabilities);
                let mut problems = problems(&self.places, source, destination.as_ref(), &self.statuses, midway);
                if !midway && self.places.uri.is_none() {
                    problems.push("--uri is missing: where the source sends the memory, such as tcp:hostB:4444".into());
                }
                problems
            }
            // It is gone, and what can be done is up to the plan.
            None => Vec::new(),
        };
        let was_paused = matches!(&view.source, Ok(Machine { run: Run::Paused, .. })) && !midway;
        Ok(Prepared { problems, midway, is_to_run: !was_paused, lines })
    }

    fn set(&mut self, source: bool, name: &str, on: bool) -> Result<(), String> {
        let capabilities = json!({ "capabilities": [{ "capability": name, "state": on }] });
        let side = if source { &mut self.source } else { &mut self.destination };
        side.execute("migrate-set-capabilities", capabilities).map(drop)
    }

    /// What is told in the end.
    pub fn report(&mut self, outcome: Option<&Outcome>, why: Option<String>, moments: &Moments) -> Report {
        let moved = outcome == Some(&Outcome::Moved);
        if moved {
            // Its last figures; it may be gone, and then there are none.
            self.source.ask_again();
        }
        let stopped = self.source.stopped.filter(|_| moved);
        let pair = stopped.zip(self.destination.resumed);
        let phases: Vec<_> = moments.durations_ms().into_iter().map(|(phase, ms)| PhaseReport { phase, ms }).collect();
        Report {
            outcome: match outcome {
                None => "checked",
                Some(Outcome::Moved) => "moved",
                Some(Outcome::Stayed(_)) => "stayed",
                Some(Outcome::Stuck(_) | Outcome::Abandoned) => "stuck",
            },
            why,
            total_ms: (phases.iter().map(|phase| phase.ms).sum::<f64>() * 1e3).round() / 1e3,
            phases,
            downtime_ms: pair.map(|(from, to)| ms(to.heard.saturating_duration_since(from.heard))),
            downtime_by_hosts_ms: pair.and_then(|(from, to)| to.stamp.checked_sub(from.stamp)).map(ms),
            downtime_by_qemu_ms: self.source.downtime_ms.filter(|_| moved),
            memory: self.source.memory,
            disks: self.disks(),
        }
    }

    fn disks(&self) -> Vec<DiskReport> {
        let each = self.places.disks.iter().enumerate();
        each.map(|(i, (drive, name))| DiskReport {
            drive: drive.clone(),
            name: name.clone(),
            size_bytes: self.statuses.get(i).and_then(|s| s.as_ref().ok()).map_or(0, |s| s.bytes.total),
            epoch: self.taken.get(i).map(|taken| taken.epoch),
            warning: self.taken.get(i).and_then(|taken| taken.warning.clone()),
        })
        .collect()
    }
}

fn found(role: &'static str, side: &mut Side) -> Result<Found, String> {
    let blocks = Block::list(&side.execute("query-block", json!({}))?);
    let capabilities = side.capabilities()?;
    Ok(Found { role, version: side.version(), machine: side.look()?, capabilities, blocks })
}

impl World for Real {
    fn look(&mut self) -> View {
        self.statuses = disks::statuses(&self.run, &self.names);
        let each = self.names.iter().zip(&self.statuses);
        let disks = each.map(|(name, status)| disks::disk(name, status)).collect();
        View { source: self.source.look(), destination: self.destination.look(), disks }
    }

    fn wait(&mut self, at_most: Duration) {
        if self.source.qmp().is_none() && self.destination.qmp().is_none() {
            std::thread::sleep(at_most);
        }
        Qmp::wait_for_either(self.source.qmp(), self.destination.qmp(), at_most);
    }

    fn memory(&self) -> Memory {
        self.source.memory
    }

    fn start(&mut self) -> Result<(), String> {
        let uri = self.places.uri.clone().ok_or("--uri is missing: where the source sends the memory")?;
        let listen = self.places.listen.as_ref().unwrap_or(&uri).clone();
        for capability in ["events", "late-block-activate"] {
            self.set(false, capability, true)?;
        }
        for capability in ["events", "pause-before-switchover"] {
            self.set(true, capability, true)?;
        }
        // The guest must not run before it has its disks, also if QEMU was started without -S.
        self.destination.execute("stop", json!({}))?;
        match self.destination.execute("migrate-incoming", json!({ "uri": listen })) {
            // Its command line said where to listen.
            Err(why) if why.contains("already been started") => {}
            result => drop(result?),
        }
        self.source.execute("migrate", json!({ "uri": uri })).map(drop)
    }

    fn go_on(&mut self) -> Result<(), String> {
        self.source.execute("migrate-continue", json!({ "state": "pre-switchover" })).map(drop)
    }

    fn cancel(&mut self) -> Result<(), String> {
        self.source.execute("migrate_cancel", Value::Object(Default::default())).map(drop)
    }

    fn take(&mut self) -> Result<(), String> {
        self.taken = disks::take(&self.run, &self.names, TAKE_WAIT)?;
        Ok(())
    }

    fn activate(&mut self) -> Result<(), NotActive> {
        let taken = disks::activate(&self.run, &self.names, TAKE_WAIT)?;
        // What they said when they were taken has the warnings.
        if self.taken.is_empty() {
            self.taken = taken;
        }
        Ok(())
    }

    fn call_off(&mut self) -> Result<(), String> {
        disks::call_off(&self.run, &self.names)
    }

    fn quit_destination(&mut self) {
        // Only one that has not been started: a guest that runs is not to be lost by mistake.
        let is_waiting = self
            .destination
            .look()
            .is_ok_and(|machine| machine.run != Run::Running || machine.migration != Migration::None);
        if is_waiting {
            // It may have ended by itself.
            let _ = self.destination.execute("quit", json!({}));
        }
    }

    fn run_source(&mut self) -> Result<(), String> {
        self.source.execute("cont", json!({}))?;
        let machine = self.source.look()?;
        if machine.run == Run::Running { Ok(()) } else { Err(format!("it is {:?}", machine.run)) }
    }

    fn run_destination(&mut self) -> Result<(), String> {
        self.destination.execute("cont", json!({})).map(drop)
    }

    fn restore(&mut self) {
        for name in ["pause-before-switchover", "events"] {
            let was_off = self.before.iter().any(|(capability, on)| capability == name && !on);
            if was_off {
                // A migration that is still ending keeps its settings; the next one sets its own.
                let _ = self.set(true, name, false);
            }
        }
    }
}
