//! One connection to the source, with many requests under way on it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use event_listener::Event;
use futures_channel::oneshot;

use super::dial::Dialed;
#[cfg(feature = "planted-faults")]
use super::planted::{PlantedFault, is_planted};
use super::read::{BadCover, FetchedData, HashAssembly, ReadAssembly};
use super::stats::SourceStats;
use crate::engine::{ByteRange, Errno, Extent};
use crate::nbd::chunk::{BlockStatus, ErrorChunk, FerryHashes, Hole, decode_data_offset};
use crate::nbd::{
    Ask, ChunkKind, ClientSession, Command, CommandFlags, FERRY_CHANGED, FERRY_CHANGED_ID, FERRY_IS_HOT, NbdError,
    ProtocolError, ReplyHeader, Request, StateFlags, Told,
};
use crate::uring::{BufferedReader, Connection, Mailbox, Part, now, spawn};

/// Longest chunk payload that is read into the receive buffer rather than past it.
const MAX_SMALL_PAYLOAD: usize = 8 << 10;

/// Data is received in pieces, between so many bytes: a slow link that delivers is told from a silent one. They are as
/// large as what comes in a short while.
const RECEIVE_PIECE: (usize, usize) = (8 << 10, 256 << 10);
/// A piece that takes longer is too large.
const PIECE_TIME: Duration = Duration::from_millis(100);

/// Why a request on a link came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LinkError {
    /// The connection is gone; ask again on another.
    Lost,
    /// The source answered, and said no.
    Refused(Errno),
}

#[derive(Debug, thiserror::Error)]
pub(super) enum LinkFailure {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the source closed the connection")]
    Closed,
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    #[error("{0}")]
    Cover(#[from] BadCover),
    #[error("the source answered a request that was not made (cookie {0})")]
    UnknownCookie(u64),
    #[error("the source answered with a {0:?} chunk, which this request does not have")]
    UnexpectedChunk(ChunkKind),
}

type Answer<T> = oneshot::Sender<Result<T, LinkError>>;

/// A request of this link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    cookie: u64,
}

enum Waiting {
    Read {
        read: ReadAssembly,
        answer: Answer<FetchedData>,
    },
    Extents {
        extents: Vec<Extent>,
        answer: Answer<Vec<Extent>>,
    },
    Hashes {
        hashes: HashAssembly,
        answer: Answer<Vec<[u8; 32]>>,
    },
    Told {
        told: Option<Told>,
        answer: Answer<Option<Told>>,
    },
    /// Of a context of our own with one bit.
    Marked {
        context: u32,
        bit: u32,
        /// What is to be answered before this.
        after: Option<Asked>,
        stretches: Vec<(u64, bool)>,
        answer: Answer<Vec<(u64, bool)>>,
    },
}

struct Pending {
    waiting: Waiting,
    error: Option<NbdError>,
}

/// A link. Clones are the same link.
#[derive(Clone)]
pub(super) struct Link {
    inner: Rc<Inner>,
}

struct Inner {
    connection: Connection,
    session: ClientSession,
    requests: Mailbox<Vec<u8>>,
    pending: RefCell<HashMap<u64, Pending>>,
    /// An answer is coming in; its request is not among those that wait any more.
    receiving: Cell<bool>,
    next_cookie: Cell<u64>,
    answers: Cell<u64>,
    alive: Cell<bool>,
    died: Event,
    last_heard: Cell<Instant>,
    /// When the first of the requests that wait was made, of those that are left without a pause.
    asked: Cell<Instant>,
    /// How large a piece of data is received at once.
    piece: Cell<usize>,
    /// Given up because nothing was heard.
    silent_since: Cell<Option<Instant>>,
    stats: SourceStats,
}

impl Link {
    /// Starts the tasks of a dialed connection.
    pub(super) fn start(dialed: Dialed, stats: SourceStats) -> Self {
        let inner = Rc::new(Inner {
            connection: dialed.connection,
            session: dialed.session,
            requests: Mailbox::default(),
            pending: RefCell::default(),
            receiving: Cell::new(false),
            next_cookie: Cell::new(1),
            answers: Cell::new(0),
            alive: Cell::new(true),
            died: Event::new(),
            last_heard: Cell::new(now()),
            asked: Cell::new(now()),
            piece: Cell::new(RECEIVE_PIECE.0),
            silent_since: Cell::new(None),
            stats,
        });
        let link = Self { inner };
        spawn(send_requests(link.clone())).detach();
        let receiving = link.clone();
        spawn(async move {
            let failure = receiving.receive(dialed.reader).await;
            receiving.die(&failure);
        })
        .detach();
        link
    }

    pub(super) fn session(&self) -> &ClientSession {
        &self.inner.session
    }

    pub(super) fn is_alive(&self) -> bool {
        self.inner.alive.get()
    }

    /// Requests that were answered.
    pub(super) fn answers(&self) -> u64 {
        self.inner.answers.get()
    }

    /// Requests under way.
    pub(super) fn load(&self) -> usize {
        self.inner.pending.borrow().len()
    }

    /// Since when the source has said nothing here, if requests wait for it.
    pub(super) fn silent_since(&self) -> Option<Instant> {
        let is_awaited = self.load() > 0 || self.inner.receiving.get();
        is_awaited.then(|| self.heard().max(self.inner.asked.get()))
    }

    /// When the source was heard here last.
    pub(super) fn heard(&self) -> Instant {
        self.inner.last_heard.get()
    }

    /// Waits for the end of the link.
    pub(super) async fn dead(&self) {
        while self.is_alive() {
            let died = self.inner.died.listen();
            if self.is_alive() {
                died.await;
            }
        }
    }

    /// Gives up a link whose source says nothing: it counts as lost since then.
    pub(super) fn close_silent(&self, since: Instant) {
        self.inner.silent_since.set(Some(since));
        self.close();
    }

    /// Since when it counts as lost: see [`Link::close_silent`], else now.
    pub(super) fn lost_since(&self) -> Instant {
        self.inner.silent_since.get().unwrap_or_else(now)
    }

    /// Gives the link up; its requests end with [`LinkError::Lost`].
    pub(super) fn close(&self) {
        self.inner.connection.shutdown();
    }

    fn die(&self, failure: &LinkFailure) {
        log::debug!("link lost: {failure}");
        self.inner.alive.set(false);
        self.inner.connection.shutdown();
        // Dropping the answers' senders tells whoever waits.
        self.inner.pending.borrow_mut().clear();
        self.inner.died.notify(usize::MAX);
        self.inner.requests.send(Vec::new());
    }

    /// Reads a range.
    pub(super) async fn read(&self, range: ByteRange) -> Result<FetchedData, LinkError> {
        let make = |answer| Waiting::Read { read: ReadAssembly::new(range), answer };
        self.ask(Command::Read, range, make).await
    }

    /// Asks for holes and zeros. Empty: the source cannot say.
    pub(super) async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, LinkError> {
        if self.session().base_allocation.is_none() {
            return Ok(Vec::new());
        }
        self.ask(Command::BlockStatus, range, |answer| Waiting::Extents { extents: Vec::new(), answer }).await
    }

    /// Asks for the hashes of a range; only of a blkferry source.
    pub(super) async fn hashes(&self, range: ByteRange) -> Result<Vec<[u8; 32]>, LinkError> {
        let make = |answer| Waiting::Hashes { hashes: HashAssembly::new(range), answer };
        self.ask(Command::FerryHash, range, make).await
    }

    /// A step of a handoff; only of a source that says how its disk stands. It is asked at once, and what is asked after
    /// it need not wait for the answer.
    pub(super) fn hand_off(&self, ask: &Ask) -> (Asked, impl Future<Output = Result<Told, LinkError>> + use<>) {
        let message = ask.encode();
        let range = ByteRange::new(0, message.len() as u64);
        let waiting = |answer| Waiting::Told { told: None, answer };
        let (asked, answered) = self.begin(Command::FerryHandoff, range, &message, waiting);
        let told = async move {
            let told = answered.await.unwrap_or(Err(LinkError::Lost))?;
            // "Done" without a word: as good as an answer that cannot be read.
            told.ok_or(LinkError::Refused(Errno::EIO))
        };
        (asked, told)
    }

    /// Asks what was written since the source's disk was made from its base: lengths, from the start of the range on. If
    /// the answer comes before that of `after` it is of no use.
    pub(super) async fn changed(&self, range: ByteRange, after: Option<Asked>) -> Result<Vec<(u64, bool)>, LinkError> {
        self.marked(Command::FerryChanged, range, (FERRY_CHANGED_ID, FERRY_CHANGED), after).await
    }

    /// Asks what the source has in its page cache: lengths, from the start of the range on. Only on a connection where
    /// that context was chosen.
    pub(super) async fn hot(&self, range: ByteRange) -> Result<Vec<(u64, bool)>, LinkError> {
        let context = self.session().hot.ok_or(LinkError::Refused(Errno::ENOTSUP))?;
        self.marked(Command::BlockStatus, range, (context, FERRY_IS_HOT), None).await
    }

    /// All of a range, however many answers that takes.
    async fn marked(
        &self,
        command: Command,
        range: ByteRange,
        (context, bit): (u32, u32),
        after: Option<Asked>,
    ) -> Result<Vec<(u64, bool)>, LinkError> {
        let mut all = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let waiting = |answer| Waiting::Marked { context, bit, after, stretches: Vec::new(), answer };
            let told = self.ask(command, rest, waiting).await?;
            let told_bytes: u64 = told.iter().map(|(len, _)| len).sum();
            if told_bytes == 0 || told_bytes > rest.len() {
                return Err(LinkError::Refused(Errno::EIO));
            }
            rest.start += told_bytes;
            all.extend(told);
        }
        Ok(all)
    }

    async fn ask<T>(
        &self,
        command: Command,
        range: ByteRange,
        waiting: impl FnOnce(Answer<T>) -> Waiting,
    ) -> Result<T, LinkError> {
        self.begin(command, range, &[], waiting).1.await.unwrap_or(Err(LinkError::Lost))
    }

    /// Sends a request. No answer will come if the link is dead.
    fn begin<T>(
        &self,
        command: Command,
        range: ByteRange,
        payload: &[u8],
        waiting: impl FnOnce(Answer<T>) -> Waiting,
    ) -> (Asked, oneshot::Receiver<Result<T, LinkError>>) {
        let (answer, answered) = oneshot::channel();
        let cookie = self.inner.next_cookie.get();
        if !self.is_alive() {
            return (Asked { cookie }, answered);
        }
        self.inner.next_cookie.set(cookie + 1);
        if self.inner.pending.borrow().is_empty() {
            self.inner.asked.set(now());
        }
        self.inner.pending.borrow_mut().insert(cookie, Pending { waiting: waiting(answer), error: None });
        let len = u32::try_from(range.len()).expect("callers ask for less than 4 GiB at once");
        let request = Request { flags: CommandFlags::empty(), command, cookie, offset: range.start, len };
        self.inner.requests.send([&request.encode()[..], payload].concat());
        (Asked { cookie }, answered)
    }

    async fn receive(&self, mut reader: BufferedReader) -> LinkFailure {
        loop {
            let result = self.receive_reply(&mut reader).await;
            self.inner.stats.add_received(reader.take_received_bytes());
            self.inner.receiving.set(false);
            if let Err(failure) = result {
                return failure;
            }
            self.inner.last_heard.set(now());
        }
    }

    async fn receive_reply(&self, reader: &mut BufferedReader) -> Result<(), LinkFailure> {
        let Some(common) = reader.read(ReplyHeader::COMMON_LEN).await? else { return Err(LinkFailure::Closed) };
        let common: [u8; ReplyHeader::COMMON_LEN] = common.try_into().expect("read what was asked for");
        self.inner.receiving.set(true);
        let mut extra = [0; 4];
        if ReplyHeader::needs_more(&common) > 0 {
            extra = small(reader, 4).await?.try_into().expect("read what was asked for");
        }
        let header = ReplyHeader::decode(&common, extra)?;
        let cookie = header.cookie();
        #[cfg(feature = "planted-faults")]
        let cookie = self.misdirected(cookie);
        let taken = self.inner.pending.borrow_mut().remove(&cookie);
        let mut pending = taken.ok_or(LinkFailure::UnknownCookie(cookie))?;
        match header {
            ReplyHeader::Simple { error, .. } => {
                pending.error = error;
                if error.is_none() {
                    self.simple_data(reader, &mut pending).await?;
                }
            }
            ReplyHeader::Chunk { kind, len, .. } => {
                header.check(self.inner.session.max_payload_bytes())?;
                self.chunk(reader, &mut pending, kind, len as usize).await?;
            }
        }
        if pending.error == Some(NbdError::Shutdown) {
            // It is going away: what is asked here is asked again when it is back (spec: "NBD_ESHUTDOWN").
            return Err(LinkFailure::Closed);
        }
        if header.is_last() {
            finish(pending)?;
            self.inner.answers.set(self.inner.answers.get() + 1);
        } else {
            self.inner.pending.borrow_mut().insert(cookie, pending);
        }
        Ok(())
    }

    /// The cookie of another read of the same length, if there is one.
    #[cfg(feature = "planted-faults")]
    fn misdirected(&self, cookie: u64) -> u64 {
        let pending = self.inner.pending.borrow();
        let len_of = |cookie: &u64| match pending.get(cookie).map(|pending| &pending.waiting) {
            Some(Waiting::Read { read, .. }) => Some(read.range().len()),
            _ => None,
        };
        let len = len_of(&cookie).filter(|_| is_planted(PlantedFault::AnswerOfAnother));
        let other = len.and_then(|_| pending.keys().filter(|other| **other != cookie && len_of(other) == len).min());
        other.copied().unwrap_or(cookie)
    }

    async fn simple_data(&self, reader: &mut BufferedReader, pending: &mut Pending) -> Result<(), LinkFailure> {
        match &mut pending.waiting {
            Waiting::Read { read, .. } => {
                let range = read.range();
                receive_data(reader, read, range.start, range.len(), &self.inner).await
            }
            // Without structured replies there is nothing to say beyond "done".
            _ => Ok(()),
        }
    }

    async fn chunk(
        &self,
        reader: &mut BufferedReader,
        pending: &mut Pending,
        kind: ChunkKind,
        len: usize,
    ) -> Result<(), LinkFailure> {
        match (kind, &mut pending.waiting) {
            (ChunkKind::None, _) => {}
            (ChunkKind::OffsetData, Waiting::Read { read, .. }) => {
                let offset = decode_data_offset(small(reader, 8).await?.try_into().expect("read what was asked for"));
                #[cfg(feature = "planted-faults")]
                let offset = if is_planted(PlantedFault::AnswerOfAnother) { read.range().start } else { offset };
                receive_data(reader, read, offset, len as u64 - 8, &self.inner).await?;
            }
            (ChunkKind::OffsetHole, Waiting::Read { read, .. }) => {
                let hole = Hole::decode(small(reader, len).await?)?;
                read.place(hole.offset, u64::from(hole.len), true)?;
            }
            (ChunkKind::BlockStatus, Waiting::Extents { extents, .. }) => {
                let status = BlockStatus::decode(&payload(reader, len).await?)?;
                if Some(status.context_id) == self.inner.session.base_allocation {
                    // One chunk a context (spec: "NBD_REPLY_TYPE_BLOCK_STATUS"): they would add up without end.
                    if !extents.is_empty() {
                        return Err(LinkFailure::UnexpectedChunk(kind));
                    }
                    let zero = |flags: StateFlags| flags.contains(StateFlags::ZERO);
                    let told = status.extents.iter();
                    extents.extend(told.map(|e| Extent { len_bytes: u64::from(e.len), zero: zero(e.flags) }));
                }
            }
            (ChunkKind::FerryHashes, Waiting::Hashes { hashes, .. }) => {
                hashes.add(FerryHashes::decode(&payload(reader, len).await?)?)?;
            }
            (ChunkKind::FerryTold, Waiting::Told { told, .. }) => {
                *told = Some(Told::decode(&payload(reader, len).await?)?)
            }
            (ChunkKind::BlockStatus, Waiting::Marked { context, bit, after, stretches, .. }) => {
                let status = BlockStatus::decode(&payload(reader, len).await?)?;
                // Of before that step: what was so then need not be so after it.
                if after.is_some_and(|Asked { cookie }| self.inner.pending.borrow().contains_key(&cookie)) {
                    pending.error = Some(NbdError::Inval);
                }
                if status.context_id == *context {
                    if !stretches.is_empty() {
                        return Err(LinkFailure::UnexpectedChunk(kind));
                    }
                    let told = status.extents.iter();
                    stretches.extend(told.map(|e| (u64::from(e.len), e.flags.bits() & *bit != 0)));
                }
            }
            (kind, _) if kind.is_error() => {
                let error = ErrorChunk::decode(kind, &payload(reader, len).await?)?;
                log::debug!("the source refused a request: {} ({})", error.error, error.message);
                pending.error = Some(error.error);
            }
            (kind, _) => return Err(LinkFailure::UnexpectedChunk(kind)),
        }
        Ok(())
    }
}

async fn small(reader: &mut BufferedReader, len: usize) -> Result<&[u8], LinkFailure> {
    reader.read(len).await?.ok_or(LinkFailure::Closed)
}

async fn payload(reader: &mut BufferedReader, len: usize) -> Result<Vec<u8>, LinkFailure> {
    if len <= MAX_SMALL_PAYLOAD {
        return Ok(small(reader, len).await?.to_vec());
    }
    let (result, bytes) = reader.read_into(vec![0; len], 0, len).await;
    result?;
    Ok(bytes)
}

async fn receive_data(
    reader: &mut BufferedReader,
    read: &mut ReadAssembly,
    offset: u64,
    len: u64,
    inner: &Inner,
) -> Result<(), LinkFailure> {
    let place = read.place(offset, len, false)?;
    let mut start = place.start;
    while start < place.end {
        let (asked, most) = (now(), inner.piece.get());
        let piece = most.min(place.end - start);
        let (result, bytes) = reader.read_into(read.take_buffer(), start, piece).await;
        read.give_buffer(bytes);
        result?;
        start += piece;
        let heard = now();
        inner.last_heard.set(heard);
        let better = if heard - asked > PIECE_TIME { most / 2 } else { most * 2 };
        inner.piece.set(better.clamp(RECEIVE_PIECE.0, RECEIVE_PIECE.1));
    }
    inner.stats.add_data(len);
    Ok(())
}

fn finish(pending: Pending) -> Result<(), LinkFailure> {
    let refused = pending.error.map(|error| LinkError::Refused(Errno(error.to_errno())));
    // A receiver that is gone no longer wants the answer.
    match (pending.waiting, refused) {
        (Waiting::Read { answer, .. }, Some(refused)) => drop(answer.send(Err(refused))),
        (Waiting::Read { read, answer }, None) => drop(answer.send(Ok(read.finish()?))),
        (Waiting::Extents { extents, answer }, refused) => drop(answer.send(refused.map_or(Ok(extents), Err))),
        (Waiting::Told { told, answer }, refused) => drop(answer.send(refused.map_or(Ok(told), Err))),
        (Waiting::Marked { stretches, answer, .. }, refused) => {
            drop(answer.send(refused.map_or(Ok(stretches), Err)));
        }
        (Waiting::Hashes { hashes, answer }, refused) => {
            drop(answer.send(refused.map_or(Ok(hashes.finish()), Err)));
        }
    }
    Ok(())
}

async fn send_requests(link: Link) {
    while link.is_alive() {
        let mut batch = link.inner.requests.recv().await;
        while let Some(more) = link.inner.requests.try_recv() {
            batch.extend_from_slice(&more);
        }
        let len = batch.len();
        if batch.is_empty() {
            continue;
        }
        if link.inner.connection.send(vec![Part::Owned(batch)]).await.is_err() {
            // The receiving side sees the end too, and buries the link.
            link.inner.connection.shutdown();
            return;
        }
        link.inner.stats.add_sent(len as u64);
    }
}
