//! I3, I4 and I5: what the guest wrote stays, whenever the source's answer comes.

use std::thread;

use blkferry::nbd::{Command, CommandFlags, NbdError};

use crate::client::Client;
use crate::manners::Manners;
use crate::rig::{BLOCK, Rig, assert_disk, assert_raw_image, filled, note};

#[test]
fn partial_writes_to_absent_blocks_are_merged_with_one_fetch_a_block() {
    let rig = Rig::new(256, Manners::default());
    let mut expected = rig.expected.clone();
    let device = rig.attach("off");
    let mut client = Client::connect(&device.uri);
    let mut other = Client::connect(&device.uri);
    rig.source.hold_all();
    // Two in block 5; one from the middle of 6 to the middle of 9, with two whole blocks inside; zeros in 11.
    let writes = [(5 * BLOCK + 50, vec![0x51; 100]), (5 * BLOCK + 3000, vec![0x52; 1096])];
    let wide = (6 * BLOCK + 1000, vec![0x53; 3 * BLOCK as usize]);
    let first = client.start_write(writes[0].0, &writes[0].1);
    let second = other.start_write(writes[1].0, &writes[1].1);
    let third = client.start_write(wide.0, &wide.1);
    let zero = client.start(Command::WriteZeroes, 11 * BLOCK + 512, 512);
    rig.source.wait_held(4);
    let read = other.start_read(5 * BLOCK, BLOCK as u32);
    // Something else in between, so that a reply that came too early would be seen.
    client.write(100 * BLOCK, &filled(0x54));
    other.write(101 * BLOCK, &filled(0x55));
    assert!(client.answered().is_empty() && other.answered().is_empty(), "a partial write has to wait for its block");
    let mut blocks: Vec<u64> = rig.source.held().iter().map(|asked| asked.offset / BLOCK).collect();
    blocks.sort_unstable();
    assert_eq!(blocks, [5, 6, 9, 11], "the blocks at the edges, once each");

    rig.source.let_go();
    client.wait(first).unwrap();
    client.wait(third).unwrap();
    client.wait(zero).unwrap();
    other.wait(second).unwrap();
    let before = expected[5 * 4096..6 * 4096].to_vec();
    for (offset, data) in writes.iter().chain([&wide]) {
        note(&mut expected, *offset, data);
    }
    note(&mut expected, 11 * BLOCK + 512, &[0; 512]);
    note(&mut expected, 100 * BLOCK, &filled(0x54));
    note(&mut expected, 101 * BLOCK, &filled(0x55));
    let got = other.wait(read).unwrap();
    for (range, words) in
        [(0..50, "untouched"), (50..150, "first write"), (150..3000, "between"), (3000..4096, "second")]
    {
        let now = &expected[5 * 4096..6 * 4096][range.clone()];
        assert!(got[range.clone()] == *now || got[range.clone()] == before[range], "{words}");
    }
    assert_disk(&mut client, &expected);
    assert_eq!(rig.source.times_asked(BLOCK)[5], 1);
    assert_raw_image(device, &rig.cache(), &expected);
}

#[test]
fn what_needs_no_merge_does_not_ask_the_source() {
    let rig = Rig::new(64, Manners::default());
    let mut expected = rig.expected.clone();
    let device = rig.attach("off");
    let mut client = Client::connect(&device.uri);
    rig.source.hold_all();
    // A trim gives up whole blocks only: these have none, or one.
    client.perform(Command::Trim, CommandFlags::empty(), 5 * BLOCK + 512, 1024).unwrap();
    client.perform(Command::Trim, CommandFlags::empty(), 7 * BLOCK + 512, 2 * BLOCK as u32).unwrap();
    note(&mut expected, 8 * BLOCK, &filled(0));
    // Zeros that would have to wait are not fast.
    let fast = CommandFlags::FAST_ZERO;
    let refused = client.perform(Command::WriteZeroes, fast, 20 * BLOCK + 512, BLOCK as u32);
    assert_eq!(refused.unwrap_err(), NbdError::NotSup);
    client.perform(Command::WriteZeroes, fast, 30 * BLOCK, BLOCK as u32).unwrap();
    note(&mut expected, 30 * BLOCK, &filled(0));
    assert!(rig.source.asked().is_empty(), "{:?}", rig.source.asked());
    rig.source.let_go();
    assert_disk(&mut client, &expected);
    assert_raw_image(device, &rig.cache(), &expected);
}

/// One block of a fetch is changed while the source's answer is held.
fn a_change_wins(hydrate: &str, change: impl Fn(&mut Client, u64) -> Vec<u8>) {
    let rig = Rig::new(512, Manners::default());
    let mut expected = rig.expected.clone();
    let device = rig.attach("off");
    let mut client = Client::connect(&device.uri);
    rig.source.hold_all();
    device.set(&format!("hydrate={hydrate}"));
    let reads = [client.start_read(40 * BLOCK, 3 * BLOCK as u32), client.start_read(41 * BLOCK, BLOCK as u32)];
    rig.source.wait_held(1);
    let data = change(&mut client, 41);
    note(&mut expected, 41 * BLOCK, &data);
    assert_eq!(client.read(41 * BLOCK, BLOCK as u32), data, "before the answer");
    assert!(client.answered().is_empty());

    rig.source.let_go();
    let wide = client.wait(reads[0]).unwrap();
    assert_eq!(wide[..4096], *rig.block(40));
    assert_eq!(wide[8192..], *rig.block(42));
    for got in [&wide[4096..8192], &client.wait(reads[1]).unwrap()] {
        assert!(got == rig.block(41) || got == data, "a read that was under way says the one or the other");
    }
    assert_eq!(client.read(41 * BLOCK, BLOCK as u32), data, "after the answer");
    assert_disk(&mut client, &expected);
    assert_raw_image(device, &rig.cache(), &expected);
}

fn write(client: &mut Client, block: u64) -> Vec<u8> {
    client.write(block * BLOCK, &filled(0x61));
    filled(0x61)
}

fn trim(client: &mut Client, block: u64) -> Vec<u8> {
    client.perform(Command::Trim, CommandFlags::empty(), block * BLOCK, BLOCK as u32).unwrap();
    filled(0)
}

fn zero(client: &mut Client, block: u64) -> Vec<u8> {
    client.perform(Command::WriteZeroes, CommandFlags::NO_HOLE, block * BLOCK, BLOCK as u32).unwrap();
    filled(0)
}

fn write_twice_and_flush(client: &mut Client, block: u64) -> Vec<u8> {
    client.write(block * BLOCK, &filled(0x62));
    client.flush();
    client.write(block * BLOCK + 1024, &[0x63; 2048]);
    let mut data = filled(0x62);
    data[1024..3072].fill(0x63);
    data
}

#[test]
fn a_write_wins_over_the_late_answer_to_a_demand_fetch() {
    a_change_wins("off", write);
    a_change_wins("off", write_twice_and_flush);
}

#[test]
fn a_write_wins_over_the_late_answer_to_hydration() {
    a_change_wins("auto", write);
    a_change_wins("auto", write_twice_and_flush);
}

#[test]
fn a_trim_and_a_zeroing_win_over_late_answers() {
    for hydrate in ["off", "auto"] {
        a_change_wins(hydrate, trim);
        a_change_wins(hydrate, zero);
    }
}

#[test]
fn a_whole_write_overtakes_a_partial_one_that_waits() {
    let rig = Rig::new(64, Manners::default());
    let device = rig.attach("off");
    let mut client = Client::connect(&device.uri);
    rig.source.hold_all();
    let partial = client.start_write(9 * BLOCK + 100, &[0x71; 200]);
    rig.source.wait_held(1);
    client.write(9 * BLOCK, &filled(0x72));
    rig.source.let_go();
    client.wait(partial).unwrap();
    // Both were under way at a time, so either may be the last; the source's block is gone for good.
    let got = client.read(9 * BLOCK, BLOCK as u32);
    let mut merged = filled(0x72);
    merged[100..300].fill(0x71);
    assert!(got == filled(0x72) || got == merged);
    let mut expected = rig.expected.clone();
    note(&mut expected, 9 * BLOCK, &got);
    assert_raw_image(device, &rig.cache(), &expected);
}

/// The answer and the write meet at every possible moment, also while the answer is being stored.
#[test]
fn answers_and_writes_that_meet() {
    let rounds = 300;
    let rig = Rig::new(4 * rounds, Manners::default());
    let mut expected = rig.expected.clone();
    let device = rig.attach("off");
    let mut client = Client::connect(&device.uri);
    for round in 0..rounds {
        rig.source.hold_all();
        let base = 4 * round;
        let read = client.start_read(base * BLOCK, 4 * BLOCK as u32);
        rig.source.wait_held(1);
        let data = vec![round as u8 | 1; 2 * BLOCK as usize];
        let write = thread::scope(|scope| {
            scope.spawn(|| rig.source.let_go());
            client.start_write((base + 1) * BLOCK, &data)
        });
        client.wait(write).unwrap();
        assert_eq!(client.read((base + 1) * BLOCK, 2 * BLOCK as u32), data, "round {round}");
        note(&mut expected, (base + 1) * BLOCK, &data);
        let got = client.wait(read).unwrap();
        assert_eq!(got[..4096], *rig.block(base), "round {round}");
        assert_eq!(got[3 * 4096..], *rig.block(base + 3), "round {round}");
    }
    assert_disk(&mut client, &expected);
    assert_raw_image(device, &rig.cache(), &expected);
}
