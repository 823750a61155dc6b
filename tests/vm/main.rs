//! The block device in real kernels: each script here runs in a small machine that `scripts/vm` boots.
//!
//! `cargo test --test vm` runs them on all kernels, `cargo test --test vm recovery_on_7_2` one of them.
//! A machine takes one script, and some seconds to boot; its output is shown if the script fails.

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

/// One machine at a time: two would slow each other down past their time limits.
static MACHINE: Mutex<()> = Mutex::new(());

fn run(kernel: &str, script: &str) {
    let _alone = MACHINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let add = |name: &str| root.join("tests/vm").join(name).display().to_string();
    // The build under test, whatever else lies in the target directory.
    let mut vm = Command::new(root.join("scripts/vm"));
    vm.args(["--kernel", kernel, "--timeout", "100", "--memory", "1536"]);
    for file in [&add("lib.sh"), &add(script), env!("CARGO_BIN_EXE_blkferry"), env!("CARGO_BIN_EXE_ublk-ferry")] {
        vm.args(["--add", file]);
    }
    // ublksrv's own `ublk`, if somebody has built it: it is no package everywhere.
    if let Ok(ublk) = std::env::var("UBLKSRV_UBLK") {
        vm.args(["--add", &format!("{ublk}:/usr/local/bin/ublk")]);
    }
    let output = vm.args(["--", script]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script} on {kernel}: {}\n{out}\n{err}", output.status);
}

macro_rules! on_kernels {
    ($($name:ident $other:ident $script:literal)*) => {$(
        #[test]
        fn $name() {
            run("6.12", $script);
        }

        #[test]
        fn $other() {
            run("7.2", $script);
        }
    )*};
}

on_kernels! {
    filesystem_on_6_12 filesystem_on_7_2 "filesystem.sh"
    traffic_on_6_12 traffic_on_7_2 "traffic.sh"
    recovery_on_6_12 recovery_on_7_2 "recovery.sh"
    edges_on_6_12 edges_on_7_2 "edges.sh"
    target_on_6_12 target_on_7_2 "target.sh"
    service_on_6_12 service_on_7_2 "service.sh"
}
