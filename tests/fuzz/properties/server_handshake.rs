//! A client at its handshake with us: any bytes.
//!
//! Input: a byte that decides how the stream is cut, then the stream. Whatever it is, each option that arrived whole
//! gets exactly one final reply, and the pieces in which it arrived make no difference.

use blkferry::nbd::option_data::{FerryRequest, InfoKind, InfoRequest, MetaContextRequest};
use blkferry::nbd::{
    BASE_ALLOCATION, EXPORT_NAME_ZEROES, ExportInfo, FERRY_VERSION, MAX_OPTION_LEN, OPTION_REPLY_MAGIC, OptionKind,
    OptionReplyKind, ProtocolError, ServerHandshake, ServerStep, Session, TransmissionFlags, put_option,
};

use super::lots::{Arrival, Lots};

#[derive(Debug, PartialEq)]
enum End {
    Open { needs: usize },
    Transmission(Session),
    Closed,
    Failed(ProtocolError),
}

#[derive(Debug, PartialEq)]
struct Course {
    /// All that was sent after the greeting.
    sent: Vec<u8>,
    taken: usize,
    end: End,
}

fn exports() -> Vec<ExportInfo> {
    let mut disk = ExportInfo::new("disk", 1 << 30, TransmissionFlags::all());
    disk.description = Some("a disk".into());
    disk.identity = Some("image:0".into());
    vec![disk, ExportInfo::new("b", 4096, TransmissionFlags::SEND_TRIM)]
}

fn converse(stream: &[u8], mut arrival: Arrival) -> Course {
    let (mut server, greeting) = ServerHandshake::new(exports());
    assert_eq!(greeting.len(), 18);
    let (mut sent, mut taken) = (Vec::new(), 0);
    let end = loop {
        let needs = server.needs();
        assert!((1..=MAX_OPTION_LEN).contains(&needs), "it wants {needs} bytes");
        let there = needs.min(stream.len() - taken);
        if there == 0 {
            break End::Open { needs };
        }
        let piece = &stream[taken..taken + arrival.next(there)];
        taken += piece.len();
        match server.feed(piece) {
            Ok(ServerStep::Reply(reply)) => {
                assert!(piece.len() == needs || reply.is_empty(), "an answer before the question was complete");
                sent.extend(reply);
                continue;
            }
            Ok(ServerStep::Transmission { reply, session }) => {
                sent.extend(reply);
                check_session(&server, &session);
                break End::Transmission(session);
            }
            Ok(ServerStep::Close { reply }) => {
                sent.extend(reply);
                break End::Closed;
            }
            Err(error) => break End::Failed(error),
        }
    };
    if !matches!(end, End::Open { .. }) {
        assert_eq!(server.needs(), 0, "it is over");
        assert!(server.feed(&[]).is_err());
    }
    Course { sent, taken, end }
}

fn check_session(server: &ServerHandshake, session: &Session) {
    let export = server.export(session).expect("the chosen export is one of ours");
    assert!(session.structured || session.base_allocation.is_none(), "contexts without structured replies");
    assert!(session.structured || !session.flags.contains(TransmissionFlags::SEND_DF));
    assert!(!session.ferry || export.identity.is_some());
    assert!(session.flags.contains(TransmissionFlags::HAS_FLAGS));
    assert_eq!(session.limits(export).size_bytes, export.size_bytes);
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Goes over the stream and over what was sent, side by side.
fn check_answers(stream: &[u8], course: &Course) {
    let Some(mut stream) = stream.get(4..course.taken) else {
        assert!(course.sent.is_empty(), "an answer to half of the flags");
        return;
    };
    let mut sent = &course.sent[..];
    while let Some(header) = stream.get(..16) {
        let (option, len) = (number(&header[8..12]) as u32, number(&header[12..]) as usize);
        let Some(later) = stream.get(16 + len..) else { break };
        stream = later;
        if option == OptionKind::ExportName.to_wire() {
            let lengths =
                if matches!(course.end, End::Transmission(_)) { &[10, 10 + EXPORT_NAME_ZEROES][..] } else { &[0] };
            assert!(stream.is_empty() && lengths.contains(&sent.len()), "EXPORT_NAME ends it");
            return;
        }
        // Only EXPORT_NAME was allowed, or a rule was broken: no answer, and the end.
        if sent.is_empty() && matches!(course.end, End::Closed | End::Failed(_)) {
            assert!(stream.is_empty());
            return;
        }
        sent = check_replies(option, sent);
    }
    assert!(sent.is_empty(), "{} bytes too many", sent.len());
}

/// The replies to one option, up to the final one; gives what was sent after them.
fn check_replies(option: u32, mut sent: &[u8]) -> &[u8] {
    loop {
        assert_eq!(number(&sent[..8]), OPTION_REPLY_MAGIC);
        assert_eq!(number(&sent[8..12]) as u32, option);
        let (kind, len) = (number(&sent[12..16]) as u32, number(&sent[16..20]) as usize);
        sent = &sent[20 + len..];
        let kind = OptionReplyKind::from_wire(kind);
        assert!(!matches!(kind, OptionReplyKind::Unknown(_)));
        if kind.is_error() || kind == OptionReplyKind::Ack {
            return sent;
        }
    }
}

pub fn check(input: &[u8]) {
    let Some((&seed, stream)) = input.split_first() else { return };
    let whole = converse(stream, Arrival::AsWanted);
    let pieces = converse(stream, Arrival::InPieces(Lots::new(seed)));
    assert_eq!(whole, pieces, "what is said depends on how it arrives");
    check_answers(stream, &whole);
}

pub fn seeds() -> Vec<Vec<u8>> {
    let info = |export: &str| {
        let infos = vec![InfoKind::Name, InfoKind::Description, InfoKind::BlockSize];
        InfoRequest { export: export.into(), infos }.encode()
    };
    let contexts = |export: &str| {
        let queries = vec!["base:".to_owned(), BASE_ALLOCATION.to_owned(), "other:x".to_owned()];
        MetaContextRequest { export: export.into(), queries }.encode()
    };
    let ferry = |version| FerryRequest { version, export: "disk".into() }.encode();
    let sessions: [&[(OptionKind, Vec<u8>)]; 6] = [
        &[
            (OptionKind::Ferry, ferry(FERRY_VERSION)),
            (OptionKind::StructuredReply, vec![]),
            (OptionKind::SetMetaContext, contexts("disk")),
            (OptionKind::Go, info("disk")),
        ],
        &[(OptionKind::List, vec![]), (OptionKind::Info, info("b")), (OptionKind::Abort, vec![])],
        &[(OptionKind::ExportName, b"disk".to_vec())],
        &[(OptionKind::StartTls, vec![]), (OptionKind::ExtendedHeaders, vec![]), (OptionKind::Go, info("nothing"))],
        &[
            (OptionKind::StructuredReply, vec![]),
            (OptionKind::ListMetaContext, contexts("")),
            (OptionKind::SetMetaContext, contexts("b")),
            (OptionKind::ExportName, vec![]),
        ],
        &[(OptionKind::Ferry, ferry(9)), (OptionKind::Unknown(77), vec![1; 40]), (OptionKind::Go, info(""))],
    ];
    let stream = |flags: u8, session: &[(OptionKind, Vec<u8>)]| {
        let mut out = vec![7, 0, 0, 0, flags];
        session.iter().for_each(|(option, data)| put_option(&mut out, *option, data));
        out
    };
    sessions.iter().flat_map(|session| [stream(3, session), stream(1, session), stream(0, session)]).collect()
}
