//! Replays what the kernel's dm-log-writes has recorded onto a copy of the disk, for `tests/vm/log_writes.sh`: the
//! disk as a power cut would have left it, at any moment that counts.
//!
//! The target logs a write when the flush after it has completed, and one with FUA when it has completed itself. So
//! what stands in the log up to a flush, a FUA write or a mark is what must be on the disk by then. What comes between
//! that and the next such point was under way: a disk may have taken any part of it (`tear`).
//!
//! The log (drivers/md/dm-log-writes.c): a superblock in the first sector, then for each entry a sector with its
//! header, a mark's name in it, and the data behind it. All numbers are little-endian.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};
use nix::fcntl::{FallocateFlags, fallocate};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// What all disks write wholly or not at all, whatever the log counts in.
const SECTOR_BYTES: usize = 512;
/// More than any request of the kernel's.
const MAX_WRITE_BYTES: u64 = 1 << 30;

/// Replays a log of dm-log-writes.
#[derive(Parser)]
struct Args {
    /// The log's device, or a copy of it
    log: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// A line for each point: how many entries lead up to it, `flush`, `fua` or `mark`, and the mark's name
    Points,
    /// Does what the entries say
    Replay {
        /// Where to
        image: PathBuf,
        /// So many entries were replayed before
        #[arg(long, default_value_t = 0)]
        from: usize,
        /// So many are to be in it
        #[arg(long)]
        to: usize,
    },
    /// Does, of the writes up to the next point, some sectors and not others
    Tear {
        /// Where to
        image: PathBuf,
        /// So many entries were replayed before
        #[arg(long)]
        from: usize,
        /// Another one tears them elsewhere
        #[arg(long)]
        seed: u64,
        /// Bytes that the disk writes wholly or not at all
        #[arg(long, default_value_t = SECTOR_BYTES)]
        atom: usize,
    },
}

#[derive(Debug, PartialEq)]
struct Entry {
    /// Where on the disk, and how much.
    start: u64,
    len: u64,
    flags: u64,
    mark: String,
    /// Where in the log the data is.
    data_at: u64,
}

impl Entry {
    /// Is what the log holds up to here on the disk?
    fn point(&self) -> Option<&'static str> {
        let named = [(MARK, "mark"), (FLUSH, "flush"), (FUA, "fua")];
        named.iter().find(|(flag, _)| self.flags & flag != 0).map(|(_, name)| *name)
    }
}

fn wrong<T>(what: impl Into<String>) -> io::Result<T> {
    Err(io::Error::other(what.into()))
}

fn read_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// All entries that the superblock counts.
fn read_entries(log: &File) -> io::Result<Vec<Entry>> {
    let mut sector = vec![0; 512];
    log.read_exact_at(&mut sector, 0)?;
    let sector_bytes = u64::from(u32::from_le_bytes(sector[24..28].try_into().expect("four bytes")));
    if read_u64(&sector, 0) != MAGIC || read_u64(&sector, 8) != VERSION || ![512, 4096].contains(&sector_bytes) {
        return wrong("this is no log of dm-log-writes");
    }
    let count = read_u64(&sector, 16);
    sector.resize(sector_bytes as usize, 0);
    let (mut at, mut entries) = (sector_bytes, Vec::new());
    for number in 1..=count {
        log.read_exact_at(&mut sector, at)?;
        let [start, sectors, flags, data_len] = [0, 8, 16, 24].map(|field| read_u64(&sector, field));
        let len = sectors.saturating_mul(sector_bytes);
        let Some(name) = sector.get(32..).and_then(|rest| rest.get(..data_len as usize)) else {
            return wrong(format!("entry {number}: a mark of {data_len} bytes"));
        };
        if flags & DISCARD == 0 && len > MAX_WRITE_BYTES {
            return wrong(format!("entry {number}: a write of {len} bytes"));
        }
        let mark = String::from_utf8_lossy(name).into_owned();
        at += sector_bytes;
        entries.push(Entry { start: start.saturating_mul(sector_bytes), len, flags, mark, data_at: at });
        // Of a discard there is nothing to log.
        at += if flags & DISCARD == 0 { len } else { 0 };
    }
    Ok(entries)
}

/// Does what the entry says, as far as `takes` lets it, which is asked for each `atom` on the disk.
fn replay_some(
    log: &File,
    entry: &Entry,
    image: &File,
    atom: usize,
    mut takes: impl FnMut() -> bool,
) -> io::Result<()> {
    if entry.len == 0 {
        return Ok(());
    }
    if entry.flags & DISCARD != 0 {
        if takes() {
            let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(image, how, entry.start as i64, entry.len as i64)?;
        }
        return Ok(());
    }
    let mut data = vec![0; entry.len as usize];
    log.read_exact_at(&mut data, entry.data_at)?;
    let mut at = 0;
    while at < data.len() {
        let place = entry.start + at as u64;
        // Atoms begin at multiples of their size on the disk, wherever the write does.
        let end = data.len().min(at + atom - (place % atom as u64) as usize);
        if takes() {
            image.write_all_at(&data[at..end], place)?;
        }
        at = end;
    }
    Ok(())
}

fn replay(log: &File, entry: &Entry, image: &File) -> io::Result<()> {
    replay_some(log, entry, image, entry.len.max(1) as usize, || true)
}

/// Random bits, by SplitMix64.
struct Coin(u64);

impl Coin {
    fn random(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

fn tear(log: &File, entries: &[Entry], image: &File, seed: u64, atom: usize) -> io::Result<()> {
    let mut coin = Coin(seed);
    for entry in entries.iter().take_while(|entry| entry.point().is_none()) {
        // Some are there, some are not, and some are there in part.
        match coin.random() % 3 {
            0 => {}
            1 => replay(log, entry, image)?,
            _ => replay_some(log, entry, image, atom, || coin.random().is_multiple_of(2))?,
        }
    }
    Ok(())
}

fn write_points(entries: &[Entry], out: &mut impl Write) -> io::Result<()> {
    for (entry, number) in entries.iter().zip(1..) {
        match entry.point() {
            Some("mark") => writeln!(out, "{number} mark {}", entry.mark)?,
            Some(kind) => writeln!(out, "{number} {kind}")?,
            None => {}
        }
    }
    Ok(())
}

fn range(entries: &[Entry], from: usize, to: usize) -> io::Result<&[Entry]> {
    entries.get(from..to).map_or_else(|| wrong(format!("the log has {} entries", entries.len())), Ok)
}

fn open(image: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).open(image)
}

fn main() -> io::Result<()> {
    let args = Args::parse();
    let log = File::open(&args.log)?;
    let entries = read_entries(&log)?;
    match args.verb {
        Verb::Points => write_points(&entries, &mut io::stdout().lock()),
        Verb::Replay { image, from, to } => {
            let image = open(&image)?;
            range(&entries, from, to)?.iter().try_for_each(|entry| replay(&log, entry, &image))
        }
        Verb::Tear { image, from, seed, atom } => {
            tear(&log, range(&entries, from, entries.len())?, &open(&image)?, seed, atom.max(1))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log as the kernel writes it, in sectors of 512 bytes: place, sectors, flags, a mark's name or the data's byte.
    fn log_of(entries: &[(u64, u64, u64, &str)]) -> File {
        let numbers = |numbers: &[u64]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
        let mut bytes = numbers(&[MAGIC, VERSION, entries.len() as u64, 512]);
        bytes.resize(512, 0);
        for (start, sectors, flags, text) in entries {
            let (name, data) = if flags & MARK != 0 { (*text, "") } else { ("", *text) };
            let mut header = numbers(&[*start, *sectors, *flags, name.len() as u64]);
            header.extend(name.bytes());
            header.resize(512, 0);
            bytes.extend(header);
            bytes.extend(data.repeat(*sectors as usize * 512).bytes());
        }
        let log = tempfile::tempfile().unwrap();
        log.write_all_at(&bytes, 0).unwrap();
        log
    }

    fn image(sectors: usize) -> File {
        let image = tempfile::tempfile().unwrap();
        image.write_all_at(&b"-".repeat(sectors * 512), 0).unwrap();
        image
    }

    /// The first byte of each sector, which must be like all others in it.
    fn sectors(image: &File) -> String {
        let mut bytes = vec![0; image.metadata().unwrap().len() as usize];
        image.read_exact_at(&mut bytes, 0).unwrap();
        let first = |sector: &[u8]| {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "half a sector");
            if sector[0] == 0 { '0' } else { char::from(sector[0]) }
        };
        bytes.chunks(512).map(first).collect()
    }

    const ENTRIES: [(u64, u64, u64, &str); 8] = [
        (1, 2, 0, "a"),
        (2, 1, 0, "b"),
        (0, 0, FLUSH, ""),
        (0, 0, MARK, "made"),
        (4, 8, FUA | 16, "c"),
        (5, 2, DISCARD, ""),
        (0, 1, 0, "d"),
        (3, 1, FLUSH | FUA, "e"),
    ];

    #[test]
    fn points_are_flushes_fua_writes_and_marks() {
        let mut said = Vec::new();
        write_points(&read_entries(&log_of(&ENTRIES)).unwrap(), &mut said).unwrap();
        assert_eq!(String::from_utf8(said).unwrap(), "3 flush\n4 mark made\n5 fua\n8 flush\n");
    }

    #[test]
    fn entries_are_replayed_in_their_order_and_no_others() {
        let log = log_of(&ENTRIES);
        let entries = read_entries(&log).unwrap();
        let image = image(13);
        let mut at = 0;
        for (to, looks) in [(1, "-aa----------"), (4, "-ab----------"), (6, "-ab-c00ccccc-"), (8, "dabec00ccccc-")] {
            for entry in range(&entries, at, to).unwrap() {
                replay(&log, entry, &image).unwrap();
            }
            assert_eq!(sectors(&image), looks);
            at = to;
        }
        assert!(range(&entries, 8, 9).is_err() && range(&entries, 9, 9).is_err());
    }

    #[test]
    fn what_was_under_way_is_there_in_part_up_to_the_next_point() {
        let log = log_of(&[(0, 8, 0, "a"), (4, 8, 0, "b"), (12, 8, FUA, "c"), (0, 20, 0, "d")]);
        let entries = read_entries(&log).unwrap();
        let mut seen = std::collections::HashSet::new();
        for seed in 0..200 {
            let image = image(20);
            tear(&log, &entries, &image, seed, 512).unwrap();
            let looks = sectors(&image);
            assert!(looks.ends_with("--------") && !looks.contains('d'), "{looks}");
            seen.insert(looks);
        }
        let wanted = ["--------------------", "aaaaaaaa------------", "aaaabbbbbbbb--------", "----bbbbbbbb--------"];
        assert!(wanted.iter().all(|looks| seen.contains(*looks)) && seen.len() > 60, "{seen:?}");
    }

    #[test]
    fn what_a_disk_writes_wholly_is_not_torn() {
        let log = log_of(&[(1, 10, 0, "a")]);
        let entries = read_entries(&log).unwrap();
        for seed in 0..50 {
            let image = image(12);
            tear(&log, &entries, &image, seed, 2048).unwrap();
            let looks = sectors(&image);
            let atoms = [&looks[1..4], &looks[4..8], &looks[8..11]];
            assert!(atoms.iter().all(|atom| atom.bytes().all(|sector| sector == atom.as_bytes()[0])), "{looks}");
        }
    }

    #[test]
    fn another_file_is_refused() {
        let log = tempfile::tempfile().unwrap();
        assert!(read_entries(&log).is_err());
        log.write_all_at(&[7; 4096], 0).unwrap();
        assert!(read_entries(&log).is_err());
        // A mark longer than its sector, a write longer than any.
        for damage in [(512 + 24, 481_u64), (512 + 8, u64::MAX / 512)] {
            let log = log_of(&[(0, 0, MARK, "x")]);
            assert_eq!(read_entries(&log).unwrap().len(), 1);
            log.write_all_at(&damage.1.to_le_bytes(), damage.0).unwrap();
            assert!(read_entries(&log).is_err());
        }
    }
}
