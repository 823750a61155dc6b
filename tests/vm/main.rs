//! The block device in real kernels: each script here runs in a small machine that `scripts/vm` boots.
//!
//! `cargo test --test vm` runs them on all kernels, `cargo test --test vm recovery_on_7_2` one of them.
//! A machine takes one script, and some seconds to boot; its output is shown if the script fails. Scripts
//! that do something again and again take the number of rounds from `BLKFERRY_VM_ROUNDS`, if it is set. How
//! many points of a log of writes are looked at is in `BLKFERRY_VM_POINTS` (a number, or `all`), and which ones
//! in `BLKFERRY_VM_SEED`.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

/// One machine at a time: two would slow each other down past their time limits.
static MACHINE: Mutex<()> = Mutex::new(());

/// Many times what a script takes on an idle machine: what hangs ends.
const TIMEOUT_SECONDS: u64 = 300;
/// The same for each round that is asked for.
const ROUND_SECONDS: u64 = 20;

/// The same for each point of a log of writes, or for all that there may be.
const POINT_SECONDS: u64 = 10;
const ALL_POINTS_SECONDS: u64 = 2 * 3600;

/// Time that was asked for beyond the usual, in seconds.
fn asked_for() -> u64 {
    let number = |name| std::env::var(name).map_or(0, |n| n.parse::<u64>().unwrap_or_else(|_| panic!("{name}={n}")));
    let points = match std::env::var("BLKFERRY_VM_POINTS").as_deref() {
        Ok("all") => ALL_POINTS_SECONDS,
        _ => number("BLKFERRY_VM_POINTS") * POINT_SECONDS,
    };
    points + number("BLKFERRY_VM_ROUNDS") * ROUND_SECONDS
}

/// Runs `script` with `options` for `scripts/vm`.
fn run(kernel: &str, script: &str, arguments: &[&str], options: &[&str]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let add = |name: &str| root.join("tests/vm").join(name).display().to_string();
    let variable = |name: &str| Some(format!("{name}={}", std::env::var(format!("BLKFERRY_VM_{name}")).ok()?));
    let variables = ["ROUNDS", "POINTS", "SEED"].into_iter().filter_map(variable);
    let mut vm = Command::new(root.join("scripts/vm"));
    vm.args(["--kernel", kernel, "--timeout", &(TIMEOUT_SECONDS + asked_for()).to_string(), "--memory", "1536"]);
    vm.args(options);
    // The build under test, whatever else lies in the target directory.
    for file in [&add("lib.sh"), &add(script), env!("CARGO_BIN_EXE_blkferry"), env!("CARGO_BIN_EXE_ublk-ferry")] {
        vm.args(["--add", file]);
    }
    // ublksrv's own `ublk`, if somebody has built it: it is no package everywhere.
    if let Ok(ublk) = std::env::var("UBLKSRV_UBLK") {
        vm.args(["--add", &format!("{ublk}:/usr/local/bin/ublk")]);
    }
    vm.args(["--", "env"]).args(variables).arg(script).args(arguments);
    let output = vm.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script} on {kernel}: {}\n{out}\n{err}", output.status);
}

/// Two machines, one after the other, with the same disks: the first one loses its power.
fn lose_power(kernel: &str) {
    let directory = tempfile::tempdir().unwrap();
    let mut disks = Vec::new();
    for (name, mib) in [("ext4", 128), ("xfs", 304), ("raw", 24)] {
        let path = directory.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
        disks.extend(["--disk".to_owned(), path.display().to_string()]);
    }
    let disks: Vec<_> = disks.iter().map(String::as_str).collect();
    run(kernel, "power.sh", &["cut"], &[&["--power-cut"], &disks[..]].concat());
    run(kernel, "power.sh", &["check"], &disks);
}

/// The example that replays logs of writes: built here, as a test of its own has no examples.
fn replay_writes() -> std::path::PathBuf {
    let programs = Path::new(env!("CARGO_BIN_EXE_blkferry")).parent().unwrap();
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--locked", "--example", "replay_writes"]);
    if programs.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success());
    programs.join("examples/replay_writes")
}

/// Two machines again: the first one records what gets to a disk, the other one looks at it as it was at any moment.
fn log_writes(kernel: &str, kind: &str) {
    let replay_writes = replay_writes();
    // Kept if it fails: with the seed that the script tells, the same points can be looked at again.
    let directory = tempfile::tempdir().unwrap().keep();
    eprintln!("the disks are in {}", directory.display());
    let mut options = vec!["--add", replay_writes.to_str().unwrap()];
    let mut disks = Vec::new();
    for (name, mib) in [("plain", 96), ("disk", 80), ("log", 512)] {
        let path = directory.join(name);
        std::fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
        disks.push(path.display().to_string());
    }
    options.extend(disks.iter().flat_map(|path| ["--disk", path.as_str()]));
    run(kernel, "log_writes.sh", &["record", kind], &options);
    run(kernel, "log_writes.sh", &["check", kind], &options);
    std::fs::remove_dir_all(&directory).unwrap();
}

fn alone(test: impl FnOnce()) {
    let _alone = MACHINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    test();
}

macro_rules! on_kernels {
    ($($name:ident $other:ident $script:literal $($option:literal)*;)*) => {$(
        #[test]
        fn $name() {
            alone(|| run("6.12", $script, &[], &[$($option),*]));
        }

        #[test]
        fn $other() {
            alone(|| run("7.2", $script, &[], &[$($option),*]));
        }
    )*};
}

on_kernels! {
    filesystem_on_6_12 filesystem_on_7_2 "filesystem.sh";
    traffic_on_6_12 traffic_on_7_2 "traffic.sh" "--cpus" "4";
    recovery_on_6_12 recovery_on_7_2 "recovery.sh";
    life_on_6_12 life_on_7_2 "life.sh";
    stacks_on_6_12 stacks_on_7_2 "stacks.sh";
    zeroes_on_6_12 zeroes_on_7_2 "zeroes.sh";
    disk_on_6_12 disk_on_7_2 "disk.sh" "--disk" "40M";
    writeback_on_6_12 writeback_on_7_2 "writeback.sh" "--disk" "40M";
    edges_on_6_12 edges_on_7_2 "edges.sh";
    target_on_6_12 target_on_7_2 "target.sh";
    service_on_6_12 service_on_7_2 "service.sh";
}

#[test]
fn power_on_6_12() {
    alone(|| lose_power("6.12"));
}

#[test]
fn power_on_7_2() {
    alone(|| lose_power("7.2"));
}

#[test]
fn log_writes_of_ext4_on_6_12() {
    alone(|| log_writes("6.12", "ext4"));
}

#[test]
fn log_writes_of_xfs_on_7_2() {
    alone(|| log_writes("7.2", "xfs"));
}
