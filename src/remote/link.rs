//! One connection to the source, with many requests under way on it.

mod replies;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::time::Instant;

use event_listener::Event;
use futures_channel::oneshot;

use replies::RECEIVE_PIECE;

use super::WATCH_PERIOD;
use super::dial::Dialed;
use super::read::{BadCover, FetchedData, HashAssembly, ReadAssembly};
use super::stats::SourceStats;
use crate::engine::{ByteRange, Errno, Extent};
use crate::nbd::chunk::EXTENT_LEN;
use crate::nbd::{
    Ask, ChunkKind, ClientSession, Command, CommandFlags, FERRY_CHANGED, FERRY_CHANGED_ID, FERRY_IS_HOT,
    FERRY_WAS_USED, MAX_FERRY_EXTENTS, NbdError, ProtocolError, Request, Told,
};
use crate::uring::{Connection, Mailbox, Part, now, spawn};

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
    #[error("the source says that it is going away")]
    Leaving,
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    #[error("{0}")]
    Cover(#[from] BadCover),
    #[error("the source answered a request that was not made (cookie {0})")]
    UnknownCookie(u64),
    #[error("the source answered with a {0:?} chunk, which this request does not have")]
    UnexpectedChunk(ChunkKind),
    #[error("the source answers a question of ours with {0} bytes at once, which is more than it may")]
    TooLong(usize),
}

type Answer<T> = oneshot::Sender<Result<T, LinkError>>;

/// A request of this link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    cookie: u64,
}

/// Longest chunk of a context of our own: its id, and the extents.
const MAX_MARKED_BYTES: usize = 4 + EXTENT_LEN * MAX_FERRY_EXTENTS;
/// Smallest piece that a context of our own tells of, a block or a page, but for the ends of a range.
const LEAST_STRETCH_BYTES: u64 = 4096;

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
    /// Of a context of our own: those of its bits that mean something to us.
    Marked {
        context: u32,
        bits: u32,
        /// What is to be answered before this.
        after: Option<Asked>,
        stretches: Vec<(u64, u32)>,
        answer: Answer<Vec<(u64, u32)>>,
    },
}

struct Pending {
    waiting: Waiting,
    error: Option<NbdError>,
}

/// Those that are reads: cookie and range.
fn reads_in(pending: &HashMap<u64, Pending>) -> impl Iterator<Item = (u64, ByteRange)> {
    pending.iter().filter_map(|(cookie, pending)| match &pending.waiting {
        Waiting::Read { read, .. } => Some((*cookie, read.range())),
        _ => None,
    })
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
    /// What it asks for, if it is a read.
    incoming: Cell<Option<ByteRange>>,
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
            incoming: Cell::default(),
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

    /// Has it been heard no later than one that is silent since then? Those that nothing was asked of meanwhile are no
    /// better: who waits would wait as long again on them.
    pub(super) fn is_no_better(&self, since: Instant) -> bool {
        self.silent_since().unwrap_or(self.heard()) <= since + WATCH_PERIOD
    }

    /// The read whose answer is coming in, or that has waited for it longest.
    pub(super) fn awaited_read(&self) -> Option<ByteRange> {
        if let Some(range) = self.inner.incoming.get() {
            return Some(range);
        }
        let pending = self.inner.pending.borrow();
        reads_in(&pending).min_by_key(|(cookie, _)| *cookie).map(|(_, range)| range)
    }

    /// All reads that it owes.
    pub(super) fn awaited_reads(&self) -> Vec<ByteRange> {
        let pending = self.inner.pending.borrow();
        reads_in(&pending).map(|(_, range)| range).chain(self.inner.incoming.get()).collect()
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
        let told = self.marked(Command::FerryChanged, range, (FERRY_CHANGED_ID, FERRY_CHANGED), after).await?;
        Ok(told.into_iter().map(|(len, bits)| (len, bits != 0)).collect())
    }

    /// Asks what the source has in its page cache: lengths, from the start of the range on, and the bits of
    /// `blkferry:hot`. Only on a connection where that context was chosen.
    pub(super) async fn hot(&self, range: ByteRange) -> Result<Vec<(u64, u32)>, LinkError> {
        let context = self.session().hot.ok_or(LinkError::Refused(Errno::ENOTSUP))?;
        self.marked(Command::BlockStatus, range, (context, FERRY_IS_HOT | FERRY_WAS_USED), None).await
    }

    /// All of a range, however many answers that takes.
    async fn marked(
        &self,
        command: Command,
        range: ByteRange,
        (context, bits): (u32, u32),
        after: Option<Asked>,
    ) -> Result<Vec<(u64, u32)>, LinkError> {
        let mut all = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let waiting = |answer| Waiting::Marked { context, bits, after, stretches: Vec::new(), answer };
            let told = self.ask(command, rest, waiting).await?;
            let told_bytes: u64 = told.iter().map(|(len, _)| len).sum();
            if told_bytes == 0 || told_bytes > rest.len() {
                return Err(LinkError::Refused(Errno::EIO));
            }
            rest.start += told_bytes;
            all.extend(told);
            // Nothing of ours is told in smaller pieces; and it must not fill our memory.
            if all.len() as u64 > range.len() / LEAST_STRETCH_BYTES + 2 {
                return Err(LinkError::Refused(Errno::EIO));
            }
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
        if link.inner.connection.send(vec![Part::Owned(batch.into())]).await.is_err() {
            // The receiving side sees the end too, and buries the link.
            link.inner.connection.shutdown();
            return;
        }
        link.inner.stats.add_sent(len as u64);
    }
}
