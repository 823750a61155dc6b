//! Sources that are far away: connections are made ahead of time there, and must not be in anybody's way.

use std::time::Duration;

use crate::bench::{Phase, attach_in, mixed_image, text};
use crate::common::{Device, World, assert_same};
use crate::relay::Relay;
use crate::servers::{nbdkit_tcp, qemu_nbd_tcp};

const SIZE: u64 = (8 << 20) + 512;
/// Longer than two ends on one host ever take.
const DELAY: Duration = Duration::from_millis(10);

fn complete(device: Device<'_>) {
    device.set("hydrate=auto");
    device.wait_complete();
    device.detach();
}

#[test]
fn an_export_gets_the_connections_that_it_is_to_have() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let export = world.export_at(&image, "127.0.0.1:0");
    let relay = Relay::far(&export.uri, DELAY);
    let device = attach_in(&world, Phase::Before, &relay.uri(), &cache, &[]);
    device.wait_for(|status| status["source"]["connections"] == 3);
    assert_eq!(relay.connections(), 3);
    complete(device);
    assert!((3..=4).contains(&relay.connections()), "one more, to ask what is hot");
    assert_same(&image, &cache);
}

/// The connections made ahead are not for a server that is no blkferry export; the usual ones follow.
#[test]
fn another_server_serves_as_ever() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let nbdkit = nbdkit_tcp(&world, &["file", text(&image)]);
    let relay = Relay::far(&nbdkit.uri, DELAY);
    let device = attach_in(&world, Phase::Before, &relay.uri(), &cache, &[]);
    device.wait_for(|status| status["source"]["connections"] == 3);
    complete(device);
    assert_same(&image, &cache);
}

/// It takes one client, and ends with it: whoever comes second must not be taken for that one.
#[test]
fn a_server_for_one_client_serves_that_one() {
    let world = World::new();
    let (image, cache) = (world.path("image.raw"), world.path("cache.raw"));
    mixed_image(&image, SIZE);
    let limited = nbdkit_tcp(&world, &["--filter=limit", "file", text(&image), "limit=1"]);
    let mut only = qemu_nbd_tcp(&world, &["--format=raw"], &image);
    for (number, uri) in [&limited.uri, &only.uri].into_iter().enumerate() {
        let relay = Relay::far(uri, DELAY);
        let device = attach_in(&world, Phase::Before, &relay.uri(), &cache, &[]);
        assert_eq!(device.status()["source"]["connections"], 1, "server {number}");
        complete(device);
        assert_same(&image, &cache);
        std::fs::remove_file(&cache).unwrap();
        std::fs::remove_file(cache.with_extension("raw.ferry")).unwrap();
    }
    only.wait_ended();
}
