//! I6: a block crosses once, whoever asks for it.

use std::thread;

use crate::client::Client;
use crate::common::{Device, noise};
use crate::manners::Manners;
use crate::rig::{BLOCK, Rig, assert_disk, assert_raw_image};
use crate::source::Source;

fn assert_never_twice(source: &Source) {
    let times = source.times_asked(BLOCK);
    if let Some(block) = times.iter().position(|&times| times > 1) {
        let who: Vec<_> = source
            .asked()
            .into_iter()
            .filter(|asked| (asked.offset..asked.offset + u64::from(asked.len)).contains(&(block as u64 * BLOCK)))
            .collect();
        panic!("block {block} was asked for {} times: {who:?}", times[block]);
    }
}

#[test]
fn two_readers_and_hydration_share_one_fetch() {
    let rig = Rig::new(512, Manners::default());
    rig.source.hold_all();
    let device = rig.attach("off");
    let mut first = Client::connect(&device.uri);
    let mut second = Client::connect(&device.uri);
    let alone = first.start_read(10 * BLOCK, BLOCK as u32);
    rig.source.wait_held(1);
    // The same block again: on both connections, in part, and as a part of more.
    let same = second.start_read(10 * BLOCK, BLOCK as u32);
    let part = first.start_read(10 * BLOCK + 512, 1024);
    let more = second.start_read(8 * BLOCK, 5 * BLOCK as u32);
    // Blocks 8 and 9, and 11 and 12, to either side of the one that is under way.
    rig.source.wait_held(3);
    device.set("hydrate=auto");
    // Hydration goes round what is on its way: 0..8, and from 13 on.
    rig.source.wait_held(5);
    assert_never_twice(&rig.source);
    rig.source.let_go();
    assert_eq!(first.wait(alone).unwrap(), rig.block(10));
    assert_eq!(second.wait(same).unwrap(), rig.block(10));
    assert_eq!(first.wait(part).unwrap(), rig.block(10)[512..1536]);
    assert_eq!(second.wait(more).unwrap(), rig.expected[8 * BLOCK as usize..13 * BLOCK as usize]);
    device.wait_complete();
    assert!(rig.source.times_asked(BLOCK).iter().all(|&times| times == 1), "each block exactly once");
    assert_raw_image(device, &rig.cache(), &rig.expected);
}

#[test]
fn many_readers_at_random_and_hydration_never_ask_twice() {
    let blocks = 2048;
    let rig = Rig::new(blocks, Manners { pieces: true, ..Manners::default() });
    let device = rig.attach("auto");
    thread::scope(|scope| {
        for reader in 0..4 {
            let (uri, expected) = (&device.uri, &rig.expected);
            scope.spawn(move || read_at_random(uri, expected, reader));
        }
    });
    device.wait_complete();
    assert!(rig.source.times_asked(BLOCK).iter().all(|&times| times == 1), "each block exactly once");
    let status = device.status();
    assert_eq!(status["wire"]["data_bytes"], blocks * BLOCK);
    assert_raw_image(device, &rig.cache(), &rig.expected);
}

fn read_at_random(uri: &str, expected: &[u8], seed: u64) {
    let mut client = Client::connect(uri);
    let dice = noise(seed, 8 * 400);
    for pair in dice.chunks_exact(8) {
        let offset = u64::from(u32::from_le_bytes(pair[..4].try_into().unwrap())) % (expected.len() as u64 - 1);
        let len = (u64::from(u16::from_le_bytes([pair[4], pair[5]])) + 1).min(expected.len() as u64 - offset);
        let got = client.read(offset, len as u32);
        assert!(got == expected[offset as usize..][..len as usize], "reader {seed}: {len} bytes at {offset}");
    }
}

/// A foreign source is asked for nothing before it has told its zeros: they might cross as data.
#[test]
fn zeros_that_the_source_tells_are_not_asked_for() {
    let mut rig = Rig::new(4096, Manners { extents: true, identity: None, ..Manners::default() });
    let zeros = with_zeros(&mut rig);
    let device = rig.attach("off");
    let samples = rig.source.times_asked(BLOCK);
    device.set("hydrate=auto");
    device.wait_complete();
    for (block, times) in rig.source.times_asked(BLOCK).into_iter().enumerate() {
        assert_eq!(times - samples[block], u32::from(!zeros(block)), "block {block}");
    }
    assert_whole(device, &rig);
}

/// A blkferry export sends zeros as holes: they may be asked for while it is asked where they are, once.
#[test]
fn zeros_of_an_export_are_asked_for_once_at_most() {
    let mut rig = Rig::new(4096, Manners { extents: true, ..Manners::default() });
    let zeros = with_zeros(&mut rig);
    let device = rig.attach("auto");
    device.wait_complete();
    for (block, times) in rig.source.times_asked(BLOCK).into_iter().enumerate() {
        assert!(times == 1 || (times == 0 && zeros(block)), "block {block}: {times} times");
    }
    assert_whole(device, &rig);
}

/// Makes two stretches of zeros, one of them with blocks that are zeros only in part at its ends.
fn with_zeros(rig: &mut Rig) -> impl Fn(usize) -> bool + use<> {
    rig.expected[256 * 4096..1024 * 4096].fill(0);
    rig.expected[2000 * 4096 + 700..3000 * 4096 + 100].fill(0);
    rig.source.set_image(rig.expected.clone());
    |block| (256..1024).contains(&block) || (2001..3000).contains(&block)
}

fn assert_whole(device: Device<'_>, rig: &Rig) {
    let mut client = Client::connect(&device.uri);
    assert_disk(&mut client, &rig.expected);
    assert_raw_image(device, &rig.cache(), &rig.expected);
}

#[test]
fn what_was_committed_is_not_asked_for_again_after_the_next_attach() {
    let rig = Rig::new(512, Manners::default());
    let device = rig.attach("off");
    let mut client = Client::connect(&device.uri);
    client.read(0, 200 * BLOCK as u32);
    client.write(300 * BLOCK, &vec![0x41; 10 * BLOCK as usize]);
    device.world.ok(["detach", "disk", "--incomplete"]);
    let mut expected = rig.expected.clone();
    expected[300 * 4096..310 * 4096].fill(0x41);

    let device = rig.attach("auto");
    device.wait_complete();
    let times = rig.source.times_asked(BLOCK);
    for (block, times) in times.into_iter().enumerate() {
        assert_eq!(times, u32::from(!(300..310).contains(&block)), "block {block}, both attaches together");
    }
    assert_raw_image(device, &rig.cache(), &expected);
}
