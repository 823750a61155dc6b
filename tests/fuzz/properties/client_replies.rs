//! A source that answers us: any bytes.
//!
//! Input: a byte that decides how the stream is cut, then the stream. A real link has asked six things at once; what
//! comes of them must be what a naive reading of the stream says ([`outcomes`]): no byte of a reply that breaks a rule
//! is believed, and nobody is left waiting.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use blkferry::engine::{ByteRange, Errno, FetchError, Lane};
use blkferry::nbd::chunk::{
    Extent, Hole, put_block_status_chunk, put_data_chunk_head, put_error_chunk, put_ferry_hashes_chunk,
    put_ferry_told_chunk, put_none_chunk,
};
use blkferry::nbd::{
    Ask, ExportInfo, FERRY_CHANGED_ID, NbdError, ReplyFlags, Request, ServerHandshake, ServerStep, StateFlags, Told,
    TransmissionFlags, Uri, put_simple_reply,
};
use blkferry::remote::{Beforehand, HandOffError, LossPolicy, OnLoss, Source};
use futures_util::future::{join, join4};
use uuid::Uuid;

use super::lots::{Lots, pieces};
use super::replies_model::{Contexts, Outcome, Question, outcomes};
use super::site::{Site, send};

const QUESTIONS: [Question; 6] = [
    Question::Read { offset: 0, len: 1024 },
    Question::Read { offset: 8192, len: 4096 },
    Question::Extents,
    Question::Hashes { len: LEN },
    Question::HandOff,
    Question::Changed { len: SIZE },
];
/// Size of the disk.
const SIZE: u64 = 1 << 20;
/// What extents and hashes were asked of.
const LEN: u64 = 65536;
/// The first is what our server gives `base:allocation`.
const CONTEXTS: Contexts = Contexts { allocation: 1, changed: FERRY_CHANGED_ID };
const MAX_PAYLOAD: u64 = 32 << 20;

/// The source: an honest handshake, six requests taken, and then whatever the input says.
fn source(stream: UnixStream, replies: &[u8], seed: u8) {
    let mut export = ExportInfo::new("", SIZE, TransmissionFlags::READ_ONLY);
    export.identity = Some("image:0".into());
    let (mut server, greeting) = ServerHandshake::new(vec![export]);
    (&stream).write_all(&greeting).unwrap();
    loop {
        let mut bytes = vec![0; server.needs()];
        (&stream).read_exact(&mut bytes).unwrap();
        match server.feed(&bytes).unwrap() {
            ServerStep::Reply(reply) => (&stream).write_all(&reply).unwrap(),
            ServerStep::Transmission { reply, .. } => {
                (&stream).write_all(&reply).unwrap();
                break;
            }
            ServerStep::Close { .. } => panic!("we know how to shake hands"),
        }
    }
    let mut requests = vec![0; QUESTIONS.len() * Request::LEN + step().encode().len()];
    (&stream).read_exact(&mut requests).unwrap();
    send(&stream, &pieces(replies, Lots::new(seed)));
}

/// The step of a handoff that is asked for.
fn step() -> Ask {
    let [disk, to] = [1, 2].map(Uuid::from_u128);
    Ask::Take { disk, to, epoch: 2, wait_ms: 0 }
}

async fn ask(uri: Uri) -> Vec<Outcome> {
    let source = Source::open(uri, LossPolicy::new(OnLoss::Wait), Beforehand::default()).await.unwrap();
    let read = async |question| {
        let Question::Read { offset, len } = question else { panic!("a read") };
        let range = ByteRange::new(offset, len as u64);
        match source.read(range, Lane::Demand).await {
            Ok(data) => {
                let mut bytes = Vec::new();
                data.pieces(range).iter().for_each(|part| part.append_to(&mut bytes));
                Outcome::Data(bytes)
            }
            Err(FetchError::Refused(Errno(errno))) => Outcome::Refused(errno),
            Err(FetchError::Unreachable) => Outcome::Lost,
            Err(FetchError::NoRoom) => panic!("this has nothing to do with room"),
        }
    };
    let range = ByteRange::new(0, LEN);
    let extents = async {
        let extents = source.extents(range, Lane::Demand).await;
        Outcome::Extents(extents.iter().map(|extent| (extent.len_bytes, extent.zero)).collect())
    };
    let hashes = async {
        match source.hashes(range).await {
            Ok(hashes) => Outcome::Hashes(hashes),
            Err(Errno(errno)) => Outcome::Refused(errno),
        }
    };
    let refused = |error| match error {
        HandOffError::Lost => Outcome::Lost,
        HandOffError::Refused(Errno(errno)) => Outcome::Refused(errno),
    };
    let told = async { source.hand_off(&step()).await.map_or_else(refused, Outcome::Told) };
    let changed = async { source.changed().await.map_or_else(refused, |changed| Outcome::Changed(changed.stretches)) };
    let gone = async {
        source.gone().await;
        source.hang_up();
    };
    let blocks = join4(read(QUESTIONS[0]), read(QUESTIONS[1]), extents, hashes);
    let ((blocks, disk), ()) = join(join(blocks, join(told, changed)), gone).await;
    vec![blocks.0, blocks.1, blocks.2, blocks.3, disk.0, disk.1]
}

/// What the caller of a link sees of it: not all outcomes can be told from each other.
fn as_seen(question: Question, outcome: Outcome) -> Outcome {
    match (question, outcome) {
        (Question::Extents, Outcome::Refused(_) | Outcome::Lost) => Outcome::Extents(Vec::new()),
        (Question::Hashes { .. }, Outcome::Lost) => Outcome::Refused(Errno::EIO.0),
        (_, outcome) => outcome,
    }
}

pub fn check(input: &[u8]) {
    let Some((&seed, stream)) = input.split_first() else { return };
    let want = outcomes(&QUESTIONS, CONTEXTS, MAX_PAYLOAD, stream);
    let want: Option<Vec<Outcome>> = want
        .map(|want| QUESTIONS.into_iter().zip(want).map(|(question, outcome)| as_seen(question, outcome)).collect());
    let replies = stream.to_vec();
    let got = Site::with(|site| {
        let listener = UnixListener::bind(&site.socket).unwrap();
        let served = site.peer_does(move || source(listener.accept().unwrap().0, &replies, seed));
        let uri: Uri = format!("nbd+unix:///?socket={}", site.socket.display()).parse().unwrap();
        let course = async {
            let (got, served) = join(ask(uri), served).await;
            served.expect("the peer ends");
            got
        };
        let got = site.reactor.block_on(course).unwrap();
        std::fs::remove_file(&site.socket).unwrap();
        got
    });
    assert!(want.as_ref().is_none_or(|want| *want == got), "got {got:?}, wanted {want:?}");
}

pub fn seeds() -> Vec<Vec<u8>> {
    let (more, done) = (ReplyFlags::empty(), ReplyFlags::DONE);
    let piece = |cookie, flags, offset, data: &[u8]| {
        let mut out = Vec::new();
        put_data_chunk_head(&mut out, cookie, flags, offset, data.len() as u32);
        out.extend_from_slice(data);
        out
    };
    let made = |put: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        put(&mut out);
        out
    };
    let first = piece(1, done, 0, &[1; 1024]);
    let hole = made(&|out| Hole { offset: 8192, len: 4096 }.put(out, 2, done));
    let extents = [Extent { len: 4096, flags: StateFlags::ZERO }, Extent { len: 61440, flags: StateFlags::empty() }];
    let status = made(&|out| put_block_status_chunk(out, 3, done, CONTEXTS.allocation, &extents));
    let other_status = made(&|out| put_block_status_chunk(out, 3, more, 9, &extents));
    let hashes = made(&|out| put_ferry_hashes_chunk(out, 4, done, 0, 4096, &[[7; 32]; 16]));
    let refusal = |cookie, flags, offset| made(&|out| put_error_chunk(out, cookie, flags, NbdError::Io, "no", offset));
    let simple = |cookie, error| made(&|out| put_simple_reply(out, cookie, error));
    let end = |cookie| made(&|out| put_none_chunk(out, cookie));
    let told = |told: &Told| made(&|out| put_ferry_told_chunk(out, 5, told));
    let given = told(&Told::Given { epoch: 2, identity: "image:1".into() });
    let no = told(&Told::No { why: "it is written to".into(), epoch: 1, later: true });
    let written = |len, written| Extent { len, flags: StateFlags::from_bits_retain(u32::from(written)) };
    let changed = |extents: &[Extent]| made(&|out| put_block_status_chunk(out, 6, done, FERRY_CHANGED_ID, extents));
    let all = changed(&[written(4096, true), written((SIZE - 4096) as u32, false)]);
    let part = changed(&[written(8192, false)]);
    let beyond = changed(&[written(SIZE as u32, true), written(1, true)]);
    let rest = made(&|out| {
        put_block_status_chunk(out, 7, done, FERRY_CHANGED_ID, &[written((SIZE - 8192) as u32, true)]);
    });
    [
        [first.clone(), hole.clone(), status.clone(), hashes.clone()].concat(),
        [hashes, other_status, status, refusal(2, done, Some(8192)), refusal(1, done, None)].concat(),
        [piece(1, more, 512, &[2; 512]), hole, piece(1, done, 0, &[3; 512]), end(3), end(4)].concat(),
        [simple(1, None), vec![4; 1024], simple(2, Some(NbdError::Inval)), simple(3, None), simple(4, None)].concat(),
        [refusal(1, more, Some(0)), piece(1, more, 0, &[5; 1024]), end(1), simple(2, Some(NbdError::Shutdown))]
            .concat(),
        [first.clone(), first].concat(),
        [given.clone(), all].concat(),
        [no, part.clone(), end(4)].concat(),
        [told(&Told::Back { epoch: 3 }), beyond].concat(),
        [told(&Told::Noted), part, rest].concat(),
        [end(5), end(6)].concat(),
        [refusal(5, done, None), simple(6, Some(NbdError::Inval))].concat(),
        [given.clone(), given].concat(),
    ]
    .into_iter()
    .map(|stream| [vec![9], stream].concat())
    .collect()
}
