//! A host: a libvirtd with directories, a name and processes of its own (see the script `host`).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::common::{BLKFERRY, World};
use crate::writer::{poll, stamps_in};

const HERE: &str = env!("CARGO_MANIFEST_DIR");

/// Ends with everything that runs on it when dropped.
pub struct Host {
    /// `unshare`, which takes the first process with it, which takes all others.
    child: Child,
    /// The first process, by its number outside.
    first: u32,
    pub dir: PathBuf,
}

impl Host {
    pub fn start(world: &World, name: &str) -> Self {
        let dir = world.path(name);
        std::fs::create_dir(&dir).unwrap();
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}:/usr/sbin:/sbin", Path::new(BLKFERRY).parent().unwrap().display());
        // It ends with this thread too, should that be killed.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--mount", "--uts", "--pid", "--mount-proc", "--fork"])
            .args(["--kill-child", "--", &format!("{HERE}/tests/libvirt/host"), name])
            .args([dir.as_os_str(), format!("{HERE}/scripts/install.d/libvirt-hook").as_ref()])
            .env("PATH", path)
            .stdin(Stdio::null())
            .spawn()
            .expect("util-linux is missing: `scripts/test` installs all that the tests need");
        let mut first = None;
        poll("a libvirtd (as root, with libvirt-daemon: `scripts/test` installs all that the tests need)", || {
            assert!(child.try_wait().unwrap().is_none(), "the host has ended: see above");
            let id = child.id();
            let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
            first = children.split_whitespace().next().map(|pid| pid.parse().unwrap());
            dir.join("libvirt-sock").exists()
        });
        Self { child, first: first.unwrap(), dir }
    }

    /// Where libvirt's clients find it.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.dir.join("libvirt-sock").display())
    }

    /// A file of the host's own.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.first))
    }

    /// A command on this host.
    pub fn command<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.first.to_string(), "--mount", "--uts", "--pid", "--"]).args(args);
        command.stdin(Stdio::null());
        command
    }

    /// A tool on this host, which must succeed.
    pub fn run(&self, args: &[&str]) {
        let out = self.command(args.iter().copied()).output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }

    pub fn blkferry(&self, args: &[&str]) -> Output {
        self.command([BLKFERRY].iter().chain(args).copied()).output().unwrap()
    }

    pub fn ok(&self, args: &[&str]) -> String {
        let out = self.blkferry(args);
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// `virsh`, for this host; the caller judges.
    pub fn try_virsh(&self, args: &[&str]) -> Result<String, String> {
        let out = self.virsh_command(args).output();
        let out = out.expect("libvirt-clients is missing: `scripts/test` installs all that the tests need");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if out.status.success() { Ok(text(&out.stdout)) } else { Err(text(&out.stderr)) }
    }

    pub fn virsh_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("virsh");
        command.args(["--quiet", "--connect", &self.uri()]).args(args).env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    pub fn virsh(&self, args: &[&str]) -> String {
        self.try_virsh(args).unwrap_or_else(|e| panic!("virsh {args:?}: {e}"))
    }

    /// What it must not do, and says why.
    pub fn virsh_refuses(&self, args: &[&str]) -> String {
        self.try_virsh(args).expect_err("it should have failed")
    }

    /// `running`, `shut off`, …; nothing if it does not know the machine.
    pub fn state(&self) -> String {
        self.try_virsh(&["domstate", "web"]).unwrap_or_default()
    }

    /// What the machine has told here.
    pub fn stamps(&self) -> Vec<(u64, u64)> {
        stamps_in(&self.path("/var/log/web.console"))
    }

    pub fn wait_stamps(&self, more: usize) {
        let before = self.stamps().len();
        poll("the guest's stamps", || self.stamps().len() >= before + more);
    }
}

impl Host {
    /// Pulls its plug.
    pub fn end(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_some()) {
            return;
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let first = format!("/proc/{}", self.first);
        poll("the end of all its processes", || !Path::new(&first).exists());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.join("libvirtd.log")).unwrap_or_default();
            // The end of it: the rest is what libvirtd lacks in so small a host.
            let lines: Vec<_> = log.lines().filter(|line| line.contains(": error :")).collect();
            println!(
                "{}, libvirtd's last errors:\n{}",
                self.dir.display(),
                lines[lines.len().saturating_sub(5)..].join("\n")
            );
        }
        self.end();
    }
}
