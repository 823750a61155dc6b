//! Two hosts; a machine on the first one, on an image that is exported, through a link of 1 Gbit/s and 20 ms.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;

use crate::common::{BLKFERRY, World, tool};
use crate::host::Host;
use crate::link::Link;
use crate::writer::{assert_stamps, poll};

/// The machine's only disk, to blkferry on the second host.
pub const DEVICE: &str = "web-vda";

pub struct Site {
    pub a: Host,
    pub b: Host,
    pub link: Link,
    pub image: PathBuf,
    pub cache: PathBuf,
    pub world: World,
}

/// A machine with these disks.
pub fn machine(disks: &str) -> String {
    include_str!("guest.xml").replace("@DISKS@", disks)
}

impl Site {
    pub fn new() -> Self {
        let world = World::new();
        // QEMU is another user.
        tool("chmod", ["755", world.path("").to_str().unwrap()]);
        let (image, cache) = (world.path("guest.raw"), world.path("cache.raw"));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/guest-image");
        tool(script.to_str().unwrap(), ["--writer", "--size", "256M", image.to_str().unwrap()]);
        let (a, b) = (Host::start(&world, "a"), Host::start(&world, "b"));

        let disk = format!(
            "<disk type='file'><driver name='qemu' type='raw' cache='none'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk>",
            image.display()
        );
        let xml = world.path("web.xml");
        std::fs::write(&xml, machine(&disk)).unwrap();
        a.virsh(&["define", "--validate", xml.to_str().unwrap()]);
        a.virsh(&["start", "web"]);

        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let site = Self { link: Link::to(&format!("127.0.0.1:{port}")), a, b, image, cache, world };
        site.export(port);
        site
    }

    /// On the first host. It ends with that.
    fn export(&self, port: u16) {
        let listen = format!("127.0.0.1:{port}");
        let args = [BLKFERRY, "export", "--handoff", "--listen", &listen, self.image.to_str().unwrap()];
        let mut export = self.a.command(args).stdout(Stdio::null()).spawn().unwrap();
        poll("the export", || {
            assert!(export.try_wait().unwrap().is_none(), "the export has ended: see above");
            std::net::TcpStream::connect(&listen).is_ok()
        });
    }

    pub fn source(&self) -> String {
        format!("nbd://{}/", self.link.address)
    }

    /// What the hook of a host is told of the disk. It fetches nothing by itself, so that what crosses is known.
    pub fn configure_hook(&self, host: &Host, source: &str, cache: &Path) {
        let text = format!("SOURCE={source}\nCACHE={}\nOPTIONS=--hydrate off\n", cache.display());
        std::fs::write(host.path(&format!("/etc/blkferry/{DEVICE}.conf")), text).unwrap();
    }

    /// `virsh migrate` to the host at `uri`, with more options.
    pub fn migration<'a>(&'a self, uri: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["migrate", "--live", "--p2p"];
        args.extend(more);
        args.extend(["web", uri, "--migrateuri", "tcp://127.0.0.1"]);
        args
    }

    pub fn status_at(&self, host: &Host) -> Value {
        serde_json::from_str(&host.ok(&["status", DEVICE, "--json"])).unwrap()
    }

    pub fn wait_complete_at(&self, host: &Host) {
        poll("all blocks", || self.status_at(host)["source_needed"] == false);
    }

    /// The machine's XML as it is to be on the second host: with another disk, up to its target.
    pub fn xml_with(&self, disk: &str) -> PathBuf {
        let xml = self.a.virsh(&["dumpxml", "--migratable", "web"]);
        let (head, rest) = xml.split_once("<disk ").unwrap();
        let (_, tail) = rest.split_once("<target ").unwrap();
        let path = self.world.path("there.xml");
        std::fs::write(&path, format!("{head}{disk}<target {tail}")).unwrap();
        path
    }

    pub fn assert_nothing_is_lost(&self, disk: &Path, told: &[(u64, u64)]) {
        assert_stamps(&self.world, disk, told);
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // The image may be immutable, given away for good. The export has to go first.
        self.a.end();
        self.world.blkferry(["reclaim", "--force", self.image.to_str().unwrap()]);
    }
}
