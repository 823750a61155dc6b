//! Metadata that cannot be right is refused with one line, and nothing is changed.

use std::fs::{self, OpenOptions};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::case::{Case, SIZE, with_json, with_superblock};
use crate::common::{Export, make_image, noise, wait_for_socket};

#[test]
fn a_metadata_file_of_the_wrong_length_is_refused() {
    let case = Case::new();
    let good = &case.good.1;
    let path = case.metadata.to_str().unwrap();
    for len in [0, 1, 100, 512, 4095, 4096, 8191] {
        case.put_metadata(&good[..len]);
        case.refused(&format!("{len} bytes of metadata"), &[path]);
    }
    for len in [8192, 8193, 12288, 12800, good.len() - 4096, good.len() - 1] {
        case.put_metadata(&good[..len]);
        case.refused(&format!("{len} bytes of metadata"), &[path, "truncated", &len.to_string()]);
    }
}

#[test]
fn what_is_no_metadata_is_refused() {
    let case = Case::new();
    let good = &case.good.1;
    case.put_metadata(&noise(1, good.len()));
    case.refused("random bytes", &["not a blkferry metadata file"]);
    case.put_metadata(&vec![0; good.len()]);
    case.refused("zeros", &["not a blkferry metadata file"]);
    case.put_metadata(&case.good.0);
    case.refused("the cache itself", &["not a blkferry metadata file"]);
    case.put_metadata(&[&good[8192..], &good[..8192]].concat());
    case.refused("map pages first", &["damaged"]);
    fs::remove_file(&case.metadata).unwrap();
    case.refused("no metadata", &["contents but no metadata", case.metadata.to_str().unwrap()]);
    fs::create_dir(&case.metadata).unwrap();
    case.refused("a directory", &[case.metadata.to_str().unwrap()]);
}

#[test]
fn a_superblock_that_makes_no_sense_is_refused() {
    let case = Case::new();
    let good = &case.good.1;
    let no_size = |json: &mut Value| drop(json.as_object_mut().unwrap().remove("size_bytes"));
    let cases = [
        ("a newer version", with_superblock(good, |page| page.version = 2), "version 2 is newer than this program's 1"),
        ("a much newer version", with_superblock(good, |page| page.version = u32::MAX), "newer"),
        ("no text", with_superblock(good, |page| page.payload = b"{}".to_vec()), "superblock is damaged"),
        ("no JSON", with_superblock(good, |page| page.payload = noise(5, 300)), "superblock is damaged"),
        ("another state", with_json(good, |s| s["state"] = json!("weird")), "superblock is damaged"),
        ("a size below zero", with_json(good, |s| s["size_bytes"] = json!(-1)), "superblock is damaged"),
        ("no size", with_json(good, no_size), "superblock is damaged"),
        ("block size 0", with_json(good, |s| s["block_bytes"] = json!(0)), "block size 0"),
        ("block size 5000", with_json(good, |s| s["block_bytes"] = json!(5000)), "block size 5000"),
        ("block size 2M", with_json(good, |s| s["block_bytes"] = json!(2 << 20)), "block size"),
        ("block size 2^63", with_json(good, |s| s["block_bytes"] = json!(1u64 << 63)), "block size"),
    ];
    for (what, bytes, says) in cases {
        case.put_metadata(&bytes);
        case.refused(what, &[says, case.metadata.to_str().unwrap()]);
    }
    for size in [0, 512, SIZE + 1, 1 << 40, i64::MAX as u64 - 511, u64::MAX - 511, u64::MAX] {
        case.put_metadata(&with_json(good, |s| s["size_bytes"] = json!(size)));
        case.refused(&format!("a size of {size}"), &[&size.to_string()]);
    }
    case.restore();
    let again = case.arguments();
    case.refused_as("another block size", &[&again[..], &["--block-size", "64K"]].concat(), &["4096", "--block-size"]);
}

#[test]
fn both_copies_damaged_or_the_newer_one_is_refused() {
    let case = Case::new();
    let flip = |pages: &[usize]| {
        let mut bytes = case.good.1.clone();
        pages.iter().for_each(|page| bytes[page * 4096 + 1000] ^= 0x10);
        bytes
    };
    for (what, copies, says) in [
        ("the superblock", [0, 1], "the superblock is damaged"),
        ("the map page", [2, 3], "map page 0 (bytes 0..8388608 of the disk) is damaged"),
    ] {
        case.put_metadata(&flip(&copies));
        case.refused(&format!("both copies of {what}"), &[says]);
        let newer = if case.is_newer(copies[0]) { copies[0] } else { copies[1] };
        case.put_metadata(&flip(&[newer]));
        case.refused(&format!("the newer copy of {what}"), &[says]);
    }
}

#[test]
fn the_older_copy_damaged_is_gone_without() {
    let case = Case::new();
    for copies in [[0, 1], [2, 3]] {
        let older = if case.is_newer(copies[0]) { copies[1] } else { copies[0] };
        let mut bytes = case.good.1.clone();
        bytes[older * 4096 + 1000] ^= 0x10;
        case.restore();
        case.put_metadata(&bytes);
        case.goes_on(&format!("page {older} of the file"), "damaged");
        // What was damaged is written anew by and by; a second attach is as good as the first.
        let out = case.world.blkferry(case.arguments());
        assert!(out.status.success());
        case.world.ok(["detach", "again", "--incomplete"]);
    }
}

#[test]
fn another_source_is_refused() {
    let case = Case::new();
    let [attach, _, rest @ ..] = case.arguments();
    for (what, size, data, says) in [
        ("other contents", SIZE, 1 << 20, "not the one that this cache belongs to"),
        ("a larger disk", SIZE + 512, 3 << 20, "grew"),
        ("a smaller disk", SIZE - 4096, 3 << 20, "shrank"),
    ] {
        let image = case.world.path("other");
        make_image(&image, size, &[(512, data)]);
        let export = case.world.export(&image);
        case.refused_as(what, &[&[attach, &export.uri], &rest[..]].concat(), &[says]);
    }
    // Metadata and cache of two different disks, brought together.
    let other = Case::new();
    case.put_metadata(&other.good.1);
    case.refused("the metadata of another cache", &["not the one that this cache belongs to"]);
}

#[test]
fn a_cache_that_does_not_hold_the_disk_is_refused() {
    let case = Case::new();
    for len in [0, 1, SIZE - 512, SIZE - 1] {
        case.restore();
        OpenOptions::new().write(true).open(&case.cache).unwrap().set_len(len).unwrap();
        case.refused(&format!("{len} bytes of cache"), &["too small", &len.to_string()]);
    }
    fs::remove_file(&case.cache).unwrap();
    case.refused("no cache", &[case.cache.to_str().unwrap()]);
    fs::create_dir(&case.cache).unwrap();
    case.refused("a directory", &["neither a regular file nor a block device"]);
}

#[test]
fn a_source_with_a_name_too_long_leaves_nothing_behind() {
    let case = Case::new();
    let image = case.world.path("image");
    // Around what just fits into the superblock, and what the daemon adds to it later.
    let (mut fit, mut too_long) = (0, 0);
    for len in (3300..3560).step_by(12) {
        let (cache, socket) = (case.world.path("new"), case.world.path(&format!("{len}.sock")));
        let name = "n".repeat(len);
        let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
        let listen = format!("unix:{}", socket.display());
        let mut command = case.world.command(["export", "--name", &name, "--listen", &listen]);
        let child = command.arg(&image).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let export = Export { child, uri };
        wait_for_socket(&socket);
        let out = case.world.blkferry(["attach", &export.uri, cache.to_str().unwrap(), "--name", "again"]);
        let said = String::from_utf8_lossy(&out.stderr);
        if out.status.success() {
            fit += 1;
            case.world.ok(["detach", "again", "--incomplete"]);
            fs::remove_file(&cache).unwrap();
            fs::remove_file(case.world.path("new.ferry")).unwrap();
        } else {
            too_long += 1;
            assert!(said.lines().count() == 1 && said.contains("too long"), "{len}: {said}");
            assert!(!cache.exists(), "{len}: a refused attach left a cache");
        }
    }
    assert!(fit > 0 && too_long > 0, "{fit} fit, {too_long} did not");
}

#[test]
fn what_a_crash_left_of_a_cache_that_was_being_made_is_no_hindrance() {
    let case = Case::new();
    fs::remove_file(&case.metadata).unwrap();
    // The data file was made, its metadata was not.
    let file = fs::File::create(&case.cache).unwrap();
    file.set_len(SIZE).unwrap();
    fs::write(case.world.path("cache.ferry.new"), noise(3, 10_000)).unwrap();
    case.world.ok(case.arguments());
    case.world.ok(["detach", "again", "--incomplete"]);
    assert!(!case.world.path("cache.ferry.new").exists());
    assert_eq!(fs::read(&case.metadata).unwrap().len(), 4 * 4096);
}
