//! The move, and what becomes of it when it does not come about.

use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use crate::site::{DEVICE, Site};
use crate::writer::{data_of, poll};

/// With the hook: `virsh migrate`, and that is all. There and back.
#[test]
fn a_machine_moves_and_its_disk_follows() {
    let mut site = Site::new();
    site.configure_hook(&site.b, &site.source(), &site.cache);
    site.a.wait_stamps(20);
    let uri = site.b.uri();
    // libvirt takes an image on this host for one that the other host cannot have.
    let line = site.a.virsh_refuses(&site.migration(&uri, &[]));
    assert!(line.contains("Migration without shared storage is unsafe"), "{line}");
    assert_eq!((site.a.state().as_str(), site.b.state().as_str()), ("running", ""));

    site.a.virsh(&site.migration(&uri, &["--unsafe"]));
    let before = site.a.stamps().len();
    assert_eq!((site.a.state().as_str(), site.b.state().as_str()), ("shut off", "running"));
    site.b.wait_stamps(10);
    assert_eq!(site.a.stamps().len(), before, "it went on at the source");
    assert_eq!(site.status_at(&site.b)["state"], "active");
    assert_eq!(site.status_at(&site.b)["handoff"]["epoch"], 2);
    // As docs/LIBVIRT.md has it: what the destination keeps is what it runs.
    let xml = site.world.path("kept.xml");
    std::fs::write(&xml, site.b.virsh(&["dumpxml", "--migratable", "web"])).unwrap();
    site.b.virsh(&["define", xml.to_str().unwrap()]);
    let xml = site.b.virsh(&["dumpxml", "--inactive", "web"]);
    assert!(xml.contains("/run/blkferry-libvirt/web-vda.nbd"), "{xml}");

    // It cannot be started where it was.
    let line = site.a.virsh_refuses(&["start", "web"]);
    println!("virsh start at the source: {line}");
    assert!(line.contains("Operation not permitted"), "{line}");
    assert_eq!(site.a.state(), "shut off");

    // Its blocks follow, each once. Until the first write the reads were not kept.
    let first = site.status_at(&site.b);
    let (data_first, read) = (data_bytes(&first), first["frontend"]["read_bytes"].as_u64().unwrap());
    let merged = first["frontend"]["writes"].as_u64().unwrap() * 2 * 4096;
    // What is read ahead, once they are, is in proportion to what was read.
    assert!(data_first <= 2 * read + merged, "more than was read crossed: {first}");
    site.b.ok(&["set", DEVICE, "hydrate=auto"]);
    site.wait_complete_at(&site.b);
    let (crossed, data) = (data_bytes(&site.status_at(&site.b)), data_of(&site.image));
    let on_link = site.link.received();
    println!(
        "{data_first} bytes of data crossed for {read} read, then {} of {data}; {on_link} on the link in all",
        crossed - data_first
    );
    assert!(crossed - data_first <= data, "some of it crossed twice");
    assert!(on_link <= crossed + crossed / 50, "more than it admits");

    // The export is not needed any more, and the image is out of reach without it.
    site.a.run(&["pkill", "-x", "blkferry"]);
    let line = site.a.virsh_refuses(&["start", "web"]);
    assert!(line.contains("Operation not permitted"), "{line}");

    // And back: what was written there crosses, and what it is at the source needs no --unsafe.
    let said = site.b.ok(&["set", DEVICE, "export=127.0.0.1:0"]);
    let (_, source) = said.trim().split_once("export=").unwrap();
    site.configure_hook(&site.a, source, &site.image);
    let told_at_a = site.a.stamps();
    site.b.virsh(&site.migration(&site.a.uri(), &[]));
    assert_eq!((site.a.state().as_str(), site.b.state().as_str()), ("running", "shut off"));
    // How much that was, only the machine knows. What it read before its first write was not kept, and crosses once more.
    poll("its first write", || site.status_at(&site.a)["state"] == "active");
    let read_at_a = site.status_at(&site.a)["frontend"]["read_bytes"].as_u64().unwrap();
    let written_at_b = site.status_at(&site.b)["blocks"]["dirty"].as_u64().unwrap() * 4096;
    site.a.ok(&["set", DEVICE, "hydrate=auto"]);
    site.wait_complete_at(&site.a);
    site.a.wait_stamps(10);
    let back = data_bytes(&site.status_at(&site.a));
    println!("{back} bytes of data crossed on the way back; {written_at_b} were written there, {read_at_a} read");
    assert!(written_at_b < data / 4, "it is a test of little that was written: {written_at_b}");
    assert!(back <= written_at_b + read_at_a, "more than what was written there: {back}");

    // A power cut, as far as the guest is concerned.
    let told = [told_at_a, site.b.stamps()].concat();
    site.b.end();
    site.a.virsh(&["destroy", "web"]);
    site.a.ok(&["detach", DEVICE]);
    site.assert_nothing_is_lost(&site.image, &[told, site.a.stamps()].concat());
}

fn data_bytes(status: &Value) -> u64 {
    status["wire"]["data_bytes"].as_u64().unwrap()
}

/// Without the hook: the device by hand, and the machine's XML as it is to be there. A move that fails before the switch
/// has not been; the next one has the same device.
#[test]
fn what_fails_before_the_switch_leaves_the_machine_at_the_source() {
    let mut site = Site::new();
    let socket = "/run/blkferry-web/web-vda.nbd";
    site.b.run(&["install", "-d", "-m", "711", "/run/blkferry-web"]);
    let source = site.source();
    let attach = ["attach", "--standby", "--activate", "on-write", &source, site.cache.to_str().unwrap()];
    site.b.ok(&[
        &attach[..],
        &["--name", DEVICE, "--hydrate", "off", "--socket", socket, "--socket-owner", "libvirt-qemu"],
    ]
    .concat());
    let there = site.xml_with(&format!(
        "<disk type='network' device='disk'><driver name='qemu' type='raw' cache='none'/><source protocol='nbd'>\
         <host transport='unix' socket='{socket}'/></source>"
    ));
    let uri = site.b.uri();
    let there = there.to_str().unwrap();
    let options = ["--unsafe", "--persistent", "--xml", there, "--persistent-xml", there];
    let migration = site.migration(&uri, &options);
    site.a.wait_stamps(5);
    // So slow that there is time for what comes.
    site.a.virsh(&["migrate-setspeed", "web", "1"]);

    for fault in ["domjobabort", "kill"] {
        let mut moving = site.a.virsh_command(&migration).stderr(Stdio::piped()).spawn().unwrap();
        poll("the memory to be on its way", || {
            let job = site.a.virsh(&["domjobinfo", "web"]);
            job.lines().any(|line| line.starts_with("Memory processed:") && !line.contains(" 0.000 "))
        });
        if fault == "domjobabort" {
            site.a.virsh(&["domjobabort", "web"]);
        } else {
            site.b.run(&["sh", "-c", "kill -KILL $(cat /run/libvirt/qemu/web.pid)"]);
        }
        assert!(!moving.wait().unwrap().success());
        assert_eq!((site.a.state().as_str(), site.b.state().as_str()), ("running", ""), "after {fault}");
        site.a.wait_stamps(5);
        assert!(site.b.stamps().is_empty());
        assert_eq!(site.status_at(&site.b)["state"], "standby");
        assert_eq!(site.status_at(&site.b)["blocks"]["present"], 0, "nothing is kept in standby");
    }

    site.a.virsh(&["migrate-setspeed", "web", "1000"]);
    site.a.virsh(&migration);
    assert_eq!((site.a.state().as_str(), site.b.state().as_str()), ("shut off", "running"));
    assert!(site.b.virsh(&["dumpxml", "--inactive", "web"]).contains(socket));
    site.b.wait_stamps(10);
    assert_eq!(site.status_at(&site.b)["state"], "active");
    site.b.ok(&["set", DEVICE, "hydrate=auto"]);
    site.wait_complete_at(&site.b);

    // The other host is not needed any more.
    let told = site.a.stamps();
    site.a.end();
    site.b.wait_stamps(10);
    site.b.virsh(&["destroy", "web"]);
    site.b.ok(&["detach", DEVICE]);
    site.assert_nothing_is_lost(&site.cache, &[told, site.b.stamps()].concat());
}

/// The hook cleans up after a move that failed; and what it cannot do stops one before it begins.
#[test]
fn the_hook_leaves_nothing_of_a_move_that_failed() {
    let site = Site::new();
    site.a.wait_stamps(5);
    let uri = site.b.uri();
    let migration = site.migration(&uri, &["--unsafe"]);
    let config = site.b.path(&format!("/etc/blkferry/{DEVICE}.conf"));
    std::fs::write(&config, format!("SOURCE=nbd://127.0.0.1:1/\nCACHE={}\n", site.cache.display())).unwrap();
    let line = site.a.virsh_refuses(&migration);
    println!("a source that is not there: {line}");
    assert!(line.contains("web-vda was not attached"), "{line}");
    assert_eq!(site.a.state(), "running");

    site.configure_hook(&site.b, &site.source(), &site.cache);
    site.a.virsh(&["migrate-setspeed", "web", "1"]);
    let mut moving = site.a.virsh_command(&migration).stderr(Stdio::piped()).spawn().unwrap();
    poll("the device", || site.b.blkferry(&["status", DEVICE]).status.success());
    poll("QEMU there", || site.b.path("/run/libvirt/qemu/web.pid").exists());
    site.a.virsh(&["domjobabort", "web"]);
    assert!(!moving.wait().unwrap().success());
    poll("the device's end", || !site.b.blkferry(&["status", DEVICE]).status.success());
    site.a.wait_stamps(5);
    assert!(Path::new(&site.image).metadata().is_ok_and(|image| !image.permissions().readonly()));
}
