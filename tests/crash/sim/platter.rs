//! A disk for the metadata file. What was written and not synced may be lost in any part, sector by sector.

use std::path::{Path, PathBuf};

use blkferry::cache::{MetadataError, MetadataFile, PAGE_BYTES, Recovered, Superblock};
use blkferry::engine::{Geometry, Maps};
use tempfile::TempDir;
use uuid::Uuid;

use crate::rng::Rng;

const SECTORS: usize = PAGE_BYTES / 512;

struct Write {
    offset: usize,
    bytes: Vec<u8>,
}

/// Of each unsynced write: the sectors that reached the platter, one bit each.
pub type Survivors = Vec<u8>;

pub struct Platter {
    durable: Vec<u8>,
    unsynced: Vec<Write>,
    map_pages: u64,
    _dir: TempDir,
    path: PathBuf,
}

pub fn superblock(geometry: Geometry) -> Superblock {
    Superblock {
        uuid: Uuid::from_u128(0x1234_5678_9abc_def0),
        epoch: 1,
        size_bytes: geometry.size_bytes(),
        block_bytes: geometry.block_bytes(),
        source: "nbd://host/disk".into(),
        source_identity: "image:0".into(),
        state: blkferry::cache::CacheState::Active,
        dirty_exact: true,
        clean: false,
        boot_id: String::new(),
        gift: None,
        floor: 0,
        given_to: None,
        released: false,
    }
}

/// A directory where nothing waits for a real disk.
pub fn memory_dir() -> TempDir {
    let shm = Path::new("/dev/shm");
    let base = if shm.is_dir() { shm.to_path_buf() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("bf").tempdir_in(base).unwrap()
}

impl Platter {
    /// With a new metadata file on it.
    pub fn new(geometry: Geometry) -> (Self, Recovered) {
        let dir = memory_dir();
        let path = dir.path().join("metadata");
        let (_, recovered) = MetadataFile::create(&path, &superblock(geometry)).unwrap();
        let durable = std::fs::read(&path).unwrap();
        (Self { durable, unsynced: Vec::new(), map_pages: Maps::pages(geometry), _dir: dir, path }, recovered)
    }

    /// Writes a copy of a map page: two superblocks come first, then all first copies, then all second ones.
    pub fn write_map(&mut self, page: u64, copy: u64, bytes: &[u8]) {
        assert!(page < self.map_pages && copy < 2 && bytes.len() == PAGE_BYTES);
        let offset = (2 + copy * self.map_pages + page) as usize * PAGE_BYTES;
        self.unsynced.push(Write { offset, bytes: bytes.to_vec() });
    }

    pub fn sync(&mut self) {
        let everything = vec![0xff; self.unsynced.len()];
        self.lose_power(&everything);
    }

    /// Only what survived is left.
    pub fn lose_power(&mut self, survivors: &Survivors) {
        self.durable = self.image(survivors);
        self.unsynced.clear();
    }

    /// What a blkferry finds that starts after a power cut.
    pub fn recover(&self, survivors: &Survivors) -> Result<Recovered, MetadataError> {
        std::fs::write(&self.path, self.image(survivors)).unwrap();
        MetadataFile::open(&self.path).map(|(_, recovered)| recovered)
    }

    fn image(&self, survivors: &Survivors) -> Vec<u8> {
        let mut image = self.durable.clone();
        for (write, mask) in self.unsynced.iter().zip(survivors) {
            for sector in (0..SECTORS).filter(|sector| mask & (1 << sector) != 0) {
                let (from, to) = (sector * 512, (sector + 1) * 512);
                image[write.offset + from..write.offset + to].copy_from_slice(&write.bytes[from..to]);
            }
        }
        image
    }

    /// A random outcome of a power cut: each write whole, gone, or torn.
    pub fn any_survivors(&self, rng: &mut Rng) -> Survivors {
        let any = |_| match rng.below(4) {
            0 => 0,
            1 => 0xff,
            _ => rng.below(256) as u8,
        };
        self.unsynced.iter().map(any).collect()
    }

    /// Outcomes to look at: all of them for a single write, if asked for; else the plain ones and some at random.
    pub fn outcomes(&self, rng: &mut Rng, every: bool) -> Vec<Survivors> {
        let writes = self.unsynced.len();
        if every && writes == 1 {
            return (0..=255).map(|mask| vec![mask]).collect();
        }
        let mut outcomes = vec![vec![0; writes]];
        if writes > 0 {
            outcomes.push(vec![0xff; writes]);
            outcomes.extend((0..6).map(|_| self.any_survivors(rng)));
        }
        outcomes
    }
}
