//! A controlled source, a device on it, and what the disk must hold.

use std::path::PathBuf;

use crate::client::Client;
use crate::common::{Device, World, noise};
use crate::manners::Manners;
use crate::source::Source;

pub const BLOCK: u64 = 4096;

pub struct Rig {
    // Before the world, in whose directory its socket is.
    pub source: Source,
    pub world: World,
    /// What the disk must hold: the source's contents, and over them what the test wrote.
    pub expected: Vec<u8>,
}

impl Rig {
    pub fn new(blocks: u64, manners: Manners) -> Self {
        let world = World::new();
        let expected = noise(7, (blocks * BLOCK) as usize);
        let source = Source::start(&world.path("source"), expected.clone(), manners);
        Self { source, world, expected }
    }

    pub fn cache(&self) -> PathBuf {
        self.world.path("cache")
    }

    pub fn attach(&self, hydrate: &str) -> Device<'_> {
        self.world.attach(&self.source.uri, &self.cache(), "disk", &["--hydrate", hydrate])
    }

    /// What a block must hold.
    pub fn block(&self, block: u64) -> &[u8] {
        &self.expected[(block * BLOCK) as usize..][..BLOCK as usize]
    }
}

/// Notes a change of the disk in what is expected of it.
pub fn note(expected: &mut [u8], offset: u64, data: &[u8]) {
    expected[offset as usize..offset as usize + data.len()].copy_from_slice(data);
}

/// A block's worth of one byte.
pub fn filled(byte: u8) -> Vec<u8> {
    vec![byte; BLOCK as usize]
}

/// Reads the whole disk and compares.
pub fn assert_disk(client: &mut Client, expected: &[u8]) {
    for (index, want) in expected.chunks(1 << 20).enumerate() {
        let offset = (index as u64) << 20;
        let got = client.read(offset, want.len() as u32);
        if let Some(at) = (0..want.len()).find(|&at| got[at] != want[at]) {
            panic!("the disk differs at {} (block {})", offset + at as u64, (offset + at as u64) / BLOCK);
        }
    }
}

/// Completes the device, detaches it, and compares the cache, which is a raw image now.
pub fn assert_raw_image(device: Device<'_>, cache: &std::path::Path, expected: &[u8]) {
    device.set("hydrate=auto");
    device.wait_complete();
    device.detach();
    let raw = std::fs::read(cache).unwrap();
    assert_eq!(raw.len(), expected.len());
    if let Some(at) = (0..raw.len()).find(|&at| raw[at] != expected[at]) {
        panic!("the cache differs at {at} (block {})", at as u64 / BLOCK);
    }
}
