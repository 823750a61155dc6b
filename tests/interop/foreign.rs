//! Sources that are not blkferry: qemu-nbd with qcow2, nbdkit with its plugins and filters.

use std::fs::File;
use std::path::Path;

use crate::bench::{Phase, attach_in, finish, mixed_image, qemu_io, run, run_json, text};
use crate::common::{World, assert_same};
use crate::servers::{nbdkit, nbdkit_tcp, qemu_nbd};

const SIZE: u64 = (20 << 20) + 512;

/// Ferries a source in every phase; in the end the cache is `want`, but for what a guest wrote in it.
fn ferries(world: &World, source: &str, want: &Path, attach: &[&str]) {
    let (cache, expected, copy) = (world.path("cache.raw"), world.path("expected.raw"), world.path("copy.raw"));
    for phase in Phase::ALL {
        let device = attach_in(world, phase, source, &cache, attach);
        let size = std::fs::metadata(want).unwrap().len();
        assert_eq!(device.status()["bytes"]["total"], size);
        run("cp", &[text(want), text(&expected)]);
        let writes = ["write -P 0x41 70000 70000", "write -z 300000 5000", "write -P 0x42 1M 64K"];
        qemu_io(&device.uri, &writes);
        writes.iter().for_each(|write| drop(run("qemu-io", &["-f", "raw", "-c", write, text(&expected)])));
        run("nbdcopy", &[&device.uri, text(&copy)]);
        assert_same(&expected, &copy);
        device.set("hydrate=auto");
        device.wait_complete();
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&expected), &device.uri]);
        device.detach();
        assert_same(&expected, &cache);
        for path in [&cache, &copy, &expected, &world.path("cache.raw.ferry")] {
            std::fs::remove_file(path).unwrap();
        }
    }
}

/// A qcow2 of a mixed image, beside the raw one, both as long as qcow2 allows.
fn qcow2(world: &World) -> (std::path::PathBuf, std::path::PathBuf) {
    let (raw, qcow2) = (world.path("image.raw"), world.path("image.qcow2"));
    mixed_image(&raw, SIZE);
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-c", text(&raw), text(&qcow2)]);
    (raw, qcow2)
}

#[test]
fn qemu_nbd_serves_a_qcow2() {
    let world = World::new();
    let (raw, qcow2) = qcow2(&world);
    let server = qemu_nbd(&world, &["--format=qcow2", "--shared=16", "--persistent"], &qcow2);
    ferries(&world, &server.uri, &raw, &[]);
}

#[test]
fn qemu_nbd_takes_one_client_only() {
    let world = World::new();
    let (raw, qcow2) = qcow2(&world);
    // Its default. It stays for the next attach (--persistent), but has one connection for demand and hydration.
    let server = qemu_nbd(&world, &["--format=qcow2", "--persistent"], &qcow2);
    let cache = world.path("cache.raw");
    let device = attach_in(&world, Phase::Before, &server.uri, &cache, &[]);
    qemu_io(&device.uri, &["read 5M 3M"]);
    assert_eq!(device.status()["source"]["connections"], 1);
    finish(device);
    assert_same(&raw, &cache);
}

#[test]
fn qemu_nbd_ends_with_its_only_client() {
    let world = World::new();
    let (raw, qcow2) = qcow2(&world);
    let mut server = qemu_nbd(&world, &["--format=qcow2"], &qcow2);
    let cache = world.path("cache.raw");
    let device = attach_in(&world, Phase::After, &server.uri, &cache, &[]);
    // The device needs it no more and has hung up; so it went.
    server.wait_ended();
    let status = device.status();
    assert_eq!((status["state"].as_str(), status["source"]["lost_reason"].as_str()), (Some("complete"), None));
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&raw), &device.uri]);
    device.detach();
    assert_same(&raw, &cache);
}

#[test]
fn nbdkit_serves_a_file() {
    let world = World::new();
    let image = world.path("image.raw");
    mixed_image(&image, SIZE);
    for options in [&[][..], &["--no-sr"], &["--filter=noextents"], &["--filter=noparallel"]] {
        let args: Vec<&str> = options.iter().copied().chain(["file", text(&image)]).collect();
        println!("nbdkit {args:?}");
        let server = nbdkit(&world, &args);
        ferries(&world, &server.uri, &image, &[]);
    }
    let server = nbdkit_tcp(&world, &["file", text(&image)]);
    ferries(&world, &server.uri, &image, &["--block-size", "64K"]);
}

#[test]
fn nbdkit_makes_disks_up() {
    let world = World::new();
    for plugin in [
        &["memory", "20M"][..],
        &["pattern", "10486272"],
        &["sparse-random", "24M", "seed=3", "percent=20"],
        &["data", "size=8M", "@1000000 le32:1234567 @5000000 0xaa*600000 @0x7ffff0 0x55*16"],
    ] {
        println!("nbdkit {plugin:?}");
        let server = nbdkit(&world, plugin);
        let want = world.path("want.raw");
        run("nbdcopy", &[&server.uri, text(&want)]);
        ferries(&world, &server.uri, &want, &[]);
        std::fs::remove_file(&want).unwrap();
    }
}

#[test]
fn nbdkit_goes_when_it_is_not_needed() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let mut server = nbdkit(&world, &["--filter=exitlast", "file", text(&image)]);
    let device = attach_in(&world, Phase::During, &server.uri, &cache, &[]);
    assert!(!server.has_ended());
    device.set("hydrate=auto");
    device.wait_complete();
    server.wait_ended();
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&image), &device.uri]);
    device.detach();
    assert_same(&image, &cache);
    // Complete is complete: it comes up again without any source.
    let device = world.attach(&server.uri, &cache, "again", &[]);
    assert_eq!(device.status()["source_needed"], false);
    qemu_io(&device.uri, &["read 0 20M", "write -P 1 0 4096"]);
    device.detach();
}

/// Units of a source that are larger than blocks: the way out is in the message, and it works.
#[test]
fn a_source_with_large_units_says_which_block_size() {
    for (unit, block) in [("4096", 4096), ("65536", 65536)] {
        let world = World::new();
        let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
        mixed_image(&image, 20 << 20);
        let (minimum, preferred) = (format!("blocksize-minimum={unit}"), format!("blocksize-preferred={unit}"));
        let filter =
            ["--filter=blocksize-policy", "file", text(&image), &minimum, &preferred, "blocksize-error-policy=error"];
        let server = nbdkit(&world, &filter);
        assert_eq!(run_json("nbdinfo", &["--json", &server.uri])["exports"][0]["block_size_minimum"], block);
        if block > 4096 {
            let small = ["attach", &server.uri, text(&cache), "--name", "small", "--block-size", "4K"];
            let said = world.refused(small);
            assert!(said.contains(&format!("--block-size {block}")), "{said}");
            assert!(!cache.exists() && !world.path("cache.raw.ferry").exists(), "a refusal leaves nothing behind");
        }
        // Without the option a new cache has blocks that the source can serve.
        ferries(&world, &server.uri, &image, &[]);
    }
}

/// A source that takes small requests only, and a cache with blocks larger than these.
#[test]
fn a_source_with_small_requests_serves_large_blocks() {
    let world = World::new();
    let image = world.path("image.raw");
    mixed_image(&image, SIZE);
    let filter =
        ["--filter=blocksize-policy", "file", text(&image), "blocksize-maximum=64K", "blocksize-error-policy=error"];
    let server = nbdkit(&world, &filter);
    assert_eq!(run_json("nbdinfo", &["--json", &server.uri])["exports"][0]["block_size_maximum"], 65536);
    ferries(&world, &server.uri, &image, &["--block-size", "4K"]);
    ferries(&world, &server.uri, &image, &["--block-size", "1M"]);
}

/// A server that answers no question about more than a gibibyte: the same questions are asked in shorter ones, and holes do
/// not cross as data.
#[test]
fn a_source_with_short_answers_only_tells_its_holes_all_the_same() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    let (refused, read) = (world.path("refused"), world.path("read"));
    File::create(&image).unwrap().set_len(5 << 30).unwrap();
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 1500M 64K", "-c", "write -P 8 5000M 1M", text(&image)]);
    let extents = format!(
        "extents=if [ $3 -gt 1073741824 ]; then touch {}; echo EINVAL too much >&2; exit 1; fi
         printf '%s\\n' '0 1500M hole,zero' '1500M 64K' '1536064K 3583936K hole,zero' '5000M 1M' '5001M 119M hole,zero'",
        text(&refused)
    );
    let pread = format!(
        "pread=echo $3 >> {}; dd if={} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
        text(&read),
        text(&image)
    );
    let server = nbdkit(&world, &["eval", "get_size=echo 5368709120", "can_extents=exit 0", &extents, &pread]);
    let device = attach_in(&world, Phase::Before, &server.uri, &cache, &[]);
    device.set("hydrate=auto");
    device.wait_complete();
    device.detach();
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&image), text(&cache)]);
    assert!(refused.exists(), "nothing was too long for it");
    let read_bytes: u64 = std::fs::read_to_string(&read).unwrap().lines().map(|len| len.parse::<u64>().unwrap()).sum();
    assert!(read_bytes < 64 << 20, "{read_bytes} bytes were read");
}

#[test]
fn a_disk_of_an_odd_size_is_refused() {
    let world = World::new();
    let server = nbdkit(&world, &["memory", "1000001"]);
    let said = world.refused(["attach", &server.uri, text(&world.path("cache.raw"))]);
    assert!(said.contains("1000001") && said.contains("512"), "{said}");
}

#[test]
fn what_is_no_source_is_refused_in_one_line() {
    let world = World::new();
    let nobody = world.path("nobody.sock");
    let cache = world.path("cache.raw");
    for uri in
        [format!("nbd+unix:///?socket={}", nobody.display()), format!("nbd://127.0.0.1:{}", crate::bench::free_port())]
    {
        let said = world.refused(["attach", &uri, text(&cache)]);
        assert!(said.contains("cannot connect"), "{said}");
        let cause = if uri.starts_with("nbd:") { "refused" } else { "No such file" };
        assert_eq!(said.matches(cause).count(), 1, "the cause, once: {said}");
    }
    assert!(!cache.exists());
}
