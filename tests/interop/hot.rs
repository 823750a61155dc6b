//! What the source has in its page cache comes first.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::bench::{Phase, attach_in, qemu_io, run_json};
use crate::common::{World, noise};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const HOT: std::ops::Range<u64> = 40 * MIB..44 * MIB;
/// In memory, too, but nobody has read it.
const READ_AHEAD: std::ops::Range<u64> = 50 * MIB..51 * MIB;
/// Bits of `blkferry:hot`.
const IN_MEMORY: u64 = 1;
const USED: u64 = 2;

/// A file on a disk, of which nothing is in memory but that range.
fn image_with_a_hot_range() -> tempfile::NamedTempFile {
    // Not in the scratch directory: what is in a tmpfs is nowhere but in the page cache.
    let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    file.as_file().write_all_at(&noise(3, SIZE as usize), 0).unwrap();
    file.as_file().sync_all().unwrap();
    file
}

fn warm_up(file: &File) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
    file.read_exact_at(&mut vec![0; (HOT.end - HOT.start) as usize], HOT.start).unwrap();
    posix_fadvise(file, READ_AHEAD.start as i64, MIB as i64, PosixFadviseAdvice::POSIX_FADV_WILLNEED).unwrap();
}

#[test]
fn what_is_hot_at_the_source_is_told_and_comes_first() {
    let world = World::new();
    let image = image_with_a_hot_range();
    let export = world.export(image.path());
    warm_up(image.as_file());

    // As another tool hears it. The samples that identity is made of may be warm, too.
    let told = || {
        let map = run_json("nbdinfo", &["--json", "--map=blkferry:hot", &export.uri]);
        let number = |extent: &serde_json::Value, name: &str| extent[name].as_u64().unwrap();
        let extents = map.as_array().unwrap().iter();
        extents.map(|e| (number(e, "offset"), number(e, "length"), number(e, "type"))).collect::<Vec<_>>()
    };
    let covers = |told: &[(u64, u64, u64)], range: &std::ops::Range<u64>, bits| {
        told.iter().any(|&(start, len, told)| told == bits && start <= range.start && start + len >= range.end)
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !covers(&told(), &READ_AHEAD, IN_MEMORY) {
        assert!(Instant::now() < deadline, "{:?}", told());
    }
    // To root alone.
    let used = if File::open("/proc/kpageflags").is_ok() { IN_MEMORY | USED } else { IN_MEMORY };
    let told = told();
    assert!(covers(&told, &HOT, used), "{told:?}");
    let hot: u64 = told.iter().filter(|(_, _, bits)| bits & IN_MEMORY != 0).map(|(_, len, _)| len).sum();
    assert!(hot < HOT.end - HOT.start + 5 * MIB, "{told:?}");

    let device = attach_in(&world, Phase::Before, &export.uri, &world.path("cache.raw"), &[]);
    device.set("hydrate=8M");
    device.wait_for(|status| status["bytes"]["present"].as_u64() > Some(16 * MIB));
    device.set("hydrate=off");
    device.wait_for(|status| status["hydrate"]["state"] == "off");
    let misses = || device.status()["frontend"]["read_misses"].as_u64().unwrap();
    assert_eq!(misses(), 0);
    qemu_io(&device.uri, &["read 40M 4M"]);
    assert_eq!(misses(), 0, "it has come before what lies in front of it: {}", device.status());
    qemu_io(&device.uri, &["read 36M 1M"]);
    assert_ne!(misses(), 0, "not everything was here: {}", device.status());
}
