//! Two QEMUs (software emulation), an image that the first one uses, a device in standby for the second one, and a link
//! of 1 Gbit/s and 20 ms between them, for the disk and for the memory.

use std::io::{BufRead, BufReader};
use std::iter;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blkferry::control::RunDir;
use blkferry::migrate::{Limits, Places};
use blkferry::qmp::{Address, Qmp};
use serde_json::{Value, json};

use crate::common::{Export, World, kill, make_image, tool};
use crate::link::Link;
use crate::writer::{PATIENCE, assert_stamps, is_bad, poll, stamps_in, told_in};

pub const LIMITS: Limits =
    Limits { memory: Some(PATIENCE), stall: Duration::from_secs(30), switchover: Duration::from_secs(120) };
/// After so long without a stamp a guest has lost its disk.
const LOST_DISK: Duration = Duration::from_secs(60);
pub const NAME: &str = "web";

/// A QEMU; killed when dropped.
pub struct Qemu {
    pub child: Child,
    pub qmp: PathBuf,
    pub console: PathBuf,
}

impl Qemu {
    pub fn start(world: &World, name: &str, drive: &str, more: &[&str]) -> Self {
        let (qmp, console) = (world.path(&format!("{name}.qmp")), world.path(&format!("{name}.log")));
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-machine", "pc", "-accel", "tcg", "-m", "192", "-no-reboot", "-display", "none"])
            .args(["-vga", "none", "-serial", &format!("file:{}", console.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
            .args(["-drive", &format!("id=disk0,{drive},format=raw,if=none,cache=writeback")])
            .args(["-device", "virtio-blk-pci,drive=disk0,id=vda"])
            .args(more)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 is missing: `scripts/test` installs all that the tests need");
        poll("QEMU's QMP socket", || qmp.exists());
        Self { child, qmp, console }
    }

    /// A word with it, while nobody else has one.
    pub fn ask(&self, command: &str) -> Result<Value, String> {
        self.ask_with(command, json!({}))
    }

    fn ask_with(&self, command: &str, arguments: Value) -> Result<Value, String> {
        let mut qmp = Qmp::connect(&Address::Unix(self.qmp.clone()), "QEMU").map_err(|e| e.to_string())?;
        qmp.execute(command, arguments).map_err(|e| e.to_string())
    }

    /// How fast its guest's memory may leave it.
    pub fn limit_memory(&self, bytes_per_s: u64) {
        self.ask_with("migrate-set-parameters", json!({ "max-bandwidth": bytes_per_s })).unwrap();
    }

    pub fn runs(&self) -> bool {
        self.ask("query-status").is_ok_and(|said| said["status"] == "running")
    }

    /// What its guest said that it wrote: number and time of each stamp.
    pub fn stamps(&self) -> Vec<(u64, u64)> {
        stamps_in(&self.console)
    }

    /// Does its guest go on writing? It may have lost its disk.
    pub fn writes_on(&self) -> bool {
        let before = told_in(&self.console).len();
        let started = Instant::now();
        while started.elapsed() < LOST_DISK {
            if is_bad(&self.console) {
                return false;
            }
            if told_in(&self.console).len() >= before + 2 {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// Waits until its guest has written so many more.
    pub fn wait_stamps(&self, more: usize) {
        let before = self.stamps().len();
        poll("the guest's stamps", || self.stamps().len() >= before + more);
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Looks when the guest's console was written to last at the one host, and first at the other: how long its writer was not
/// heard of, by this host's clock.
pub struct Silence {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl Silence {
    pub fn between(a: &Qemu, b: &Qemu) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, a, b) = (stop.clone(), a.console.clone(), b.console.clone());
        let len = |console: &Path| std::fs::metadata(console).map_or(0, |meta| meta.len());
        let look = move || {
            let mut last = (len(&a), Instant::now());
            while len(&b) == 0 && !stopped.load(Ordering::Relaxed) {
                let now = len(&a);
                if now != last.0 {
                    last = (now, Instant::now());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            last.1.elapsed()
        };
        Self { stop, thread: std::thread::spawn(look) }
    }

    /// From the last word there to the first one here, which has to have come.
    pub fn end(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// A disk that the guest has and does not use; no link between its export and its device.
pub struct Other {
    pub name: String,
    pub export: Option<Export>,
    image: PathBuf,
    port: u16,
}

/// Everything that it takes for a move.
pub struct Site {
    pub a: Qemu,
    pub b: Qemu,
    pub export: Option<Export>,
    pub link: Link,
    pub uri: String,
    listen: String,
    pub image: PathBuf,
    pub cache: PathBuf,
    pub others: Vec<Other>,
    pub memory: Link,
    export_port: u16,
    pub world: World,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Site {
    /// `size`: of the disk; `drive`: more about the source's drive, such as `file.locking=off`.
    pub fn new(size: &str, drive: &str) -> Self {
        Self::with(size, drive, &[])
    }

    /// Every further disk is a drive `diskN` in both machines, and a device of that name.
    pub fn with(size: &str, drive: &str, further: &[&str]) -> Self {
        let world = World::new();
        let (image, cache) = (world.path("guest.raw"), world.path("cache.raw"));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/guest-image");
        tool(script.to_str().unwrap(), ["--writer", "--size", size, image.to_str().unwrap()]);
        let mut others = Vec::new();
        let (mut drives_a, mut drives_b) = (Vec::new(), vec!["-incoming".into(), "defer".into(), "-S".into()]);
        for &name in further {
            let (disk, port) = (world.path(&format!("{name}.raw")), free_port());
            make_image(&disk, 8 << 20, &[(0, 1 << 20)]);
            let drive = |file| format!("id={name},{file},format=raw,if=none,cache=writeback");
            let device = format!("virtio-blk-pci,drive={name},id=front-{name}");
            let export = serve(&world, &disk, port);
            let status = standby(&world, &export.uri, &world.path(&format!("{name}-cache.raw")), name);
            let uri = status["frontend"]["uri"].as_str().unwrap();
            let file = format!("file.driver=file,file.filename={}", disk.display());
            drives_a.extend(["-drive".into(), drive(file), "-device".into(), device.clone()]);
            drives_b.extend(["-drive".into(), drive(format!("file={uri}")), "-device".into(), device]);
            others.push(Other { name: name.into(), export: Some(export), image: disk, port });
        }
        let words = |words: &[String]| words.iter().map(String::as_str).collect::<Vec<_>>().join("\n");
        let (drives_a, drives_b) = (words(&drives_a), words(&drives_b));
        let (drives_a, drives_b): (Vec<&str>, Vec<&str>) = (drives_a.lines().collect(), drives_b.lines().collect());
        let file = format!("file.driver=file,file.filename={}{drive}", image.display());
        let a = Qemu::start(&world, "a", &file, &drives_a);
        let export_port = free_port();
        let export = serve(&world, &image, export_port);
        let link = Link::to(&format!("127.0.0.1:{export_port}"));
        let uri = format!("nbd://{}/", link.address);
        let status = standby(&world, &uri, &cache, NAME);
        let drive = format!("file={},file.reconnect-delay=60", status["frontend"]["uri"].as_str().unwrap());
        let b = Qemu::start(&world, "b", &drive, &drives_b);
        let port = free_port();
        let memory = Link::to(&format!("127.0.0.1:{port}"));
        let listen = format!("tcp:127.0.0.1:{port}");
        Self { a, b, export: Some(export), link, uri, listen, image, cache, others, memory, export_port, world }
    }

    pub fn places(&self) -> Places {
        Places {
            from: Address::Unix(self.a.qmp.clone()),
            to: Address::Unix(self.b.qmp.clone()),
            uri: Some(format!("tcp:{}", self.memory.address)),
            listen: Some(self.listen.clone()),
            disks: iter::once(("disk0".into(), NAME.into()))
                .chain(self.others.iter().map(|other| (other.name.clone(), other.name.clone())))
                .collect(),
            leave: Vec::new(),
        }
    }

    pub fn run_dir(&self) -> RunDir {
        RunDir::at(self.world.run_dir())
    }

    /// `blkferry migrate` with these places.
    pub fn command(&self, more: &[&str]) -> Vec<String> {
        let Places { from, to, uri, listen, .. } = self.places();
        let (from, to) = (from.to_string(), to.to_string());
        let mut args: Vec<String> =
            ["migrate", "--from", &from, "--to", &to, "--disk", "disk0=web"].map(Into::into).into();
        args.extend(["--uri".into(), uri.unwrap(), "--listen".into(), listen.unwrap()]);
        args.extend(more.iter().map(|&arg| arg.to_owned()));
        args
    }

    pub fn status(&self) -> Value {
        self.status_of(NAME)
    }

    pub fn status_of(&self, name: &str) -> Value {
        serde_json::from_str(&self.world.ok(["status", name, "--json"])).unwrap()
    }

    /// Serves a further disk again.
    pub fn restart_other(&mut self, number: usize) {
        let Other { image, port, .. } = &self.others[number];
        self.others[number].export = Some(serve(&self.world, image, *port));
    }

    pub fn kill_export(&mut self) {
        self.export = None;
    }

    pub fn restart_export(&mut self) {
        self.export = Some(serve(&self.world, &self.image, self.export_port));
    }

    pub fn kill_daemon(&self) {
        let pid = self.status()["pid"].as_i64().unwrap() as i32;
        kill(pid, nix::sys::signal::Signal::SIGKILL);
        poll("the daemon's end", || !self.world.blkferry(["status", NAME]).status.success());
    }

    pub fn restart_daemon(&self) {
        standby(&self.world, &self.uri, &self.cache, NAME);
    }

    /// What the guest's disk holds, wherever it is now: every stamp that was told of has to be there, and the file system
    /// has to be whole once its journal was replayed.
    pub fn assert_nothing_is_lost(&self, disk: &Path) {
        assert_stamps(&self.world, disk, &[told_in(&self.a.console), told_in(&self.b.console)].concat());
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.a.kill();
        self.b.kill();
        self.export = None;
        // The image may be immutable: given away for good.
        self.world.blkferry(["reclaim", "--force", self.image.to_str().unwrap()]);
        for Other { export, image, .. } in &mut self.others {
            *export = None;
            self.world.blkferry(["reclaim", "--force", image.to_str().unwrap()]);
        }
    }
}

pub fn serve(world: &World, image: &Path, port: u16) -> Export {
    let mut command = world.command(["export", "--handoff", "--json", "--listen", &format!("127.0.0.1:{port}")]);
    let mut child = command.arg(image).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let said: Value = serde_json::from_str(&line).expect("an export says where it serves");
    Export { child, uri: said["uris"][0].as_str().unwrap().to_owned() }
}

fn standby(world: &World, uri: &str, cache: &Path, name: &str) -> Value {
    let args = ["attach", "--standby", uri, cache.to_str().unwrap(), "--name", name, "--json", "--hydrate", "off"];
    serde_json::from_str(&world.ok(args)).unwrap()
}
