//! Caches that cannot be used.

use std::fs::File;
use std::path::Path;

use crate::client::Client;
use crate::common::{Export, World, make_image, noise, tool};
use crate::namespace::{Mounted, alone};
use crate::trace::{assert_says, misused, one_line, refused};

const SIZE: u64 = 4 << 20;

/// A world with a source.
fn with_source() -> (World, Export) {
    let world = World::new();
    make_image(&world.path("image"), SIZE, &[(0, SIZE)]);
    let export = world.export(&world.path("image"));
    (world, export)
}

fn attach_refused(world: &World, export: &Export, cache: &Path, words: &[&str]) -> String {
    let line = refused(world, ["attach", &export.uri, cache.to_str().unwrap(), "--name", "disk"], words);
    assert!(line.contains(cache.to_str().unwrap()), "the cache is named: {line}");
    line
}

#[test]
fn a_place_where_no_cache_can_be() {
    let (world, export) = with_source();
    attach_refused(&world, &export, &world.path("no/where"), &["the directory that it is to be made in is not there"]);
    std::fs::create_dir(world.path("directory")).unwrap();
    attach_refused(&world, &export, &world.path("directory"), &["neither a regular file nor a block device"]);
    attach_refused(&world, &export, Path::new("/dev/null"), &["neither a regular file nor a block device"]);
    std::fs::write(world.path("file"), "a file").unwrap();
    attach_refused(&world, &export, &world.path("file/cache"), &["Not a directory"]);
    // The metadata cannot be made: then the cache is not left, either.
    let (cache, metadata) = (world.path("cache"), world.path("no/metadata"));
    let args = ["attach", &export.uri, cache.to_str().unwrap(), "--metadata", metadata.to_str().unwrap()];
    refused(&world, args, &[metadata.to_str().unwrap(), "No such file"]);
}

#[test]
fn a_file_with_something_else_in_it() {
    let (world, export) = with_source();
    let precious = world.path("precious.raw");
    std::fs::write(&precious, noise(3, SIZE as usize)).unwrap();
    attach_refused(&world, &export, &precious, &["has contents but no metadata", "precious.raw.ferry", "remove it"]);
    // Somebody took the source's own image for the cache.
    attach_refused(&world, &export, &world.path("image"), &["has contents but no metadata"]);
    // And something else for the metadata.
    let (cache, other) = (world.path("cache"), world.path("letter.txt"));
    std::fs::write(&other, "Dear Sir or Madam, ".repeat(1000)).unwrap();
    let args = ["attach", &export.uri, cache.to_str().unwrap(), "--metadata", other.to_str().unwrap()];
    refused(&world, args, &["letter.txt", "not a blkferry metadata file"]);
}

/// One file cannot be both: the one would be written over the other.
#[test]
fn a_cache_that_is_its_own_metadata() {
    let (world, export) = with_source();
    let cache = world.path("cache");
    let dotted = world.path("./run/../cache");
    for metadata in [&cache, &dotted] {
        let args = ["attach", &export.uri, cache.to_str().unwrap(), "--metadata", metadata.to_str().unwrap()];
        refused(&world, args, &["metadata", cache.to_str().unwrap()]);
    }
    // A file that is there, under two names.
    File::create(&cache).unwrap();
    std::fs::hard_link(&cache, world.path("twin")).unwrap();
    std::os::unix::fs::symlink(&cache, world.path("alias")).unwrap();
    for name in ["twin", "alias"] {
        let metadata = world.path(name);
        let args = ["attach", &export.uri, cache.to_str().unwrap(), "--metadata", metadata.to_str().unwrap()];
        refused(&world, args, &["metadata"]);
    }
}

/// An image that is all holes looks as empty as a new cache does.
#[test]
fn a_cache_that_is_being_served() {
    let (world, _) = with_source();
    let image = world.path("empty-disk");
    File::create(&image).unwrap().set_len(SIZE).unwrap();
    let export = world.export(&image);
    attach_refused(&world, &export, &image, &["in use by another process"]);
}

#[test]
fn a_cache_that_lost_a_part() {
    let (world, export) = with_source();
    let cache = world.path("cache");
    let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "off"]);
    Client::connect(&device.uri).write(0, &[9; 4096]);
    world.ok(["detach", "disk", "--incomplete"]);
    let whole = std::fs::read(&cache).unwrap();
    File::options().write(true).open(&cache).unwrap().set_len(SIZE / 2).unwrap();
    let (found, needed) = ((SIZE / 2).to_string(), SIZE.to_string());
    attach_refused(&world, &export, &cache, &["too small", &found, &needed]);
    std::fs::remove_file(&cache).unwrap();
    attach_refused(&world, &export, &cache, &["is not there, but its metadata", "remove the metadata too"]);
    // Put back, all is well.
    std::fs::write(&cache, whole).unwrap();
    let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "off"]);
    assert_eq!(Client::connect(&device.uri).read(0, 4096), [9; 4096]);
    world.ok(["detach", "disk", "--incomplete"]);
}

/// A loop device; gone when dropped.
struct Loop(String);

impl Loop {
    fn over(path: &Path) -> Self {
        Self(tool("losetup", ["--find", "--show", path.to_str().unwrap()]).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        tool("losetup", ["--detach", &self.0]);
    }
}

#[test]
fn a_device_that_is_too_small() {
    let (world, export) = with_source();
    File::create(world.path("backing")).unwrap().set_len(SIZE - 512).unwrap();
    let device = Loop::over(&world.path("backing"));
    let metadata = world.path("metadata");
    let attach = ["attach", &export.uri, &device.0, "--name", "disk", "--metadata", metadata.to_str().unwrap()];
    let (found, needed) = ((SIZE - 512).to_string(), SIZE.to_string());
    refused(&world, attach, &[&device.0, "too small", &found, &needed, "larger device"]);
    // The right size is fine; what the device held is not looked at.
    drop(device);
    File::options().write(true).open(world.path("backing")).unwrap().set_len(SIZE).unwrap();
    let device = Loop::over(&world.path("backing"));
    let attached = world.attach(&export.uri, Path::new(&device.0), "disk", &["--metadata", metadata.to_str().unwrap()]);
    attached.wait_complete();
    attached.detach();
    drop(device);
    assert!(std::fs::read(world.path("backing")).unwrap() == std::fs::read(world.path("image")).unwrap());
}

#[test]
fn a_device_that_is_mounted() {
    alone("caches::a_device_that_is_mounted", || {
        let (world, export) = with_source();
        let backing = world.path("backing");
        File::create(&backing).unwrap().set_len(16 << 20).unwrap();
        tool("mkfs.ext4", ["-q", backing.to_str().unwrap()]);
        let device = Loop::over(&backing);
        let mounted = Mounted::device(&device.0, &world.path("mounted"));
        let metadata = world.path("metadata");
        let attach = ["attach", &export.uri, &device.0, "--name", "disk", "--metadata", metadata.to_str().unwrap()];
        let line = one_line(&world.blkferry(attach));
        assert_says(&line, &[&device.0, "busy"]);
        assert!(!metadata.exists());
        drop(mounted);
    });
}

#[test]
fn a_place_that_is_read_only() {
    alone("caches::a_place_that_is_read_only", || {
        let (world, export) = with_source();
        let mounted = Mounted::tmpfs(&world.path("mounted"), "16M");
        let cache = world.path("mounted/cache");
        mounted.make_read_only();
        attach_refused(&world, &export, &cache, &["open for writing", "Read-only file system"]);
        // Neither can one be continued there.
        mounted.make_writable();
        let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "off"]);
        Client::connect(&device.uri).write(0, &[9; 4096]);
        world.ok(["detach", "disk", "--incomplete"]);
        mounted.make_read_only();
        attach_refused(&world, &export, &cache, &["Read-only file system"]);
        mounted.make_writable();
        let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "off"]);
        assert_eq!(Client::connect(&device.uri).read(0, 4096), [9; 4096]);
        world.ok(["detach", "disk", "--incomplete"]);
    });
}

#[test]
fn a_block_size_that_cannot_be() {
    let (world, export) = with_source();
    let cache = world.path("cache");
    let cache = cache.to_str().unwrap();
    for size in ["0", "512", "2K", "5000", "12K", "2M"] {
        let args = ["attach", &export.uri, cache, "--name", "disk", "--block-size", size];
        misused(&world, args, &["--block-size", "power of two", "4K", "1M"]);
    }
    for size in ["big", "-4K", "4X", "1e6", "0x1000", "99999999999999999999", "9999999999999T", ""] {
        misused(&world, ["attach", &export.uri, cache, &format!("--block-size={size}")], &["--block-size"]);
    }
    let device = world.attach(&export.uri, Path::new(cache), "disk", &["--block-size", "64K", "--hydrate", "off"]);
    Client::connect(&device.uri).write(0, &[9; 512]);
    world.ok(["detach", "disk", "--incomplete"]);
    let args = ["attach", &export.uri, cache, "--name", "disk", "--block-size", "4K"];
    refused(&world, args, &["65536", "4096", "leave --block-size out"]);
}

#[test]
fn a_second_daemon_on_the_same_cache() {
    let (world, export) = with_source();
    let cache = world.path("cache");
    let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "off"]);
    let mut client = Client::connect(&device.uri);
    client.write(0, &[9; 4096]);
    client.flush();
    let attach = |name: &str, cache: &Path, words: &[&str]| {
        refused(&world, ["attach", &export.uri, cache.to_str().unwrap(), "--name", name], words);
    };
    attach("other", &cache, &["in use by another process", "blkferry list"]);
    // Under another path it would have other metadata.
    std::os::unix::fs::symlink(&cache, world.path("alias")).unwrap();
    attach("other", &world.path("alias"), &["cache"]);
    std::fs::hard_link(&cache, world.path("twin")).unwrap();
    attach("other", &world.path("twin"), &["cache"]);
    // The first one has seen nothing of it.
    assert_eq!(client.read(0, 4096), [9; 4096]);
    let expected = std::fs::read(world.path("image")).unwrap();
    assert_eq!(client.read(8192, 4096), expected[8192..12288]);
    device.set("hydrate=auto");
    device.wait_complete();
    device.detach();
}

#[test]
fn a_second_daemon_on_a_cache_with_nothing_in_it_yet() {
    let (world, export) = with_source();
    let cache = world.path("cache");
    let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "off"]);
    for name in ["alias", "twin"] {
        let path = world.path(name);
        match name {
            "alias" => std::os::unix::fs::symlink(&cache, &path).unwrap(),
            _ => std::fs::hard_link(&cache, &path).unwrap(),
        }
        let attach = ["attach", &export.uri, path.to_str().unwrap(), "--name", "other"];
        refused(&world, attach, &["in use by another process"]);
    }
    device.set("hydrate=auto");
    device.wait_complete();
    device.detach();
    assert!(std::fs::read(&cache).unwrap() == std::fs::read(world.path("image")).unwrap());
}
