use super::*;
use crate::nbd::OptionReplyHeader;
use crate::nbd::option::put_option;
use crate::nbd::option_data::{FerryRequest, InfoRequest, MetaContextRequest};

fn exports() -> Vec<ExportInfo> {
    let mut ferry = ExportInfo::new("ferry", 1 << 20, TransmissionFlags::SEND_DF);
    ferry.identity = Some("id".into());
    vec![ferry, ExportInfo::new("plain", 4096, TransmissionFlags::empty())]
}

/// A server that has read the client's flags.
fn server(flags: ClientFlags) -> ServerHandshake {
    let (mut server, _) = ServerHandshake::new(exports());
    server.feed(&flags.bits().to_be_bytes()).unwrap();
    server
}

fn modern() -> ServerHandshake {
    server(ClientFlags::all())
}

/// Sends one option; returns what came of it, with all replies of the option together.
fn ask(server: &mut ServerHandshake, option: OptionKind, data: &[u8]) -> Result<ServerStep, ProtocolError> {
    let mut stream = Vec::new();
    put_option(&mut stream, option, data);
    let mut rest = stream.as_slice();
    loop {
        let (now, later) = rest.split_at(server.needs().min(rest.len()));
        rest = later;
        let step = server.feed(now)?;
        if rest.is_empty() || step != ServerStep::Reply(Vec::new()) {
            assert!(rest.is_empty(), "answered before all was read");
            return Ok(step);
        }
    }
}

/// The kinds of the replies to one option.
fn kinds(server: &mut ServerHandshake, option: OptionKind, data: &[u8]) -> Vec<OptionReplyKind> {
    match ask(server, option, data).unwrap() {
        ServerStep::Reply(reply) => kinds_of(option, &reply),
        other => panic!("not a mere reply: {other:?}"),
    }
}

fn kinds_of(option: OptionKind, mut reply: &[u8]) -> Vec<OptionReplyKind> {
    let mut kinds = Vec::new();
    while let Some((header, rest)) = reply.split_first_chunk() {
        let header = OptionReplyHeader::decode(header, option).unwrap();
        kinds.push(header.kind);
        reply = &rest[header.len_bytes as usize..];
    }
    kinds
}

fn go(server: &mut ServerHandshake, export: &str) -> Session {
    let data = InfoRequest { export: export.into(), infos: Vec::new() }.encode();
    match ask(server, OptionKind::Go, &data).unwrap() {
        ServerStep::Transmission { session, .. } => session,
        other => panic!("no session: {other:?}"),
    }
}

fn meta(export: &str, queries: &[&str]) -> Vec<u8> {
    let queries = queries.iter().map(|query| (*query).to_owned()).collect();
    MetaContextRequest { export: export.into(), queries }.encode()
}

fn structured() -> ServerHandshake {
    let mut server = modern();
    let ack = kinds(&mut server, OptionKind::StructuredReply, &[]);
    assert_eq!(ack, [OptionReplyKind::Ack]);
    server
}

const META_ACK: [OptionReplyKind; 2] = [OptionReplyKind::MetaContext, OptionReplyKind::Ack];

#[test]
fn unknown_client_flags_end_the_connection() {
    let (mut server, _) = ServerHandshake::new(exports());
    let error = server.feed(&[0, 0, 0, 7]).unwrap_err();
    assert_eq!(error, ProtocolError::UnknownClientFlags { flags: 7 });
    assert_eq!(server.needs(), 0);
    assert_eq!(server.feed(&[0]), Err(ProtocolError::HandshakeOver));
}

#[test]
fn without_fixed_newstyle_there_is_only_export_name() {
    for option in [OptionKind::Go, OptionKind::List, OptionKind::Unknown(99)] {
        let mut server = server(ClientFlags::empty());
        let step = ask(&mut server, option, &[]).unwrap();
        assert_eq!(step, ServerStep::Close { reply: Vec::new() }, "{option}");
    }
}

#[test]
fn garbage_instead_of_an_option_ends_the_connection() {
    let mut server = modern();
    let error = server.feed(b"GET / HTTP/1.1\r\n").unwrap_err();
    assert_eq!(error, ProtocolError::BadOptionMagic { got: 0x4745_5420_2f20_4854 });
}

#[test]
fn more_bytes_than_needed_are_refused() {
    let mut server = modern();
    let error = server.feed(&[0; 17]).unwrap_err();
    assert_eq!(error, ProtocolError::FedTooMuch { needs_bytes: 16, got_bytes: 17 });
}

#[test]
fn long_options_are_skipped_and_very_long_ones_end_the_connection() {
    let mut server = modern();
    let long = vec![0; MAX_OPTION_LEN + 1];
    let too_big = [OptionReplyKind::ErrTooBig];
    let unsupported = [OptionReplyKind::ErrUnsupported];
    assert_eq!(kinds(&mut server, OptionKind::Go, &long), too_big);
    assert_eq!(kinds(&mut server, OptionKind::Unknown(77), &long), unsupported);
    let longest = vec![0; MAX_SKIPPED_OPTION_LEN];
    assert_eq!(kinds(&mut server, OptionKind::Unknown(77), &longest), unsupported);
    // After all this the server is still in step.
    assert_eq!(kinds(&mut server, OptionKind::StructuredReply, &[]), [OptionReplyKind::Ack]);

    let mut header = OPTION_MAGIC.to_be_bytes().to_vec();
    header.extend_from_slice(&77u32.to_be_bytes());
    header.extend_from_slice(&(MAX_SKIPPED_OPTION_LEN as u32 + 1).to_be_bytes());
    let error = server.feed(&header).unwrap_err();
    assert!(matches!(error, ProtocolError::OptionTooLong { option: OptionKind::Unknown(77), .. }));
}

#[test]
fn export_name_cannot_be_refused_in_words() {
    for name in [&b"nope"[..], b"\xff\xfe", b"a\0b"] {
        let step = ask(&mut modern(), OptionKind::ExportName, name).unwrap();
        assert_eq!(step, ServerStep::Close { reply: Vec::new() });
    }
    // A name above the limit is not even read.
    let mut server = modern();
    let mut header = Vec::new();
    put_option(&mut header, OptionKind::ExportName, &vec![b'x'; MAX_NAME + 1]);
    assert_eq!(server.feed(&header[..16]), Ok(ServerStep::Close { reply: Vec::new() }));
}

#[test]
fn options_are_counted() {
    let mut server = modern();
    for _ in 0..MAX_OPTIONS {
        kinds(&mut server, OptionKind::List, &[]);
    }
    let error = ask(&mut server, OptionKind::List, &[]).unwrap_err();
    assert_eq!(error, ProtocolError::TooManyOptions { max: MAX_OPTIONS });
}

#[test]
fn data_where_none_belongs_is_invalid() {
    let mut server = modern();
    for option in [OptionKind::List, OptionKind::StructuredReply] {
        assert_eq!(kinds(&mut server, option, b"x"), [OptionReplyKind::ErrInvalid], "{option}");
    }
    assert!(!go(&mut server, "ferry").structured, "the refused option changed nothing");
}

#[test]
fn broken_option_data_is_invalid_and_the_handshake_goes_on() {
    let broken: [&[u8]; 6] = [
        b"",
        b"\0\0\0\x05ferr\0\0",            // the name is longer than the data
        b"\0\0\0\x05ferry\0\x02\0\x03",   // two requests announced, one there
        b"\0\0\0\x05ferry\0\x01\0\x03\0", // a byte left over
        b"\0\0\0\x02\xff\xff\0\0",        // no UTF-8
        b"\0\0\0\x02a\0\0\0",             // NUL
    ];
    let mut server = modern();
    for data in broken {
        assert_eq!(kinds(&mut server, OptionKind::Go, data), [OptionReplyKind::ErrInvalid]);
    }
    let mut server = structured();
    for data in [&b"\0\0\0\0\xff\xff\xff\xff"[..], b"\0\0\0\0\0\0\0\x01\0\0\0\x09base:"] {
        let invalid = [OptionReplyKind::ErrInvalid];
        assert_eq!(kinds(&mut server, OptionKind::SetMetaContext, data), invalid);
        assert_eq!(kinds(&mut server, OptionKind::ListMetaContext, data), invalid);
    }
    go(&mut server, "ferry");
}

#[test]
fn info_does_not_enter_transmission() {
    let mut server = modern();
    let data = InfoRequest { export: "plain".into(), infos: Vec::new() }.encode();
    let info = [OptionReplyKind::Info, OptionReplyKind::Ack];
    assert_eq!(kinds(&mut server, OptionKind::Info, &data), info);
    assert_eq!(go(&mut server, "plain").export_index, 1);
}

#[test]
fn an_export_may_really_have_the_empty_name() {
    let named = ExportInfo::new("a", 1, TransmissionFlags::empty());
    let empty = ExportInfo::new("", 2, TransmissionFlags::empty());
    let (mut server, _) = ServerHandshake::new(vec![named, empty]);
    server.feed(&3u32.to_be_bytes()).unwrap();
    assert_eq!(go(&mut server, "").export_index, 1);
}

#[test]
fn a_server_without_exports_has_no_default() {
    let (mut server, _) = ServerHandshake::new(Vec::new());
    server.feed(&3u32.to_be_bytes()).unwrap();
    let data = InfoRequest { export: String::new(), infos: Vec::new() }.encode();
    assert_eq!(kinds(&mut server, OptionKind::Go, &data), [OptionReplyKind::ErrUnknown]);
    assert_eq!(kinds(&mut server, OptionKind::List, &[]), [OptionReplyKind::Ack]);
}

#[test]
fn df_goes_with_structured_replies() {
    let df = TransmissionFlags::SEND_DF;
    assert!(!go(&mut modern(), "ferry").flags.contains(df));
    assert!(go(&mut structured(), "ferry").flags.contains(df));
    assert!(!go(&mut structured(), "plain").flags.contains(df));
}

#[test]
fn contexts_need_structured_replies() {
    let mut server = modern();
    let data = meta("ferry", &["base:allocation"]);
    let invalid = [OptionReplyKind::ErrInvalid];
    assert_eq!(kinds(&mut server, OptionKind::SetMetaContext, &data), invalid);
    assert_eq!(kinds(&mut server, OptionKind::ListMetaContext, &data), invalid);
    assert_eq!(go(&mut server, "ferry").base_allocation, None);
}

#[test]
fn contexts_count_for_the_export_they_were_set_for() {
    let set = |export: &str| {
        let mut server = structured();
        let data = meta(export, &["qemu:x", "base:allocation", "base:allocation"]);
        assert_eq!(kinds(&mut server, OptionKind::SetMetaContext, &data), META_ACK);
        server
    };
    assert_eq!(go(&mut set("ferry"), "ferry").base_allocation, Some(BASE_ALLOCATION_ID));
    assert_eq!(go(&mut set(""), "ferry").base_allocation, Some(BASE_ALLOCATION_ID));
    assert_eq!(go(&mut set("ferry"), "plain").base_allocation, None);
    assert_eq!(go(&mut set("plain"), "").base_allocation, None);
}

#[test]
fn each_selection_replaces_the_former_even_when_it_fails() {
    let long = vec![0; MAX_OPTION_LEN + 1];
    let replacements = [
        (meta("ferry", &[]), OptionReplyKind::Ack),
        (meta("ferry", &["base:"]), OptionReplyKind::Ack),
        (meta("ferry", &["base:other", "nocolon"]), OptionReplyKind::Ack),
        (meta("nope", &["base:allocation"]), OptionReplyKind::ErrUnknown),
        (b"\0".to_vec(), OptionReplyKind::ErrInvalid),
        (long, OptionReplyKind::ErrTooBig),
    ];
    for (second, answer) in replacements {
        let mut server = structured();
        let first = meta("ferry", &["base:allocation"]);
        assert_eq!(kinds(&mut server, OptionKind::SetMetaContext, &first), META_ACK);
        assert_eq!(kinds(&mut server, OptionKind::SetMetaContext, &second), [answer]);
        assert_eq!(go(&mut server, "ferry").base_allocation, None, "{answer}");
    }
}

#[test]
fn ferry_needs_an_identity_a_version_and_the_same_export() {
    let data = |version, export: &str| FerryRequest { version, export: export.into() }.encode();
    let ack = [OptionReplyKind::Ferry, OptionReplyKind::Ack];
    let unsupported = [OptionReplyKind::ErrUnsupported];

    let mut server = modern();
    assert_eq!(kinds(&mut server, OptionKind::Ferry, &data(1, "ferry")), ack);
    assert!(go(&mut server, "ferry").ferry);

    let mut server = modern();
    assert_eq!(kinds(&mut server, OptionKind::Ferry, &data(1, "ferry")), ack);
    assert!(!go(&mut server, "plain").ferry, "another export than the one asked about");

    let mut server = modern();
    assert_eq!(kinds(&mut server, OptionKind::Ferry, &data(1, "plain")), unsupported);
    assert_eq!(kinds(&mut server, OptionKind::Ferry, &data(2, "ferry")), unsupported);
    let unknown = [OptionReplyKind::ErrUnknown];
    assert_eq!(kinds(&mut server, OptionKind::Ferry, &data(1, "nope")), unknown);
    assert_eq!(kinds(&mut server, OptionKind::Ferry, b"\0"), [OptionReplyKind::ErrInvalid]);
    assert!(!go(&mut server, "ferry").ferry);
}

#[test]
fn limits_follow_the_session() {
    let mut server = structured();
    let data = meta("ferry", &["base:allocation"]);
    kinds(&mut server, OptionKind::SetMetaContext, &data);
    let session = go(&mut server, "ferry");
    let export = server.export(&session).unwrap();
    assert_eq!(export.name, "ferry");
    let want = Limits {
        size_bytes: 1 << 20,
        flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_DF,
        min_block: 1,
        max_payload: 1 << 25,
        structured: true,
        contexts: true,
        ferry: false,
        handoff: false,
    };
    assert_eq!(session.limits(export), want);
}
