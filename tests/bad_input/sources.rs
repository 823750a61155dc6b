//! Sources that cannot be reached, or are none: `attach` says so and leaves nothing behind.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use blkferry::nbd::option_data::Info;
use blkferry::nbd::{BlockSizes, HandshakeFlags, NBD_MAGIC, OptionKind, OptionReplyKind, TransmissionFlags};

use crate::common::{World, make_image, noise};
use crate::manners::Manners;
use crate::source::Source;
use crate::strangers::{Replies, greeting, haggler, says, stranger};
use crate::trace::{misused, refused};

/// Attaches a new cache to a source that is no good.
fn attach_refused(world: &World, uri: &str, words: &[&str]) -> String {
    let cache = world.path("cache");
    let line = refused(world, ["attach", uri, cache.to_str().unwrap(), "--name", "disk"], words);
    assert!(line.contains(uri), "the source is named: {line}");
    line
}

#[test]
fn nobody_is_there() {
    let world = World::new();
    let nowhere = format!("nbd+unix:///?socket={}", world.path("nowhere").display());
    attach_refused(&world, &nowhere, &["cannot connect", "No such file", "path of its socket"]);
    // A socket that a dead server left.
    drop(UnixListener::bind(world.path("left")).unwrap());
    let left = format!("nbd+unix:///?socket={}", world.path("left").display());
    attach_refused(&world, &left, &["cannot connect", "refused", "path of its socket"]);
    // Nothing listens on the first port of the reserved ones.
    attach_refused(&world, "nbd://127.0.0.1:1/", &["cannot connect", "refused", "is the port open"]);
    attach_refused(&world, "nbd://no.such.host.invalid/vm", &["cannot connect"]);
}

#[test]
fn it_is_no_uri() {
    let world = World::new();
    let cases: [(&str, &[&str]); 6] = [
        ("disk.raw", &["no NBD URI", "nbd://HOST"]),
        ("nbd:host:10809", &["QEMU's old form", "nbd://HOST"]),
        ("http://host/disk", &["\"http\"", "nbd"]),
        ("nbds://host/", &["TLS", "SSH tunnel"]),
        ("nbd+unix:///vm", &["path of a socket"]),
        ("nbd://host:70000/", &["\"70000\"", "65535"]),
    ];
    for (uri, words) in cases {
        let cache = world.path("cache");
        misused(&world, ["attach", uri, cache.to_str().unwrap()], words);
    }
}

#[test]
fn it_speaks_something_else() {
    let world = World::new();
    let ssh = says(&world.path("ssh"), b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n");
    attach_refused(&world, &ssh, &["no NBD server", "SSH-2.0-", "check host and port"]);
    let noise = says(&world.path("noise"), b"\x1b[2J\xff\x00\x07\r\n\x80more of it and no end");
    let line = attach_refused(&world, &noise, &["no NBD server", "check host and port"]);
    assert!(!line.contains(char::is_control), "a terminal would obey it: {line:?}");
    let hangs_up = stranger(&world.path("hangs-up"), |_| Ok(()));
    attach_refused(&world, &hangs_up, &["closed the connection", "before its greeting"]);
    let half = stranger(&world.path("half"), |stream| stream.write_all(&NBD_MAGIC.to_be_bytes()));
    attach_refused(&world, &half, &["closed the connection", "in the middle of its greeting"]);
}

#[test]
fn it_says_nothing() {
    let world = World::new();
    let silent = stranger(&world.path("silent"), |stream| stream.read(&mut [0]).map(drop));
    attach_refused(&world, &silent, &["no answer within", "NBD server"]);
}

#[test]
fn it_is_old() {
    let world = World::new();
    let oldstyle = says(&world.path("oldstyle"), b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00\x00\x00");
    attach_refused(&world, &oldstyle, &["oldstyle", "newer server"]);
    let unfixed = stranger(&world.path("unfixed"), |stream| {
        stream.write_all(&greeting(HandshakeFlags::empty()))?;
        stream.read(&mut [0]).map(drop)
    });
    attach_refused(&world, &unfixed, &["without fixed newstyle", "newer server"]);
    let unknown = says(&world.path("unknown"), b"NBDMAGICNEXTDIAL\x00\x03");
    attach_refused(&world, &unknown, &["unknown NBD dialect"]);
}

#[test]
fn it_has_no_such_export() {
    let world = World::new();
    let image = world.path("image");
    make_image(&image, 1 << 20, &[(0, 4096)]);
    let socket = world.path("named").display().to_string();
    let mut named = world.command(["export", "--name", "web", "--listen", &format!("unix:{socket}")]);
    let mut child = named.arg(&image).stdout(std::process::Stdio::null()).spawn().unwrap();
    crate::common::wait_for_socket(&world.path("named"));
    let uri = format!("nbd+unix:///db?socket={socket}");
    attach_refused(&world, &uri, &["no export named \"db\"", "last part of the URI"]);
    crate::common::kill(child.id() as i32, nix::sys::signal::Signal::SIGTERM);
    assert!(child.wait().unwrap().success());
    // A server with the older option only has no other way to say no.
    let older = haggler(&world.path("older"), |_| None);
    attach_refused(&world, &older, &["closed the connection", "none of this name"]);
}

/// A server with one export of that size.
fn of_size(world: &World, name: &str, size_bytes: u64) -> String {
    haggler(&world.path(name), move |option| {
        let flags = TransmissionFlags::HAS_FLAGS;
        let info = Info::Export { size_bytes, flags }.encode();
        (option == OptionKind::Go).then(|| vec![(OptionReplyKind::Info, info), (OptionReplyKind::Ack, Vec::new())])
    })
}

#[test]
fn it_refuses_us() {
    let world = World::new();
    let answers: [(&str, OptionReplyKind, &[&str]); 4] = [
        ("tls", OptionReplyKind::ErrTlsRequired, &["wants TLS", "SSH tunnel"]),
        ("policy", OptionReplyKind::ErrPolicy, &["forbids", "go away", "allow this client"]),
        ("shutdown", OptionReplyKind::ErrShutdown, &["shutting down", "later"]),
        ("other", OptionReplyKind::Unknown(0x8000_1234), &["refused", "go away"]),
    ];
    for (name, kind, words) in answers {
        let refuse = move |option| (option == OptionKind::Go).then(|| vec![(kind, b"go away".to_vec())]);
        attach_refused(&world, &haggler(&world.path(name), refuse), words);
    }
}

#[test]
fn it_breaks_the_rules_of_the_handshake() {
    let world = World::new();
    let info = |sizes| Info::BlockSize(sizes).encode();
    let odd = info(BlockSizes { min: 3, preferred: 4096, max: 1 << 20 });
    let answers: [(&str, Replies, &[&str]); 5] = [
        ("no-size", vec![(OptionReplyKind::Ack, vec![])], &["without telling its size"]),
        ("short", vec![(OptionReplyKind::Info, vec![0, 0, 1])], &["cannot be understood", "too early"]),
        ("long", vec![(OptionReplyKind::Info, vec![0; 100_000])], &["100000 bytes", "limit"]),
        ("stray", vec![(OptionReplyKind::Server, vec![0; 8])], &["does not belong there"]),
        ("odd", vec![(OptionReplyKind::Info, odd), (OptionReplyKind::Ack, vec![])], &["without telling its size"]),
    ];
    for (name, replies, words) in answers {
        let answer = move |option| (option == OptionKind::Go).then(|| replies.clone());
        attach_refused(&world, &haggler(&world.path(name), answer), words);
    }
    let garbage = stranger(&world.path("garbage"), |stream| {
        stream.write_all(&greeting(HandshakeFlags::all()))?;
        stream.write_all(&noise(1, 64))?;
        stream.read(&mut [0]).map(drop)
    });
    attach_refused(&world, &garbage, &["out of step"]);
}

#[test]
fn it_has_a_size_that_no_disk_has() {
    let world = World::new();
    attach_refused_size(&world, "odd", 1_000_000, &["1000000", "512"]);
    attach_refused_size(&world, "empty", 0, &["size 0", "nothing"]);
    let huge = of_size(&world, "huge", 1 << 63);
    attach_refused(&world, &huge, &["9223372036854775808", "check the server"]);
}

/// These get as far as the first look at the contents, so that the server has to be a better one.
fn attach_refused_size(world: &World, name: &str, size: usize, words: &[&str]) {
    let source = Source::start(&world.path(name), vec![7; size], Manners::default());
    let cache = world.path("cache");
    refused(world, ["attach", &source.uri, cache.to_str().unwrap(), "--name", "disk"], words);
}

#[test]
fn its_requests_are_too_coarse_for_the_block_size() {
    let world = World::new();
    let manners = Manners { min_block: 65536, ..Manners::default() };
    let source = Source::start(&world.path("coarse"), noise(1, 1 << 20), manners);
    let cache = world.path("cache");
    let args = ["attach", &source.uri, cache.to_str().unwrap(), "--name", "disk", "--block-size", "4K"];
    refused(&world, args, &["65536", "--block-size 65536"]);
}

/// A foreign server is known by samples of its contents: they have to come, and in time.
#[test]
fn it_cannot_be_identified() {
    let world = World::new();
    let manners = Manners { identity: None, ..Manners::default() };
    let broken = Source::start(&world.path("broken"), noise(1, 1 << 20), manners.clone());
    broken.lie(crate::reply::Lie::Refusal(blkferry::nbd::NbdError::Io));
    attach_refused(&world, &broken.uri, &["Input/output error"]);
    broken.lie(crate::reply::Lie::CutInData);
    attach_refused(&world, &broken.uri, &["connection"]);
    let lying = Source::start(&world.path("lying"), noise(1, 1 << 20), manners);
    lying.lie(crate::reply::Lie::Overlap);
    attach_refused(&world, &lying.uri, &["connection"]);
}

#[test]
fn it_never_answers_a_read() {
    let world = World::new();
    let manners = Manners { identity: None, ..Manners::default() };
    let stuck = Source::start(&world.path("stuck"), noise(1, 1 << 20), manners);
    stuck.hold_all();
    let (cache, said) = (world.path("cache"), world.path("said"));
    let mut command = world.command(["attach", &stuck.uri, cache.to_str().unwrap(), "--name", "disk"]);
    // Into a file: the daemon would hold a pipe open for as long as it waits.
    command.stderr(std::fs::File::create(&said).unwrap()).stdout(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it waits for ever");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let said = std::fs::read_to_string(&said).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    crate::trace::assert_says(&said, &[&stuck.uri, "no answer"]);
    assert!(!cache.exists());
}
