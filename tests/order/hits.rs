//! I8 and I9: what is here is answered while 64 misses wait for the source.

use blkferry::nbd::{Command, CommandFlags, Wants};

use crate::client::Client;
use crate::manners::Manners;
use crate::rig::{BLOCK, Rig, assert_disk, assert_raw_image, filled, note};

/// Blocks from 0 that are here before anything waits.
const PRESENT: u64 = 128;
const MISSES: u64 = 64;

/// The block of a miss: no two are neighbours, so each is a fetch of its own.
fn missed(index: u64) -> u64 {
    PRESENT + 16 + 3 * index
}

/// 64 misses on `waiting`; then everything that needs no source on `free` (the same connection if `None`).
fn everything_else_passes(manners: Manners, same_connection: bool, wants: Wants) {
    let rig = Rig::new(1024, manners);
    let device = rig.attach("off");
    let mut waiting = Client::connect(&device.uri);
    let mut other = Client::connect_wanting(&device.uri, wants);
    assert_eq!(waiting.read(0, (PRESENT * BLOCK) as u32), rig.expected[..(PRESENT * BLOCK) as usize]);

    rig.source.hold_all();
    let misses: Vec<(u64, u64)> =
        (0..MISSES).map(|index| (missed(index), waiting.start_read(missed(index) * BLOCK, BLOCK as u32))).collect();
    rig.source.wait_held(MISSES as usize);

    let free = if same_connection { &mut waiting } else { &mut other };
    let mut expected = rig.expected.clone();
    without_the_source(free, &mut expected);

    // All of that was answered, and not one of the misses.
    assert_eq!(rig.source.held().len(), MISSES as usize, "no reply of the source was let go");
    assert!(waiting.answered().is_empty(), "a miss was answered with no data from the source");
    assert_eq!(waiting.unanswered(), MISSES as usize);
    let status = device.status();
    assert_eq!(status["frontend"]["waiting_requests"], MISSES);
    assert_eq!(status["state"], "active", "a slow source is not a lost one");

    rig.source.let_go();
    for (block, cookie) in misses {
        let got = waiting.wait(cookie).unwrap();
        // A read that was under way when its block was overwritten may say either.
        let now = &expected[(block * BLOCK) as usize..][..BLOCK as usize];
        assert!(got == rig.block(block) || got == now, "block {block}");
    }
    assert_disk(&mut other, &expected);
    assert_disk(&mut waiting, &expected);
    assert_raw_image(device, &rig.cache(), &expected);
}

/// Hits, whole-block changes of blocks that are present, absent or being fetched, flushes.
fn without_the_source(client: &mut Client, expected: &mut [u8]) {
    let block = BLOCK as usize;
    // Hits: a block, a part of one, all of them.
    for (offset, len) in [(3 * BLOCK, block), (5 * BLOCK + 512, 1024), (0, PRESENT as usize * block)] {
        assert_eq!(client.read(offset, len as u32), expected[offset as usize..offset as usize + len]);
    }
    // Writes: to present blocks (whole, and in part), to absent ones, to one that is being fetched, to a mix.
    let writes = [
        (7 * BLOCK, filled(0x11)),
        (9 * BLOCK + 100, vec![0x12; 700]),
        (900 * BLOCK, filled(0x13)),
        (missed(0) * BLOCK, filled(0x14)),
        ((missed(2) - 1) * BLOCK, vec![0x15; 7 * block]),
        ((PRESENT - 1) * BLOCK, vec![0x16; 4 * block]),
    ];
    for (offset, data) in &writes {
        client.write(*offset, data);
        note(expected, *offset, data);
        assert_eq!(client.read(*offset, data.len() as u32), *data, "what was just written is a hit");
    }
    let fua = client.ask(Command::Write, CommandFlags::FUA, 910 * BLOCK, BLOCK as u32, &filled(0x17));
    client.wait(fua).unwrap();
    note(expected, 910 * BLOCK, &filled(0x17));
    // Trims and zeroings: present, absent, being fetched.
    let zeros = [
        (Command::Trim, 20, 2),
        (Command::Trim, 920, 3),
        (Command::Trim, missed(10), 1),
        (Command::WriteZeroes, 30, 2),
        (Command::WriteZeroes, 930, 3),
        (Command::WriteZeroes, missed(20), 1),
    ];
    for (command, first, count) in zeros {
        client.perform(command, CommandFlags::empty(), first * BLOCK, (count * BLOCK) as u32).unwrap();
        note(expected, first * BLOCK, &vec![0; count as usize * block]);
        assert_eq!(client.read(first * BLOCK, (count * BLOCK) as u32), vec![0; count as usize * block]);
    }
    client.flush();
    let fua = client.perform(Command::WriteZeroes, CommandFlags::FUA, 940 * BLOCK, BLOCK as u32);
    fua.unwrap();
    note(expected, 940 * BLOCK, &vec![0; block]);
    client.perform(Command::Cache, CommandFlags::empty(), 0, (8 * BLOCK) as u32).unwrap();
    if client.session.base_allocation.is_some() {
        client.perform(Command::BlockStatus, CommandFlags::empty(), 0, (16 * BLOCK) as u32).unwrap();
    }
}

fn structured() -> Wants {
    Wants { structured: true, base_allocation: true, ..Wants::default() }
}

#[test]
fn hits_writes_and_flushes_pass_64_misses_on_their_own_connection() {
    everything_else_passes(Manners::default(), true, structured());
}

#[test]
fn hits_writes_and_flushes_pass_64_misses_on_another_connection() {
    everything_else_passes(Manners::default(), false, structured());
}

#[test]
fn hits_writes_and_flushes_pass_64_misses_with_simple_replies_and_one_connection_to_the_source() {
    let manners = Manners { several: false, structured: false, ..Manners::default() };
    everything_else_passes(manners, false, Wants::default());
}

/// Large misses: what a guest reads ahead must not take the place of what it has.
#[test]
fn a_hit_passes_64_misses_of_a_mebibyte() {
    let mib = 1 << 20;
    let rig = Rig::new(80 * 256, Manners::default());
    let device = rig.attach("off");
    let mut client = Client::connect(&device.uri);
    client.read(0, mib as u32);
    rig.source.hold_all();
    let misses: Vec<u64> = (1..=MISSES).map(|index| client.start_read(index * mib, mib as u32)).collect();
    rig.source.wait_held(MISSES as usize);
    let hit = client.start_read(0, BLOCK as u32);
    let write = client.start_write(70 * mib, &filled(0x21));
    // Both, or the test says after its patience that no reply came.
    assert_eq!(client.wait(hit).unwrap(), rig.block(0));
    client.wait(write).unwrap();
    assert!(client.answered().is_empty(), "a miss was answered with no data from the source");
    rig.source.let_go();
    for (index, cookie) in (1..).zip(misses) {
        assert_eq!(client.wait(cookie).unwrap(), rig.expected[(index * mib) as usize..][..mib as usize]);
    }
    device.world.ok(["detach", "disk", "--incomplete"]);
}
