//! fio's nbd engine with its own checksums, over sizes from 512 bytes to 1 MiB that keep to no block.
//!
//! fio checks what it reads back through the device. After the detach three more things hold: a fio that never saw
//! the device finds the same checksums in the raw image; the image is what the device last read as; and where fio's
//! own log says that it wrote nothing, the image is the source.

use std::path::Path;

use crate::bench::{Phase, attach_in, mixed_image, run, run_fails, text};
use crate::common::{World, assert_same};

const SIZE: u64 = (32 << 20) + 512;

/// A job writes on a range of its own, so that several may run at once: name, offset, length.
type Job = (&'static str, u64, u64);

/// Two of the three start in the middle of a block; no two share one.
const JOBS: [Job; 3] =
    [("a", 0, 10 << 20), ("b", (11 << 20) + 1537, 9 << 20), ("c", (21 << 20) + 4095, (10 << 20) + 513)];

/// What both runs of fio are told. Overlapping writes would make the checksums a matter of luck: fio's map of what
/// it wrote keeps them apart.
fn options(depth: u32, jobs: &[Job], each: impl Fn(&str) -> Vec<String>) -> Vec<String> {
    let all = ["--rw=randrw", "--bsrange=512-1M", "--bs_unaligned", "--verify=crc32c", "--verify_fatal=1"];
    let mut args: Vec<String> = all.map(str::to_owned).into();
    args.extend(["--verify_state_save=0", "--randseed=20251", "--fsync=16"].map(str::to_owned));
    args.push(format!("--iodepth={depth}"));
    for (name, offset, len) in jobs {
        args.extend([format!("--name={name}"), format!("--offset={offset}"), format!("--size={len}")]);
        args.extend(each(name));
    }
    args
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn check_raw(cache: &Path, depth: u32, jobs: &[Job]) -> Vec<String> {
    let file = format!("--filename={}", text(cache));
    options(depth, jobs, |_| vec!["--ioengine=psync".into(), file.clone(), "--verify_only=1".into()])
}

/// The ranges that a fio wrote, as its I/O log tells.
pub fn written(log: &Path) -> Vec<(u64, u64)> {
    let text = std::fs::read_to_string(log).unwrap();
    let fields = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let writes = fields.filter(|fields| fields.get(2) == Some(&"write"));
    writes.map(|fields| (fields[3].parse().unwrap(), fields[4].parse().unwrap())).collect()
}

/// Runs the jobs against a device in this phase and checks all that the module's page promises.
fn verify(phase: Phase, depth: u32, jobs: &[Job], attach: &[&str]) {
    let world = World::new();
    let (image, cache, copy) = (world.path("image.raw"), world.path("cache.raw"), world.path("copy.raw"));
    mixed_image(&image, SIZE);
    let export = world.export(&image);
    let device = attach_in(&world, phase, &export.uri, &cache, attach);
    let log = |name: &str| world.path(&format!("{name}.log"));
    let uri = format!("--uri={}", device.uri);
    let fio = options(depth, jobs, |name| {
        vec!["--ioengine=nbd".into(), uri.clone(), format!("--write_iolog={}", text(&log(name)))]
    });
    run("fio", &strs(&fio));
    if phase == Phase::Before {
        assert_eq!(device.status()["hydrate"]["mode"], "off", "nothing comes by itself");
    }
    device.set("hydrate=auto");
    device.wait_complete();
    run("nbdcopy", &[&device.uri, text(&copy)]);
    device.detach();

    assert_same(&copy, &cache);
    run("fio", &strs(&check_raw(&cache, depth, jobs)));
    let (mut want, got) = (std::fs::read(&image).unwrap(), std::fs::read(&cache).unwrap());
    let mut changed = 0;
    for (offset, len) in jobs.iter().flat_map(|(name, ..)| written(&log(name))) {
        let range = offset as usize..(offset + len) as usize;
        changed += u64::from(want[range.clone()] != got[range.clone()]);
        want[range.clone()].copy_from_slice(&got[range]);
    }
    assert!(changed >= 20, "fio wrote in {changed} places only");
    if let Some(at) = (0..want.len()).find(|&i| want[i] != got[i]) {
        panic!("the image differs from its source at {at}, where fio wrote nothing");
    }
}

#[test]
fn one_request_at_a_time() {
    Phase::ALL.into_iter().for_each(|phase| verify(phase, 1, &[("all", 0, SIZE)], &[]));
}

#[test]
fn many_requests_at_once() {
    Phase::ALL.into_iter().for_each(|phase| verify(phase, 32, &[("most", 1537, SIZE - 1537)], &[]));
}

#[test]
fn several_connections_on_ranges_of_their_own() {
    Phase::ALL.into_iter().for_each(|phase| verify(phase, 32, &JOBS, &[]));
}

#[test]
fn large_blocks_that_neighbours_share() {
    // Ranges that meet inside blocks of 1 MiB: each block is merged from two writers.
    let jobs =
        [("a", 0, (5 << 20) + 700_000), ("b", (5 << 20) + 700_000, 5 << 20), ("c", (10 << 20) + 700_000, 7 << 20)];
    verify(Phase::Before, 32, &jobs, &["--block-size", "1M"]);
    verify(Phase::During, 1, &jobs, &["--block-size", "64K"]);
}

#[test]
fn a_spoilt_byte_is_found() {
    let world = World::new();
    let file = world.path("file.raw");
    mixed_image(&file, SIZE);
    let log = world.path("a.log");
    let plain = options(1, &JOBS[..1], |_| {
        vec!["--ioengine=psync".into(), format!("--filename={}", text(&file)), format!("--write_iolog={}", text(&log))]
    });
    run("fio", &strs(&plain));
    run("fio", &strs(&check_raw(&file, 1, &JOBS[..1])));
    let (offset, len) = *written(&log).iter().max_by_key(|(_, len)| *len).unwrap();
    run("qemu-io", &["-f", "raw", "-c", &format!("write -P 0x11 {} 1", offset + len / 2), text(&file)]);
    run_fails("fio", &strs(&check_raw(&file, 1, &JOBS[..1])));
}
