//! The disks' XML in the documentation: libvirt has to take it, and QEMU has to be asked for what it says.

use crate::common::World;
use crate::host::Host;
use crate::site::machine;

const DOCS: [(&str, &str); 2] =
    [("README.md", include_str!("../../README.md")), ("docs/LIBVIRT.md", include_str!("../../docs/LIBVIRT.md"))];

/// What stands between ```xml and ```.
fn examples(text: &str) -> Vec<&str> {
    text.split("```xml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
}

#[test]
fn libvirt_takes_the_xml_of_the_documentation() {
    let world = World::new();
    let host = Host::start(&world, "a");
    let xml = world.path("web.xml");
    let mut kinds = Vec::new();
    for (file, text) in DOCS {
        let examples = examples(text);
        assert!(!examples.is_empty(), "{file}");
        for example in examples {
            std::fs::write(&xml, machine(example)).unwrap();
            host.virsh(&["define", "--validate", xml.to_str().unwrap()]);
            let command = host.virsh(&["domxml-to-native", "qemu-argv", "--domain", "web"]);
            for (part, driver) in [
                (
                    "socket='/run/blkferry-web/web.nbd'",
                    r#""driver":"nbd","server":{"type":"unix","path":"/run/blkferry-web/web.nbd"}"#,
                ),
                ("dev='/dev/ublkb0'", r#""driver":"host_device","filename":"/dev/ublkb0""#),
            ] {
                if example.contains(part) {
                    assert!(command.contains(driver), "{file}: {command}");
                    kinds.push(part);
                }
            }
            host.virsh(&["undefine", "web"]);
        }
    }
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds.len(), 2, "both frontends are documented");
}

const DISKS: &str = "<disk type='file'><driver name='qemu' type='KIND' cache='none'/><source file='/images/web.raw'>\
    <seclabel model='dac' relabel='no'/></source><backingStore/><target dev='vda' bus='virtio'/><serial>one</serial></disk>\
    <disk type='file'><driver name='qemu' type='raw'/><source file='/images/data.raw'/><target dev='vdb'/></disk>";

/// A kernel without ublk is enough for this: a stand-in says what blkferry says of a block device.
#[test]
fn the_hook_changes_the_disks_source_and_nothing_else() {
    let world = World::new();
    let host = Host::start(&world, "a");
    let (xml, dir) = (world.path("web.xml"), world.path("bin"));
    std::fs::create_dir(&dir).unwrap();
    let says = r#"{"state":"standby","frontend":{"kind":"ublk","uri":"/dev/ublkb0","device":"/dev/ublkb0"}}"#;
    std::fs::write(dir.join("blkferry"), format!("#!/bin/sh\necho '{says}'\n")).unwrap();
    host.run(&["chmod", "755", dir.join("blkferry").to_str().unwrap()]);
    let config = host.path("/etc/blkferry/web-vda.conf");
    std::fs::write(config, "SOURCE=nbd://a/\nCACHE=/images/cache\nOPTIONS=--frontend ublk\n").unwrap();
    let hook = |kind: &str| {
        std::fs::write(&xml, machine(&DISKS.replace("KIND", kind))).unwrap();
        host.virsh(&["define", "--validate", xml.to_str().unwrap()]);
        let before = host.virsh(&["dumpxml", "--migratable", "web"]);
        host.virsh(&["undefine", "web"]);
        std::fs::write(&xml, &before).unwrap();
        let line = format!(
            "PATH={}:$PATH /etc/libvirt/hooks/qemu.d/blkferry web migrate begin - <{}",
            dir.display(),
            xml.display()
        );
        (before, host.command(["sh", "-c", &line]).output().unwrap())
    };

    let (before, out) = hook("raw");
    let after = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    std::fs::write(&xml, &after).unwrap();
    host.virsh(&["define", "--validate", xml.to_str().unwrap()]);
    host.virsh(&["undefine", "web"]);
    let (head, rest) = before.split_once("<disk type='file'").unwrap();
    let (attributes, rest) = rest.split_once("      <source ").unwrap();
    let (_, tail) = rest.split_once("      <target ").unwrap();
    let wanted = format!("{head}<disk type='block'{attributes}      <source dev='/dev/ublkb0'/>\n      <target {tail}");
    assert_eq!(after.trim(), wanted.trim());

    let (_, out) = hook("qcow2");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("disk vda of web cannot follow"), "{said}");
}
