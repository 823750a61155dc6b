//! Tests that need a file system of their own run again, alone, in a mount namespace of their own: what they mount
//! is seen by nobody else and goes away with them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::tool;

const INSIDE: &str = "BLKFERRY_TEST_NAMESPACE";

/// Runs `test` (whose full name is `name`) in a mount namespace. Without root in one of a user's own.
pub fn alone(name: &str, test: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return test();
    }
    let root = nix::unistd::geteuid().is_root();
    let namespaces = if root { ["--mount"].as_slice() } else { &["--mount", "--user", "--map-root-user"] };
    let mut command = Command::new("unshare");
    command.args(namespaces).args(["--propagation", "private"]).arg(std::env::current_exe().unwrap());
    let status = command.args(["--exact", name, "--nocapture"]).env(INSIDE, "1").status();
    let status = status.unwrap_or_else(|e| panic!("unshare cannot be run ({e}); it is in util-linux"));
    assert!(status.success(), "{name} failed in its namespace: {status}");
}

/// Something mounted; unmounted when dropped.
pub struct Mounted(PathBuf);

impl Mounted {
    /// A small file system in memory.
    pub fn tmpfs(at: &Path, size: &str) -> Self {
        std::fs::create_dir_all(at).unwrap();
        tool("mount", ["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", at.to_str().unwrap()]);
        Self(at.into())
    }

    pub fn device(device: &str, at: &Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        tool("mount", [device, at.to_str().unwrap()]);
        Self(at.into())
    }

    pub fn make_read_only(&self) {
        tool("mount", ["-o", "remount,ro", self.0.to_str().unwrap()]);
    }

    pub fn make_writable(&self) {
        tool("mount", ["-o", "remount,rw", self.0.to_str().unwrap()]);
    }

    pub fn resize(&self, size: &str) {
        tool("mount", ["-o", &format!("remount,size={size}"), self.0.to_str().unwrap()]);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // With the namespace it would go anyway.
        crate::common::tool_output("umount", ["--lazy", self.0.to_str().unwrap()]);
    }
}
