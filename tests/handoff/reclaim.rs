//! Having the disk back from a host that is gone for good, and what a file is taken for by what lies beside it.

use std::fs;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::client::Client;
use crate::common::kill;
use crate::rig::{Rig, abort, activate, can_be_written, contents, loosen, offer, write_blocks};

const SIZE: u64 = 16 << 20;

#[test]
fn a_taker_that_is_gone_for_good_does_not_take_the_disk_with_it() {
    for (hydrate, state) in [("off", "active"), ("auto", "complete")] {
        let rig = Rig::new(SIZE);
        let export = rig.world.export(&rig.image);
        let b = rig.attach(&export.uri, "b", &["--hydrate", hydrate]);
        let mut wanted = contents(SIZE);
        let mut at_b = Client::connect(&b.uri);
        write_blocks(&mut at_b, &mut wanted, 3..5, 9);
        if state == "complete" {
            b.wait_complete();
        }
        let c = rig.attach(&offer(&b), "c", &["--hydrate", "off"]);
        Client::connect(&c.uri).write(0, &[7; 4096]);
        kill(c.pid, Signal::SIGKILL);
        drop(at_b);
        rig.world.ok(["detach", "b", "--incomplete"]);

        let cache = rig.cache.to_str().unwrap();
        let refused = rig.world.refused(["reclaim", cache]);
        assert!(refused.contains("was given to") && refused.contains("in epoch 2"), "{refused}");
        let said = rig.world.ok(["reclaim", "--force", cache]);
        assert!(said.contains("was taken back from"), "{said}");
        // What was given is there, what was written by the taker is not, and the taker is told so if it comes back.
        let b = rig.attach(&export.uri, "b", &["--hydrate", "off"]);
        assert_eq!((&b.status()["state"], &b.status()["handoff"]["epoch"]), (&json!(state), &json!(3)));
        let refused = rig.refused(&offer(&b), "c", &[]);
        assert!(refused.contains("taken back there since"), "{refused}");
        write_blocks(&mut Client::connect(&b.uri), &mut wanted, 0..1, 5);
        b.set("hydrate=auto");
        b.wait_complete();
        b.detach();
        assert!(fs::read(&rig.cache).unwrap() == wanted);
        assert!(rig.world.ok(["reclaim", cache]).contains("is here"));
    }
}

/// An image that could be handed over was at the cache's place once, and its record outlived it.
#[test]
fn an_old_record_does_not_make_an_image_of_a_cache() {
    let rig = Rig::new(SIZE);
    let export = rig.world.export(&rig.image);
    let cache = rig.cache.to_str().unwrap();
    crate::common::make_image(&rig.cache, SIZE, &[]);
    drop(rig.hand_out_other(&rig.cache));
    fs::remove_file(&rig.cache).unwrap();

    let record = rig.world.path("b.raw.handoff");
    let old = fs::read(&record).unwrap();
    let b = rig.attach(&export.uri, "b", &["--hydrate", "off"]);
    assert!(!record.exists(), "it is of an image that is gone");
    // As if it had been there all the same.
    fs::write(&record, old).unwrap();
    let c = rig.attach(&offer(&b), "c", &["--hydrate", "off"]);
    Client::connect(&c.uri).write(0, &[7; 4096]);
    kill(c.pid, Signal::SIGKILL);
    rig.world.ok(["detach", "b", "--incomplete"]);
    let refused = rig.world.refused(["export", cache, "--listen", "127.0.0.1:0"]);
    assert!(refused.contains("is the cache of a device"), "{refused}");
    let nowhere = rig.world.path("nowhere");
    let refused = rig.world.refused(["reclaim", "--force", cache, "--metadata", nowhere.to_str().unwrap()]);
    assert!(refused.contains("no metadata at"), "{refused}");
    let refused = rig.world.refused(["reclaim", cache]);
    assert!(refused.contains("was given to"), "{refused}");
    assert!(rig.world.ok(["reclaim", "--force", cache]).contains("was taken back"));
    // What is there is not all of the disk, by whatever name it is asked for.
    let metadata = rig.world.path("b.raw.ferry");
    for named in [&["reclaim", cache][..], &["reclaim", "--force", cache, "--metadata", metadata.to_str().unwrap()]] {
        let refused = rig.world.refused(named);
        assert!(refused.contains("is the cache of a device"), "{refused}");
    }
}

/// It went out, its image was removed by somebody who means it, and it comes back to a file of that name.
#[test]
fn an_image_that_was_removed_leaves_nothing_that_speaks_for_its_successor() {
    let rig = Rig::new(SIZE);
    let export = rig.hand_out();
    let b = rig.attach(&export.uri, "b", &[]);
    let mut wanted = contents(SIZE);
    write_blocks(&mut Client::connect(&b.uri), &mut wanted, 3..5, 9);
    b.wait_complete();
    export.stop();
    loosen(&rig.image);
    fs::remove_file(&rig.image).unwrap();
    assert!(rig.world.path("a.raw.handoff").exists());

    let a = rig.attach(&offer(&b), "a", &[]);
    a.wait_complete();
    let image = rig.image.to_str().unwrap();
    let refused = rig.world.refused(["reclaim", "--force", image]);
    assert!(refused.contains("is running, and has the disk"), "{refused}");
    a.detach();
    assert!(rig.world.ok(["reclaim", "--force", image]).contains("is here"));
    let export = rig.hand_out();
    let c = rig.attach(&export.uri, "c", &["--standby"]);
    assert!(Client::connect(&c.uri).read(0, SIZE as u32) == wanted);
}

/// A cache that was given away becomes an image, so that the disk can come home to it; death comes before its metadata
/// goes. Whoever takes the disk back then must not be overruled by that metadata later.
#[test]
fn metadata_that_outlived_its_cache_does_not_speak_for_the_image() {
    let rig = Rig::new(SIZE);
    let export = rig.world.export(&rig.image);
    let mut wanted = contents(SIZE);
    let b = rig.attach(&export.uri, "b", &[]);
    b.wait_complete();
    let c = rig.attach(&offer(&b), "c", &[]);
    write_blocks(&mut Client::connect(&c.uri), &mut wanted, 3..5, 9);
    c.wait_complete();
    rig.world.ok(["detach", "b"]);
    let (metadata, cache) = (rig.world.path("b.raw.ferry"), rig.cache.to_str().unwrap());
    let outlived = fs::read(&metadata).unwrap();
    let from_c = offer(&c);
    abort(&rig.attach(&from_c, "b", &["--standby"])).unwrap();
    assert!(!metadata.exists() && rig.world.path("b.raw.handoff").exists(), "it is an image");
    fs::write(&metadata, &outlived).unwrap();

    let refused = rig.world.refused(["reclaim", cache]);
    assert!(refused.contains("was given to"), "{refused}");
    assert!(metadata.exists(), "nothing was done");
    assert!(rig.world.ok(["reclaim", "--force", cache]).contains("was taken back from"));
    assert!(!metadata.exists() && can_be_written(&rig.cache));
    // A machine uses it. What C has is another disk from now on, and not what this one grew out of.
    let mut here = fs::read(&rig.cache).unwrap();
    here[8192..12288].fill(5);
    fs::write(&rig.cache, &here).unwrap();
    let refused = rig.refused(&from_c, "b", &["--standby"]);
    assert!(refused.contains("has contents but no metadata"), "{refused}");
    // Even if the metadata was there: it is not the later word.
    fs::write(&metadata, &outlived).unwrap();
    let refused = rig.refused(&from_c, "b", &["--standby"]);
    assert!(refused.contains("it was taken back, or written to"), "{refused}");
    assert!(fs::read(&rig.cache).unwrap() == here);
}

/// The disk has come home, and death comes before the record beside the image is cleared up.
#[test]
fn an_image_that_a_disk_came_home_to_is_not_taken_for_what_it_was() {
    let rig = Rig::new(SIZE);
    let export = rig.hand_out();
    let b = rig.attach(&export.uri, "b", &[]);
    let mut wanted = contents(SIZE);
    write_blocks(&mut Client::connect(&b.uri), &mut wanted, 3..5, 9);
    b.wait_complete();
    export.stop();
    let record = rig.world.path("a.raw.handoff");
    let before = fs::read(&record).unwrap();
    let uri = offer(&b);
    let a = rig.attach(&uri, "a", &["--standby", "--hydrate", "off"]);
    activate(&a).unwrap();
    write_blocks(&mut Client::connect(&a.uri), &mut wanted, 7..8, 1);
    kill(a.pid, Signal::SIGKILL);
    fs::write(&record, &before).unwrap();

    let image = rig.image.to_str().unwrap();
    for words in
        [&["reclaim", image][..], &["reclaim", "--force", image], &["export", image, "--listen", "127.0.0.1:0"]]
    {
        let refused = rig.world.refused(words);
        assert!(refused.contains("is the cache of a device"), "{words:?}: {refused}");
    }
    assert!(fs::read(&record).unwrap() == before, "nothing was done");
    let a = rig.attach(&uri, "a", &[]);
    a.wait_complete();
    assert!(!record.exists());
    a.detach();
    assert!(fs::read(&rig.image).unwrap() == wanted);
}
