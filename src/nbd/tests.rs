//! Properties of the whole layer: both ends talk to each other however their bytes are cut, and no bytes make
//! either of them panic, ask for too much, or say too much. Golden bytes are in tests/nbd_golden.rs.

use super::option_data::{
    FerryAnswer, FerryRequest, Info, InfoKind, InfoRequest, MetaContext, MetaContextRequest, ServerEntry,
};
use super::*;
use proptest::prelude::*;
use proptest::sample::Index;

/// Exports of a server, most with an identity, one of them possibly the default.
fn exports() -> impl Strategy<Value = Vec<ExportInfo>> {
    let sizes = (0u32..=16, 9u32..=20).prop_map(|(min, preferred)| (1 << min, 1 << preferred.max(min)));
    let export = ("[a-zé]{0,3}", any::<u64>(), any::<u16>(), sizes, any::<Option<String>>());
    let export = export.prop_map(|(name, size_bytes, bits, (min_block, preferred_block), identity)| {
        let identity = identity.map(|text| text.replace('\0', "-"));
        let flags = TransmissionFlags::from_bits_truncate(bits);
        let description = (!name.is_empty()).then(|| format!("about {name}"));
        ExportInfo {
            min_block,
            preferred_block,
            max_block: preferred_block + 7,
            identity,
            description,
            tells_hot: size_bytes.is_multiple_of(3),
            ..ExportInfo::new(name, size_bytes >> 1, flags)
        }
    });
    prop::collection::vec(export, 0..4)
}

fn wants() -> impl Strategy<Value = Wants> {
    any::<[bool; 6]>().prop_map(|[structured, base_allocation, hot, ferry, known_ferry, list]| Wants {
        structured,
        base_allocation,
        hot,
        ferry,
        known_ferry,
        list,
    })
}

/// How the two handshakes of a connection ended.
#[derive(Debug)]
struct Talk {
    session: Option<Session>,
    client: Result<ClientStep, ProtocolError>,
    /// Bytes that one end sent and the other did not take.
    left_over: usize,
}

fn abort_ack() -> Vec<u8> {
    let mut ack = Vec::new();
    put_option_reply(&mut ack, OptionKind::Abort, OptionReplyKind::Ack, &[]);
    ack
}

/// Lets both ends talk in memory, with bytes that arrive in pieces of the given lengths.
fn talk(server: (ServerHandshake, Vec<u8>), mut client: ClientHandshake, pieces: &[usize]) -> Talk {
    let (mut server, mut to_client) = server;
    let (mut to_server, mut session) = (Vec::new(), None);
    let mut pieces = pieces.iter().cycle();
    loop {
        let mut len = |needs: usize, there: usize| (*pieces.next().unwrap()).clamp(1, needs.max(1)).min(there);
        if client.needs() > 0 && !to_client.is_empty() {
            let piece: Vec<u8> = to_client.drain(..len(client.needs(), to_client.len())).collect();
            match client.feed(&piece) {
                Ok(ClientStep::Send(sent)) => to_server.extend(sent),
                done => {
                    if let Ok(ClientStep::Listed { send, .. }) = &done {
                        assert_eq!(server.feed(send), Ok(ServerStep::Close { reply: abort_ack() }));
                    }
                    return Talk { session, client: done, left_over: to_client.len() + to_server.len() };
                }
            }
        } else if server.needs() > 0 && !to_server.is_empty() {
            let piece: Vec<u8> = to_server.drain(..len(server.needs(), to_server.len())).collect();
            match server.feed(&piece).expect("our client keeps the rules") {
                ServerStep::Reply(reply) => to_client.extend(reply),
                ServerStep::Transmission { reply, session: agreed } => {
                    to_client.extend(reply);
                    session = Some(agreed);
                }
                ServerStep::Close { reply } => to_client.extend(reply),
            }
        } else {
            panic!("both ends wait: {client:?}");
        }
    }
}

proptest! {
    #[test]
    fn both_ends_agree_however_the_bytes_are_cut(
        exports in exports(),
        wants in wants(),
        which in any::<Index>(),
        existing in any::<bool>(),
        pieces in prop::collection::vec(1usize..60, 1..8),
    ) {
        let known = existing && !exports.is_empty();
        let name = if known { which.get(&exports).name.clone() } else { "nope".to_owned() };
        let client = ClientHandshake::new(name.clone(), wants);
        let talk = talk(ServerHandshake::new(exports.clone()), client, &pieces);
        prop_assert_eq!(talk.left_over, 0);
        if wants.list {
            let entry = |export: &ExportInfo| (export.name.clone(), export.description.clone().unwrap_or_default());
            let want: Vec<_> = exports.iter().map(entry).collect();
            let listed = matches!(&talk.client, Ok(ClientStep::Listed { exports, .. }) if *exports == want);
            prop_assert!(listed, "{:?}", talk);
            return Ok(());
        }
        if !known {
            let message = "there is no export named \"nope\" here".to_owned();
            prop_assert_eq!(talk.client, Err(ProtocolError::ExportUnknown { export: name, message }));
            return Ok(());
        }
        let Ok(ClientStep::Ready { session: client, send }) = talk.client else {
            panic!("{talk:?}");
        };
        let server = talk.session.expect("the client is ready, so the server is");
        let export = &exports[server.export_index];
        prop_assert!(send.is_empty());
        prop_assert_eq!(&export.name, &name);
        prop_assert_eq!(client.size_bytes, export.size_bytes);
        prop_assert_eq!(client.flags, server.flags);
        prop_assert_eq!(client.flags, export.wire_flags(wants.structured));
        let sizes = BlockSizes { min: client.min_block, preferred: client.preferred_block, max: client.max_block };
        prop_assert_eq!(sizes, export.block_sizes());
        prop_assert_eq!((client.structured, server.structured), (wants.structured, wants.structured));
        prop_assert_eq!((client.base_allocation, client.hot), (server.base_allocation, server.hot));
        prop_assert_eq!(server.hot.is_some(), wants.structured && wants.hot && export.tells_hot);
        prop_assert_eq!(server.base_allocation.is_some(), wants.structured && wants.base_allocation);
        prop_assert_eq!(server.ferry, wants.ferry && export.identity.is_some());
        prop_assert_eq!(client.ferry_identity, export.identity.clone().filter(|_| wants.ferry));
        prop_assert!(server.no_zeroes);
    }
}

/// Lengths that a header may announce: mostly the truth, sometimes anything.
fn lies() -> impl Strategy<Value = Option<u32>> {
    prop_oneof![6 => Just(None), 1 => any::<u32>().prop_map(Some), 1 => (0u32..200_000).prop_map(Some)]
}

/// Data that is right for some option or reply, or a damaged form of it, or noise.
fn data() -> impl Strategy<Value = Vec<u8>> {
    let text = "[a-z:]{0,8}";
    let valid = prop_oneof![
        (text, prop::collection::vec(0u16..6, 0..4)).prop_map(|(export, infos)| {
            let infos = infos.into_iter().map(InfoKind::from_wire).collect();
            InfoRequest { export, infos }.encode()
        }),
        (text, prop::collection::vec("(base:(allocation)?|x:y)", 0..4))
            .prop_map(|(export, queries)| MetaContextRequest { export, queries }.encode()),
        (1u16..3, text).prop_map(|(version, export)| FerryRequest { version, export }.encode()),
        text.prop_map(|identity| FerryAnswer { version: 1, identity, handoff: None }.encode()),
        (text, text).prop_map(|(name, description)| ServerEntry { name, description }.encode()),
        any::<(u64, u16)>().prop_map(|(size_bytes, bits)| {
            let flags = TransmissionFlags::from_bits_retain(bits | 1);
            Info::Export { size_bytes, flags }.encode()
        }),
        any::<[u32; 3]>()
            .prop_map(|[min, preferred, max]| Info::BlockSize(BlockSizes { min, preferred, max }).encode()),
        any::<u32>().prop_map(|id| MetaContext { id, name: BASE_ALLOCATION.into() }.encode()),
        Just(Vec::new()),
    ];
    let damaged = (valid, any::<Option<(Index, u8)>>()).prop_map(|(mut data, damage)| {
        if let Some((at, byte)) = damage.filter(|_| !data.is_empty()) {
            let at = at.index(data.len());
            data[at] = byte;
        }
        data
    });
    prop_oneof![3 => damaged, 1 => prop::collection::vec(any::<u8>(), 0..80)]
}

/// Feeds all of `stream` in pieces no longer than wanted; checks what holds for any stream.
fn feed_server(server: &mut ServerHandshake, stream: &[u8], exports: usize) -> bool {
    let mut rest = stream;
    while !rest.is_empty() {
        let needs = server.needs();
        assert!((1..=MAX_OPTION_LEN).contains(&needs), "asks for {needs} bytes");
        let (now, later) = rest.split_at(needs.min(rest.len()));
        rest = later;
        let step = server.feed(now);
        let reply = match &step {
            Ok(ServerStep::Reply(reply) | ServerStep::Close { reply } | ServerStep::Transmission { reply, .. }) => {
                reply.len()
            }
            Err(_) => 0,
        };
        assert!(reply <= 64 + (exports + 4) * (20 + 2 * MAX_NAME), "answers {reply} bytes to one option");
        if !matches!(step, Ok(ServerStep::Reply(_))) {
            assert_eq!(server.needs(), 0);
            return false;
        }
    }
    true
}

proptest! {
    #[test]
    fn no_client_hurts_the_server(
        exports in exports(),
        flags in prop_oneof![3 => Just(3u32), 1 => any::<u32>()],
        options in prop::collection::vec((prop_oneof![0u32..13, Just(0x6672_7279), any::<u32>()], data(), lies()), 0..12),
        noise in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let count = exports.len();
        let (mut server, _) = ServerHandshake::new(exports);
        let mut alive = feed_server(&mut server, &flags.to_be_bytes(), count);
        for (option, data, lie) in options {
            let mut stream = Vec::new();
            put_option(&mut stream, OptionKind::from_wire(option), &data);
            if let Some(len) = lie {
                stream[12..16].copy_from_slice(&len.to_be_bytes());
            }
            alive = alive && feed_server(&mut server, &stream, count);
        }
        let _ = alive && feed_server(&mut server, &noise, count);
    }

    #[test]
    fn no_server_hurts_the_client(
        wants in wants(),
        export in "[a-z]{0,3}",
        greeting in prop_oneof![4 => Just(None), 1 => any::<[u8; 18]>().prop_map(Some)],
        replies in prop::collection::vec(
            (prop_oneof![0u32..6, 0x8000_0000u32..0x8000_000c, Just(0x6672_7279), any::<u32>()], data(), lies()),
            0..24,
        ),
    ) {
        let mut client = ClientHandshake::new(export, wants);
        let mut asked = OptionKind::Abort;
        let (_, sound) = ServerHandshake::new(Vec::new());
        let greeting = greeting.map_or(sound, |bytes| bytes.to_vec());
        let mut alive = feed_client(&mut client, &greeting, &mut asked);
        for (kind, data, lie) in replies {
            let mut stream = Vec::new();
            put_option_reply(&mut stream, asked, OptionReplyKind::from_wire(kind), &data);
            if let Some(len) = lie {
                stream[16..20].copy_from_slice(&len.to_be_bytes());
            }
            alive = alive && feed_client(&mut client, &stream, &mut asked);
        }
    }
}

/// As [`feed_server`]; notes the option that the client asks last, so that replies can be to it.
fn feed_client(client: &mut ClientHandshake, stream: &[u8], asked: &mut OptionKind) -> bool {
    let mut rest = stream;
    while !rest.is_empty() {
        let needs = client.needs();
        assert!((1..=MAX_OPTION_REPLY_LEN).contains(&needs), "asks for {needs} bytes");
        let (now, later) = rest.split_at(needs.min(rest.len()));
        rest = later;
        match client.feed(now) {
            Ok(ClientStep::Send(sent)) => {
                // The first option comes behind four bytes of flags.
                let option = sent.windows(16).find_map(|window| OptionHeader::decode(window.try_into().unwrap()).ok());
                *asked = option.map_or(*asked, |header| header.option);
            }
            Ok(ClientStep::Ready { session, .. }) => {
                assert!(session.size_bytes <= i64::MAX as u64);
                assert!(session.min_block.is_power_of_two() && session.preferred_block.is_power_of_two());
                assert!(session.min_block <= session.preferred_block && session.preferred_block <= session.max_block);
                assert!(session.max_payload_bytes() >= 512 && session.max_payload_bytes() <= DEFAULT_MAX_PAYLOAD);
                assert!(session.max_payload_bytes().is_multiple_of(session.min_block));
                assert!(session.structured || session.base_allocation.is_none());
                return false;
            }
            Ok(ClientStep::Listed { .. }) | Err(_) => return false,
        }
    }
    true
}

proptest! {
    #[test]
    fn requests_survive_and_none_is_accepted_that_leaves_the_export(
        bytes in any::<[u8; 28]>(),
        size_bytes in prop_oneof![any::<u64>(), 0u64..1 << 20],
        bits in any::<u16>(),
        min_block in prop_oneof![Just(1u32), Just(512), any::<u32>()],
        agreed in any::<[bool; 3]>(),
        command in 0u16..9,
    ) {
        let mut bytes = bytes;
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[6..8].copy_from_slice(&command.to_be_bytes());
        let request = Request::decode(&bytes).unwrap();
        prop_assert_eq!(request.encode(), bytes);
        let flags = TransmissionFlags::from_bits_truncate(bits);
        let [structured, contexts, ferry] = agreed;
        let limits = Limits {
            size_bytes, flags, min_block, max_payload: DEFAULT_MAX_PAYLOAD, structured, contexts, ferry,
            handoff: ferry,
        };
        // With offsets and flags as they come, and brought near to what is allowed.
        let near = Request {
            flags: request.flags & CommandFlags::FUA,
            offset: request.offset % size_bytes.max(1),
            len: request.len % 4096,
            ..request
        };
        for request in [request, near] {
            if request.validate(&limits).is_ok() && !matches!(request.command, Command::Disc | Command::Flush) {
                prop_assert!(request.offset.checked_add(u64::from(request.len)).is_some_and(|end| end <= size_bytes));
                prop_assert!(request.payload_len() <= DEFAULT_MAX_PAYLOAD);
                prop_assert!(!(request.command.writes() && flags.contains(TransmissionFlags::READ_ONLY)));
            }
        }
    }

    #[test]
    fn no_reply_hurts_the_client(
        common in any::<[u8; 16]>(),
        extra in any::<[u8; 4]>(),
        magic in 0..3,
        kind in prop_oneof![0u16..8, 0x8000u16..0x8004, Just(0x6672), any::<u16>()],
        payload in prop::collection::vec(any::<u8>(), 0..200),
        max_payload in any::<u32>(),
    ) {
        let mut common = common;
        match magic {
            0 => common[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes()),
            1 => {
                common[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
                common[6..8].copy_from_slice(&kind.to_be_bytes());
            }
            _ => {}
        }
        if let Ok(header) = ReplyHeader::decode(&common, extra) {
            prop_assert_eq!(ReplyHeader::needs_more(&common), if magic == 1 { 4 } else { 0 });
            if let (Ok(()), ReplyHeader::Chunk { len, .. }) = (header.check(max_payload), header) {
                let bound = (12 + 32 * MAX_FERRY_HASHES as u64).max(u64::from(max_payload) + 8);
                prop_assert!(u64::from(len) <= bound);
            }
        }
        let kind = ChunkKind::from_wire(kind);
        let _ = Hole::decode(&payload);
        if let Ok(status) = BlockStatus::decode(&payload) {
            prop_assert_eq!(4 + 8 * status.extents.len(), payload.len());
        }
        if let Ok(hashes) = FerryHashes::decode(&payload) {
            prop_assert_eq!(12 + 32 * hashes.hashes.len(), payload.len());
        }
        if let Ok(error) = ErrorChunk::decode(kind, &payload) {
            // Each wrong byte may become a replacement character of three.
            prop_assert!(error.message.len() <= 3 * payload.len());
        }
    }

    #[test]
    fn option_data_survives_and_noise_is_only_refused(
        export in "[^\0]{0,40}",
        texts in prop::collection::vec("[^\0]{0,40}", 0..6),
        infos in prop::collection::vec(any::<u16>(), 0..6),
        id in any::<u32>(),
        noise in data(),
    ) {
        let infos = infos.into_iter().map(InfoKind::from_wire).collect();
        let request = InfoRequest { export: export.clone(), infos };
        prop_assert_eq!(InfoRequest::decode(&request.encode()), Ok(request));
        let request = MetaContextRequest { export: export.clone(), queries: texts };
        prop_assert_eq!(MetaContextRequest::decode(&request.encode()), Ok(request));
        let request = FerryRequest { version: 1, export: export.clone() };
        prop_assert_eq!(FerryRequest::decode(&request.encode()), Ok(request));
        let answer = FerryAnswer { version: 1, identity: export.clone(), handoff: None };
        prop_assert_eq!(FerryAnswer::decode(&answer.encode()), Ok(answer));
        let context = MetaContext { id, name: export.clone() };
        prop_assert_eq!(MetaContext::decode(&context.encode()), Ok(context));
        let info = Info::Name(export);
        prop_assert_eq!(Info::decode(&info.encode()), Ok(info));

        if let Ok(request) = MetaContextRequest::decode(&noise) {
            prop_assert!(request.queries.len() <= noise.len() / 4);
        }
        if let Ok(request) = InfoRequest::decode(&noise) {
            prop_assert!(request.infos.len() <= noise.len() / 2);
        }
        let _ = (FerryRequest::decode(&noise), FerryAnswer::decode(&noise), ServerEntry::decode(&noise));
        let _ = (Info::decode(&noise), MetaContext::decode(&noise));
    }
}
