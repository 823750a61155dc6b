//! Clients that send garbage, lie about lengths, hang up in the middle or never come to the point. One client's
//! trouble ends that client: after each, a good one is served as if nothing had been, and memory and descriptors
//! come back.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use blkferry::nbd::option_data::{InfoKind, InfoRequest, MetaContextRequest};
use blkferry::nbd::{
    BASE_ALLOCATION, ClientFlags, Command, CommandFlags, OptionKind, OptionReplyHeader, OptionReplyKind, Request,
    Wants, put_option,
};

use crate::client::{dial, shake_hands};
use crate::common::{BLKFERRY, Export, World, make_image, noise};
use crate::target::Target;

/// Reads until the server hangs up; it must.
fn hangs_up(mut stream: UnixStream, after: &str) {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        Ok(_) => {}
        // What we sent and it did not read makes this of a close.
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(e) => panic!("after {after} the server does not hang up: {e}"),
    }
}

/// Past the greeting, with our flags sent.
fn haggling(target: &Target<'_>) -> UnixStream {
    let mut stream = dial(target.uri);
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&ClientFlags::all().bits().to_be_bytes()).unwrap();
    stream
}

fn reply_to(stream: &mut UnixStream, option: OptionKind) -> OptionReplyKind {
    let mut header = [0; OptionReplyHeader::LEN];
    stream.read_exact(&mut header).unwrap();
    let header = OptionReplyHeader::decode(&header, option).unwrap();
    stream.read_exact(&mut vec![0; header.len_bytes as usize]).unwrap();
    header.kind
}

fn option(kind: OptionKind, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_option(&mut out, kind, data);
    out
}

fn header_only(kind: OptionKind, len: u32) -> Vec<u8> {
    let mut out = option(kind, &[]);
    out[12..].copy_from_slice(&len.to_be_bytes());
    out
}

fn garbage_instead_of_a_handshake(target: &Target<'_>) {
    target.survives("garbage", |target| {
        for seed in 0..40 {
            let mut stream = dial(target.uri);
            // It may hang up before all of it is sent.
            let _ = stream.write_all(&noise(seed, 100_000));
            hangs_up(stream, "garbage");
        }
        for words in
            [&b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..], b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"]
        {
            let mut stream = dial(target.uri);
            stream.write_all(words).unwrap();
            hangs_up(stream, "another protocol");
        }
        // Flags that were never offered.
        let mut stream = dial(target.uri);
        stream.write_all(&0xffff_ffffu32.to_be_bytes()).unwrap();
        hangs_up(stream, "unknown flags");
    });
}

fn options_that_make_no_sense(target: &Target<'_>) {
    target.survives("options", |target| {
        let mut stream = haggling(target);
        let mut expect = |kind, data: &[u8], want| {
            stream.write_all(&option(kind, data)).unwrap();
            assert_eq!(reply_to(&mut stream, kind), want, "{kind} with {} bytes", data.len());
        };
        use OptionReplyKind::{ErrInvalid, ErrTooBig, ErrUnknown, ErrUnsupported};
        expect(OptionKind::Unknown(0x1234_5678), &[], ErrUnsupported);
        expect(OptionKind::Unknown(99), &noise(1, 1 << 20), ErrUnsupported);
        expect(OptionKind::StartTls, &[], ErrUnsupported);
        expect(OptionKind::ExtendedHeaders, &[], ErrUnsupported);
        expect(OptionKind::Go, &noise(1, 70_000), ErrTooBig);
        expect(OptionKind::Info, &noise(1, 1 << 20), ErrTooBig);
        expect(OptionKind::Go, &noise(2, 100), ErrInvalid);
        expect(OptionKind::Go, &[], ErrInvalid);
        expect(OptionKind::List, b"what?", ErrInvalid);
        expect(OptionKind::StructuredReply, b"please", ErrInvalid);
        let named = |export: &str| InfoRequest { export: export.to_owned(), infos: vec![InfoKind::BlockSize] }.encode();
        expect(OptionKind::Go, &named("no such export"), ErrUnknown);
        expect(OptionKind::Go, &named(&"x".repeat(4097)), ErrInvalid);
        expect(OptionKind::Go, &named("a\0b"), ErrInvalid);
        let queries = MetaContextRequest { export: String::new(), queries: vec![BASE_ALLOCATION.to_owned()] };
        expect(OptionKind::SetMetaContext, &queries.encode(), ErrInvalid);
        // Four billion queries are promised.
        expect(OptionKind::SetMetaContext, &[0, 0, 0, 0, 255, 255, 255, 255], ErrInvalid);
        // After all that it is still willing to go.
        stream.write_all(&option(OptionKind::Go, &named(""))).unwrap();
        while reply_to(&mut stream, OptionKind::Go) != OptionReplyKind::Ack {}
    });
}

fn options_without_an_end(target: &Target<'_>) {
    target.survives("options without an end", |target| {
        let mut stream = haggling(target);
        stream.write_all(&header_only(OptionKind::Unknown(7), u32::MAX)).unwrap();
        hangs_up(stream, "four gigabytes of option data");
        let mut stream = haggling(target);
        stream.write_all(&header_only(OptionKind::ExportName, 5000)).unwrap();
        hangs_up(stream, "too long an export name");
        let mut stream = haggling(target);
        stream.write_all(&option(OptionKind::ExportName, b"no such export")).unwrap();
        hangs_up(stream, "the older way to ask for what is not there");
        let mut stream = haggling(target);
        stream.write_all(&option(OptionKind::Abort, &[])).unwrap();
        hangs_up(stream, "abort");
        let mut stream = haggling(target);
        let mut wrong = option(OptionKind::List, &[]);
        wrong[3] ^= 1;
        stream.write_all(&wrong).unwrap();
        hangs_up(stream, "a wrong magic");
        let mut stream = haggling(target);
        let mut answered = 0;
        while answered < 5000 && stream.write_all(&option(OptionKind::StructuredReply, &[])).is_ok() {
            if stream.read_exact(&mut [0; OptionReplyHeader::LEN]).is_err() {
                break;
            }
            answered += 1;
        }
        assert!(answered < 5000, "one client may not haggle for ever");
        hangs_up(stream, "a thousand options");
    });
}

fn half_open_handshakes(target: &Target<'_>) {
    target.survives("half-open handshakes", |target| {
        let whole = [ClientFlags::all().bits().to_be_bytes().to_vec(), option(OptionKind::List, &[])].concat();
        let mut open = Vec::new();
        for index in 0..100 {
            let mut stream = dial(target.uri);
            stream.write_all(&whole[..index % whole.len()]).unwrap();
            open.push(stream);
        }
        // While they are all there.
        target.assert_good_client("half-open handshakes that are still there");
    });
}

fn hang_ups(target: &Target<'_>) {
    let request =
        |command, len| Request { flags: CommandFlags::empty(), command, cookie: 1, offset: 0, len }.encode().to_vec();
    target.survives("hang-ups", |target| {
        for round in 0..100 {
            let mut stream = target.in_transmission();
            match round % 5 {
                // In the middle of a header, of a payload, before any answer, with answers under way, at once.
                0 => stream.write_all(&request(Command::Read, 4096)[..13]).unwrap(),
                1 => {
                    let mut bytes = request(Command::Write, 1 << 20);
                    bytes.resize(100_000, 9);
                    stream.write_all(&bytes).unwrap();
                }
                2 => stream.write_all(&request(Command::Read, 1 << 20).repeat(50)).unwrap(),
                3 => {
                    stream.write_all(&request(Command::Read, 1 << 20).repeat(50)).unwrap();
                    stream.read_exact(&mut [0; 30_000]).unwrap();
                }
                _ => {}
            }
        }
    });
}

fn requests_that_are_none(target: &Target<'_>) {
    target.survives("requests that are none", |target| {
        for seed in 0..20 {
            let mut stream = target.in_transmission();
            let _ = stream.write_all(&noise(seed, 50_000));
            hangs_up(stream, "garbage where a request starts");
        }
        // A good request before it is answered, or not; the garbage ends it either way.
        let mut stream = target.in_transmission();
        let good = Request { flags: CommandFlags::empty(), command: Command::Read, cookie: 1, offset: 0, len: 4096 };
        stream.write_all(&[good.encode().to_vec(), noise(1, 28)].concat()).unwrap();
        hangs_up(stream, "garbage after a request");
        // Four gigabytes are announced: neither taken nor skipped.
        let mut stream = target.in_transmission();
        stream.write_all(&Request { command: Command::Write, len: u32::MAX, ..good }.encode()).unwrap();
        hangs_up(stream, "a write of four gigabytes");
    });
}

/// Asks for gigabytes and reads nothing.
fn answers_that_nobody_reads(target: &Target<'_>) {
    // What four connections may hold at once. Were it lost each time, the third would be too many.
    target.survives_with("answers that nobody reads", 4 * (64 << 10) + (32 << 10), |target| {
        let before = target.usage();
        let mut greedy = Vec::new();
        for _ in 0..4 {
            let mut stream = target.in_transmission();
            stream.set_nonblocking(true).unwrap();
            let good =
                Request { flags: CommandFlags::empty(), command: Command::Read, cookie: 1, offset: 0, len: 1 << 20 };
            for _ in 0..4000 {
                if stream.write_all(&good.encode()).is_err() {
                    break;
                }
            }
            greedy.push(stream);
        }
        target.assert_good_client("answers that nobody reads, while nobody reads them");
        // 64 MiB for each of them is what a connection may hold.
        let now = target.usage();
        assert!(now.memory_kib < before.memory_kib + 4 * (100 << 10), "{before:?}, then {now:?}");
    });
}

/// More than the server takes at a time, and hordes that leave as soon as they have come.
fn too_many_clients(target: &Target<'_>) {
    target.survives("too many clients", |target| {
        let crowd: Vec<UnixStream> =
            (0..400).filter_map(|_| UnixStream::connect(crate::client::socket_of(target.uri)).ok()).collect();
        assert!(crowd.len() > 256);
        drop(crowd);
        target.assert_good_client("a crowd that has left");
        for _ in 0..2000 {
            drop(dial(target.uri));
        }
    });
}

/// A crowd that takes all places and says nothing. Whoever comes to the point gets in at once, again and again, and
/// those who are in stay in.
fn a_crowd_that_says_nothing(target: &Target<'_>) {
    target.survives("a crowd that says nothing", |target| {
        let mut regular = crate::client::Client::connect(target.uri);
        for _ in 0..3 {
            let crowd: Vec<UnixStream> = (0..400).map(|_| dial(target.uri)).collect();
            target.assert_good_client("a crowd that is still there");
            assert!(regular.read(0, 4096) == target.expected[..4096]);
            drop(crowd);
        }
    });
}

fn all(target: &Target<'_>) {
    garbage_instead_of_a_handshake(target);
    options_that_make_no_sense(target);
    options_without_an_end(target);
    half_open_handshakes(target);
    hang_ups(target);
    requests_that_are_none(target);
    answers_that_nobody_reads(target);
    too_many_clients(target);
    a_crowd_that_says_nothing(target);
}

/// Asks a thousand times for half a mebibyte of hashes, which takes reading 64 GiB, reads none of them, and leaves.
#[test]
fn questions_whose_answers_nobody_reads() {
    const RANGE: u64 = 64 << 20;
    let world = World::new();
    make_image(&world.path("image"), RANGE, &[]);
    let export = quiet_export(&world);
    let expected = vec![0; 1 << 20];
    let target = Target { uri: &export.uri, pid: export.child.id() as i32, expected: &expected };
    target.assert_good_client("nothing");
    let before = target.usage();
    let mut stream = dial(target.uri);
    shake_hands(&mut stream, "", Wants { structured: true, ferry: true, ..Wants::default() });
    let question =
        Request { flags: CommandFlags::empty(), command: Command::FerryHash, cookie: 1, offset: 0, len: RANGE as u32 };
    for _ in 0..1000 {
        stream.write_all(&question.encode()).unwrap();
    }
    // As much as it takes for a connection, and a while longer.
    let mut most_kib = 0;
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_secs(2) {
        let now = target.usage().memory_kib;
        assert!(now < before.memory_kib + (100 << 10), "{before:?}, then {now} KiB");
        if now > most_kib {
            (most_kib, since) = (now, Instant::now());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(most_kib > before.memory_kib + (20 << 10), "it answers: {before:?}, then {most_kib} KiB");
    target.assert_good_client("questions whose answers nobody reads");
    drop(stream);
    // What nobody will hear is not looked up.
    target.usage_within(before.descriptors, before.memory_kib + (80 << 10));
    export.stop();
}

/// More clients than the server has descriptors for.
#[test]
fn an_export_runs_out_of_descriptors() {
    let world = World::new();
    make_image(&world.path("image"), SIZE, &[(0, SIZE)]);
    let (image, socket) = (world.path("image"), world.path("few"));
    let serve =
        format!("ulimit -n 40; exec '{}' export '{}' --listen unix:'{}'", BLKFERRY, image.display(), socket.display());
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &serve]).env("BLKFERRY_LOG", "off").stdout(std::process::Stdio::null());
    let child = command.spawn().unwrap();
    crate::common::wait_for_socket(&socket);
    let export = Export { child, uri: format!("nbd+unix:///?socket={}", socket.display()) };
    let expected = std::fs::read(&image).unwrap();
    let target = Target { uri: &export.uri, pid: export.child.id() as i32, expected: &expected };
    target.survives("too few descriptors", |target| {
        let crowd: Vec<UnixStream> = (0..100).map(|_| dial(target.uri)).collect();
        drop(crowd);
    });
    export.stop();
}

const SIZE: u64 = 4 << 20;

/// An export that keeps its thoughts on all these clients to itself.
fn quiet_export(world: &World) -> Export {
    let (image, socket) = (world.path("image"), world.path("quiet"));
    let mut command =
        world.command(["export", image.to_str().unwrap(), "--listen", &format!("unix:{}", socket.display())]);
    let child = command.env("BLKFERRY_LOG", "error").stdout(std::process::Stdio::null()).spawn().unwrap();
    crate::common::wait_for_socket(&socket);
    Export { child, uri: format!("nbd+unix:///?socket={}", socket.display()) }
}

#[test]
fn an_export_survives_hostile_clients() {
    let world = World::new();
    make_image(&world.path("image"), SIZE, &[(0, SIZE)]);
    let export = quiet_export(&world);
    let expected = std::fs::read(world.path("image")).unwrap();
    all(&Target { uri: &export.uri, pid: export.child.id() as i32, expected: &expected });
    assert!(std::fs::read(world.path("image")).unwrap() == expected, "an export never writes");
    export.stop();
}

#[test]
fn a_device_survives_hostile_clients() {
    let world = World::new();
    make_image(&world.path("image"), SIZE, &[(0, SIZE)]);
    let export = world.export(&world.path("image"));
    let expected = std::fs::read(world.path("image")).unwrap();
    let device = world.attach(&export.uri, &world.path("cache"), "disk", &[]);
    device.wait_complete();
    // Payloads that are cut off must not reach the disk.
    all(&Target { uri: &device.uri, pid: device.pid, expected: &expected });
    device.detach();
    assert!(std::fs::read(world.path("cache")).unwrap() == expected);
}
