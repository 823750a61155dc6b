//! A source that shrank, grew or changed since the cache was made: refused, and the cache stays as it is.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::client::Client;
use crate::common::{World, make_image, noise};
use crate::manners::Manners;
use crate::source::Source;
use crate::trace::refused;

const SIZE: u64 = 4 << 20;

/// A cache that is half here: some blocks fetched, some written, the rest at the source.
struct HalfWay {
    image: PathBuf,
    cache: PathBuf,
    expected: Vec<u8>,
}

impl HalfWay {
    fn new(world: &World) -> Self {
        let image = world.path("image");
        make_image(&image, SIZE, &[(0, SIZE)]);
        let mut half = Self { cache: world.path("cache"), expected: std::fs::read(&image).unwrap(), image };
        let export = world.export(&half.image);
        half.use_it(world, &export.uri);
        half
    }

    /// Reads and writes a bit, and detaches.
    fn use_it(&mut self, world: &World, uri: &str) {
        let device = world.attach(uri, &self.cache, "disk", &["--hydrate", "off"]);
        let mut client = Client::connect(&device.uri);
        client.read(0, 256 << 10);
        let written = noise(99, 64 << 10);
        client.write(1 << 20, &written);
        self.expected[1 << 20..(1 << 20) + written.len()].copy_from_slice(&written);
        client.flush();
        drop(client);
        world.ok(["detach", "disk", "--incomplete"]);
    }

    fn attach_refused(&self, world: &World, uri: &str, words: &[&str]) {
        refused(world, ["attach", uri, self.cache.to_str().unwrap(), "--name", "disk"], words);
    }

    /// With the right source it goes on, and nothing is missing.
    fn goes_on(&self, world: &World, uri: &str) {
        let device = world.attach(uri, &self.cache, "disk", &[]);
        device.wait_complete();
        device.detach();
        assert!(std::fs::read(&self.cache).unwrap() == self.expected);
    }
}

fn resize(path: &Path, size: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(size).unwrap();
}

/// The image's time of change, which is part of what it is known by.
fn keep_time(path: &Path, change: impl FnOnce()) {
    let time = std::fs::metadata(path).unwrap().modified().unwrap();
    change();
    File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
}

#[test]
fn it_shrank_or_grew() {
    let world = World::new();
    let half = HalfWay::new(&world);
    let time = std::fs::metadata(&half.image).unwrap().modified().unwrap();
    let original = std::fs::read(&half.image).unwrap();
    for (size, word) in [(SIZE / 2, "shrank"), (SIZE - 512, "shrank"), (SIZE + 512, "grew"), (2 * SIZE, "grew")] {
        resize(&half.image, size);
        let export = world.export(&half.image);
        let (now, then) = (size.to_string(), SIZE.to_string());
        half.attach_refused(&world, &export.uri, &[word, &now, &then, "right source", "new cache"]);
    }
    std::fs::write(&half.image, original).unwrap();
    File::options().write(true).open(&half.image).unwrap().set_modified(time).unwrap();
    half.goes_on(&world, &world.export(&half.image).uri);
}

#[test]
fn it_was_written_to() {
    let world = World::new();
    let half = HalfWay::new(&world);
    let image = File::options().read(true).write(true).open(&half.image).unwrap();
    let time = image.metadata().unwrap().modified().unwrap();
    // Far from every sample, so that only the time of change tells.
    let (at, mut byte) = (SIZE / 2 + 12345, [0]);
    image.read_exact_at(&mut byte, at).unwrap();
    image.write_all_at(&[!byte[0]], at).unwrap();
    image.set_modified(time + std::time::Duration::from_secs(1)).unwrap();
    half.attach_refused(&world, &world.export(&half.image).uri, &["changed since", "right source", "new cache"]);
    image.write_all_at(&byte, at).unwrap();
    image.set_modified(time).unwrap();
    half.goes_on(&world, &world.export(&half.image).uri);
}

#[test]
fn it_is_another_disk_of_the_same_size() {
    let world = World::new();
    let half = HalfWay::new(&world);
    let other = world.path("other");
    std::fs::write(&other, noise(5, SIZE as usize)).unwrap();
    half.attach_refused(&world, &world.export(&other).uri, &["not the one that this cache belongs to"]);
    // Also when somebody has put back its time.
    let time = std::fs::metadata(&half.image).unwrap().modified().unwrap();
    File::options().write(true).open(&other).unwrap().set_modified(time).unwrap();
    half.attach_refused(&world, &world.export(&other).uri, &["not the one that this cache belongs to"]);
    half.goes_on(&world, &world.export(&half.image).uri);
}

/// The export looks at its image again for every client.
#[test]
fn it_changed_under_a_running_export() {
    let world = World::new();
    let half = HalfWay::new(&world);
    let export = world.export(&half.image);
    let changed = ["changed since", "right source"];
    keep_time(&half.image, || {
        let file = File::options().write(true).open(&half.image).unwrap();
        file.write_all_at(b"somebody formats the disk", 0).unwrap();
    });
    half.attach_refused(&world, &export.uri, &changed);
    keep_time(&half.image, || {
        let file = File::options().write(true).open(&half.image).unwrap();
        file.write_all_at(&half.expected[..100], 0).unwrap();
    });
    half.goes_on(&world, &export.uri);
}

#[test]
fn it_shrank_under_a_running_export() {
    let world = World::new();
    let half = HalfWay::new(&world);
    let export = world.export(&half.image);
    resize(&half.image, SIZE / 2);
    half.attach_refused(&world, &export.uri, &["source"]);
}

#[test]
fn a_foreign_source_is_known_by_its_contents() {
    let world = World::new();
    let image = noise(17, SIZE as usize);
    let manners = Manners { identity: None, ..Manners::default() };
    let mut half = HalfWay { image: PathBuf::new(), cache: world.path("cache"), expected: image.clone() };
    let source = Source::start(&world.path("source"), image.clone(), manners);
    half.use_it(&world, &source.uri);
    let mut other = image.clone();
    // Where partition tables and file systems have their UUIDs.
    other[1024] ^= 1;
    source.set_image(other);
    half.attach_refused(&world, &source.uri, &["not the one that this cache belongs to"]);
    source.set_image(image[..SIZE as usize / 2].to_vec());
    half.attach_refused(&world, &source.uri, &["shrank"]);
    source.set_image(image);
    half.goes_on(&world, &source.uri);
}

#[test]
fn who_is_complete_needs_nobody_and_so_nobody_in_particular() {
    let world = World::new();
    let half = HalfWay::new(&world);
    let export = world.export(&half.image);
    half.goes_on(&world, &export.uri);
    let socket = export.uri.split_once("socket=").unwrap().1.to_owned();
    export.stop();
    // Another image is on offer there now: of another size, and of the same.
    for size in [2 * SIZE, SIZE] {
        let other = world.path("other");
        std::fs::write(&other, noise(5, size as usize)).unwrap();
        let export = world.export_at(&other, &format!("unix:{socket}"));
        let device = world.attach(&export.uri, &half.cache, "disk", &[]);
        assert_eq!(device.status()["state"], "complete");
        assert!(Client::connect(&device.uri).read(0, 4096) == half.expected[..4096]);
        device.detach();
        export.stop();
    }
    assert!(std::fs::read(&half.cache).unwrap() == half.expected);
}
