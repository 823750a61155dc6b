use super::*;
use crate::nbd::Defect;
use crate::nbd::consts::{MAX_OPTION_REPLY_LEN, TransmissionFlags};
use crate::nbd::export_info::BlockSizes;
use crate::nbd::option::{OptionHeader, OptionReplyKind, put_option_reply};
use crate::nbd::option_data::{FerryAnswer, Info, MetaContext};

const ALL: Wants =
    Wants { structured: true, base_allocation: true, hot: true, ferry: true, known_ferry: false, list: false };

/// A client that has read the greeting, and the option it sends first.
fn client(export: &str, wants: Wants) -> (ClientHandshake, OptionKind) {
    let mut client = ClientHandshake::new(export.into(), wants);
    client.feed(&NBD_MAGIC.to_be_bytes()).unwrap();
    client.feed(&OPTION_MAGIC.to_be_bytes()).unwrap();
    let ClientStep::Send(sent) = client.feed(&3u16.to_be_bytes()).unwrap() else {
        panic!("nothing sent");
    };
    assert_eq!(sent[..4], 3u32.to_be_bytes());
    (client, asked(&sent[4..]))
}

/// The option that these bytes ask.
fn asked(sent: &[u8]) -> OptionKind {
    OptionHeader::decode(sent.first_chunk().unwrap()).unwrap().option
}

fn answer(
    client: &mut ClientHandshake,
    option: OptionKind,
    kind: OptionReplyKind,
    data: &[u8],
) -> Result<ClientStep, ProtocolError> {
    let mut stream = Vec::new();
    put_option_reply(&mut stream, option, kind, data);
    let mut step = client.feed(&stream[..20]);
    if !data.is_empty() && step.is_ok() {
        step = client.feed(&stream[20..]);
    }
    step
}

/// Answers; returns the option that the client asks next.
fn next(client: &mut ClientHandshake, option: OptionKind, kind: OptionReplyKind, data: &[u8]) -> OptionKind {
    match answer(client, option, kind, data).unwrap() {
        ClientStep::Send(sent) => asked(&sent),
        other => panic!("no further option: {other:?}"),
    }
}

/// Answers with something that is not the last reply.
fn tell(client: &mut ClientHandshake, option: OptionKind, kind: OptionReplyKind, data: &[u8]) {
    let step = answer(client, option, kind, data);
    assert_eq!(step, Ok(ClientStep::Send(Vec::new())));
}

fn tell_export(client: &mut ClientHandshake, size_bytes: u64, flags: TransmissionFlags) {
    let info = Info::Export { size_bytes, flags: flags | TransmissionFlags::HAS_FLAGS };
    tell(client, OptionKind::Go, OptionReplyKind::Info, &info.encode());
}

fn acked(client: &mut ClientHandshake) -> Result<ClientSession, ProtocolError> {
    match answer(client, OptionKind::Go, OptionReplyKind::Ack, &[])? {
        ClientStep::Ready { session, .. } => Ok(session),
        other => panic!("not ready: {other:?}"),
    }
}

#[test]
fn asks_only_for_what_is_wanted() {
    assert_eq!(client("x", Wants::default()).1, OptionKind::Go);
    assert_eq!(client("x", Wants { ferry: true, ..Wants::default() }).1, OptionKind::Ferry);
    // Contexts without structured replies are not possible, so they are not asked for.
    let contexts = Wants { base_allocation: true, ..Wants::default() };
    assert_eq!(client("x", contexts).1, OptionKind::Go);
    assert_eq!(client("x", Wants { list: true, ..ALL }).1, OptionKind::List);
}

#[test]
fn lives_without_everything_but_the_export() {
    use OptionKind::{Ferry, Go, StructuredReply};
    for refusal in [
        OptionReplyKind::ErrUnsupported,
        OptionReplyKind::ErrPolicy,
        OptionReplyKind::ErrInvalid,
        OptionReplyKind::Unknown(0x8000_7777),
    ] {
        let (mut client, first) = client("x", ALL);
        assert_eq!(first, Ferry);
        assert!(client.may_be_ferry());
        assert_eq!(next(&mut client, Ferry, refusal, b"no"), StructuredReply);
        assert!(!client.may_be_ferry());
        assert_eq!(next(&mut client, StructuredReply, refusal, b"no"), Go, "no contexts then");
        tell_export(&mut client, 512, TransmissionFlags::SEND_DF);
        let session = acked(&mut client).unwrap();
        assert!(!session.structured);
        assert_eq!(session.base_allocation, None);
        assert_eq!(session.ferry_identity, None);
        assert_eq!(session.flags, TransmissionFlags::HAS_FLAGS, "DF needs structured replies");
    }
}

/// All options that these bytes ask, one after the other.
fn all_asked(mut sent: &[u8]) -> Vec<OptionKind> {
    let mut options = Vec::new();
    while let Some(header) = sent.first_chunk() {
        let header = OptionHeader::decode(header).unwrap();
        options.push(header.option);
        sent = &sent[OptionHeader::LEN + header.len_bytes as usize..];
    }
    options
}

/// The rest of a handshake with a server that has everything; nothing more is to be sent.
fn answer_all(client: &mut ClientHandshake, options: &[OptionKind]) -> ClientSession {
    for option in options {
        match option {
            OptionKind::Go => tell_export(client, 512, TransmissionFlags::empty()),
            OptionKind::Ferry => {
                let identity = FerryAnswer { version: 1, identity: "i".into(), handoff: None }.encode();
                tell(client, *option, OptionReplyKind::Ferry, &identity);
            }
            OptionKind::SetMetaContext => {
                let context = MetaContext { id: 5, name: BASE_ALLOCATION.into() }.encode();
                tell(client, *option, OptionReplyKind::MetaContext, &context);
            }
            _ => {}
        }
        if *option != OptionKind::Go {
            tell(client, *option, OptionReplyKind::Ack, &[]);
        }
    }
    acked(client).unwrap()
}

#[test]
fn a_blkferry_export_gets_the_rest_together() {
    use OptionKind::{Ferry, Go, SetMetaContext, StructuredReply};
    let (mut client, first) = client("x", ALL);
    assert_eq!(first, Ferry);
    let identity = FerryAnswer { version: 1, identity: "i".into(), handoff: None }.encode();
    tell(&mut client, Ferry, OptionReplyKind::Ferry, &identity);
    let ClientStep::Send(sent) = answer(&mut client, Ferry, OptionReplyKind::Ack, &[]).unwrap() else {
        panic!("nothing sent");
    };
    let rest = [StructuredReply, SetMetaContext, Go];
    assert_eq!(all_asked(&sent), rest);
    assert!(client.farewell().is_empty(), "GO may succeed: no option may follow it");
    let session = answer_all(&mut client, &rest);
    assert!(session.structured && session.base_allocation == Some(5) && session.ferry_identity.is_some());
}

#[test]
fn a_known_blkferry_export_gets_everything_together_and_may_be_none_any_more() {
    use OptionKind::{Ferry, Go, SetMetaContext, StructuredReply};
    let greeted = || {
        let mut client = ClientHandshake::new("x".into(), Wants { known_ferry: true, ..ALL });
        client.feed(&NBD_MAGIC.to_be_bytes()).unwrap();
        client.feed(&OPTION_MAGIC.to_be_bytes()).unwrap();
        let ClientStep::Send(sent) = client.feed(&3u16.to_be_bytes()).unwrap() else { panic!("nothing sent") };
        assert_eq!(all_asked(&sent[4..]), [Ferry, StructuredReply, SetMetaContext, Go]);
        client
    };
    let session = answer_all(&mut greeted(), &[Ferry, StructuredReply, SetMetaContext, Go]);
    assert!(session.structured && session.ferry_identity.is_some());
    // Another server has taken its place: it knows nothing of all this.
    let mut client = greeted();
    for option in [Ferry, StructuredReply, SetMetaContext] {
        tell(&mut client, option, OptionReplyKind::ErrUnsupported, &[]);
    }
    tell_export(&mut client, 512, TransmissionFlags::empty());
    let session = acked(&mut client).unwrap();
    assert_eq!((session.structured, session.base_allocation, session.ferry_identity), (false, None, None));
}

#[test]
fn what_was_told_before_an_error_does_not_count() {
    use OptionKind::{ExportName, Ferry, Go, SetMetaContext, StructuredReply};
    let (mut client, _) = client("x", ALL);
    let identity = FerryAnswer { version: 1, identity: "i".into(), handoff: None }.encode();
    tell(&mut client, Ferry, OptionReplyKind::Ferry, &identity);
    assert_eq!(next(&mut client, Ferry, OptionReplyKind::ErrPolicy, &[]), StructuredReply);
    let after = next(&mut client, StructuredReply, OptionReplyKind::Ack, &[]);
    assert_eq!(after, SetMetaContext);
    let context = MetaContext { id: 5, name: BASE_ALLOCATION.into() }.encode();
    tell(&mut client, SetMetaContext, OptionReplyKind::MetaContext, &context);
    assert_eq!(next(&mut client, SetMetaContext, OptionReplyKind::ErrTooBig, &[]), Go);
    tell_export(&mut client, 512, TransmissionFlags::empty());
    let sizes = BlockSizes { min: 4096, preferred: 4096, max: 4096 };
    tell(&mut client, Go, OptionReplyKind::Info, &Info::BlockSize(sizes).encode());
    assert_eq!(next(&mut client, Go, OptionReplyKind::ErrUnsupported, &[]), ExportName);
    let ClientStep::Ready { session, .. } = client.feed(b"\0\0\0\0\0\0\x04\0\0\x01").unwrap() else {
        panic!("not ready");
    };
    assert_eq!((session.size_bytes, session.min_block), (1024, 512));
    assert_eq!(session.base_allocation, None);
    assert_eq!(session.ferry_identity, None);
}

#[test]
fn other_contexts_and_infos_are_ignored() {
    let (mut client, _) = client("x", Wants { ferry: false, ..ALL });
    next(&mut client, OptionKind::StructuredReply, OptionReplyKind::Ack, &[]);
    let context = MetaContext { id: 5, name: "qemu:dirty".into() }.encode();
    tell(&mut client, OptionKind::SetMetaContext, OptionReplyKind::MetaContext, &context);
    next(&mut client, OptionKind::SetMetaContext, OptionReplyKind::Ack, &[]);
    tell(&mut client, OptionKind::Go, OptionReplyKind::Info, b"\x77\x77whatever");
    tell(&mut client, OptionKind::Go, OptionReplyKind::Info, b"\0\x01canonical");
    tell(&mut client, OptionKind::Go, OptionReplyKind::Info, b"\0\x02a \x1b[31mdisk\n");
    tell_export(&mut client, 512, TransmissionFlags::empty());
    let session = acked(&mut client).unwrap();
    assert!(session.structured);
    assert_eq!(session.base_allocation, None);
    assert_eq!(session.name.as_deref(), Some("canonical"));
    assert_eq!(session.description.as_deref(), Some("a  [31mdisk"), "no terminal codes");
}

#[test]
fn each_refusal_of_the_export_has_its_own_error() {
    let refuse = |export: &str, kind| {
        let (mut client, _) = client(export, Wants::default());
        let error = answer(&mut client, OptionKind::Go, kind, b"why\x07").unwrap_err();
        assert!(!client.farewell().is_empty(), "a soft disconnect is due");
        assert_eq!(client.needs(), 0);
        error
    };
    let (export, message) = ("disk".to_owned(), "why".to_owned());
    let option = OptionKind::Go;
    assert_eq!(
        refuse("disk", OptionReplyKind::ErrUnknown),
        ProtocolError::ExportUnknown { export: export.clone(), message: message.clone() }
    );
    assert_eq!(refuse("", OptionReplyKind::ErrUnknown), ProtocolError::NoDefaultExport { message: message.clone() });
    assert_eq!(
        refuse("disk", OptionReplyKind::ErrPolicy),
        ProtocolError::RefusedByPolicy { option, message: message.clone() }
    );
    assert_eq!(
        refuse("disk", OptionReplyKind::ErrTlsRequired),
        ProtocolError::TlsRequired { export, message: message.clone() }
    );
    assert_eq!(
        refuse("disk", OptionReplyKind::ErrShutdown),
        ProtocolError::ServerShutdown { message: message.clone() }
    );
    assert_eq!(
        refuse("disk", OptionReplyKind::ErrBlockSizeRequired),
        ProtocolError::BlockSizesRequired { message: message.clone() }
    );
    let kind = OptionReplyKind::ErrPlatform;
    assert_eq!(refuse("disk", kind), ProtocolError::OptionRefused { option, kind, message });
}

#[test]
fn tls_and_shutdown_end_it_at_any_option() {
    for kind in [OptionReplyKind::ErrTlsRequired, OptionReplyKind::ErrShutdown] {
        let (mut client, first) = client("x", ALL);
        assert!(answer(&mut client, first, kind, &[]).is_err(), "{kind}");
    }
}

#[test]
fn a_server_out_of_step_is_found_out() {
    let reply = |kind, data: &[u8]| {
        let (mut client, _) = client("x", Wants::default());
        answer(&mut client, OptionKind::Go, kind, data).unwrap_err()
    };
    let option = OptionKind::Go;
    let malformed = |defect| ProtocolError::MalformedOptionReply { option, defect };
    assert_eq!(
        reply(OptionReplyKind::Server, b"\0\0\0\0"),
        ProtocolError::UnexpectedReply { option, kind: OptionReplyKind::Server }
    );
    assert_eq!(reply(OptionReplyKind::Ack, b"x"), malformed(Defect::TrailingBytes));
    assert_eq!(reply(OptionReplyKind::Info, b"\0"), malformed(Defect::TooShort));
    assert_eq!(reply(OptionReplyKind::Info, b"\0\x03\0\0\0\x01"), malformed(Defect::TooShort));
    assert_eq!(reply(OptionReplyKind::Info, b"\0\0\0\0\0\0\0\0\0\0\0\x02"), malformed(Defect::NoHasFlags));
    assert_eq!(reply(OptionReplyKind::Info, b"\0\0\0\0\0\0\0\0\0\0\0\x01\0"), malformed(Defect::TrailingBytes));

    let (mut other, _) = client("x", Wants::default());
    let error = answer(&mut other, OptionKind::Info, OptionReplyKind::Ack, &[]).unwrap_err();
    let want = ProtocolError::ReplyToOtherOption { sent: OptionKind::Go, got: OptionKind::Info };
    assert_eq!(error, want);

    let (mut other, _) = client("x", Wants::default());
    let error = other.feed(b"HTTP/1.1 400 Bad Req").unwrap_err();
    assert!(matches!(error, ProtocolError::BadOptionReplyMagic { .. }));
}

#[test]
fn claims_about_the_export_are_checked() {
    let (mut empty, _) = client("x", Wants::default());
    let want = ProtocolError::NoExportInfo { export: "x".into() };
    assert_eq!(acked(&mut empty), Err(want));

    let (mut huge, _) = client("x", Wants::default());
    tell_export(&mut huge, 1 << 63, TransmissionFlags::empty());
    assert_eq!(acked(&mut huge), Err(ProtocolError::ExportTooLarge { size_bytes: 1 << 63 }));

    let (mut odd, _) = client("x", Wants::default());
    tell_export(&mut odd, 1 << 62, TransmissionFlags::empty());
    let sizes = Info::BlockSize(BlockSizes { min: 3, preferred: 4096, max: 4096 });
    tell(&mut odd, OptionKind::Go, OptionReplyKind::Info, &sizes.encode());
    assert!(matches!(acked(&mut odd), Err(ProtocolError::BadBlockSizes { min: 3, .. })));
}

#[test]
fn payload_stays_portable_and_aligned() {
    let mut session = {
        let (mut client, _) = client("x", Wants::default());
        tell_export(&mut client, 1 << 30, TransmissionFlags::empty());
        acked(&mut client).unwrap()
    };
    assert_eq!(session.max_payload_bytes(), 32 << 20);
    session.max_block = u32::MAX;
    assert_eq!(session.max_payload_bytes(), 32 << 20);
    session.max_block = 10_000;
    assert_eq!(session.max_payload_bytes(), 9728, "a multiple of 512");
}

#[test]
fn replies_are_bounded_one_by_one_and_together() {
    let list = Wants { list: true, ..Wants::default() };
    let (mut one, _) = client("", list);
    let mut stream = Vec::new();
    let long = vec![0; MAX_OPTION_REPLY_LEN + 1];
    put_option_reply(&mut stream, OptionKind::List, OptionReplyKind::Server, &long);
    let error = one.feed(&stream[..20]).unwrap_err();
    assert!(matches!(error, ProtocolError::OptionReplyTooLong { .. }));

    let (mut many, _) = client("", list);
    let entry = [0; 4096 + 4];
    let error = loop {
        match answer(&mut many, OptionKind::List, OptionReplyKind::Server, &entry) {
            Ok(_) => assert!(many.listed.len() < 2000),
            Err(error) => break error,
        }
    };
    assert_eq!(error, ProtocolError::HandshakeTooLong { max_bytes: MAX_HANDSHAKE_BYTES });
}

#[test]
fn a_hang_up_is_explained_by_when_it_came() {
    let texts = [ClientHandshake::new(String::new(), ALL).closed_by_server(), client("", ALL).0.closed_by_server(), {
        let (mut client, _) = client("x", Wants::default());
        next(&mut client, OptionKind::Go, OptionReplyKind::ErrUnsupported, &[]);
        assert!(client.farewell().is_empty(), "no option may follow EXPORT_NAME");
        client.closed_by_server()
    }]
    .map(|error| error.to_string());
    assert!(texts[0].contains("before its greeting"), "{}", texts[0]);
    assert!(texts[1].contains("options"), "{}", texts[1]);
    assert!(texts[2].contains("none of this name"), "{}", texts[2]);
}
