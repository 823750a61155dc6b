//! Whole disks through the device, with other people's tools, before, during and after hydration.

use serde_json::json;

use crate::bench::{Phase, attach_in, finish, mixed_image, qemu_io, run, run_fails, run_json, text};
use crate::common::{World, assert_same};
use crate::export::assert_map;

const SIZE: u64 = (24 << 20) + 512;

#[test]
fn nbdinfo_sees_a_writable_disk() {
    let world = World::new();
    let image = world.path("image.raw");
    mixed_image(&image, SIZE);
    let export = world.export(&image);
    for phase in Phase::ALL {
        let cache = world.path(&format!("{phase:?}.raw"));
        let device = attach_in(&world, phase, &export.uri, &cache, &[]);
        let info = run_json("nbdinfo", &["--json", &device.uri]);
        let told = &info["exports"][0];
        assert_eq!(told["export-size"], SIZE);
        assert_eq!(told["is_read_only"], false);
        for ability in ["flush", "fua", "trim", "zero", "fast_zero", "multi_conn", "df", "cache"] {
            assert_eq!(told[format!("can_{ability}")], true, "{ability} in {told}");
        }
        assert_eq!(told["contexts"], json!(["base:allocation"]));
        assert_map(&run_json("nbdinfo", &["--map", "--json", &device.uri]), SIZE);
        finish(device);
        assert_same(&image, &cache);
    }
}

#[test]
fn the_device_reads_as_its_source() {
    let world = World::new();
    let image = world.path("image.raw");
    mixed_image(&image, SIZE);
    let export = world.export(&image);
    for phase in Phase::ALL {
        for tool in ["nbdcopy", "convert", "compare"] {
            let (cache, copy) = (world.path("cache.raw"), world.path("copy.raw"));
            let device = attach_in(&world, phase, &export.uri, &cache, &[]);
            match tool {
                "nbdcopy" => drop(run("nbdcopy", &[&device.uri, text(&copy)])),
                "convert" => drop(run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &device.uri, text(&copy)])),
                _ => {
                    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&image), &device.uri]);
                    run("cp", &[text(&image), text(&copy)]);
                }
            }
            assert_same(&image, &copy);
            finish(device);
            assert_same(&image, &cache);
            for path in [&cache, &copy, &world.path("cache.raw.ferry")] {
                std::fs::remove_file(path).unwrap();
            }
        }
    }
}

#[test]
fn a_whole_new_disk_is_written_through_the_device() {
    let world = World::new();
    let (image, new) = (world.path("image.raw"), world.path("new.raw"));
    mixed_image(&image, SIZE);
    // Other content at every place, other holes too.
    mixed_image(&world.path("larger.raw"), SIZE + (300 << 10));
    run(
        "dd",
        &[
            &format!("if={}", text(&world.path("larger.raw"))),
            &format!("of={}", text(&new)),
            "bs=100K",
            "skip=3",
            "conv=sparse",
        ],
    );
    run("truncate", &["-s", &SIZE.to_string(), text(&new)]);
    let export = world.export(&image);
    for phase in Phase::ALL {
        for tool in ["nbdcopy", "convert"] {
            let cache = world.path("cache.raw");
            let device = attach_in(&world, phase, &export.uri, &cache, &[]);
            match tool {
                "nbdcopy" => drop(run("nbdcopy", &["--flush", text(&new), &device.uri])),
                _ => drop(run("qemu-img", &["convert", "-n", "-W", "-f", "raw", "-O", "raw", text(&new), &device.uri])),
            }
            run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&new), &device.uri]);
            run_fails("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&image), &device.uri]);
            finish(device);
            assert_same(&new, &cache);
            std::fs::remove_file(&cache).unwrap();
            std::fs::remove_file(world.path("cache.raw.ferry")).unwrap();
        }
    }
}

#[test]
fn large_blocks_odd_sizes_and_tcp() {
    let world = World::new();
    for (block, size) in
        [("4K", (20 << 20) + 512), ("64K", (20 << 20) + 512), ("1M", (20 << 20) + 512), ("1M", 512), ("4K", 5 << 20)]
    {
        let [image, cache, copy, want] =
            ["image.raw", "cache.raw", "copy.raw", "want.raw"].map(|name| world.path(name));
        mixed_image(&image, size);
        let export = world.export_at(&image, "127.0.0.1:0");
        let device = attach_in(&world, Phase::Before, &export.uri, &cache, &["--block-size", block]);
        // The last byte, before anything else is here.
        let write = format!("write -P 0x5a {} 1", size - 1);
        qemu_io(&device.uri, &[&write, &format!("read -P 0x5a {} 1", size - 1)]);
        run("cp", &[text(&image), text(&want)]);
        run("qemu-io", &["-f", "raw", "-c", &write, text(&want)]);
        run("nbdcopy", &[&device.uri, text(&copy)]);
        assert_same(&want, &copy);
        finish(device);
        assert_same(&want, &cache);
        for path in [&cache, &copy, &world.path("cache.raw.ferry")] {
            std::fs::remove_file(path).unwrap();
        }
    }
}
