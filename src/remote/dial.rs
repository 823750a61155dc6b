//! Getting through to a source: connect and shake hands.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use event_listener::Event;
use futures_util::FutureExt;
use futures_util::future::{Either, select};

use super::CONNECT_TIMEOUT;
use super::stats::SourceStats;
use crate::nbd::{Address, ClientHandshake, ClientSession, ClientStep, ProtocolError, TransmissionFlags, Uri, Wants};
use crate::uring::{BufferedReader, Connection, Part, Task, now, sleep, spawn};

/// Receive buffer of a link: headers and small replies; bulk goes past it.
const READER_BYTES: usize = 16 << 10;
/// A source that has not answered for this long is far: what is asked of it together saves time.
const FAR: Duration = Duration::from_millis(2);

/// Why a source cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nobody there.
    #[error("source {uri}: cannot connect: {source}; {}", what_to_look_at(.uri))]
    Connect {
        /// The source.
        uri: String,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody there, who does not answer.
    #[error("source {uri}: no answer within {} s; is this an NBD server, and does it take another client?", CONNECT_TIMEOUT.as_secs())]
    Silent {
        /// The source.
        uri: String,
    },
    /// The connection broke during the handshake.
    #[error("source {uri}: the connection broke during the handshake: {source}")]
    Broken {
        /// The source.
        uri: String,
        /// What the system said.
        source: io::Error,
    },
    /// What it speaks is not what we need.
    #[error("source {uri}: {source}")]
    Protocol {
        /// The source.
        uri: String,
        /// What is wrong.
        source: ProtocolError,
    },
}

fn what_to_look_at(uri: &str) -> &'static str {
    if uri.starts_with("nbd+unix:") {
        "is the server running, and is that the path of its socket?"
    } else {
        "is the export running there, and is the port open?"
    }
}

/// A connection that has reached the transmission phase.
pub(super) struct Dialed {
    pub(super) connection: Connection,
    pub(super) reader: BufferedReader,
    pub(super) session: ClientSession,
    /// How long the fastest answer took.
    pub(super) round_trip: Duration,
}

/// Connects to a source. `known_ferry`: it is a blkferry export, or was one when it was asked last.
pub(super) async fn dial(uri: &Uri, stats: &SourceStats, known_ferry: bool) -> Result<Dialed, DialError> {
    in_time(uri, async {
        let connection = connect(uri).await?;
        shake_hands(uri, connection, stats, wants(known_ferry), |_| ()).await
    })
    .await
}

/// Connects to a blkferry export to ask what it has in its page cache, and nothing else.
pub(super) async fn dial_hot(uri: &Uri, stats: &SourceStats) -> Result<Dialed, DialError> {
    let wants = Wants { structured: true, hot: true, ferry: true, known_ferry: true, ..Wants::default() };
    in_time(uri, async { shake_hands(uri, connect(uri).await?, stats, wants, |_| ()).await }).await
}

/// A connection made on the chance that the source takes it.
pub(super) type Spare = Task<Result<Dialed, DialError>>;
pub(super) type Spares = Vec<Spare>;

/// Connects to a source of which nothing is known, or that it is a blkferry export. If it turns out to be far away,
/// `spares` more connections are made meanwhile, which go on as soon as it turns out to be one: all come up together. To
/// any other server they say nothing.
pub(super) async fn dial_first(
    uri: &Uri,
    stats: &SourceStats,
    known_ferry: bool,
    spares: usize,
) -> Result<(Dialed, Spares), DialError> {
    in_time(uri, async {
        let before = now();
        let found = Rc::new(Found::default());
        let started = RefCell::new(Spares::new());
        let look = |handshake: Option<&ClientHandshake>| {
            let is_far = matches!(uri.address, Address::Tcp { .. }) && now().duration_since(before) >= FAR;
            // Who takes long and is no export may only be slow to open its disk.
            let may_be_ferry = handshake.is_none_or(ClientHandshake::may_be_ferry);
            if is_far && may_be_ferry && started.borrow().is_empty() {
                let spare = |_| spawn(spare(uri.clone(), stats.clone(), found.clone()));
                started.borrow_mut().extend((0..spares).map(spare));
            }
            if handshake.is_some_and(ClientHandshake::is_ferry) {
                found.ring();
            }
        };
        let connection = connect(uri).await?;
        look(None);
        let dialed = shake_hands(uri, connection, stats, wants(known_ferry), |handshake| look(Some(handshake))).await?;
        let welcome = found.rung.get() && dialed.session.flags.contains(TransmissionFlags::CAN_MULTI_CONN);
        Ok((dialed, if welcome { started.take() } else { Spares::new() }))
    })
    .await
}

/// It is a blkferry export.
#[derive(Default)]
struct Found {
    rung: Cell<bool>,
    event: Event,
}

impl Found {
    fn ring(&self) {
        self.rung.set(true);
        self.event.notify(usize::MAX);
    }

    async fn rung(&self) {
        let heard = self.event.listen();
        if !self.rung.get() {
            heard.await;
        }
    }
}

async fn spare(uri: Uri, stats: SourceStats, found: Rc<Found>) -> Result<Dialed, DialError> {
    in_time(&uri, async {
        let connection = connect(&uri).await?;
        found.rung().await;
        shake_hands(&uri, connection, &stats, wants(true), |_| ()).await
    })
    .await
}

async fn in_time<T>(uri: &Uri, attempt: impl Future<Output = Result<T, DialError>>) -> Result<T, DialError> {
    let attempt = std::pin::pin!(attempt);
    match select(attempt, sleep(CONNECT_TIMEOUT).boxed_local()).await {
        Either::Left((result, _)) => result,
        Either::Right(_) => Err(DialError::Silent { uri: uri.to_string() }),
    }
}

async fn connect(uri: &Uri) -> Result<Connection, DialError> {
    let connected = match uri.address.clone() {
        Address::Tcp { host, port } => Connection::connect_tcp(host, port, CONNECT_TIMEOUT).await,
        Address::Unix(path) => Connection::connect_unix(path).await,
    };
    connected.map_err(|source| DialError::Connect { uri: uri.to_string(), source })
}

fn wants(known_ferry: bool) -> Wants {
    Wants { structured: true, base_allocation: true, ferry: true, known_ferry, ..Wants::default() }
}

async fn shake_hands(
    uri: &Uri,
    connection: Connection,
    stats: &SourceStats,
    wants: Wants,
    on_news: impl Fn(&ClientHandshake),
) -> Result<Dialed, DialError> {
    let broken = |source| DialError::Broken { uri: uri.to_string(), source };
    let protocol = |source| DialError::Protocol { uri: uri.to_string(), source };
    let mut reader = BufferedReader::new(connection.clone(), READER_BYTES);
    let mut handshake = ClientHandshake::new(uri.export.clone(), wants);
    let (mut asked, mut round_trip) = (None, CONNECT_TIMEOUT);
    loop {
        let want = handshake.needs().min(READER_BYTES);
        let read = reader.read(want).await.map_err(broken)?.map(|bytes| handshake.feed(bytes));
        stats.add_greeted(reader.take_received_bytes());
        on_news(&handshake);
        if let Some(asked) = asked.take() {
            round_trip = round_trip.min(now().duration_since(asked));
        }
        match read.unwrap_or_else(|| Err(handshake.closed_by_server())) {
            Ok(ClientStep::Send(bytes)) => {
                stats.add_sent(bytes.len() as u64);
                // Nothing is sent in the middle of an answer.
                asked = (!bytes.is_empty()).then(now);
                connection.send(vec![Part::Owned(bytes.into())]).await.map_err(broken)?;
            }
            Ok(ClientStep::Ready { session, send }) => {
                stats.add_sent(send.len() as u64);
                connection.send(vec![Part::Owned(send.into())]).await.map_err(broken)?;
                return Ok(Dialed { connection, reader, session, round_trip });
            }
            Ok(ClientStep::Listed { .. }) => unreachable!("no list was asked for"),
            Err(error) => {
                // Politeness only: the connection is given up either way.
                let _ = connection.send(vec![Part::Owned(handshake.farewell().into())]).await;
                return Err(protocol(error));
            }
        }
    }
}
