//! Golden bytes of every NBD message, of both sides, written by hand from doc/proto.md of
//! github.com/NetworkBlockDevice/nbd. If one of these tests fails, the code is wrong, or peers in the field are.

use blkferry::nbd::chunk::{
    decode_data_offset, put_block_status_chunk, put_data_chunk_head, put_error_chunk, put_ferry_hashes_chunk,
    put_none_chunk,
};
use blkferry::nbd::{
    BlockStatus, ChunkKind, ClientHandshake, ClientStep, Command, CommandFlags, ErrorChunk, ExportInfo, Extent,
    FerryHashes, Hole, NbdError, OptionKind, ProtocolError, ReplyFlags, ReplyHeader, Request, ServerHandshake,
    ServerStep, Session, StateFlags, TransmissionFlags, Wants, put_option, put_simple_reply,
};

#[path = "common/hex.rs"]
mod hex;

use hex::bytes;

#[track_caller]
fn assert_bytes(got: &[u8], want: &str) {
    let want = bytes(want);
    assert!(got == want, "\n got: {got:02x?}\nwant: {want:02x?}");
}

const GREETING: &str = "'NBDMAGIC' 'IHAVEOPT' 0003";
const FIXED_AND_NO_ZEROES: &str = "00000003";
const FIXED_ONLY: &str = "00000001";

fn exports() -> Vec<ExportInfo> {
    let flags = TransmissionFlags::READ_ONLY
        | TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_DF
        | TransmissionFlags::CAN_MULTI_CONN;
    let mut disk = ExportInfo::new("disk", 0x1_2345_6000, flags);
    disk.description = Some("a disk".into());
    disk.min_block = 512;
    disk.identity = Some("u-1".into());
    vec![disk, ExportInfo::new("b", 4096, TransmissionFlags::SEND_TRIM)]
}

/// Feeds a whole client stream; returns every byte the server sent after its greeting, and the last step.
fn serve(stream: &str) -> (Vec<u8>, Option<ServerStep>) {
    let (mut server, greeting) = ServerHandshake::new(exports());
    assert_bytes(&greeting, GREETING);
    let stream = bytes(stream);
    let (mut rest, mut sent) = (stream.as_slice(), Vec::new());
    while !rest.is_empty() {
        let (now, later) = rest.split_at(server.needs().min(rest.len()));
        rest = later;
        match server.feed(now).expect("the client keeps the rules") {
            ServerStep::Reply(reply) => sent.extend_from_slice(&reply),
            ServerStep::Transmission { reply, session } => {
                sent.extend_from_slice(&reply);
                assert!(rest.is_empty(), "bytes left over");
                assert_eq!(server.needs(), 0);
                return (sent, Some(ServerStep::Transmission { reply, session }));
            }
            ServerStep::Close { reply } => {
                sent.extend_from_slice(&reply);
                return (sent, Some(ServerStep::Close { reply }));
            }
        }
    }
    (sent, None)
}

/// Serves one option after fixed newstyle flags.
#[track_caller]
fn assert_answer(option: &str, want: &str) {
    let (sent, last) = serve(&format!("{FIXED_AND_NO_ZEROES} {option}"));
    assert_eq!(last, None, "the handshake goes on");
    assert_bytes(&sent, want);
}

fn session(step: Option<ServerStep>) -> Session {
    match step {
        Some(ServerStep::Transmission { session, .. }) => session,
        other => panic!("no transmission phase: {other:?}"),
    }
}

const STRUCTURED: &str = "'IHAVEOPT' 00000008 00000000";
const STRUCTURED_ACK: &str = "0003e889045565a9 00000008 00000001 00000000";

#[test]
fn server_answers_export_name_without_and_with_zeroes() {
    let option = "'IHAVEOPT' 00000001 00000004 'disk'";
    // HAS_FLAGS, READ_ONLY, SEND_FLUSH, CAN_MULTI_CONN; no SEND_DF without structured replies.
    let answer = "0000000123456000 0107";
    let (sent, last) = serve(&format!("{FIXED_AND_NO_ZEROES} {option}"));
    assert_bytes(&sent, answer);
    assert!(session(last).no_zeroes);

    let (sent, last) = serve(&format!("{FIXED_ONLY} {option}"));
    assert_bytes(&sent, &format!("{answer} {}", "00".repeat(124)));
    assert!(!session(last).no_zeroes);

    // A client without fixed newstyle has this one option.
    let (sent, last) = serve(&format!("00000000 {option}"));
    assert_eq!(sent.len(), 134);
    assert_eq!(session(last).export_index, 0);
}

#[test]
fn server_takes_the_empty_name_for_the_first_export() {
    let (sent, last) = serve(&format!("{FIXED_AND_NO_ZEROES} 'IHAVEOPT' 00000001 00000000"));
    assert_bytes(&sent, "0000000123456000 0107");
    assert_eq!(session(last).export_index, 0);
}

#[test]
fn server_hangs_up_on_an_unknown_export_name() {
    let (sent, last) = serve(&format!("{FIXED_ONLY} 'IHAVEOPT' 00000001 00000004 'nope'"));
    assert!(sent.is_empty());
    assert_eq!(last, Some(ServerStep::Close { reply: Vec::new() }));
}

#[test]
fn server_answers_abort() {
    let (sent, last) = serve(&format!("{FIXED_ONLY} 'IHAVEOPT' 00000002 00000003 'bye'"));
    assert_bytes(&sent, "0003e889045565a9 00000002 00000001 00000000");
    assert!(matches!(last, Some(ServerStep::Close { .. })));
}

#[test]
fn server_answers_list() {
    assert_answer(
        "'IHAVEOPT' 00000003 00000000",
        "0003e889045565a9 00000003 00000002 0000000e 00000004 'disk' 'a disk'
         0003e889045565a9 00000003 00000002 00000005 00000001 'b'
         0003e889045565a9 00000003 00000001 00000000",
    );
}

#[test]
fn server_refuses_what_it_does_not_speak() {
    assert_answer(
        "'IHAVEOPT' 00000005 00000000",
        "0003e889045565a9 00000005 80000001 00000021 'NBD_OPT_STARTTLS is not supported'",
    );
    assert_answer(
        "'IHAVEOPT' 0000000b 00000000",
        "0003e889045565a9 0000000b 80000001 00000029 'NBD_OPT_EXTENDED_HEADERS is not supported'",
    );
    // An unknown option with data, which is skipped; the next option is understood again.
    assert_answer(
        &format!("'IHAVEOPT' 0000beef 00000005 'abcde' {STRUCTURED}"),
        &format!(
            "0003e889045565a9 0000beef 80000001 0000001e 'number 0xbeef is not supported'
             {STRUCTURED_ACK}"
        ),
    );
}

#[test]
fn server_answers_info_with_all_that_is_asked() {
    assert_answer(
        // Name length 4, four requests: DESCRIPTION, BLOCK_SIZE, NAME, and one from the future.
        "'IHAVEOPT' 00000006 00000012 00000004 'disk' 0004 0002 0003 0001 0777",
        "0003e889045565a9 00000006 00000003 0000000c 0000 0000000123456000 0107
         0003e889045565a9 00000006 00000003 0000000e 0003 00000200 00001000 02000000
         0003e889045565a9 00000006 00000003 00000006 0001 'disk'
         0003e889045565a9 00000006 00000003 00000008 0002 'a disk'
         0003e889045565a9 00000006 00000001 00000000",
    );
}

#[test]
fn server_enters_transmission_after_go() {
    let go = "'IHAVEOPT' 00000007 00000007 00000001 'b' 0000";
    let (sent, last) = serve(&format!("{FIXED_AND_NO_ZEROES} {go}"));
    assert_bytes(
        &sent,
        "0003e889045565a9 00000007 00000003 0000000c 0000 0000000000001000 0021
         0003e889045565a9 00000007 00000001 00000000",
    );
    let want = Session {
        export_index: 1,
        flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_TRIM,
        structured: false,
        base_allocation: None,
        hot: None,
        ferry: false,
        no_zeroes: true,
    };
    assert_eq!(session(last), want);
}

#[test]
fn server_says_that_an_export_is_unknown_and_goes_on() {
    assert_answer(
        "'IHAVEOPT' 00000007 0000000a 00000004 'nope' 0000",
        "0003e889045565a9 00000007 80000006 00000024 'there is no export named \"nope\" here'",
    );
}

#[test]
fn server_offers_base_allocation() {
    let list = |queries: &str| format!("{STRUCTURED} 'IHAVEOPT' 00000009 {queries}");
    let context = "0003e889045565a9 00000009 00000004 00000013 00000000 'base:allocation'";
    let ack = "0003e889045565a9 00000009 00000001 00000000";
    // No query; the wildcard; the very name; other namespaces.
    let name = "00000004 'disk'";
    let found = format!("{STRUCTURED_ACK} {context} {ack}");
    assert_answer(&list(&format!("0000000c {name} 00000000")), &found);
    assert_answer(&list(&format!("00000015 {name} 00000001 00000005 'base:'")), &found);
    assert_answer(&list(&format!("0000001f {name} 00000001 0000000f 'base:allocation'")), &found);
    let none = format!("{STRUCTURED_ACK} {ack}");
    assert_answer(&list(&format!("00000016 {name} 00000001 00000006 'qemu:x'")), &none);
}

const SET_META: &str = "'IHAVEOPT' 0000000a 0000001f 00000004 'disk' 00000001 0000000f 'base:allocation'";
const SET_META_ANSWER: &str = "0003e889045565a9 0000000a 00000004 00000013 00000001 'base:allocation'
     0003e889045565a9 0000000a 00000001 00000000";
const FERRY: &str = "'IHAVEOPT' 66727279 0000000a 0001 00000004 'disk'";
const FERRY_ANSWER: &str = "0003e889045565a9 66727279 66727279 0000001e '{\"version\":1,\"identity\":\"u-1\"}'
     0003e889045565a9 66727279 00000001 00000000";
const GO: &str = "'IHAVEOPT' 00000007 0000000c 00000004 'disk' 0001 0003";
const GO_ANSWER: &str = "0003e889045565a9 00000007 00000003 0000000c 0000 0000000123456000 0187
     0003e889045565a9 00000007 00000003 0000000e 0003 00000200 00001000 02000000
     0003e889045565a9 00000007 00000001 00000000";

#[test]
fn server_agrees_on_everything_with_a_blkferry_client() {
    let (sent, last) = serve(&format!("{FIXED_ONLY} {STRUCTURED} {SET_META} {FERRY} {GO}"));
    assert_bytes(&sent, &format!("{STRUCTURED_ACK} {SET_META_ANSWER} {FERRY_ANSWER} {GO_ANSWER}"));
    let session = session(last);
    assert!(session.structured && session.ferry && !session.no_zeroes);
    assert_eq!(session.base_allocation, Some(1));
    assert_eq!(session.export_index, 0);
}

/// The client's bytes for each step, and the server's: the whole conversation from the other side.
#[test]
fn client_sends_and_understands_the_same_conversation() {
    let wants = Wants { structured: true, base_allocation: true, ferry: true, ..Wants::default() };
    let mut client = ClientHandshake::new("disk".into(), wants);
    assert_bytes(&converse(&mut client, GREETING), &format!("{FIXED_AND_NO_ZEROES} {FERRY}"));
    assert_bytes(&converse(&mut client, FERRY_ANSWER), &format!("{STRUCTURED} {SET_META} {GO}"));
    let session = ready(&mut client, &format!("{STRUCTURED_ACK} {SET_META_ANSWER} {GO_ANSWER}"));
    assert_eq!(session.size_bytes, 0x1_2345_6000);
    assert_eq!(session.flags.bits(), 0x187);
    assert_eq!((session.min_block, session.preferred_block, session.max_block), (512, 4096, 1 << 25));
    assert!(session.structured);
    assert_eq!(session.base_allocation, Some(1));
    assert_eq!(session.ferry_identity.as_deref(), Some("u-1"));
}

#[test]
fn client_falls_back_to_export_name() {
    let mut client = ClientHandshake::new("disk".into(), Wants::default());
    let go = format!("{FIXED_ONLY} {GO}");
    assert_bytes(&converse(&mut client, "'NBDMAGIC' 'IHAVEOPT' 0001"), &go);
    let unsupported = "0003e889045565a9 00000007 80000001 00000000";
    assert_bytes(&converse(&mut client, unsupported), "'IHAVEOPT' 00000001 00000004 'disk'");
    let answer = format!("0000000000100000 0003 {}", "00".repeat(124));
    let session = ready(&mut client, &answer);
    assert_eq!(session.size_bytes, 1 << 20);
    assert_eq!(session.flags.bits(), 3);
    assert_eq!((session.min_block, session.preferred_block, session.max_block), (512, 4096, 1 << 25));
}

#[test]
fn client_lists_exports_and_says_goodbye() {
    let wants = Wants { list: true, ..Wants::default() };
    let mut client = ClientHandshake::new(String::new(), wants);
    let list = format!("{FIXED_AND_NO_ZEROES} 'IHAVEOPT' 00000003 00000000");
    assert_bytes(&converse(&mut client, GREETING), &list);
    let answer = "0003e889045565a9 00000003 00000002 0000000e 00000004 'disk' 'a disk'
                  0003e889045565a9 00000003 00000002 00000005 00000001 'b'
                  0003e889045565a9 00000003 00000001 00000000";
    let ClientStep::Listed { exports, send } = feed_all(&mut client, answer) else {
        panic!("not listed");
    };
    assert_eq!(exports, [("disk".into(), "a disk".into()), ("b".into(), String::new())]);
    assert_bytes(&send, "'IHAVEOPT' 00000002 00000000");
}

#[test]
fn client_tells_other_servers_apart() {
    let error = |greeting: &str| {
        let mut client = ClientHandshake::new(String::new(), Wants::default());
        let greeting = bytes(greeting);
        let mut rest = greeting.as_slice();
        loop {
            let (now, later) = rest.split_at(client.needs());
            rest = later;
            if let Err(error) = client.feed(now) {
                assert!(client.farewell().is_empty(), "no option was sent yet");
                return error;
            }
        }
    };
    assert_eq!(error("'SSH-2.0-OpenSSH'"), ProtocolError::NotNbd { got: *b"SSH-2.0-" });
    assert_eq!(error("'NBDMAGIC' 0000420281861253"), ProtocolError::Oldstyle);
    assert_eq!(error("'NBDMAGIC' 'IHAVEOPT' 0002"), ProtocolError::NotFixedNewstyle);
    let dialect = ProtocolError::UnknownDialect { magic: 0x1122_3344_5566_7788 };
    assert_eq!(error("'NBDMAGIC' 1122334455667788"), dialect);
}

#[test]
fn client_aborts_with_the_abort_option() {
    let mut client = ClientHandshake::new("x".into(), Wants::default());
    converse(&mut client, GREETING);
    assert_bytes(&client.farewell(), "'IHAVEOPT' 00000002 00000000");
}

#[test]
fn options_are_numbered_as_in_the_spec() {
    let numbers = [
        (OptionKind::ExportName, 1),
        (OptionKind::Abort, 2),
        (OptionKind::List, 3),
        (OptionKind::StartTls, 5),
        (OptionKind::Info, 6),
        (OptionKind::Go, 7),
        (OptionKind::StructuredReply, 8),
        (OptionKind::ListMetaContext, 9),
        (OptionKind::SetMetaContext, 10),
        (OptionKind::ExtendedHeaders, 11),
    ];
    for (option, number) in numbers {
        let mut out = Vec::new();
        put_option(&mut out, option, &[]);
        assert_bytes(&out, &format!("'IHAVEOPT' {number:08x} 00000000"));
    }
}

fn feed_all(client: &mut ClientHandshake, stream: &str) -> ClientStep {
    let stream = bytes(stream);
    let mut rest = stream.as_slice();
    loop {
        let (now, later) = rest.split_at(client.needs());
        rest = later;
        let step = client.feed(now).expect("the server keeps the rules");
        if rest.is_empty() {
            return step;
        }
        assert_eq!(step, ClientStep::Send(Vec::new()), "nothing is sent in the middle");
    }
}

/// What the client sends once it has these bytes of the server.
fn converse(client: &mut ClientHandshake, stream: &str) -> Vec<u8> {
    match feed_all(client, stream) {
        ClientStep::Send(sent) => sent,
        other => panic!("not the end of the handshake, but {other:?}"),
    }
}

fn ready(client: &mut ClientHandshake, stream: &str) -> blkferry::nbd::ClientSession {
    match feed_all(client, stream) {
        ClientStep::Ready { session, send } => {
            assert!(send.is_empty());
            assert_eq!(client.needs(), 0);
            session
        }
        other => panic!("not ready: {other:?}"),
    }
}

#[track_caller]
fn assert_request(flags: CommandFlags, command: Command, offset: u64, len: u32, want: &str) {
    let request = Request { flags, command, cookie: 0x1122_3344_5566_7788, offset, len };
    assert_bytes(&request.encode(), want);
    assert_eq!(Request::decode(&request.encode()), Ok(request));
}

#[test]
fn requests() {
    let none = CommandFlags::empty();
    let c = "1122334455667788";
    assert_request(
        CommandFlags::DF,
        Command::Read,
        0x1_0000_0200,
        0x1000,
        &format!("25609513 0004 0000 {c} 0000000100000200 00001000"),
    );
    assert_request(
        CommandFlags::FUA,
        Command::Write,
        0x1000,
        0x200,
        &format!("25609513 0001 0001 {c} 0000000000001000 00000200"),
    );
    assert_request(none, Command::Disc, 0, 0, &format!("25609513 0000 0002 {c} {:024}", 0));
    assert_request(none, Command::Flush, 0, 0, &format!("25609513 0000 0003 {c} {:024}", 0));
    assert_request(none, Command::Trim, 0, u32::MAX, &format!("25609513 0000 0004 {c} 0000000000000000 ffffffff"));
    assert_request(none, Command::Cache, 1, 2, &format!("25609513 0000 0005 {c} 0000000000000001 00000002"));
    assert_request(
        CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
        Command::WriteZeroes,
        u64::MAX,
        3,
        &format!("25609513 0012 0006 {c} ffffffffffffffff 00000003"),
    );
    assert_request(
        CommandFlags::REQ_ONE,
        Command::BlockStatus,
        4,
        5,
        &format!("25609513 0008 0007 {c} 0000000000000004 00000005"),
    );
    assert_request(none, Command::FerryHash, 6, 7, &format!("25609513 0000 f001 {c} 0000000000000006 00000007"));
}

#[track_caller]
fn header(stream: &[u8]) -> (ReplyHeader, Vec<u8>) {
    let common = stream[..16].try_into().expect("16 bytes");
    let more = ReplyHeader::needs_more(common);
    let mut extra = [0; 4];
    extra[..more].copy_from_slice(&stream[16..16 + more]);
    (ReplyHeader::decode(common, extra).expect("a reply"), stream[16 + more..].to_vec())
}

const COOKIE: u64 = 0xa1a2_a3a4_a5a6_a7a8;

#[test]
fn simple_replies() {
    for (error, number) in [
        (None, 0),
        (Some(NbdError::Perm), 1),
        (Some(NbdError::Io), 5),
        (Some(NbdError::NoMem), 12),
        (Some(NbdError::Inval), 22),
        (Some(NbdError::NoSpc), 28),
        (Some(NbdError::Overflow), 75),
        (Some(NbdError::NotSup), 95),
        (Some(NbdError::Shutdown), 108),
    ] {
        let mut out = Vec::new();
        put_simple_reply(&mut out, COOKIE, error);
        assert_bytes(&out, &format!("67446698 {number:08x} a1a2a3a4a5a6a7a8"));
        let want = ReplyHeader::Simple { error, cookie: COOKIE };
        assert_eq!(header(&out), (want, Vec::new()));
    }
}

#[track_caller]
fn assert_chunk(out: &[u8], kind: ChunkKind, last: bool, want: &str) -> Vec<u8> {
    assert_bytes(out, want);
    let (header, payload) = header(out);
    let ReplyHeader::Chunk { kind: got, len, .. } = header else {
        panic!("no chunk");
    };
    assert_eq!(got, kind);
    assert_eq!(len as usize, payload.len());
    assert_eq!(header.cookie(), COOKIE);
    assert_eq!(header.is_last(), last);
    assert_eq!(header.check(1 << 25), Ok(()));
    payload
}

#[test]
fn data_chunk() {
    let mut out = Vec::new();
    put_data_chunk_head(&mut out, COOKIE, ReplyFlags::empty(), 0x1_0000_0000, 3);
    out.extend_from_slice(b"abc");
    let payload = assert_chunk(
        &out,
        ChunkKind::OffsetData,
        false,
        "668e33ef 0000 0001 a1a2a3a4a5a6a7a8 0000000b 0000000100000000 'abc'",
    );
    assert_eq!(decode_data_offset(payload[..8].try_into().unwrap()), 0x1_0000_0000);
}

#[test]
fn hole_and_none_chunks() {
    let hole = Hole { offset: 0x2_0000, len: 0x1_0000 };
    let mut out = Vec::new();
    hole.put(&mut out, COOKIE, ReplyFlags::DONE);
    let payload = assert_chunk(
        &out,
        ChunkKind::OffsetHole,
        true,
        "668e33ef 0001 0002 a1a2a3a4a5a6a7a8 0000000c 0000000000020000 00010000",
    );
    assert_eq!(Hole::decode(&payload), Ok(hole));

    let mut out = Vec::new();
    put_none_chunk(&mut out, COOKIE);
    let want = "668e33ef 0001 0000 a1a2a3a4a5a6a7a8 00000000";
    assert!(assert_chunk(&out, ChunkKind::None, true, want).is_empty());
}

#[test]
fn block_status_chunk() {
    let extents = [
        Extent { len: 0x1000, flags: StateFlags::empty() },
        Extent { len: 0x2000, flags: StateFlags::HOLE | StateFlags::ZERO },
    ];
    let mut out = Vec::new();
    put_block_status_chunk(&mut out, COOKIE, ReplyFlags::DONE, 7, &extents);
    let payload = assert_chunk(
        &out,
        ChunkKind::BlockStatus,
        true,
        "668e33ef 0001 0005 a1a2a3a4a5a6a7a8 00000014
         00000007 00001000 00000000 00002000 00000003",
    );
    let want = BlockStatus { context_id: 7, extents: extents.to_vec() };
    assert_eq!(BlockStatus::decode(&payload), Ok(want));
}

#[test]
fn error_chunks() {
    let mut out = Vec::new();
    put_error_chunk(&mut out, COOKIE, ReplyFlags::DONE, NbdError::Io, "disk died", None);
    let payload = assert_chunk(
        &out,
        ChunkKind::Error,
        true,
        "668e33ef 0001 8001 a1a2a3a4a5a6a7a8 0000000f 00000005 0009 'disk died'",
    );
    let want = ErrorChunk { error: NbdError::Io, message: "disk died".into(), offset: None };
    assert_eq!(ErrorChunk::decode(ChunkKind::Error, &payload), Ok(want));

    let mut out = Vec::new();
    put_error_chunk(&mut out, COOKIE, ReplyFlags::empty(), NbdError::Inval, "", Some(0x1234));
    let payload = assert_chunk(
        &out,
        ChunkKind::ErrorOffset,
        false,
        "668e33ef 0000 8002 a1a2a3a4a5a6a7a8 0000000e 00000016 0000 0000000000001234",
    );
    let want = ErrorChunk { error: NbdError::Inval, message: String::new(), offset: Some(0x1234) };
    assert_eq!(ErrorChunk::decode(ChunkKind::ErrorOffset, &payload), Ok(want));
}

#[test]
fn ferry_hashes_chunk() {
    let hashes = [[0x11; 32], [0x22; 32]];
    let mut out = Vec::new();
    put_ferry_hashes_chunk(&mut out, COOKIE, ReplyFlags::DONE, 0x4000, 0x1000, &hashes);
    let payload = assert_chunk(
        &out,
        ChunkKind::FerryHashes,
        true,
        &format!(
            "668e33ef 0001 6672 a1a2a3a4a5a6a7a8 0000004c 0000000000004000 00001000 {} {}",
            "11".repeat(32),
            "22".repeat(32)
        ),
    );
    let want = FerryHashes { offset: 0x4000, piece_len_bytes: 0x1000, hashes: hashes.to_vec() };
    assert_eq!(FerryHashes::decode(&payload), Ok(want));
}
