//! The guest that writes stamps (tests/guest/writer), seen from outside: what it told of has to be on its disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::unistd::{Whence, lseek};

use crate::common::{World, tool, tool_output};

/// Where the guest's ext4 file system begins: behind 1 MiB and 32 MiB of boot partition.
const ROOT_OFFSET: u64 = 33 << 20;
/// Emulated machines on a busy host: nothing here is a matter of seconds.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Waits for something that must come.
pub fn poll(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn text_of(console: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(console).unwrap_or_default()).into_owned()
}

/// Has the guest, or its writer, lost its disk?
pub fn is_bad(console: &Path) -> bool {
    let text = text_of(console);
    text.contains("FERRY-WRITER-BAD") || text.contains("I/O error")
}

/// What the guest said on its console that it wrote: number and time of each stamp.
pub fn stamps_in(console: &Path) -> Vec<(u64, u64)> {
    assert!(!is_bad(console), "{}", text_of(console));
    told_in(console)
}

/// The same of a guest that may have lost its disk after that.
pub fn told_in(console: &Path) -> Vec<(u64, u64)> {
    let text = text_of(console);
    // The last line may be half a line.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let stamps = whole.lines().filter_map(|line| line.trim().strip_prefix("FERRY-STAMP "));
    stamps.filter_map(|words| words.split_once(' ')).map(|(n, at)| (n.parse().unwrap(), at.parse().unwrap())).collect()
}

/// Every stamp that was told of has to be on the disk, and its file system whole once its journal was replayed.
pub fn assert_stamps(world: &World, disk: &Path, told: &[(u64, u64)]) {
    // e2fsck forgets an offset when it has replayed a journal: it gets the file system alone.
    let fs = world.path("root.raw");
    cut(disk, ROOT_OFFSET, &fs);
    let fs = fs.to_str().unwrap();
    // It was cut off while it ran: the journal is replayed, as by the next boot.
    let replayed = tool_output("e2fsck", ["-p", fs]);
    let said = String::from_utf8_lossy(&replayed.stdout);
    assert!(replayed.status.code().is_some_and(|code| code <= 1), "{said}");
    tool("e2fsck", ["-f", "-n", fs]);
    let file = tool("debugfs", ["-R", "cat /var/lib/ferry/stamps", fs]);
    assert!(!told.is_empty());
    for (n, at) in told {
        let line = &file[(*n as usize - 1) * 512..][..512];
        assert_eq!(line.trim(), format!("stamp {n} {at}"), "a stamp that was durable is not there");
    }
    println!("{} stamps were told of, all are there, the file system is whole", told.len());
}

/// Goes through what is not a hole from there on, MiB by MiB.
fn each_piece(disk: &Path, from: u64, mut work: impl FnMut(u64, &[u8])) {
    let disk = File::open(disk).unwrap();
    let mut at = from;
    // No data any more: ENXIO.
    while let Ok(data) = lseek(&disk, at as i64, Whence::SeekData) {
        let hole = lseek(&disk, data, Whence::SeekHole).unwrap() as u64;
        at = data as u64;
        while at < hole {
            let mut bytes = vec![0; (hole - at).min(1 << 20) as usize];
            disk.read_exact_at(&mut bytes, at).unwrap();
            work(at, &bytes);
            at += bytes.len() as u64;
        }
    }
}

/// Copies a disk from there on; holes stay holes.
fn cut(disk: &Path, from: u64, to: &Path) {
    let to = File::create(to).unwrap();
    to.set_len(disk.metadata().unwrap().len() - from).unwrap();
    each_piece(disk, from, |at, bytes| to.write_all_at(bytes, at - from).unwrap());
}

/// Bytes of the blocks that are not zeros: the most that may cross a wire once.
pub fn data_of(disk: &Path) -> u64 {
    let mut sum = 0;
    each_piece(disk, 0, |_, bytes| {
        let blocks = bytes.chunks(4096).filter(|block| block.iter().any(|&byte| byte != 0));
        sum += blocks.map(|block| block.len() as u64).sum::<u64>();
    });
    sum
}
