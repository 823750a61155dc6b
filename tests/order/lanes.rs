//! Demand does not stand behind hydration.

use std::time::Duration;

use crate::client::Client;
use crate::manners::Manners;
use crate::rig::{BLOCK, Rig, assert_raw_image, filled, note};
use crate::source::Asked;

const MIB: u64 = 1 << 20;

/// Hydration asks for a mebibyte at a time here, the guest for less.
fn is_bulk(asked: &Asked) -> bool {
    asked.len >= 64 << 10
}

/// With the answers to `ahead` of hydration's reads held, and to all that follow; says how many there were in the end.
fn demand_passes_hydration(manners: Manners, ahead: usize) -> usize {
    let rig = Rig::new(64 * MIB / BLOCK, manners);
    rig.source.hold(is_bulk);
    let device = rig.attach("auto");
    let held = rig.source.wait_held(ahead);
    assert!(held.iter().all(|asked| asked.offset + u64::from(asked.len) <= 40 * MIB), "hydration goes in order");

    let mut client = Client::connect(&device.uri);
    let mut expected = rig.expected.clone();
    let far = 60 * MIB / BLOCK;
    // Absent, and nobody has asked for it: a read, a partial write, a read of several blocks.
    assert_eq!(client.read(far * BLOCK, BLOCK as u32), rig.block(far));
    client.write((far + 5) * BLOCK + 1000, &[0x31; 100]);
    note(&mut expected, (far + 5) * BLOCK + 1000, &[0x31; 100]);
    let run = client.read((far + 2) * BLOCK, 8 * BLOCK as u32);
    assert_eq!(run, expected[((far + 2) * BLOCK) as usize..][..8 * BLOCK as usize]);
    // On its way for hydration: it can be overwritten, but not read yet.
    client.write(3 * BLOCK, &filled(0x32));
    note(&mut expected, 3 * BLOCK, &filled(0x32));
    assert_eq!(client.read(3 * BLOCK, BLOCK as u32), filled(0x32));
    let waits = client.start_read(4 * BLOCK, BLOCK as u32);
    assert_eq!(client.read(far * BLOCK, BLOCK as u32), rig.block(far));
    assert!(client.answered().is_empty());
    let held = rig.source.held().len();
    assert!(held >= ahead, "nothing was let go so far");

    rig.source.let_go();
    assert_eq!(client.wait(waits).unwrap(), rig.block(4));
    assert_raw_image(device, &rig.cache(), &expected);
    held
}

#[test]
fn a_demand_read_ends_while_all_of_hydration_is_held() {
    demand_passes_hydration(Manners::default(), 2);
}

/// As much is asked for at first as a link of 1 Gbit/s would hold: 2 MiB and one round trip's.
#[test]
fn so_it_does_while_a_far_source_is_asked_for_as_much_as_a_long_link_holds() {
    let held = demand_passes_hydration(Manners { delay: Duration::from_millis(50), ..Manners::default() }, 8);
    assert!(held <= 16, "{held} requests at once, for a link of unknown speed");
}

#[test]
fn on_the_only_connection_of_a_source_it_depends_on_the_source_alone() {
    demand_passes_hydration(Manners { several: false, ..Manners::default() }, 2);
}

/// A server answers the requests of a connection in their order, as most do: what hydration has asked for on the
/// demand connection would be waited for.
#[test]
fn hydration_stays_off_the_connection_of_demand() {
    let rig = Rig::new(64 * MIB / BLOCK, Manners::default());
    let device = rig.attach("auto");
    device.wait_complete();
    // Nobody read from the device: all reads are hydration's.
    let asked = rig.source.asked();
    let strays = asked.iter().filter(|asked| asked.connection == 0).count();
    assert_eq!(strays, 0, "of {} reads for hydration so many went over the demand connection", asked.len());
    device.detach();
}

#[test]
fn demand_has_its_own_connection_while_hydration_runs() {
    let rig = Rig::new(64 * MIB / BLOCK, Manners { delay: Duration::from_millis(50), ..Manners::default() });
    let device = rig.attach("off");
    rig.source.wait_connected(3);
    rig.source.hold(is_bulk);
    device.set("hydrate=auto");
    rig.source.wait_held(8);
    let mut client = Client::connect(&device.uri);
    let far = 60 * MIB / BLOCK;
    client.read(far * BLOCK, BLOCK as u32);
    let (demand, bulk): (Vec<Asked>, Vec<Asked>) = rig.source.asked().into_iter().partition(|a| !is_bulk(a));
    assert_eq!(demand.iter().map(|asked| asked.offset).collect::<Vec<_>>(), [far * BLOCK]);
    assert!(bulk.iter().all(|bulk| bulk.connection != demand[0].connection), "demand stands behind hydration");
    rig.source.let_go();
    device.wait_complete();
    device.detach();
}
