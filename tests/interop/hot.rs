//! What the source has in its page cache comes first.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::bench::{Phase, attach_in, qemu_io, run_json};
use crate::common::{World, noise};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const HOT: std::ops::Range<u64> = 40 * MIB..44 * MIB;

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
}

#[test]
fn what_is_hot_at_the_source_is_told_and_comes_first() {
    let world = World::new();
    let image = image_with_a_hot_range();
    let export = world.export(image.path());
    warm_up(image.as_file());

    // As another tool hears it. The samples that identity is made of may be warm, too.
    let map = run_json("nbdinfo", &["--json", "--map=blkferry:hot", &export.uri]);
    let covers = |extent: &serde_json::Value| {
        let (start, len) = (extent["offset"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
        extent["type"] == 1 && start <= HOT.start && start + len >= HOT.end
    };
    let extents = map.as_array().unwrap();
    assert!(extents.iter().any(covers), "{map}");
    let hot: u64 = extents.iter().filter(|e| e["type"] == 1).map(|e| e["length"].as_u64().unwrap()).sum();
    assert!(hot < HOT.end - HOT.start + 4 * MIB, "{map}");

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
