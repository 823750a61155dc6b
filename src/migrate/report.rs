//! What is told in the end.

use std::time::Instant;

use serde::Serialize;

use super::machine::Memory;
use super::plan::Step;

/// When each phase began.
#[derive(Clone, Debug, Default)]
pub struct Moments {
    began: Vec<(&'static str, Instant)>,
    ended: Option<Instant>,
}

impl Moments {
    /// A step is about to be done.
    pub(super) fn enter(&mut self, step: &Step, now: Instant) {
        let phase = phase_of(step);
        if phase.is_some() && self.began.last().map(|(phase, _)| *phase) != phase {
            self.began.extend(phase.map(|phase| (phase, now)));
        }
    }

    pub(super) fn end(&mut self, now: Instant) {
        self.ended = Some(now);
    }

    /// When the memory began to move.
    pub(super) fn memory(&self) -> Option<Instant> {
        self.began.iter().find(|(phase, _)| *phase == "memory").map(|(_, at)| *at)
    }

    /// Each phase with its duration in milliseconds.
    pub fn durations_ms(&self) -> Vec<(&'static str, f64)> {
        let ends = self.began.iter().skip(1).map(|(_, at)| *at).chain(self.ended);
        self.began.iter().zip(ends).map(|((phase, at), end)| (*phase, ms(end - *at))).collect()
    }
}

/// The phase that a step belongs to; some are only the end of another one.
pub(super) fn phase_of(step: &Step) -> Option<&'static str> {
    match step {
        Step::Start => Some("prepare"),
        Step::WaitMemory => Some("memory"),
        Step::Continue | Step::WaitSwitchover => Some("switchover"),
        Step::Take | Step::WaitDisks(_) => Some("take"),
        Step::Activate => Some("activate"),
        Step::StartGuest => Some("start"),
        Step::Cancel(_) | Step::Back(_) => Some("back"),
        Step::Done | Step::Stuck(_) => None,
    }
}

pub(super) fn ms(duration: std::time::Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// What `migrate --json` prints. Fields are added, never renamed or removed.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// `moved`, `stayed` (the guest is at the source), `stuck` (see to it), `checked`.
    pub outcome: &'static str,
    /// Why it was not moved: one line.
    pub why: Option<String>,
    /// From the first look to the last.
    pub total_ms: f64,
    /// Each phase, in order.
    pub phases: Vec<PhaseReport>,
    /// How long the guest stood still, as seen from here: from the news that it stopped to the news that it runs.
    pub downtime_ms: Option<f64>,
    /// The same by the clocks of the two QEMUs' hosts: true only if they agree, as on one host.
    pub downtime_by_hosts_ms: Option<f64>,
    /// What the source's QEMU takes for it: without the disks and the start.
    pub downtime_by_qemu_ms: Option<f64>,
    /// The memory.
    pub memory: Memory,
    /// All disks.
    pub disks: Vec<DiskReport>,
}

/// A phase.
#[derive(Clone, Debug, Serialize)]
pub struct PhaseReport {
    /// Its name.
    pub phase: &'static str,
    /// How long it took.
    pub ms: f64,
}

/// A disk.
#[derive(Clone, Debug, Serialize)]
pub struct DiskReport {
    /// As the source's QEMU calls it.
    pub drive: String,
    /// The device at the destination.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// The epoch that has begun.
    pub epoch: Option<u64>,
    /// What the operator has to see to.
    pub warning: Option<String>,
}
