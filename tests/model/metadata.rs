//! The metadata file on a simulated disk: written by the real committer, read by the real recovery.

use std::io;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use blkferry::cache::{
    CacheState, Committer, Durable, PAGE_BYTES, ReadAt, Recovered, Recovery, Superblock, encode_superblock, file_bytes,
    map_offset,
};
use blkferry::engine::{Geometry, Maps, PageImage};

use crate::check::{Checked, Violation};
use crate::disk::Disk;
use crate::stamp::{SECTOR, Stamp};
use crate::world::{LiveWords, Options};

/// The bytes of a sector of metadata; nobody changes them.
pub type Bytes = Arc<[u8; SECTOR as usize]>;

/// A metadata file as a device finds it first, and who will write to it.
#[derive(Debug)]
pub struct Birth {
    pub sectors: Vec<Bytes>,
    pub pages: Vec<PageImage>,
    committer: Committer,
}

/// Both disks of a cache, for the steps of a commit.
pub struct Disks<'a> {
    pub data: &'a mut Disk<Stamp>,
    /// When the sync of the data began.
    pub mark: u64,
    pub metadata: &'a mut Disk<Bytes>,
    pub map_pages: u64,
}

impl Durable for Disks<'_> {
    fn sync_data(&mut self) -> io::Result<()> {
        self.data.sync(self.mark);
        Ok(())
    }

    fn write_map(&mut self, page: u64, copy: u64, bytes: &[u8]) -> io::Result<()> {
        let sectors = sectors_of_copy(self.map_pages, page, copy, bytes);
        sectors.for_each(|(sector, bytes)| self.metadata.write(sector, bytes));
        Ok(())
    }

    fn sync_metadata(&mut self) -> io::Result<()> {
        self.metadata.sync(self.metadata.mark());
        Ok(())
    }
}

/// The disk's bytes, as a file.
struct File<'a>(&'a Disk<Bytes>);

impl ReadAt for File<'_> {
    fn size_bytes(&self) -> io::Result<u64> {
        Ok(self.0.sectors() * SECTOR)
    }

    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let sectors = bytes.chunks_exact_mut(SECTOR as usize);
        sectors.zip(offset / SECTOR..).for_each(|(bytes, sector)| bytes.copy_from_slice(self.0.read(sector).deref()));
        Ok(())
    }
}

fn sectors_of(bytes: &[u8]) -> impl Iterator<Item = Bytes> {
    bytes.chunks_exact(SECTOR as usize).map(|sector| Arc::new(sector.try_into().expect("a whole sector")))
}

/// The sectors of a copy of a map page: where, and what.
pub fn sectors_of_copy(map_pages: u64, page: u64, copy: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, Bytes)> {
    (map_offset(map_pages, page, copy) / SECTOR..).zip(sectors_of(bytes))
}

impl Birth {
    /// Of a device with these blocks: made by a commit, as any later state.
    pub fn new(geometry: Geometry, pages: Vec<PageImage>) -> Self {
        let map_pages = Maps::pages(geometry);
        let mut bytes = encode_superblock(&superblock(geometry), 1);
        assert_eq!(bytes.len(), PAGE_BYTES);
        bytes.resize(file_bytes(map_pages) as usize, 0);
        let mut metadata = Disk::new(sectors_of(&bytes).collect());
        let recovered = recover(&metadata, Options::default()).expect("a new file is whole");
        let mut committer = new_committer(&recovered);
        let maps = Maps::new(geometry, Box::new(LiveWords::of(geometry, &pages)));
        let mut data = Disk::new(Vec::new());
        let mut disks = Disks { data: &mut data, mark: 0, metadata: &mut metadata, map_pages };
        committer.commit(&maps, &mut disks).expect("nothing fails here");
        Self { sectors: (0..metadata.sectors()).map(|sector| metadata.read(sector)).collect(), pages, committer }
    }

    /// Who goes on with it.
    pub fn committer(&self, options: Options) -> Committer {
        planted(self.committer.clone(), options)
    }
}

fn superblock(geometry: Geometry) -> Superblock {
    Superblock {
        uuid: uuid::Uuid::from_u128(0x1234_5678_9abc_def0),
        epoch: 1,
        size_bytes: geometry.size_bytes(),
        block_bytes: geometry.block_bytes(),
        source: "nbd://host/disk".into(),
        source_identity: "image:0".into(),
        state: CacheState::Active,
        dirty_exact: true,
        clean: false,
        boot_id: String::new(),
        gift: None,
        floor: 0,
        given_to: None,
        released: false,
    }
}

/// What a new process finds.
pub fn recover(metadata: &Disk<Bytes>, options: Options) -> Checked<Recovered> {
    let file = File(metadata);
    let recovery = Recovery::new(Path::new("simulated"), &file);
    #[cfg(feature = "planted-faults")]
    let recovery =
        if options.fault == Some(crate::planted::Fault::TornPageUsed) { recovery.use_torn_pages() } else { recovery };
    #[cfg(not(feature = "planted-faults"))]
    let _ = options;
    recovery.run().map_err(|error| Violation { rule: "I2", what: format!("nobody damaged it, and yet: {error}") })
}

/// Who commits from now on.
pub fn committer_on(recovered: &Recovered, options: Options) -> Committer {
    planted(new_committer(recovered), options)
}

/// On half of all disks it takes one page at a time, as on a disk of terabytes it takes a thousand.
fn new_committer(recovered: &Recovered) -> Committer {
    let mut committer = Committer::new(recovered);
    if (recovered.superblock.size_bytes / SECTOR).is_multiple_of(2) {
        committer.set_batch_pages(1);
    }
    committer
}

fn planted(committer: Committer, options: Options) -> Committer {
    #[cfg(feature = "planted-faults")]
    if let Some(crate::planted::Fault::Commit(fault)) = options.fault {
        let mut committer = committer;
        committer.plant(fault);
        return committer;
    }
    let _ = options;
    committer
}
