//! The host of the device: a directory for its cache, and the process that serves it, which may be killed.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use blkferry::cache::CacheOptions;
use blkferry::device::Mode;
use blkferry::device::simulation::{Simulated, StartError};
use blkferry::nbd::Address;
use blkferry::remote::LossPolicy;
use blkferry::uring::simulation::{ProcessId, World};
use blkferry::uring::sleep;
use tempfile::TempDir;

use crate::judge::Judge;
use crate::setup::Setup;
use crate::source::{HOST, PORT};
use crate::weather::Weather;

/// Pause of whoever starts the device, if it did not come up.
const RESTART: Duration = Duration::from_millis(700);

/// See the module's page.
pub struct Machine {
    dir: TempDir,
    setup: Rc<Setup>,
    weather: Rc<Weather>,
    judge: Rc<Judge>,
    pub policy: LossPolicy,
    pub mode: Cell<Mode>,
    process: Cell<Option<ProcessId>>,
    device: Rc<RefCell<Option<Rc<Simulated>>>>,
}

impl Machine {
    pub fn new(setup: Rc<Setup>, weather: Rc<Weather>, judge: Rc<Judge>) -> Rc<Self> {
        // Memory: nothing here is to wait for a disk.
        let dir = tempfile::Builder::new().prefix("bf").tempdir_in("/dev/shm").expect("a tmpfs for the live map");
        let (policy, mode) = (LossPolicy::new(setup.policy), Cell::new(setup.mode));
        let (process, device) = (Cell::default(), Rc::default());
        Rc::new(Self { dir, setup, weather, judge, policy, mode, process, device })
    }

    pub fn path(&self) -> &std::path::Path {
        self.dir.path()
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// Starts the device, and again until it comes up.
    pub fn start(&self, world: &World) {
        self.judge.device_starts();
        let options = CacheOptions {
            data: self.data(),
            metadata: self.data().with_extension("ferry"),
            live_dir: self.dir.path().into(),
            block_bytes: Some(self.setup.block_bytes),
            forget_unflushed: false,
            overwrite: false,
            standby: false,
            home: false,
        };
        let (policy, mode, weather, judge) =
            (self.policy.clone(), self.mode.get(), self.weather.clone(), self.judge.clone());
        let slot = self.device.clone();
        let (process, task) = world.start_process(async move {
            loop {
                let disk = weather.clone();
                let delay = move || disk.draw(disk.disk_delay.get()) * 4;
                let uri = Address::Tcp { host: HOST.into(), port: PORT }.uri("");
                match Simulated::start(uri, policy.clone(), options.clone(), mode, delay).await {
                    Ok(device) => {
                        judge.note(|| "the device is up".into());
                        judge.device_starts();
                        *slot.borrow_mut() = Some(Rc::new(device));
                        return;
                    }
                    Err(error @ StartError::Dial(_)) => judge.note(|| format!("it does not come up: {error}")),
                    // The source is another disk at the moment.
                    Err(StartError::Open(blkferry::cache::OpenError::IdentityChanged { .. })) => {}
                    Err(error) => return judge.broken("start", error.to_string()),
                }
                sleep(RESTART).await;
                judge.device_starts();
            }
        });
        task.detach();
        self.process.set(Some(process));
    }

    pub fn device(&self) -> Option<Rc<Simulated>> {
        self.device.borrow().clone()
    }

    pub fn process(&self) -> Option<ProcessId> {
        self.process.get()
    }

    /// Tasks of its process.
    pub fn tasks(&self, world: &World) -> usize {
        self.process.get().map_or(0, |process| world.tasks_of(process))
    }

    /// Kills the process of the device.
    pub fn kill(&self, world: &World) {
        let device = self.device.borrow_mut().take();
        if let Some(process) = self.process.take() {
            world.kill(process);
        }
        drop(device);
    }

    /// Stops the device in order, and ends its process.
    pub async fn stop(&self, world: &World) {
        if let Some(device) = self.device()
            && let Err(error) = device.stop().await
        {
            self.judge.broken("stop", format!("the device does not leave its cache in order: {error}"));
        }
        self.kill(world);
    }
}
