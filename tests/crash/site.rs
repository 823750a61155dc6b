//! What lies on disk and on tmpfs between two daemons, read and damaged by the rules of docs/FORMAT.md alone.

use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use blkferry::cache::{CopyState, MetadataFile, PAGE_BYTES, SealedPage, Superblock};
use blkferry::engine::{BlockRun, Geometry};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::common::{World, noise};

/// The superblock, if the metadata file is there.
pub fn superblock(metadata: &Path) -> Option<Superblock> {
    metadata.exists().then(|| MetadataFile::open(metadata).unwrap().1.superblock)
}

/// Where the live map of a cache is.
pub fn live_path(world: &World, metadata: &Path) -> PathBuf {
    let name = format!("{}.live", superblock(metadata).expect("the cache was made").uuid);
    let in_run_dir = world.run_dir().join("live").join(&name);
    if in_run_dir.exists() {
        return in_run_dir;
    }
    Path::new("/dev/shm").join(format!("blkferry-{}", nix::unistd::geteuid())).join(name)
}

/// Which blocks are present: one bit a block, as 64-bit words.
pub struct Present(Vec<u64>);

impl Present {
    /// As the live map says: one page of header, then the present words, then as many dirty words.
    pub fn from_live_map(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_else(|e| panic!("live map {}: {e}", path.display()));
        let maps = &bytes[4096..];
        let words = maps[..maps.len() / 2].chunks_exact(8);
        Self(words.map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect())
    }

    /// As the metadata file says.
    pub fn from_metadata(path: &Path) -> Self {
        let (_, recovered) = MetadataFile::open(path).unwrap();
        let superblock = &recovered.superblock;
        let blocks = superblock.size_bytes.div_ceil(superblock.block_bytes);
        let mut words = vec![0; blocks.div_ceil(15_872) as usize * 248];
        for image in &recovered.pages {
            words[image.page as usize * 248..][..248].copy_from_slice(&image.present);
        }
        Self(words)
    }

    pub fn has(&self, block: u64) -> bool {
        self.0[block as usize / 64] & (1 << (block % 64)) != 0
    }

    /// All blocks, as runs of equal state.
    pub fn runs(&self, geometry: Geometry) -> impl Iterator<Item = (BlockRun, bool)> {
        let blocks = geometry.blocks();
        let mut at = 0;
        std::iter::from_fn(move || {
            let (start, state) = (at, (at < blocks).then(|| self.has(at))?);
            at = (start..blocks).find(|&block| self.has(block) != state).unwrap_or(blocks);
            Some((BlockRun::new(start, at), state))
        })
    }
}

/// Opens a cache when the last I/O of its killed daemon has ended: that holds the lock.
pub fn quiet_cache(path: &Path) -> File {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    for start in [100, 200] {
        let lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: start,
            l_len: 5,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_SETLKW(&lock)).unwrap();
    }
    file
}

/// What an absent block holds in the cache means nothing: after this it holds garbage.
pub fn scribble_on_absent_blocks(cache: &Path, geometry: Geometry, present: &Present, seed: u64) {
    let file = quiet_cache(cache);
    for (run, _) in present.runs(geometry).filter(|(_, present)| !present) {
        let range = geometry.bytes_of(run);
        file.write_all_at(&noise(seed ^ range.start, range.len() as usize), range.start).unwrap();
    }
}

/// Makes it look as if the machine had been started again: the tmpfs is empty, the boot id is another one.
pub fn reboot(world: &World, metadata: &Path) {
    fs::remove_file(live_path(world, metadata)).unwrap();
    change_superblock(metadata, |superblock| superblock.boot_id = "00000000-0000-4000-8000-000000000000".into());
}

/// Writes another superblock over both copies, as one that a blkferry wrote.
pub fn change_superblock(metadata: &Path, change: impl Fn(&mut Superblock)) {
    change_superblock_pages(metadata, |page| {
        let end = page.payload.iter().position(|&byte| byte == 0).expect("a superblock is shorter than its page");
        let mut superblock = serde_json::from_slice(&page.payload[..end]).unwrap();
        change(&mut superblock);
        page.payload = serde_json::to_vec(&superblock).unwrap();
    });
}

/// Seals changed pages again where valid copies of the superblock are.
pub fn change_superblock_pages(metadata: &Path, change: impl Fn(&mut SealedPage)) {
    let file = OpenOptions::new().read(true).write(true).open(metadata).unwrap();
    for copy in copies(0..2) {
        let mut bytes = [0; PAGE_BYTES];
        file.read_exact_at(&mut bytes, copy).unwrap();
        if let CopyState::Valid(mut page) = SealedPage::decode(&bytes, 1, 0) {
            change(&mut page);
            file.write_all_at(&page.encode(), copy).unwrap();
        }
    }
    file.sync_all().unwrap();
}

fn copies(pages: Range<u64>) -> impl Iterator<Item = u64> {
    pages.map(|page| page * PAGE_BYTES as u64)
}
