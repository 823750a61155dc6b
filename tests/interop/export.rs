//! `blkferry export` as other people's clients see it.

use serde_json::{Value, json};

use crate::bench::{Kind, mixed_image, run, run_fails, run_json, stripes, text, try_run};
use crate::client::Client;
use crate::common::{World, assert_same};

/// Not a multiple of any block size.
const SIZE: u64 = (40 << 20) + 512;

/// Checks a `--map --json` of a mixed image: gapless, holes where holes were left, data where data is.
pub fn assert_map(map: &Value, size: u64) {
    let extents: Vec<(u64, u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["offset"].as_u64().unwrap(), e["length"].as_u64().unwrap(), e["type"].as_u64().unwrap()))
        .collect();
    let end = extents.iter().fold(0, |at, &(offset, len, _)| {
        assert_eq!(offset, at, "a gap or an overlap");
        offset + len
    });
    assert_eq!(end, size, "the map covers the disk");
    for (offset, len, kind) in stripes(size) {
        let inside = extents.iter().filter(|(at, n, _)| *at < offset + len && offset < at + n);
        for &(at, n, flags) in inside {
            match kind {
                Kind::Hole => assert_eq!(flags, 3, "a hole at {offset}, told as {flags} at {at}+{n}"),
                Kind::Noise => assert_eq!(flags, 0, "data at {offset}, told as {flags} at {at}+{n}"),
                // Whether written zeros are told as zeros is the file system's choice.
                Kind::Zeros | Kind::Mixed => {}
            }
        }
    }
}

#[test]
fn nbdinfo_sees_what_is_served() {
    let world = World::new();
    let image = world.path("image.raw");
    mixed_image(&image, SIZE);
    for listen in ["127.0.0.1:0", "unix"] {
        let export = if listen == "unix" { world.export(&image) } else { world.export_at(&image, listen) };
        let info = run_json("nbdinfo", &["--json", &export.uri]);
        let told = &info["exports"][0];
        assert_eq!((&info["protocol"], &info["structured"]), (&json!("newstyle-fixed"), &json!(true)));
        assert_eq!(told["export-size"], SIZE);
        for (what, so) in [("is_read_only", true), ("can_multi_conn", true), ("can_df", true), ("can_trim", false)] {
            assert_eq!(told[what], so, "{what} in {told}");
        }
        // The second one needs Linux 6.5.
        let contexts = [json!(["base:allocation"]), json!(["base:allocation", "blkferry:hot"])];
        assert!(contexts.contains(&told["contexts"]), "{told}");
        assert_map(&run_json("nbdinfo", &["--map", "--json", &export.uri]), SIZE);
        export.stop();
    }
}

#[test]
fn every_tool_copies_the_image_as_it_is() {
    let world = World::new();
    let image = world.path("image.raw");
    mixed_image(&image, SIZE);
    let before = std::fs::metadata(&image).unwrap().modified().unwrap();
    for export in [world.export(&image), world.export_at(&image, "127.0.0.1:0")] {
        let copy = world.path("copy.raw");
        for how in [&[][..], &["--request-size=33554432"], &["--synchronous"], &["--no-extents", "--connections=8"]] {
            let _ = std::fs::remove_file(&copy);
            let mut args = how.to_vec();
            args.extend([export.uri.as_str(), text(&copy)]);
            run("nbdcopy", &args);
            assert_same(&image, &copy);
        }
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&image), &export.uri]);
        for format in ["raw", "qcow2"] {
            let _ = std::fs::remove_file(&copy);
            run("qemu-img", &["convert", "-f", "raw", "-O", format, &export.uri, text(&copy)]);
            run("qemu-img", &["compare", "-f", "raw", "-F", format, text(&image), text(&copy)]);
        }
        let map = run_json("qemu-img", &["map", "-f", "raw", "--output=json", &export.uri]);
        let covered: u64 = map.as_array().unwrap().iter().map(|e| e["length"].as_u64().unwrap()).sum();
        assert_eq!(covered, SIZE);
        assert_eq!(Client::plain(&export.uri).read_all(), std::fs::read(&image).unwrap(), "simple replies");
        export.stop();
    }
    assert_eq!(std::fs::metadata(&image).unwrap().modified().unwrap(), before, "the image was touched");
}

#[test]
fn a_comparison_can_fail() {
    let world = World::new();
    let (image, other) = (world.path("image.raw"), world.path("other.raw"));
    mixed_image(&image, SIZE);
    run("cp", &[text(&image), text(&other)]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 20000000 1", text(&other)]);
    let export = world.export(&image);
    let said = run_fails("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&other), &export.uri]);
    assert!(said.contains("mismatch"), "{said}");
}

#[test]
fn nobody_writes_to_an_export() {
    let world = World::new();
    let image = world.path("image.raw");
    mixed_image(&image, SIZE);
    let export = world.export(&image);
    for command in ["write 0 4096", "write -z 0 4096", "discard 0 4096"] {
        assert!(!try_run("qemu-io", &["-f", "raw", "-c", command, &export.uri]).status.success(), "{command}");
    }
    // By hand, for a client that does not look at the flags.
    use blkferry::nbd::{Command, CommandFlags, NbdError};
    let mut client = Client::connect(&export.uri);
    let none = CommandFlags::empty();
    assert_eq!(client.ask(Command::Write, none, 0, 4096, &[1; 4096]), Err(NbdError::Perm));
    assert_eq!(client.ask(Command::WriteZeroes, none, 0, 4096, &[]), Err(NbdError::Perm));
    assert_eq!(client.ask(Command::Trim, none, 0, 4096, &[]), Err(NbdError::Perm));
    assert_eq!(client.read(SIZE - 512, 512).map(|bytes| bytes.len()), Ok(512), "the connection lives on");
    drop(client);
    run("nbdcopy", &[&export.uri, text(&world.path("copy.raw"))]);
    assert_same(&image, &world.path("copy.raw"));
}

#[test]
fn exports_have_names() {
    let world = World::new();
    let (image, socket) = (world.path("image.raw"), world.path("named.sock"));
    mixed_image(&image, 1 << 20);
    let listen = format!("unix:{}", socket.display());
    let mut command = world.command(["export", "--name", "disk one", "--listen", &listen]);
    let child = command.arg(&image).stdout(std::process::Stdio::null()).spawn().unwrap();
    let export = crate::common::Export { child, uri: format!("nbd+unix:///?socket={}", socket.display()) };
    crate::common::wait_for_socket(&socket);
    let listed = run_json("nbdinfo", &["--list", "--json", &export.uri]);
    assert_eq!(listed["exports"][0]["export-name"], "disk one");
    for name in ["", "disk%20one"] {
        let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
        assert_eq!(run_json("nbdinfo", &["--json", &uri])["exports"][0]["export-size"], 1 << 20);
    }
    let uri = format!("nbd+unix:///other?socket={}", socket.display());
    run_fails("nbdinfo", &[&uri]);
    let said = world.refused(["attach", &uri, text(&world.path("cache.raw"))]);
    assert!(said.contains("other"), "it names the export that is not there: {said}");
    export.stop();
}
