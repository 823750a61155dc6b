//! What the end-to-end tests share: a private run directory, exports, devices, tools that must be there.
//!
//! A tool that is missing fails the test that needs it, with the command that installs it: nothing is skipped.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use blkferry::cache::peek;
use blkferry::control::RunDir;
use serde_json::Value;
use tempfile::TempDir;

/// The program under test.
pub const BLKFERRY: &str = env!("CARGO_BIN_EXE_blkferry");

/// A directory of its own for a test, with a run directory in it. Daemons that are left are stopped at its end.
pub struct World {
    dir: TempDir,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("bf").tempdir_in(scratch()).unwrap();
        std::fs::create_dir(dir.path().join("run")).unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn run_dir(&self) -> PathBuf {
        self.path("run")
    }

    /// `blkferry ARGS`, to its end.
    pub fn blkferry<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }

    /// `blkferry ARGS`, which must succeed; gives what it printed.
    pub fn ok<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        text_of("blkferry", self.blkferry(args))
    }

    /// `blkferry ARGS`, which must fail with one clear line on standard error; gives that line.
    pub fn refused<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        let out = self.blkferry(args);
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success(), "it should have failed; it said {stderr:?}");
        assert!(out.status.code().is_some(), "it was killed: {:?}", out.status);
        let lines: Vec<&str> = stderr.lines().filter(|l| !l.trim().is_empty()).collect();
        assert_eq!(lines.len(), 1, "one clear line, not:\n{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
        lines[0].to_owned()
    }

    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(BLKFERRY);
        // Whatever this machine's kernel and user could have.
        command.args(args).env("BLKFERRY_RUN_DIR", self.run_dir()).env("BLKFERRY_FRONTEND", "nbd");
        command
    }

    /// Serves an image with `blkferry export` on a unix socket.
    pub fn export(&self, image: &Path) -> Export {
        let socket = self.path(&format!("export-{}.sock", unique()));
        self.export_at(image, &format!("unix:{}", socket.display()))
    }

    /// Serves an image with `blkferry export` at a `--listen` address.
    pub fn export_at(&self, image: &Path, listen: &str) -> Export {
        self.export_with(image, listen, &[])
    }

    /// The same, with further options.
    pub fn export_with(&self, image: &Path, listen: &str, more: &[&str]) -> Export {
        let mut command = self.command(["export", "--json", "--listen", listen]);
        let mut child = command.args(more).arg(image).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).expect("an export says where it serves");
        Export { child, uri: said["uris"][0].as_str().unwrap().to_owned() }
    }

    /// Attaches in the background.
    pub fn attach(&self, source: &str, cache: &Path, name: &str, more: &[&str]) -> Device<'_> {
        let mut args = vec!["attach", source, cache.to_str().unwrap(), "--name", name, "--json"];
        args.extend(more);
        let status: Value = serde_json::from_str(&self.ok(args)).unwrap();
        Device {
            world: self,
            name: name.to_owned(),
            uri: status["frontend"]["uri"].as_str().unwrap().to_owned(),
            pid: status["pid"].as_u64().unwrap() as i32,
        }
    }
}

impl World {
    /// They lie in /dev/shm if the run directory is not on tmpfs, and outlive caches that were not detached.
    fn remove_live_maps(&self) {
        let Ok(live) = RunDir::at(self.run_dir()).live_dir() else { return };
        for entry in std::fs::read_dir(self.path("")).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_file())
                && let Ok(Some(superblock)) = peek(&entry.path())
            {
                let _ = std::fs::remove_file(live.join(format!("{}.live", superblock.uuid)));
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let Ok(out) = self.command(["list", "--json"]).output() else { return };
        let rows: Vec<Value> = serde_json::from_slice(&out.stdout).unwrap_or_default();
        for row in rows.iter().filter(|row| row["state"] != "dead") {
            if let Some(pid) = row["pid"].as_i64() {
                kill(pid as i32, nix::sys::signal::Signal::SIGKILL);
            }
        }
        self.remove_live_maps();
    }
}

/// A running `blkferry export`; stopped when dropped.
pub struct Export {
    pub child: Child,
    pub uri: String,
}

impl Export {
    /// Stops it as Ctrl-C does, and waits.
    pub fn stop(mut self) {
        kill(self.child.id() as i32, nix::sys::signal::Signal::SIGINT);
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An attached device.
pub struct Device<'a> {
    pub world: &'a World,
    pub name: String,
    pub uri: String,
    pub pid: i32,
}

impl Device<'_> {
    pub fn status(&self) -> Value {
        serde_json::from_str(&self.world.ok(["status", &self.name, "--json"])).unwrap()
    }

    pub fn set(&self, setting: &str) {
        self.world.ok(["set", &self.name, setting]);
    }

    /// Waits until all blocks are here and committed.
    pub fn wait_complete(&self) -> Value {
        self.wait_for(|status| status["source_needed"] == false)
    }

    pub fn wait_for(&self, done: impl Fn(&Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let status = self.status();
            if done(&status) {
                return status;
            }
            assert!(started.elapsed() < Duration::from_secs(300), "it never came: {status}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Detaches a complete device.
    pub fn detach(self) {
        self.world.ok(["detach", &self.name]);
    }

    /// Ends it although blocks are absent.
    pub fn detach_incomplete(self) {
        self.world.ok(["detach", "--incomplete", &self.name]);
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill_daemon(self) {
        kill(self.pid, nix::sys::signal::Signal::SIGKILL);
        let started = Instant::now();
        while Path::new(&format!("/proc/{}/fd", self.pid)).read_dir().is_ok_and(|mut d| d.next().is_some()) {
            assert!(started.elapsed() < Duration::from_secs(30));
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

pub fn kill(pid: i32, signal: nix::sys::signal::Signal) {
    // Gone already is as good.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
}

/// Runs a tool that must be there and must succeed; gives what it printed.
pub fn tool<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> String {
    text_of(program, tool_output(program, args))
}

/// Runs a tool that must be there; the caller judges.
pub fn tool_output<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Output {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    match Command::new(program).args(args).env("PATH", path).stdin(Stdio::null()).output() {
        Ok(out) => out,
        Err(e) => panic!("{program} cannot be run ({e}): `scripts/test` installs all that the tests need"),
    }
}

fn text_of(program: &str, out: Output) -> String {
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{program} failed: {}\n{text}", String::from_utf8_lossy(&out.stderr));
    text
}

/// Waits until something listens on a unix socket.
pub fn wait_for_socket(path: &Path) {
    let started = Instant::now();
    while !path.exists() {
        assert!(started.elapsed() < Duration::from_secs(20), "no socket at {}", path.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Where big files go: the build directory, which is on a real disk.
fn scratch() -> PathBuf {
    let dir = std::env::var_os("BLKFERRY_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn unique() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// Bytes without pattern, the same for the same seed (splitmix64).
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut bytes: Vec<u8> = std::iter::repeat_with(|| next().to_le_bytes()).take(len.div_ceil(8)).flatten().collect();
    bytes.truncate(len);
    bytes
}

/// A sparse image: `data` lists (offset, length) of noise.
pub fn make_image(path: &Path, size: u64, data: &[(u64, u64)]) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for &(offset, len) in data {
        file.write_all_at(&noise(offset ^ 0xfe44, len as usize), offset).unwrap();
    }
    file.sync_all().unwrap();
}

/// Are two files the same, byte for byte?
pub fn assert_same(a: &Path, b: &Path) {
    let (mut fa, mut fb) = (File::open(a).unwrap(), File::open(b).unwrap());
    let (mut ba, mut bb) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0u64;
    loop {
        let n = fa.read(&mut ba).unwrap();
        if n == 0 {
            assert_eq!(fb.read(&mut bb).unwrap(), 0, "{} is longer", b.display());
            return;
        }
        fb.read_exact(&mut bb[..n]).unwrap();
        if let Some(i) = (0..n).find(|&i| ba[i] != bb[i]) {
            panic!("{} and {} differ at {}", a.display(), b.display(), at + i as u64);
        }
        at += n as u64;
    }
}
