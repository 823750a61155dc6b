//! What crosses the network: every byte that is needed, once, and nothing else.
//!
//! Counted by a relay between source and blkferry, which must agree with `status --json`; needed is what the image
//! itself says: its granules of 4 KiB that hold anything but zeros, less those that the guest overwrote.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;

use crate::bench::{GRANULE, Phase, attach_in, granules_of_data, mixed_image, qemu_io, run, text};
use crate::client::Client;
use crate::common::{Device, World, assert_same, make_image};
use crate::relay::Relay;
use crate::servers::nbdkit_tcp;

/// A short last block, and more than one stripe of everything.
const SIZE: u64 = (48 << 20) + 512;
/// Handshakes of three connections, questions about holes and the answers: nothing that grows with the disk's data.
const HANDSHAKES_BYTES: u64 = 4096;
/// To a source that takes several: one for demand, two for hydration.
const CONNECTIONS: u64 = 3;

/// Bytes of an image's granules of data, but for those that lie in one of `overwritten`.
fn needed_bytes(image: &[u8], overwritten: &[Range<u64>]) -> u64 {
    let kept = |&(at, len): &(u64, u64)| !overwritten.iter().any(|gone| gone.start <= at && at + len <= gone.end);
    granules_of_data(image).iter().filter(|granule| kept(granule)).map(|(_, len)| len).sum()
}

/// The device's own count, once it is complete and has hung up.
fn wire_of(device: &Device<'_>, relay: &Relay) -> Value {
    let status = device.wait_for(|status| status["source_needed"] == false && status["source"]["connections"] == 0);
    relay.wait_quiet();
    status["wire"].clone()
}

/// The greeting of an NBD server, in bytes.
const GREETING_BYTES: u64 = 18;

/// What a source says on the connection that asks what is hot, at most: a handshake, and the answer for a small disk.
const HOT_BYTES: u64 = 2048;

/// The relay and the device count the same, to the byte, but for what nobody has read of connections that were given up:
/// greetings of those made on the chance that a far source takes them (a near one seems far if the machine is busy), and
/// what was said on the one that asks what is hot, if there was nothing left to fetch before it was answered.
fn assert_counts_agree(wire: &Value, relay: &Relay) {
    let unread = relay.received() - wire["received_bytes"].as_u64().unwrap();
    let spares = relay.connections() - CONNECTIONS;
    let greetings = unread.is_multiple_of(GREETING_BYTES) && unread / GREETING_BYTES <= spares;
    assert!(greetings || (spares > 0 && unread <= HOT_BYTES), "received: {unread} more");
    assert_eq!(wire["sent_bytes"], relay.to_source(), "sent");
}

/// Attaches, and lets hydration begin when all connections are up: one that is given up in the middle of its handshake
/// leaves bytes behind that nobody has read.
fn attach_through<'a>(world: &'a World, relay: &Relay, cache: &Path) -> Device<'a> {
    let device = attach_in(world, Phase::Before, &relay.uri(), cache, &[]);
    device.wait_for(|status| status["source"]["connections"] == CONNECTIONS);
    device
}

#[test]
fn what_is_needed_crosses_once_and_nothing_else() {
    let world = World::new();
    let (image, cache, expected) = (world.path("image.raw"), world.path("cache.raw"), world.path("expected.raw"));
    mixed_image(&image, SIZE);
    let export = world.export_at(&image, "127.0.0.1:0");
    let relay = Relay::before(&export.uri);
    let device = attach_through(&world, &relay, &cache);
    assert!(relay.received() < HANDSHAKES_BYTES, "nothing was asked for yet");

    // The guest overwrites data, zeros and holes; writes zeros, and gives blocks up: none of these is needed.
    qemu_io(
        &device.uri,
        &[
            "write -P 0xa1 4M 3M",
            "write -P 0xa2 20480 4096",
            "write -z 9M 1M",
            "discard 12M 2M",
            "write -P 0xa3 48M 512",
        ],
    );
    let mib = |start: u64, end: u64| start << 20..end << 20;
    let overwritten = [mib(4, 7), 20480..24576, mib(9, 10), mib(12, 14), 48 << 20..SIZE];
    let status = device.status();
    assert_eq!(status["wire"]["data_bytes"], 0, "a write of whole blocks needs nothing: {status}");
    // It reads some of what it did not write, aligned and not, and writes a part of a block.
    qemu_io(&device.uri, &["read 0 1M", "read 2000001 777777", "write -P 0xa4 30000000 1000", "read 8M 3M"]);

    device.set("hydrate=auto");
    let wire = wire_of(&device, &relay);
    let needed = needed_bytes(&std::fs::read(&image).unwrap(), &overwritten);
    println!("needed {needed}; told {wire}; relay: {} from the source", relay.received());
    assert!(needed > 16 << 20, "the image makes the test worth while");
    assert_counts_agree(&wire, &relay);
    assert_eq!(wire["data_bytes"], needed, "each granule that is needed, once");
    assert!(relay.received() * 100 <= needed * 101, "{} bytes for {needed}", relay.received());
    // Requests and heads of answers, too: both directions together.
    assert!((relay.received() + relay.to_source()) * 100 <= needed * 101, "{} more sent", relay.to_source());

    run("cp", &[text(&image), text(&expected)]);
    let write = |range: Range<u64>, byte: u8| {
        let file = std::fs::File::options().write(true).open(&expected).unwrap();
        let bytes = vec![byte; (range.end - range.start) as usize];
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, range.start).unwrap();
    };
    overwritten.iter().zip([0xa1, 0xa2, 0, 0, 0xa3]).for_each(|(range, byte)| write(range.clone(), byte));
    write(30000000..30001000, 0xa4);
    device.detach();
    assert_same(&expected, &cache);
}

#[test]
fn readers_and_hydration_share_what_they_fetch() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let export = world.export_at(&image, "127.0.0.1:0");
    let relay = Relay::before(&export.uri);
    let device = attach_through(&world, &relay, &cache);
    let wanted = std::fs::read(&image).unwrap();
    std::thread::scope(|scope| {
        for reader in 0..4 {
            let (uri, wanted) = (&device.uri, &wanted);
            scope.spawn(move || read_in_own_order(uri, reader, wanted));
        }
        device.set("hydrate=auto");
    });
    let wire = wire_of(&device, &relay);
    let needed = needed_bytes(&wanted, &[]);
    assert_counts_agree(&wire, &relay);
    assert_eq!(wire["data_bytes"], needed, "each granule once, whoever asks for it");
    device.detach();
    assert_same(&image, &cache);
}

/// Reads the whole disk in requests of odd sizes, eight at a time, from a quarter of its own on.
fn read_in_own_order(uri: &str, reader: u64, wanted: &[u8]) {
    let mut client = Client::connect(uri);
    let piece = 50_000 + 7_777 * reader;
    let count = SIZE.div_ceil(piece);
    let mut under_way = std::collections::HashMap::new();
    for i in 0..count {
        let offset = (i + count * reader / 4) % count * piece;
        let len = piece.min(SIZE - offset) as u32;
        let cookie = client.send(blkferry::nbd::Command::Read, blkferry::nbd::CommandFlags::empty(), offset, len, &[]);
        under_way.insert(cookie, offset as usize);
        while under_way.len() >= 8 || (i + 1 == count && !under_way.is_empty()) {
            let (cookie, answer) = client.receive();
            let (offset, bytes) = (under_way.remove(&cookie).unwrap(), answer.unwrap());
            assert!(bytes == wanted[offset..offset + bytes.len()], "reader {reader}: wrong data at {offset}");
        }
    }
}

/// The worst that an image can do: every other granule is data. Each stretch of data then costs the head of its
/// chunk (28 bytes) and the mention of the zeros beside it (32 bytes), and both are mentioned in the answer about holes
/// (8 bytes each), which here comes when everything has been asked for.
#[test]
fn an_image_in_shreds_costs_heads_of_chunks_only() {
    for written_zeros in [false, true] {
        let world = World::new();
        let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
        let size = 16 << 20;
        let data: Vec<(u64, u64)> = (0..size).step_by(2 * GRANULE).map(|at| (at, GRANULE as u64)).collect();
        make_image(&image, size, &data);
        if written_zeros {
            let file = std::fs::File::options().write(true).open(&image).unwrap();
            for (at, _) in &data {
                std::os::unix::fs::FileExt::write_all_at(&file, &[0; GRANULE], at + GRANULE as u64).unwrap();
            }
            file.sync_all().unwrap();
        }
        let export = world.export_at(&image, "127.0.0.1:0");
        let relay = Relay::before(&export.uri);
        let device = attach_through(&world, &relay, &cache);
        device.set("hydrate=auto");
        let wire = wire_of(&device, &relay);
        let (pieces, received) = (data.len() as u64, relay.received());
        let needed = pieces * GRANULE as u64;
        println!("written zeros: {written_zeros}; needed {needed}; received {received}; sent {}", relay.to_source());
        assert_counts_agree(&wire, &relay);
        assert_eq!(wire["data_bytes"], needed);
        assert!(received <= needed + pieces * 76 + HANDSHAKES_BYTES, "{received} bytes for {needed}");
        device.detach();
        assert_same(&image, &cache);
    }
}

/// A foreign source sends written zeros as data, and is asked for samples to know it by. Holes do not cross.
#[test]
fn a_foreign_source_sends_no_holes() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let nbdkit = nbdkit_tcp(&world, &["file", text(&image)]);
    let relay = Relay::before(&nbdkit.uri);
    let device = attach_through(&world, &relay, &cache);
    // Blocks that were sampled may cross again: a sample is not kept.
    let samples = device.status()["wire"]["data_bytes"].as_u64().unwrap();
    assert!(samples <= 256 << 10, "{samples} bytes to know the disk by");
    device.set("hydrate=auto");
    let wire = wire_of(&device, &relay);
    assert_counts_agree(&wire, &relay);
    let allocated: u64 = crate::bench::stripes(SIZE)
        .iter()
        .filter(|(_, _, kind)| *kind != crate::bench::Kind::Hole)
        .map(|(at, len, _)| {
            (at + len).next_multiple_of(GRANULE as u64).min(SIZE) - at / GRANULE as u64 * GRANULE as u64
        })
        .sum();
    let data = wire["data_bytes"].as_u64().unwrap();
    assert_eq!(data, allocated + samples, "what is allocated, once, and the samples");
    assert!(relay.received() * 100 <= (allocated + samples) * 101);
    device.detach();
    assert_same(&image, &cache);
}
