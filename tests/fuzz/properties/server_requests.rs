//! A client in its transmission phase with us: any bytes.
//!
//! Input: a byte that says what was agreed on, a byte that decides how the stream is cut, then the stream. The real
//! server reads it from a socket. Its answers must be those of a naive one that does one request after the other,
//! byte by byte, and the disk must be the same afterwards.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use blkferry::nbd::option_data::{FerryRequest, InfoKind, InfoRequest, MetaContextRequest};
use blkferry::nbd::{
    BASE_ALLOCATION, Command, CommandFlags, FERRY_VERSION, OptionKind, Request, ServerHandshake, ServerStep, Session,
    put_option,
};
use blkferry::server::{Disk, ServeStats, Server};
use blkferry::uring::Listener;

use super::lots::{Lots, pieces};
use super::requests_model::{Model, Ram, SIZE, fresh};
use super::site::{Site, send};

/// More than fits into a socket would need a peer that sends and reads at once.
const MAX_INPUT: usize = 8 << 10;

/// The options of a client, by the bits of a byte.
fn options(mode: u8) -> Vec<u8> {
    let mut out = vec![0, 0, 0, 3];
    let export = String::new;
    if mode & 1 != 0 {
        put_option(&mut out, OptionKind::StructuredReply, &[]);
    }
    if mode & 3 == 3 {
        let request = MetaContextRequest { export: export(), queries: vec![BASE_ALLOCATION.to_owned()] };
        put_option(&mut out, OptionKind::SetMetaContext, &request.encode());
    }
    if mode & 4 != 0 {
        let request = FerryRequest { version: FERRY_VERSION, export: export() };
        put_option(&mut out, OptionKind::Ferry, &request.encode());
    }
    put_option(&mut out, OptionKind::Go, &InfoRequest { export: export(), infos: vec![InfoKind::BlockSize] }.encode());
    out
}

/// What is agreed on, and how many bytes that takes from the server.
fn agreed(ram: &Ram, options: &[u8]) -> (Session, usize) {
    let (mut server, greeting) = ServerHandshake::new(vec![ram.export()]);
    let (mut rest, mut sent) = (options, greeting.len());
    loop {
        let (piece, later) = rest.split_at(server.needs());
        rest = later;
        match server.feed(piece).unwrap() {
            ServerStep::Reply(reply) => sent += reply.len(),
            ServerStep::Transmission { reply, session } => return (session, sent + reply.len()),
            ServerStep::Close { .. } => panic!("these options are fine"),
        }
    }
}

pub fn check(input: &[u8]) {
    let [mode, seed, stream @ ..] = input else { return };
    if stream.len() > MAX_INPUT {
        return;
    }
    let ram = Ram::new(if mode & 8 != 0 { 512 } else { 1 });
    let options = options(*mode);
    let (session, greeted) = agreed(&ram, &options);
    let limits = session.limits(&ram.export());
    let mut model = Model { bytes: fresh(), limits, session, replies: Vec::new() };
    let in_order = model.serve(stream);

    let got = serve(&ram, [&options[..], stream].concat(), *seed);
    let replies = got.get(greeted..).expect("the handshake is answered");
    if in_order {
        assert!(replies == model.replies, "\n got: {replies:02x?}\nwant: {:02x?}", model.replies);
    } else {
        // What was under way when it broke a rule need not be answered, but nothing else is.
        assert!(model.replies.starts_with(replies), "\n got: {replies:02x?}\nwant: {:02x?}", model.replies);
    }
    let bytes = ram.bytes.borrow();
    if let Some(at) = (0..SIZE).find(|&at| bytes[at] != model.bytes[at]) {
        panic!("the disk differs at {at}: {:#x}, not {:#x}", bytes[at], model.bytes[at]);
    }
}

/// All that a server says to a client that says this.
fn serve(ram: &Ram, stream: Vec<u8>, seed: u8) -> Vec<u8> {
    Site::with(|site| {
        let (listener, disk) = (Listener::unix(&site.socket).unwrap(), Rc::new(ram.clone()));
        let socket = site.socket.clone();
        let answers = site.peer_does(move || {
            let mut client = UnixStream::connect(socket).unwrap();
            send(&client, &pieces(&stream, Lots::new(seed)));
            // The server may have hung up before.
            let _ = client.shutdown(Shutdown::Write);
            let mut answers = Vec::new();
            // A server that hangs up on what it has not read resets the connection; what it said before is there.
            let _ = client.read_to_end(&mut answers);
            answers
        });
        let served = async move {
            let stats = ServeStats::default();
            let server = Server::start(listener, disk, stats.clone());
            let answers = answers.await.expect("the peer ends");
            server.stop(Duration::from_secs(60)).await;
            assert_eq!(stats.clients(), 0, "a client that is gone is forgotten");
            answers
        };
        site.reactor.block_on(served).unwrap()
    })
}

/// A step of a handoff.
const ASK: &[u8] = br#"{"ask":"take","disk":"00000000-0000-0000-0000-000000000000","to":"00000000-0000-0000-0000-000000000001","epoch":2,"wait_ms":0}"#;

pub fn seeds() -> Vec<Vec<u8>> {
    let request = |command, flags: CommandFlags, offset, len| {
        Request { flags, command, cookie: offset + 7, offset, len }.encode().to_vec()
    };
    let none = CommandFlags::empty();
    let write =
        |flags, offset, len: u32| [request(Command::Write, flags, offset, len), vec![0xa5; len as usize]].concat();
    let disc = request(Command::Disc, none, 0, 0);
    let sessions = [
        vec![request(Command::Read, none, 0, 512), write(none, 512, 512), request(Command::Read, none, 0, 8192)],
        vec![
            write(CommandFlags::FUA, 4096, 1024),
            request(Command::Flush, none, 0, 0),
            request(Command::Read, CommandFlags::DF, 4096, 8192),
            disc.clone(),
        ],
        vec![
            request(Command::Trim, none, 0, 4096),
            request(Command::WriteZeroes, CommandFlags::NO_HOLE, 8192, 4096),
            request(Command::WriteZeroes, CommandFlags::FAST_ZERO, 8192, 4096),
            request(Command::BlockStatus, none, 0, 65536),
            request(Command::BlockStatus, CommandFlags::REQ_ONE, 4096, 65536),
            request(Command::FerryHash, none, 0, 16384),
            request(Command::Cache, none, 0, 131_072),
        ],
        vec![
            [request(Command::FerryHandoff, none, 0, ASK.len() as u32), ASK.to_vec()].concat(),
            [request(Command::FerryHandoff, none, 0, 3), b"ask".to_vec()].concat(),
            request(Command::FerryChanged, none, 0, 65536),
        ],
        vec![
            request(Command::Read, none, 131_072, 512),
            request(Command::Read, none, u64::MAX - 511, 512),
            request(Command::Write, none, 0, 40_000),
            request(Command::Unknown(99), none, 0, 512),
            request(Command::Read, none, 0, 20_000),
        ],
    ];
    let modes = [0, 1, 3, 7, 15];
    let with_mode = |mode| sessions.iter().map(move |session| [vec![mode, 3], session.concat()].concat());
    modes.into_iter().flat_map(with_mode).collect()
}
