//! TRIM, WRITE_ZEROES and CACHE on blocks that are not here: once zero, always zero; the source never comes back.

use blkferry::nbd::{Command, CommandFlags, NbdError};

use crate::bench::{Phase, attach_in, finish, qemu_io, run, text};
use crate::client::Client;
use crate::common::{Device, World, assert_same, make_image};

const MIB: u64 = 1 << 20;
/// All of it data: a byte of the source that comes back shows.
const SIZE: u64 = 16 * MIB + 512;
const NONE: CommandFlags = CommandFlags::empty();

/// A world, an image of noise in it, and what the disk must hold.
fn noisy_world() -> (World, Vec<u8>) {
    let world = World::new();
    let image = world.path("image.raw");
    make_image(&image, SIZE, &[(0, SIZE)]);
    let disk = std::fs::read(&image).unwrap();
    (world, disk)
}

fn assert_disk(client: &mut Client, want: &[u8]) {
    let got = client.read_all();
    if let Some(at) = (0..want.len()).find(|&i| want[i] != got[i]) {
        panic!("wrong at {at}: {:#x} instead of {:#x}", got[at], want[at]);
    }
}

fn data_bytes(device: &Device<'_>) -> u64 {
    device.status()["wire"]["data_bytes"].as_u64().unwrap()
}

/// Zeroes and trims of all kinds, in the model and on the device. Flags, offset, length; `None` trims.
fn change(client: &mut Client, disk: &mut [u8], flags: Option<CommandFlags>, offset: u64, len: u64, block: u64) {
    let (start, end) = match flags {
        Some(flags) => {
            client.zero(flags, offset, len as u32).unwrap();
            (offset, offset + len)
        }
        None => {
            client.trim(offset, len as u32);
            // Whole blocks, of which the short last one is one, read as zeros; the rest stays as it is.
            let end = if offset + len == SIZE { SIZE } else { (offset + len) / block * block };
            (offset.next_multiple_of(block), end)
        }
    };
    if start < end {
        disk[start as usize..end as usize].fill(0);
    }
}

#[test]
fn what_became_zero_stays_zero() {
    for (phase, block) in [Phase::Before, Phase::During, Phase::After].into_iter().zip([4096, 4096, 65536]) {
        let (world, mut disk) = noisy_world();
        let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
        let export = world.export(&image);
        let device = attach_in(&world, phase, &export.uri, &cache, &["--block-size", &block.to_string()]);
        let mut client = Client::connect(&device.uri);
        let (hole, keep, fua) = (NONE, CommandFlags::NO_HOLE, CommandFlags::FUA);
        let kinds = [Some(hole), Some(keep), Some(hole | fua), Some(CommandFlags::FAST_ZERO), None];
        for (i, flags) in kinds.into_iter().enumerate() {
            let at = i as u64 * 3 * MIB;
            // Whole blocks: many, one.
            change(&mut client, &mut disk, flags, at, MIB, block);
            change(&mut client, &mut disk, flags, at + MIB + block, block, block);
            if phase != Phase::After && flags == Some(CommandFlags::FAST_ZERO) {
                continue;
            }
            // Parts: of two blocks and those between; inside one block; of two blocks and none between.
            change(&mut client, &mut disk, flags, at + 2 * MIB - 1, 5 * block + 77, block);
            change(&mut client, &mut disk, flags, at + 2 * MIB + 20 * block + 13, 99, block);
            change(&mut client, &mut disk, flags, at + 2 * MIB + 31 * block - 5, 10, block);
        }
        // The short last block.
        change(&mut client, &mut disk, None, 16 * MIB, 512, block);
        assert_disk(&mut client, &disk);
        device.set("hydrate=auto");
        device.wait_complete();
        assert_disk(&mut client, &disk);
        drop(client);
        device.detach();
        assert!(std::fs::read(&cache).unwrap() == disk, "the raw image is not what the device was");
    }
}

#[test]
fn whole_blocks_need_no_source_and_no_wire() {
    let (world, mut disk) = noisy_world();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    let export = world.export(&image);
    let device = attach_in(&world, Phase::Before, &export.uri, &cache, &[]);
    let mut client = Client::connect(&device.uri);
    for (i, flags) in
        [Some(NONE), Some(CommandFlags::NO_HOLE), Some(CommandFlags::FAST_ZERO), None].into_iter().enumerate()
    {
        change(&mut client, &mut disk, flags, i as u64 * 2 * MIB, 2 * MIB, 4096);
    }
    assert_eq!(client.read(0, 8 << 20).unwrap(), vec![0; 8 << 20]);
    let status = device.status();
    assert_eq!(status["wire"]["data_bytes"], 0, "{status}");
    assert_eq!(status["blocks"]["dirty"], 8 * MIB / 4096, "{status}");
    // A trim of less than a block does nothing, and fetches nothing.
    client.trim(9 * MIB + 1, 4000);
    assert_eq!(data_bytes(&device), 0);
    // Parts of absent blocks are fetched, those blocks and no others.
    client.zero(NONE, 10 * MIB + 4000, 200).unwrap();
    disk[(10 * MIB + 4000) as usize..][..200].fill(0);
    assert_eq!(data_bytes(&device), 2 * 4096);
    // A fast zero that would have to fetch is refused, and changes nothing.
    assert_eq!(client.zero(CommandFlags::FAST_ZERO, 11 * MIB + 1, 8192), Err(NbdError::NotSup));
    assert_eq!(data_bytes(&device), 2 * 4096);
    assert_disk(&mut client, &disk);
    // Of all that, NO_HOLE alone takes space: 2 MiB, and a few blocks for what was fetched.
    let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&cache).unwrap()) * 512;
    assert!((2 * MIB..=2 * MIB + (64 << 10)).contains(&(used - 8 * MIB)), "{used} bytes are used");
    drop(client);
    finish(device);
    assert!(std::fs::read(&cache).unwrap() == disk);
}

#[test]
fn space_comes_back_when_blocks_are_given_up() {
    use std::os::unix::fs::MetadataExt;
    let (world, _) = noisy_world();
    let cache = world.path("cache.raw");
    let export = world.export(&world.path("image.raw"));
    let device = attach_in(&world, Phase::After, &export.uri, &cache, &[]);
    let used = || std::fs::metadata(&cache).unwrap().blocks() * 512;
    let full = used();
    assert!(full >= SIZE);
    qemu_io(&device.uri, &["write -z 0 4M"]);
    assert!(used() > full - MIB, "NO_HOLE keeps the space");
    qemu_io(&device.uri, &["discard 4M 4M", "write -z -u 8M 4M"]);
    assert!(used() <= full - 7 * MIB, "{} of {full} bytes are still used", used());
    qemu_io(&device.uri, &["read -P 0 0 12M"]);
    device.detach();
}

#[test]
fn a_cached_range_needs_no_source() {
    let (world, disk) = noisy_world();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    let export = world.export(&image);
    let device = attach_in(&world, Phase::Before, &export.uri, &cache, &[]);
    let mut client = Client::connect(&device.uri);
    client.ask(Command::Cache, NONE, 3 * MIB + 100, (2 * MIB) as u32, &[]).unwrap();
    let status = device.status();
    assert_eq!(status["blocks"]["present"], 2 * MIB / 4096 + 1, "{status}");
    assert_eq!(status["blocks"]["dirty"], 0, "{status}");
    export.stop();
    let got = client.read(3 * MIB, (2 * MIB) as u32).unwrap();
    assert!(got == disk[(3 * MIB) as usize..][..(2 * MIB) as usize]);
    // The source comes back, and the rest follows.
    let socket = export_socket(&device);
    let _again = world.export_at(&image, &format!("unix:{socket}"));
    assert_disk(&mut client, &disk);
    drop(client);
    finish(device);
    assert_same(&image, &cache);
}

fn export_socket(device: &Device<'_>) -> String {
    let uri = device.status()["source"]["uri"].as_str().unwrap().to_owned();
    uri.split_once("socket=").unwrap().1.to_owned()
}

#[test]
fn a_write_just_before_the_source_would_be_asked() {
    // What QEMU sends: zeroing with and without unmapping, discards, writes with FUA, flushes; one connection.
    let (world, mut disk) = noisy_world();
    let cache = world.path("cache.raw");
    let export = world.export(&world.path("image.raw"));
    let device = attach_in(&world, Phase::During, &export.uri, &cache, &[]);
    qemu_io(
        &device.uri,
        &[
            "write -P 0x31 -f 1000 5000",
            "write -z 1M 64K",
            "write -z -u 2M 64K",
            "write -z -n 3M 64K",
            "discard 4M 64K",
            "flush",
            "aio_write -P 0x32 5M 1M",
            "aio_write -P 0x33 6M 512",
            "aio_flush",
            "read -P 0x32 5M 1M",
            "read -P 0 1M 64K",
        ],
    );
    disk[1000..6000].fill(0x31);
    (1..5).for_each(|mib| disk[(mib * MIB) as usize..][..64 << 10].fill(0));
    disk[(5 * MIB) as usize..][..MIB as usize].fill(0x32);
    disk[(6 * MIB) as usize..][..512].fill(0x33);
    let copy = world.path("copy.raw");
    run("nbdcopy", &[&device.uri, text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == disk);
    finish(device);
    assert_same(&copy, &cache);
}

#[test]
fn wrong_requests_are_refused_one_by_one() {
    let (world, disk) = noisy_world();
    let cache = world.path("cache.raw");
    let export = world.export(&world.path("image.raw"));
    let device = attach_in(&world, Phase::Before, &export.uri, &cache, &[]);
    for mut client in [Client::connect(&device.uri), Client::plain(&device.uri)] {
        let mut ask = |command, flags, offset, len, payload: &[u8]| client.ask(command, flags, offset, len, payload);
        assert_eq!(ask(Command::Read, NONE, SIZE - 511, 512, &[]), Err(NbdError::Inval));
        assert_eq!(ask(Command::Read, NONE, u64::MAX - 100, 512, &[]), Err(NbdError::Inval));
        assert_eq!(ask(Command::Write, NONE, SIZE, 512, &[1; 512]), Err(NbdError::NoSpc));
        assert!(ask(Command::WriteZeroes, NONE, SIZE - 1, 2, &[]).is_err());
        assert!(ask(Command::Trim, NONE, SIZE, 1, &[]).is_err());
        assert_eq!(ask(Command::Unknown(77), NONE, 0, 0, &[]), Err(NbdError::Inval));
        assert!(ask(Command::Write, CommandFlags::from_bits_retain(1 << 15), 0, 512, &[1; 512]).is_err());
        assert!(ask(Command::Write, NONE, 0, (32 << 20) + 1, &vec![1; (32 << 20) + 1]).is_err());
        assert!(ask(Command::FerryHash, NONE, 0, 4096, &[]).is_err());
        assert_eq!(client.read(0, 512).unwrap(), &disk[..512], "the connection lives on");
    }
    finish(device);
    assert_same(&world.path("image.raw"), &cache);
}
