//! What the daemon answers on its control socket.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use indicatif::HumanBytes;

use super::export_side::ExportSide;
use super::hands::Hands;
use super::rate::RateMeter;
use super::{Wish, lock};
use crate::control::{
    BlockStatus, ByteStatus, CacheStatus, Detached, FrontendStatus, Handler, HydrateStatus, SETTINGS, SourceStatus,
    State, Status, Taken, UblkEntry, WireStatus,
};
use crate::device::{Core, HydrationState, Mode, Phase, Verifier, VerifyProgress, VerifyReport};
use crate::nbd::Address;
use crate::remote::{LossPolicy, OnLoss, OnLossError, SourceStats};
use crate::server::ServeStats;
use crate::ublk::DeviceInfo;
use crate::uring::{BindError, Listener};

/// How long a setting may take to be written down.
const WRITE_DOWN_PATIENCE: Duration = Duration::from_secs(5);

/// What a device is, for as long as its daemon runs.
pub(super) struct DeviceFacts {
    pub(super) name: String,
    pub(super) uri: String,
    pub(super) policy: LossPolicy,
    pub(super) ublk: Option<DeviceInfo>,
    pub(super) source_uri: String,
    pub(super) cache: PathBuf,
    pub(super) metadata: PathBuf,
}

/// Counters of the parts.
pub(super) struct Meters {
    pub(super) source: SourceStats,
    pub(super) serve: ServeStats,
}

/// What else can be asked of the device.
pub(super) struct Sides {
    pub(super) verifier: Verifier,
    pub(super) hands: Arc<Hands>,
    pub(super) export: ExportSide,
}

pub(super) struct DaemonHandler {
    core: Arc<Core>,
    started: Instant,
    device: DeviceFacts,
    meters: Meters,
    verifier: Mutex<Verifier>,
    hands: Arc<Hands>,
    export: ExportSide,
    rate: Mutex<RateMeter>,
    wishes: Mutex<Sender<Wish>>,
    answered: Mutex<Option<Sender<()>>>,
}

/// Bytes that only the source has. The last block may be short.
pub(super) fn absent_bytes(core: &Core) -> u64 {
    let (maps, geometry) = (core.maps(), core.geometry());
    let whole = maps.absent_count() * geometry.block_bytes();
    let last = geometry.blocks() - 1;
    let short = geometry.blocks() * geometry.block_bytes() - geometry.size_bytes();
    if maps.is_present(last) { whole } else { whole.saturating_sub(short) }
}

impl DaemonHandler {
    pub(super) fn new(
        core: Arc<Core>,
        device: DeviceFacts,
        meters: Meters,
        sides: Sides,
        wishes: Sender<Wish>,
    ) -> Self {
        Self {
            core,
            started: Instant::now(),
            device,
            meters,
            verifier: Mutex::new(sides.verifier),
            hands: sides.hands,
            export: sides.export,
            rate: Mutex::default(),
            wishes: Mutex::new(wishes),
            answered: Mutex::default(),
        }
    }

    /// Offers the device to other hosts, from the start. `Err`: not now, but the next daemon of it will try again.
    pub(super) fn export_on(
        &self,
        asked: &Address,
        found: Result<(Listener, Address), BindError>,
    ) -> Result<(), String> {
        self.export.want(Some(asked.clone()));
        self.export.start_on(asked, found.map_err(|e| e.to_string())?).map(drop)
    }

    /// Offers the device to other hosts.
    pub(super) fn export(&self, address: &Address) -> Result<String, String> {
        self.export.start(address)
    }

    /// What was set since, for another daemon of this device.
    pub(super) fn note_settings(&self, entry: &mut UblkEntry) {
        entry.hydrate = self.core.hydration.mode().to_string();
        entry.on_source_loss = self.device.policy.get().to_string();
        entry.export = self.export.wanted().map(|address| address.to_string());
    }

    pub(super) fn stop_export(&self) {
        self.export.stop();
    }

    pub(super) fn cache_path(&self) -> String {
        self.device.cache.display().to_string()
    }

    /// Takes a sample for the rate, and the status with it.
    pub(super) fn sample(&self) -> Status {
        let present = self.core.geometry().size_bytes() - absent_bytes(&self.core);
        lock(&self.rate).sample(Instant::now(), present);
        self.snapshot()
    }

    /// Would somebody miss the device, or miss what is not here?
    pub(super) fn is_needed(&self) -> bool {
        match self.core.gate.phase() {
            Phase::Away => !self.hands.is_released(),
            _ => !self.core.health.is_complete() && self.core.maps().absent_count() > 0,
        }
    }

    pub(super) fn why_not_detached(&self) -> String {
        let name = &self.device.name;
        if self.core.gate.phase() == Phase::Away {
            return format!(
                "{name} was given to the next host, which has not said yet that it has everything: it fetches from here. \
                 Wait, or end it with --incomplete if that host does not need it any more"
            );
        }
        if let Some(reason) = self.core.health.failed() {
            return format!(
                "{name} has failed and is not complete: {reason}. End it with `blkferry detach {name} --incomplete`"
            );
        }
        if self.core.gate.phase() == Phase::Standby {
            return format!(
                "{name} is in standby: nothing is fetched, and the disk is still the source's. Take it over (`blkferry \
                 activate {name}`), call it off (`blkferry abort {name}`), or end it with --incomplete and attach it \
                 again later"
            );
        }
        format!(
            "{name} is not complete: {} are still at the source only. Wait for hydration (`blkferry status {name} \
             --watch`), or detach with --incomplete and attach the same cache again later",
            HumanBytes(absent_bytes(&self.core)),
        )
    }

    fn change(&self, key: &str, value: &str) -> Result<String, String> {
        match key {
            "hydrate" => {
                let mode: Mode = value.parse().map_err(|e: crate::device::ModeError| e.to_string())?;
                self.core.hydration.set_mode(mode);
                Ok(mode.to_string())
            }
            "on-source-loss" => {
                let policy: OnLoss = value.parse().map_err(|e: OnLossError| e.to_string())?;
                self.device.policy.set(policy);
                Ok(policy.to_string())
            }
            "export" if value == "off" => {
                self.export.close();
                Ok("off".into())
            }
            "export" => self.export(&value.parse().map_err(|e: crate::nbd::UriError| e.to_string())?),
            _ => Err(format!("there is no setting {key:?}; use {SETTINGS}")),
        }
    }

    fn state(&self) -> State {
        let health = &self.core.health;
        match () {
            () if health.has_failed() => State::Failed,
            () if self.core.gate.phase() == Phase::Standby => State::Standby,
            () if self.core.gate.phase() == Phase::Away => State::Away,
            () if health.is_complete() => State::Complete,
            () if health.lost().is_some() => State::Degraded,
            () => State::Active,
        }
    }

    pub(super) fn snapshot(&self) -> Status {
        let (core, health) = (&self.core, &self.core.health);
        let absent = absent_bytes(core);
        let total = core.geometry().size_bytes();
        let lost = health.lost();
        Status {
            name: self.device.name.clone(),
            state: self.state(),
            failure: health.failed(),
            source_needed: !(health.is_complete()
                || (self.core.gate.phase() == Phase::Away && self.hands.is_released())),
            handoff: self.hands.status(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_s: self.started.elapsed().as_secs_f64(),
            frontend: self.frontend(),
            source: SourceStatus {
                uri: self.device.source_uri.clone(),
                identity: self.hands.source_identity(),
                connections: self.meters.source.links(),
                on_loss: self.device.policy.get().to_string(),
                lost_s: lost.as_ref().map(|(since, _)| since.as_secs_f64()),
                lost_reason: lost.map(|(_, reason)| reason),
            },
            cache: CacheStatus {
                path: self.cache_path(),
                metadata: self.device.metadata.display().to_string(),
                commits: core.counters.commits.load(Ordering::Relaxed),
            },
            blocks: BlockStatus {
                size_bytes: core.geometry().block_bytes(),
                total: core.geometry().blocks(),
                present: core.maps().present_count(),
                dirty: core.maps().dirty_count(),
                absent: core.maps().absent_count(),
            },
            bytes: ByteStatus { total, present: total - absent, absent },
            wire: WireStatus {
                received_bytes: self.meters.source.received_bytes(),
                sent_bytes: self.meters.source.sent_bytes(),
                data_bytes: self.meters.source.data_bytes(),
            },
            hydrate: self.hydrate(absent),
        }
    }

    fn frontend(&self) -> FrontendStatus {
        let counters = &self.core.counters;
        let ublk = self.device.ublk;
        FrontendStatus {
            kind: if ublk.is_some() { "ublk" } else { "nbd" }.into(),
            uri: self.device.uri.clone(),
            device: ublk.map(|_| self.device.uri.clone()),
            features: ublk.map(|info| info.features.names()).unwrap_or_default(),
            queues: ublk.map_or(0, |info| info.queues),
            depth: ublk.map_or(0, |info| info.depth),
            clients: self.meters.serve.clients(),
            read_hits: counters.read_hits.load(Ordering::Relaxed),
            read_misses: counters.read_misses.load(Ordering::Relaxed),
            read_bytes: counters.read_bytes.load(Ordering::Relaxed),
            writes: counters.writes.load(Ordering::Relaxed),
            written_bytes: counters.written_bytes.load(Ordering::Relaxed),
            waiting_requests: counters.waiting.load(Ordering::Relaxed),
        }
    }

    fn hydrate(&self, absent: u64) -> HydrateStatus {
        let rate = lock(&self.rate).rate();
        let (state, reason) = match self.core.hydration.state() {
            _ if self.core.health.is_complete() => ("done", None),
            HydrationState::Running => ("running", None),
            HydrationState::Off => ("off", None),
            HydrationState::Paused(reason) => ("paused", Some(reason)),
            HydrationState::Done => ("done", None),
        };
        HydrateStatus {
            mode: self.core.hydration.mode().to_string(),
            state: state.into(),
            reason,
            rate_bytes_per_s: rate,
            eta_s: (rate > 0.0 && absent > 0).then(|| absent as f64 / rate),
        }
    }
}

impl Handler for DaemonHandler {
    fn status(&self) -> Status {
        self.snapshot()
    }

    fn set(&self, key: &str, value: &str) -> Result<String, String> {
        let now = self.change(key, value)?;
        // Whoever has the answer may kill us. One that is stopping writes nothing down any more.
        let (answer, written) = crossbeam::channel::bounded(1);
        if lock(&self.wishes).send(Wish::WriteDown { answer }).is_ok() {
            let _ = written.recv_timeout(WRITE_DOWN_PATIENCE);
        }
        Ok(now)
    }

    fn detach(&self, incomplete: bool) -> Result<Detached, String> {
        let (answer, said) = crossbeam::channel::bounded(1);
        let (tell, answered) = crossbeam::channel::bounded(1);
        *lock(&self.answered) = Some(tell);
        let wish = Wish::Detach { incomplete, answer, answered };
        lock(&self.wishes).send(wish).map_err(|_| "the daemon is stopping already".to_owned())?;
        said.recv().unwrap_or_else(|_| Err("the daemon is stopping already".into()))
    }

    fn take(&self, wait: Duration) -> Result<Taken, String> {
        self.hands.take(wait)
    }

    fn activate(&self, wait: Duration) -> Result<Taken, String> {
        self.hands.activate(wait)
    }

    fn call_off(&self) -> Result<(), String> {
        self.hands.call_off()
    }

    fn abort(&self) -> Result<(), String> {
        self.hands.abort()?;
        let (answer, said) = crossbeam::channel::bounded(1);
        let (tell, answered) = crossbeam::channel::bounded(1);
        *lock(&self.answered) = Some(tell);
        let wish = Wish::Vanish { answer, answered };
        lock(&self.wishes).send(wish).map_err(|_| "the daemon is stopping already".to_owned())?;
        said.recv().unwrap_or_else(|_| Err("the daemon is stopping already".into()))
    }

    fn detach_answered(&self) {
        if let Some(answered) = lock(&self.answered).take() {
            // The main loop may have given up waiting.
            let _ = answered.send(());
        }
    }

    fn verify(&self, progress: &mut dyn FnMut(VerifyProgress) -> bool) -> Result<VerifyReport, String> {
        let verifier = lock(&self.verifier).clone();
        verifier.run(&self.device.source_uri, &self.hands.source_identity(), progress)
    }
}
