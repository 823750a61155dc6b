//! Getting through to a source: connect and shake hands.

use std::io;

use futures_util::FutureExt;
use futures_util::future::{Either, select};

use super::CONNECT_TIMEOUT;
use crate::nbd::{Address, ClientHandshake, ClientSession, ClientStep, ProtocolError, Uri, Wants};
use crate::uring::{BufferedReader, Connection, Part, sleep};

/// Receive buffer of a link: headers and small replies; bulk goes past it.
const READER_BYTES: usize = 16 << 10;

/// Why a source cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nobody there.
    #[error("source {uri}: cannot connect: {source}; is the export running there, and is the port open?")]
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

/// A connection that has reached the transmission phase.
pub(super) struct Dialed {
    pub(super) connection: Connection,
    pub(super) reader: BufferedReader,
    pub(super) session: ClientSession,
}

/// Connects to a source.
pub(super) async fn dial(uri: &Uri) -> Result<Dialed, DialError> {
    let attempt = async {
        let connected = match uri.address.clone() {
            Address::Tcp { host, port } => Connection::connect_tcp(host, port, CONNECT_TIMEOUT).await,
            Address::Unix(path) => Connection::connect_unix(path).await,
        };
        let connection = connected.map_err(|source| DialError::Connect { uri: uri.to_string(), source })?;
        let mut reader = BufferedReader::new(connection.clone(), READER_BYTES);
        let session = shake_hands(uri, &connection, &mut reader).await?;
        Ok(Dialed { connection, reader, session })
    };
    match select(attempt.boxed_local(), sleep(CONNECT_TIMEOUT).boxed_local()).await {
        Either::Left((result, _)) => result,
        Either::Right(_) => Err(DialError::Silent { uri: uri.to_string() }),
    }
}

async fn shake_hands(
    uri: &Uri,
    connection: &Connection,
    reader: &mut BufferedReader,
) -> Result<ClientSession, DialError> {
    let broken = |source| DialError::Broken { uri: uri.to_string(), source };
    let protocol = |source| DialError::Protocol { uri: uri.to_string(), source };
    let wants = Wants { structured: true, base_allocation: true, ferry: true, list: false };
    let mut handshake = ClientHandshake::new(uri.export.clone(), wants);
    loop {
        let want = handshake.needs().min(READER_BYTES);
        let step = match reader.read(want).await.map_err(broken)? {
            Some(bytes) => handshake.feed(bytes),
            None => return Err(protocol(handshake.closed_by_server())),
        };
        match step {
            Ok(ClientStep::Send(bytes)) => connection.send(vec![Part::Owned(bytes)]).await.map_err(broken)?,
            Ok(ClientStep::Ready { session, send }) => {
                connection.send(vec![Part::Owned(send)]).await.map_err(broken)?;
                return Ok(session);
            }
            Ok(ClientStep::Listed { .. }) => unreachable!("no list was asked for"),
            Err(error) => {
                // Politeness only: the connection is given up either way.
                let _ = connection.send(vec![Part::Owned(handshake.farewell())]).await;
                return Err(protocol(error));
            }
        }
    }
}
