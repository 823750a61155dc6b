//! Does everything fit together? Pure.

use serde_json::Value;

use super::places::Places;
use super::plan::{Machine, Migration, Run};
use crate::control::{State, Status};

/// What a QEMU says about itself.
#[derive(Clone, Debug)]
pub struct Found {
    /// `source` or `destination`.
    pub role: &'static str,
    /// Its version.
    pub version: String,
    /// How it is.
    pub machine: Machine,
    /// What its migrations can do, and whether that is on.
    pub capabilities: Vec<(String, bool)>,
    /// Its disks.
    pub blocks: Vec<Block>,
}

/// A disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// The name of the drive; may be empty.
    pub device: String,
    /// The name of the block node.
    pub node: String,
    /// The path of the machine's device that uses it; may be empty.
    pub qdev: String,
    /// The file, or the URI.
    pub file: String,
    /// Its size.
    pub size_bytes: u64,
    /// The guest cannot write to it.
    pub read_only: bool,
}

/// All that does not fit, one clear line each.
pub type Problems = Vec<String>;

impl Block {
    /// From what `query-block` says; empty drives are left out.
    pub fn list(said: &Value) -> Vec<Self> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let each = said.as_array().into_iter().flatten().filter(|block| block["inserted"].is_object());
        each.map(|block| {
            let inserted = &block["inserted"];
            Self {
                device: text(&block["device"]),
                node: text(&inserted["node-name"]),
                qdev: text(&block["qdev"]),
                file: text(&inserted["file"]),
                size_bytes: inserted["image"]["virtual-size"].as_u64().unwrap_or_default(),
                read_only: inserted["ro"].as_bool().unwrap_or_default(),
            }
        })
        .collect()
    }

    /// Does somebody mean this one?
    fn is_called(&self, name: &str) -> bool {
        let in_path = || self.qdev.split('/').any(|part| part == name);
        [&self.device, &self.node, &self.qdev].into_iter().any(|own| own == name) || in_path()
    }

    /// What people call it.
    fn label(&self) -> &str {
        [&self.device, &self.node, &self.qdev].into_iter().find(|name| !name.is_empty()).map_or("?", String::as_str)
    }

    /// Is it the same device of the machine, in another QEMU?
    fn corresponds_to(&self, other: &Self) -> bool {
        if self.qdev.is_empty() || other.qdev.is_empty() {
            !self.device.is_empty() && self.device == other.device
        } else {
            self.qdev == other.qdev
        }
    }

    /// Does it lead to this device of ours?
    fn leads_to(&self, status: &Status) -> bool {
        let frontend = &status.frontend;
        let path = frontend.device.as_deref().or_else(|| frontend.uri.split("socket=").nth(1)).unwrap_or(&frontend.uri);
        let own_name = path.rsplit('/').next().unwrap_or(path);
        let real = std::fs::canonicalize(&self.file).ok();
        self.file.contains(own_name) || real.is_some_and(|real| real.to_str() == Some(path))
    }
}

impl Found {
    fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|(name, _)| name == capability)
    }

    pub(super) fn is_on(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|(name, on)| name == capability && *on)
    }

    fn need(&self, capability: &str, since: &str, problems: &mut Problems) {
        if !self.has(capability) {
            problems.push(format!(
                "QEMU {} at the {} cannot do {capability}: QEMU {since} or later is needed",
                self.version, self.role
            ));
        }
    }

    fn find(&self, name: &str) -> Option<&Block> {
        self.blocks.iter().find(|block| block.is_called(name))
    }

    fn labels(&self) -> String {
        let writable = self.blocks.iter().filter(|block| !block.read_only);
        let labels: Vec<&str> = writable.map(Block::label).collect();
        if labels.is_empty() { "none".into() } else { labels.join(", ") }
    }
}

/// Everything that does not fit. `midway`: a migration is under way already, or done and not used yet.
pub(super) fn problems(
    places: &Places,
    source: &Found,
    destination: Option<&Found>,
    statuses: &[Result<Status, String>],
    midway: bool,
) -> Problems {
    let mut problems = Vec::new();
    source.need("pause-before-switchover", "2.12", &mut problems);
    if let Some(destination) = destination {
        destination.need("late-block-activate", "3.0", &mut problems);
    }
    check_states(source, destination, midway, &mut problems);
    check_names(places, source, &mut problems);
    for ((drive, name), status) in places.disks.iter().zip(statuses) {
        match status {
            // Midway a guest may stand still because of it: then the plan knows what to do.
            Err(_) if midway => {}
            Err(why) => problems.push(why.clone()),
            Ok(status) => {
                if !midway {
                    check_device(name, status, &mut problems);
                }
                if let Some(block) = source.find(drive) {
                    check_disk(drive, block, destination, status, &mut problems);
                }
            }
        }
    }
    problems
}

fn check_states(source: &Found, destination: Option<&Found>, midway: bool, problems: &mut Problems) {
    if midway {
        if source.machine.migration == Migration::Moving && !source.is_on("pause-before-switchover") {
            problems.push("another migration of the source's QEMU is under way; wait for it, or cancel it".into());
        }
        return;
    }
    match &source.machine.run {
        Run::Running | Run::Paused => {}
        Run::Incoming => {
            problems.push("the source's QEMU waits for a migration itself: it has no guest to move".into())
        }
        run => problems.push(format!("the source's QEMU cannot be moved in its state: {run:?}")),
    }
    match destination.map(|destination| &destination.machine.run) {
        None | Some(Run::Incoming) => {}
        Some(run) => problems.push(format!(
            "the destination's QEMU does not wait for a migration ({}): start it with -incoming defer -S",
            format!("{run:?}").to_lowercase()
        )),
    }
}

/// Each writable disk of the machine has to come along.
fn check_names(places: &Places, source: &Found, problems: &mut Problems) {
    for (drive, _) in &places.disks {
        match source.find(drive) {
            None => problems
                .push(format!("the source's machine has no disk {drive}; its writable disks are: {}", source.labels())),
            Some(block) if block.read_only => {
                problems.push(format!("disk {drive} of the source's machine is read-only: it does not change hands"));
            }
            Some(_) => {}
        }
    }
    let known = |block: &Block| {
        places.disks.iter().any(|(drive, _)| block.is_called(drive))
            || places.leave.iter().any(|name| block.is_called(name))
    };
    for block in source.blocks.iter().filter(|block| !block.read_only && !known(block)) {
        problems.push(format!(
            "disk {} of the source's machine ({}) is not named: give --disk {}=DEVICE, or --leave {} if both hosts reach it \
             or its contents travel with the memory",
            block.label(),
            block.file,
            block.label(),
            block.label()
        ));
    }
}

fn check_device(name: &str, status: &Status, problems: &mut Problems) {
    match status.state {
        State::Standby if status.handoff.source_disk.is_none() => problems.push(format!(
            "the source of device {name} cannot give its disk away: serve it with `blkferry export --handoff`"
        )),
        State::Standby => {
            if let Some(why) = &status.source.lost_reason {
                problems.push(format!("device {name} has lost its source: {why}"));
            }
        }
        State::Active | State::Degraded | State::Complete => problems.push(format!(
            "device {name} is active already: its disk is here; only devices in standby (`blkferry attach --standby`) can \
             take one over"
        )),
        State::Away => problems.push(format!("device {name} was given to another host")),
        State::Failed => problems
            .push(format!("device {name} has failed: {}", status.failure.as_deref().unwrap_or("see its log"))),
    }
}

fn check_disk(drive: &str, block: &Block, destination: Option<&Found>, status: &Status, problems: &mut Problems) {
    let name = &status.name;
    if block.size_bytes != status.bytes.total {
        problems.push(format!(
            "disk {drive} has {} bytes at the source, and device {name} has {}: that is another disk",
            block.size_bytes, status.bytes.total
        ));
    }
    let Some(destination) = destination else { return };
    match destination.blocks.iter().find(|there| there.corresponds_to(block)) {
        None => problems.push(format!(
            "the destination's machine has no disk that corresponds to {drive}; its writable disks are: {}",
            destination.labels()
        )),
        Some(there) if !there.leads_to(status) => problems.push(format!(
            "disk {drive} of the destination's machine is {}, and not device {name} ({})",
            there.file, status.frontend.uri
        )),
        Some(_) => {}
    }
}
