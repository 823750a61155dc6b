//! A cache that was used and left in order, to be damaged in every way.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use blkferry::cache::{CopyState, MetadataFile, PAGE_BYTES, SealedPage, Superblock};
use serde_json::Value;

use crate::common::{Export, World, make_image};

pub const SIZE: u64 = 8 << 20;

pub struct Case {
    pub world: World,
    pub export: Export,
    pub cache: PathBuf,
    pub metadata: PathBuf,
    /// Cache and metadata as they were left.
    pub good: (Vec<u8>, Vec<u8>),
    /// Blocks present and dirty.
    pub blocks: (u64, u64),
}

fn blocks(status: &Value) -> (u64, u64) {
    (status["blocks"]["present"].as_u64().unwrap(), status["blocks"]["dirty"].as_u64().unwrap())
}

impl Case {
    /// Both copies of the superblock and of the one map page are in use.
    pub fn new() -> Self {
        let world = World::new();
        let (image, cache, metadata) = (world.path("image"), world.path("cache"), world.path("cache.ferry"));
        make_image(&image, SIZE, &[(0, 3 << 20), (5 << 20, 2 << 20)]);
        let export = world.export(&image);
        let device = world.attach(&export.uri, &cache, "disk", &["--hydrate", "off"]);
        for (write, read) in [("write -P 1 64k 64k", "read 4M 64k"), ("write -P 2 6M 256k", "read 0 16k")] {
            qemu_io(&device.uri, &[write, read, "flush"]);
        }
        // A read is answered before its blocks stand in the cache.
        let status = device.wait_for(|status| status["blocks"]["present"] == 100);
        world.ok(["detach", "disk", "--incomplete"]);
        let good = (fs::read(&cache).unwrap(), fs::read(&metadata).unwrap());
        assert_eq!(good.1.len(), 4 * PAGE_BYTES);
        let case = Self { world, export, cache, metadata, good, blocks: blocks(&status) };
        assert!((0..4).all(|page| case.sequence(page) > 0), "all four pages are in use");
        case
    }

    /// The sequence of a page of the file; 0 if it is blank.
    pub fn sequence(&self, page: usize) -> u64 {
        let bytes = &self.good.1[page * PAGE_BYTES..][..PAGE_BYTES];
        match SealedPage::decode(bytes, 1 + page as u32 / 2, 0) {
            CopyState::Valid(page) => page.sequence,
            _ => 0,
        }
    }

    /// Is this the newer copy of the two?
    pub fn is_newer(&self, page: usize) -> bool {
        self.sequence(page) > self.sequence(page ^ 1)
    }

    /// Everything as it was left.
    pub fn restore(&self) {
        fs::write(&self.cache, &self.good.0).unwrap();
        fs::write(&self.metadata, &self.good.1).unwrap();
    }

    /// Another metadata file in the place of the good one.
    pub fn put_metadata(&self, bytes: &[u8]) {
        fs::write(&self.metadata, bytes).unwrap();
    }

    pub fn arguments(&self) -> [&str; 7] {
        let cache = self.cache.to_str().unwrap();
        ["attach", &self.export.uri, cache, "--name", "again", "--hydrate", "off"]
    }

    /// Attaching must fail with one line that says all of this, and change nothing.
    pub fn refused(&self, what: &str, says: &[&str]) {
        self.refused_as(what, &self.arguments(), says);
    }

    pub fn refused_as(&self, what: &str, arguments: &[&str], says: &[&str]) {
        let before = self.everything();
        let said = self.world.refused(arguments);
        println!("{what}: {said}");
        assert!(says.iter().all(|text| said.contains(text)), "{what}: {said}");
        assert!(said.len() < 600, "{what}: too long to be read");
        let after = self.everything();
        let paths: BTreeSet<&PathBuf> = before.keys().chain(after.keys()).collect();
        let changed: Vec<_> = paths.into_iter().filter(|path| before.get(*path) != after.get(*path)).collect();
        assert!(changed.is_empty(), "{what}: these changed: {changed:?}");
    }

    /// Attaching must work with a warning on standard error that says this, and no bit may be lost.
    pub fn goes_on(&self, what: &str, warns: &str) {
        let out = self.world.blkferry(self.arguments());
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{what}: {said}");
        assert!(said.contains("warn") && said.contains(warns), "{what}: no warning: {said:?}");
        let status: Value = serde_json::from_str(&self.world.ok(["status", "again", "--json"])).unwrap();
        assert_eq!(blocks(&status), self.blocks, "{what}: bits were lost or won");
        self.world.ok(["detach", "again", "--incomplete"]);
    }

    /// All files of the test and what is in them, but for logs; and the live maps.
    fn everything(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        for dir in [self.world.path("."), self.world.run_dir()] {
            for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
                let is_log = entry.path().extension().is_some_and(|e| e == "log");
                if entry.file_type().unwrap().is_file() && !is_log {
                    files.insert(entry.path(), fs::read(entry.path()).unwrap());
                } else {
                    files.insert(entry.path(), Vec::new());
                }
            }
        }
        let uuid = uuid::Uuid::from_slice(&self.good.1[16..32]).unwrap();
        let live = live_path(&self.world, uuid);
        if live.exists() {
            files.insert(live.clone(), fs::read(live).unwrap());
        }
        files
    }
}

/// Where the live map of a cache is while it is attached.
pub fn live_path(world: &World, uuid: uuid::Uuid) -> PathBuf {
    let in_run_dir = world.run_dir().join("live");
    let elsewhere = PathBuf::from(format!("/dev/shm/blkferry-{}", nix::unistd::geteuid()));
    (if in_run_dir.is_dir() { in_run_dir } else { elsewhere }).join(format!("{uuid}.live"))
}

/// Runs qemu-io commands on a device or file.
pub fn qemu_io(what: &str, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw"]).args(commands.iter().flat_map(|text| ["-c", text])).arg(what);
    let out = command.output().expect("qemu-io: `scripts/test` installs all that the tests need");
    assert!(out.status.success(), "qemu-io: {}", String::from_utf8_lossy(&out.stderr));
}

/// The file with both superblocks changed and sealed again.
pub fn with_superblock(metadata: &[u8], change: impl Fn(&mut SealedPage)) -> Vec<u8> {
    let mut out = metadata.to_vec();
    for bytes in out.chunks_exact_mut(PAGE_BYTES).take(2) {
        let CopyState::Valid(mut page) = SealedPage::decode(bytes, 1, 0) else { panic!("both are in use") };
        change(&mut page);
        bytes.copy_from_slice(&page.encode());
    }
    out
}

/// The same for the text in it.
pub fn with_json(metadata: &[u8], change: impl Fn(&mut Value)) -> Vec<u8> {
    with_superblock(metadata, |page| {
        let end = page.payload.iter().position(|&byte| byte == 0).unwrap();
        let mut json = serde_json::from_slice(&page.payload[..end]).unwrap();
        change(&mut json);
        page.payload = serde_json::to_vec(&json).unwrap();
    })
}

/// What a metadata file says.
pub fn superblock_of(path: &Path) -> Superblock {
    MetadataFile::open(path).unwrap().1.superblock
}
