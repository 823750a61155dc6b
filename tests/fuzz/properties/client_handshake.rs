//! A server at its handshake with us: any bytes.
//!
//! Input: a byte of wishes, a byte that decides how the stream is cut, then the stream. Whatever it is, we only send
//! well-formed options, and what we believe about the export keeps the rules.

use blkferry::nbd::{
    ClientHandshake, ClientSession, ClientStep, ExportInfo, MAX_HANDSHAKE_BYTES, MAX_NAME, MAX_OPTION_REPLY_LEN,
    OPTION_MAGIC, OptionKind, ProtocolError, ServerHandshake, ServerStep, TransmissionFlags, Wants,
};

use super::lots::{Arrival, Lots};

#[derive(Debug, PartialEq)]
enum End {
    Open { needs: usize },
    Ready(ClientSession),
    Listed(Vec<(String, String)>),
    Failed(ProtocolError),
}

#[derive(Debug, PartialEq)]
struct Course {
    sent: Vec<u8>,
    taken: usize,
    farewell: Vec<u8>,
    end: End,
}

fn wants_of(wishes: u8) -> (Wants, String) {
    let wish = |bit: u8| wishes & (1 << bit) != 0;
    let wants = Wants {
        structured: wish(0),
        base_allocation: wish(1),
        hot: wish(6),
        ferry: wish(2),
        known_ferry: wish(3),
        list: wish(4),
    };
    (wants, if wish(5) { String::new() } else { "disk".into() })
}

fn converse(stream: &[u8], wishes: u8, mut arrival: Arrival) -> Course {
    let (wants, export) = wants_of(wishes);
    let mut client = ClientHandshake::new(export, wants);
    let (mut sent, mut taken) = (Vec::new(), 0);
    let end = loop {
        let needs = client.needs();
        assert!((1..=MAX_OPTION_REPLY_LEN).contains(&needs), "it wants {needs} bytes");
        assert!(!client.closed_by_server().to_string().is_empty());
        let there = needs.min(stream.len() - taken);
        if there == 0 {
            break End::Open { needs };
        }
        let piece = &stream[taken..taken + arrival.next(there)];
        taken += piece.len();
        match client.feed(piece) {
            Ok(ClientStep::Send(bytes)) => {
                assert!(piece.len() == needs || bytes.is_empty(), "an answer before the message was complete");
                sent.extend(bytes);
            }
            Ok(ClientStep::Ready { session, send }) => {
                sent.extend(send);
                break End::Ready(session);
            }
            Ok(ClientStep::Listed { exports, send }) => {
                sent.extend(send);
                break End::Listed(exports);
            }
            Err(error) => break End::Failed(error),
        }
    };
    if !matches!(end, End::Open { .. }) {
        assert_eq!(client.needs(), 0, "it is over");
        assert!(client.feed(&[]).is_err());
    }
    Course { sent, taken, farewell: client.farewell(), end }
}

/// Flags, then whole options, each of which is one that we may ask.
fn check_options(mut sent: &[u8]) {
    if sent.is_empty() {
        return;
    }
    assert!(sent[..3] == [0, 0, 0] && sent[3] & !3 == 0, "flags {:?}", &sent[..4]);
    sent = &sent[4..];
    while !sent.is_empty() {
        assert_eq!(sent[..8], OPTION_MAGIC.to_be_bytes());
        let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        assert!(!matches!(OptionKind::from_wire(number(&sent[8..12])), OptionKind::Unknown(_)));
        sent = &sent[16 + number(&sent[12..16]) as usize..];
    }
}

fn check_session(session: &ClientSession, wants: Wants) {
    assert!(session.size_bytes < 1 << 63);
    assert!(session.min_block.is_power_of_two() && session.min_block <= 1 << 16);
    assert!(session.preferred_block.is_power_of_two() && session.preferred_block >= session.min_block.max(512));
    let max = session.max_payload_bytes();
    assert!(max > 0 && max.is_multiple_of(session.min_block) && max <= session.max_block && max <= 32 << 20);
    assert!(session.flags.contains(TransmissionFlags::HAS_FLAGS));
    assert!(session.structured || !session.flags.contains(TransmissionFlags::SEND_DF));
    assert!(wants.structured || wants.known_ferry || !session.structured, "it was not asked for");
    for text in [&session.name, &session.description, &session.ferry_identity].into_iter().flatten() {
        assert!(text.len() <= 3 * MAX_NAME && !text.contains('\0'));
    }
}

pub fn check(input: &[u8]) {
    let [wishes, seed, stream @ ..] = input else { return };
    let whole = converse(stream, *wishes, Arrival::AsWanted);
    let pieces = converse(stream, *wishes, Arrival::InPieces(Lots::new(*seed)));
    // A limit on all bytes is found to be passed by the piece that passes it.
    if stream.len() <= MAX_HANDSHAKE_BYTES {
        assert_eq!(whole, pieces, "what is said depends on how it arrives");
    }
    check_options(&whole.sent);
    if let [_, ..] = &whole.farewell[..] {
        check_options(&[&[0, 0, 0, 3], &whole.farewell[..]].concat());
    }
    match &whole.end {
        End::Ready(session) => check_session(session, wants_of(*wishes).0),
        End::Failed(error) => assert!(!error.to_string().contains(|c: char| c.is_control() && c != '\n')),
        End::Listed(exports) => assert!(exports.iter().all(|(name, _)| name.len() <= MAX_NAME)),
        End::Open { .. } => {}
    }
}

/// What our own server answers a client with such wishes.
fn served(wishes: u8, export: &ExportInfo) -> Vec<u8> {
    let (wants, name) = wants_of(wishes);
    let mut client = ClientHandshake::new(name, wants);
    let (mut server, greeting) = ServerHandshake::new(vec![export.clone()]);
    let mut stream = vec![wishes, 3];
    let (mut to_client, mut to_server) = (greeting, Vec::new());
    while !to_client.is_empty() {
        stream.extend_from_slice(&to_client);
        while !to_client.is_empty() {
            let piece: Vec<u8> = to_client.drain(..client.needs().min(to_client.len())).collect();
            match client.feed(&piece) {
                Ok(ClientStep::Send(bytes)) => to_server.extend(bytes),
                _ => return stream,
            }
        }
        while !to_server.is_empty() {
            let piece: Vec<u8> = to_server.drain(..server.needs().min(to_server.len())).collect();
            match server.feed(&piece) {
                Ok(ServerStep::Reply(reply) | ServerStep::Transmission { reply, .. } | ServerStep::Close { reply }) => {
                    to_client.extend(reply);
                }
                Err(_) => return stream,
            }
        }
    }
    stream
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut disk = ExportInfo::new("disk", 1 << 30, TransmissionFlags::all());
    disk.description = Some("a disk".into());
    let foreign = disk.clone();
    disk.identity = Some("image:0".into());
    let wishes = [0b0000_0111, 0b0000_1111, 0b0000_0000, 0b0000_0001, 0b0001_0000, 0b0010_0111, 0b0000_0011];
    wishes.into_iter().flat_map(|wishes| [served(wishes, &disk), served(wishes, &foreign)]).collect()
}
