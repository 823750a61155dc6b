//! One client, from its greeting to its end.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use futures_util::FutureExt;
use futures_util::future::{Either, select};

use super::disk::Disk;
use super::hashes::READ_BYTES;
use super::stats::ServeStats;
use super::{HANDSHAKE_TIMEOUT, HASH_PIECE_BYTES, MAX_BYTES, MAX_REQUESTS, MAX_WAITING_BYTES, replies};
use crate::engine::ByteRange;
use crate::nbd::chunk::{EXTENT_LEN, Extent, HASH_LEN};
use crate::nbd::{
    Ask, Command, CommandFlags, ExportInfo, Limits, MAX_EXTENTS, MAX_FERRY_EXTENTS, NbdError, ProtocolError, Request,
    ServerHandshake, ServerStep, Session,
};
use crate::uring::{Budget, Buffer, BufferedReader, Connection, Lent, Mailbox, Part, sleep, spawn};

/// Receive buffer: many requests, or the payload of a small write.
const READER_BYTES: usize = 64 << 10;
/// Questions about what is hot that one client may have under way: as many as ours has.
const MAX_HOT_QUESTIONS: usize = 16;
/// Parts sent with one system call, across replies.
const MAX_PARTS_PER_SEND: usize = 128;

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the handshake took longer than {} s", HANDSHAKE_TIMEOUT.as_secs())]
    TooSlow,
    #[error("a write of {0} bytes is announced, which is more than this server takes or skips")]
    PayloadTooLong(u32),
}

struct Reply {
    parts: Vec<Part>,
    /// The request's share of the limits, given back when the reply is sent.
    _shares: Shares,
}

/// What one request holds of the limits of its connection.
struct Shares {
    _request: Lent,
    _bytes: Option<Lent>,
}

/// The limits of one connection.
struct Lendable {
    requests: Budget,
    bytes: Budget,
    waiting_bytes: Budget,
    /// Questions about what is hot.
    hot: Budget,
}

/// What the requests of one connection share.
struct Context<D> {
    lendable: Lendable,
    disk: Rc<D>,
    session: Session,
    limits: Limits,
    replies: Mailbox<Reply>,
    stats: ServeStats,
    /// Nobody will read the replies.
    gone: Cell<bool>,
}

/// Serves a client until it leaves; `on_agreed` is called when its handshake is over. `Ok`: it left in order. What is
/// still under way then is finished after this returns, with a share of `leftovers`: requests that wait for the source
/// may take long.
pub(super) async fn run<D: Disk>(
    connection: Connection,
    disk: Rc<D>,
    stats: ServeStats,
    leftovers: Budget,
    on_agreed: impl FnOnce(),
) -> Result<(), ConnectionError> {
    let mut reader = BufferedReader::new(connection.clone(), READER_BYTES);
    let export = disk.export();
    let agreed = {
        let handshake = shake_hands(&connection, &mut reader, export.clone()).boxed_local();
        match select(handshake, sleep(HANDSHAKE_TIMEOUT).boxed_local()).await {
            Either::Left((agreed, _)) => agreed?,
            Either::Right(_) => return Err(ConnectionError::TooSlow),
        }
    };
    let Some(session) = agreed else { return Ok(()) };
    on_agreed();
    let limits = session.limits(&export);
    let replies = Mailbox::default();
    let lendable = Lendable {
        requests: Budget::new(MAX_REQUESTS),
        bytes: Budget::new(MAX_BYTES),
        waiting_bytes: Budget::new(MAX_WAITING_BYTES),
        hot: Budget::new(MAX_HOT_QUESTIONS),
    };
    let gone = Cell::new(false);
    let context = Rc::new(Context { lendable, disk, session, limits, replies, stats, gone });
    let writer = spawn(write_replies(connection.clone(), context.clone()));
    let result = read_requests(&mut reader, &context).await;
    if result.is_err() {
        context.gone.set(true);
        connection.shutdown();
    }
    // DISC, or the end of the stream: what is under way is finished and answered. The writer stays until then: replies
    // hold their shares of the limits, and who waits for those holds the connection's memory.
    let share = leftovers.take(1).await;
    spawn(async move {
        context.lendable.requests.all_back().await;
        connection.shutdown();
        writer.cancel().await;
        drop(share);
    })
    .detach();
    result
}

async fn shake_hands(
    connection: &Connection,
    reader: &mut BufferedReader,
    export: ExportInfo,
) -> Result<Option<Session>, ConnectionError> {
    let (mut handshake, greeting) = ServerHandshake::new(vec![export]);
    connection.send(vec![Part::Owned(greeting.into())]).await?;
    loop {
        let want = handshake.needs().min(READER_BYTES);
        let Some(bytes) = reader.read(want).await? else { return Ok(None) };
        match handshake.feed(bytes)? {
            ServerStep::Reply(reply) => connection.send(vec![Part::Owned(reply.into())]).await?,
            ServerStep::Transmission { reply, session } => {
                connection.send(vec![Part::Owned(reply.into())]).await?;
                return Ok(Some(session));
            }
            ServerStep::Close { reply } => {
                connection.send(vec![Part::Owned(reply.into())]).await?;
                connection.shutdown();
                return Ok(None);
            }
        }
    }
}

async fn read_requests<D: Disk>(reader: &mut BufferedReader, context: &Rc<Context<D>>) -> Result<(), ConnectionError> {
    loop {
        let Some(header) = reader.read(Request::LEN).await? else { return Ok(()) };
        let request = Request::decode(header.try_into().expect("read what was asked for"))?;
        if request.command == Command::Disc {
            return Ok(());
        }
        let payload_len = request.payload_len();
        if payload_len > context.limits.max_payload.saturating_mul(2) {
            return Err(ConnectionError::PayloadTooLong(payload_len));
        }
        let verdict = request.validate(&context.limits);
        let request_share = context.lendable.requests.take(1).await;
        let mut bytes_share = None;
        let mut payload = Buffer::default();
        if verdict.is_err() {
            reader.skip(payload_len as usize).await?;
        } else if payload_len > 0 {
            bytes_share = Some(context.lendable.bytes.take(payload_len as usize).await);
            let (result, filled) =
                reader.read_into(Buffer::to_fill(payload_len as usize), 0, payload_len as usize).await;
            result?;
            payload = filled;
            if request.command == Command::Write {
                context.stats.add_written(u64::from(payload_len));
            }
        }
        let context = context.clone();
        spawn(async move {
            // What is answered takes its bytes here, not where requests are read: while it waits for room, others go on.
            let only_looks = matches!(
                request.command,
                Command::Read | Command::BlockStatus | Command::FerryHash | Command::FerryChanged
            );
            let mut turn = None;
            if only_looks && verdict.is_ok() {
                bytes_share = Some(context.take_reply_bytes(&request).await);
                if request.command == Command::BlockStatus && context.session.hot.is_some() {
                    turn = Some(context.lendable.hot.take(1).await);
                }
            }
            let parts = match verdict {
                Err(error) => replies::done(context.session.structured, request.cookie, Err(error)),
                Ok(()) if only_looks && context.gone.get() => Vec::new(),
                Ok(()) => answer(&context, request, payload).await,
            };
            drop(turn);
            // Less may have been found than there was room for.
            let len = parts.iter().map(Part::len).sum();
            bytes_share.iter_mut().filter(|_| only_looks).for_each(|share| share.keep(len));
            context.replies.send(Reply { parts, _shares: Shares { _request: request_share, _bytes: bytes_share } });
        })
        .detach();
    }
}

impl<D: Disk> Context<D> {
    /// Room for the longest answer that there can be, and for what is read for it.
    async fn take_reply_bytes(&self, request: &Request) -> Lent {
        let range = ByteRange::new(request.offset, u64::from(request.len));
        let Lendable { bytes, waiting_bytes, .. } = &self.lendable;
        let len = request.len as usize;
        match request.command {
            Command::Read if self.disk.reads_at_once(range) => bytes.take(len).await,
            Command::Read => waiting_bytes.take(len).await,
            Command::FerryHash => {
                waiting_bytes.take(READ_BYTES as usize + len / HASH_PIECE_BYTES as usize * HASH_LEN).await
            }
            Command::FerryChanged => waiting_bytes.take(MAX_FERRY_EXTENTS * EXTENT_LEN).await,
            _ => {
                let contexts =
                    usize::from(self.session.base_allocation.is_some()) + usize::from(self.session.hot.is_some());
                waiting_bytes.take(contexts * most_extents(request) * EXTENT_LEN).await
            }
        }
    }
}

async fn answer<D: Disk>(context: &Context<D>, request: Request, payload: Buffer) -> Vec<Part> {
    let structured = context.session.structured;
    let Request { flags, command, cookie, offset, len } = request;
    let range = ByteRange::new(offset, u64::from(len));
    let fua = flags.contains(CommandFlags::FUA);
    let disk = &context.disk;
    let result = match command {
        Command::Read => match disk.read(range).await {
            Ok(mut pieces) => {
                // It may lie here for long, and is counted by its length: it must not hold a whole fetch.
                pieces.iter_mut().for_each(Part::let_go_of_the_rest);
                return replies::data(structured, flags.contains(CommandFlags::DF), cookie, offset, pieces);
            }
            Err(error) => Err(error),
        },
        Command::Write => disk.write(offset, payload, fua).await,
        Command::Flush => disk.flush().await,
        Command::Trim => disk.trim(range, fua).await,
        Command::WriteZeroes => {
            let keep_allocated = flags.contains(CommandFlags::NO_HOLE);
            disk.zero(range, fua, keep_allocated, flags.contains(CommandFlags::FAST_ZERO)).await
        }
        Command::Cache => disk.prefetch(range).await,
        Command::BlockStatus => match block_status(context, range, most_extents(&request)).await {
            Ok(contexts) => return replies::block_status(cookie, &contexts),
            Err(error) => Err(error),
        },
        Command::FerryHash => match disk.hashes(range, HASH_PIECE_BYTES).await {
            Ok(hashes) => return replies::hashes(cookie, offset, HASH_PIECE_BYTES, &hashes),
            Err(error) => Err(error),
        },
        Command::FerryHandoff => match Ask::decode(&payload) {
            Ok(ask) => match disk.hand_off(ask).await {
                Ok(told) => return replies::told(cookie, &told),
                Err(error) => Err(error),
            },
            Err(_) => Err(NbdError::Inval),
        },
        Command::FerryChanged => match disk.changed(range, MAX_FERRY_EXTENTS).await {
            Ok(stretches) if !stretches.is_empty() => return replies::changed(cookie, &stretches),
            Ok(_) => Err(NbdError::Inval),
            Err(error) => Err(error),
        },
        Command::Disc | Command::Unknown(_) => Err(NbdError::Inval),
    };
    replies::done(structured, cookie, result)
}

fn most_extents(request: &Request) -> usize {
    if request.flags.contains(CommandFlags::REQ_ONE) { 1 } else { MAX_EXTENTS.min(8192) }
}

/// For each context that was selected its id and extents (spec: "one chunk for each metadata context").
async fn block_status<D: Disk>(
    context: &Context<D>,
    range: ByteRange,
    max: usize,
) -> Result<Vec<(u32, Vec<Extent>)>, NbdError> {
    let mut contexts = Vec::new();
    if let Some(id) = context.session.base_allocation {
        contexts.push((id, replies::allocation(&context.disk.extents(range, max).await?)));
    }
    if let Some(id) = context.session.hot {
        contexts.push((id, replies::hot(&context.disk.hot(range, max).await?)));
    }
    if contexts.iter().any(|(_, extents)| extents.is_empty()) { Err(NbdError::Inval) } else { Ok(contexts) }
}

async fn write_replies<D: Disk>(connection: Connection, context: Rc<Context<D>>) {
    loop {
        let mut batch = vec![context.replies.recv().await];
        let mut parts = std::mem::take(&mut batch[0].parts);
        while parts.len() < MAX_PARTS_PER_SEND
            && let Some(mut reply) = context.replies.try_recv()
        {
            parts.append(&mut reply.parts);
            batch.push(reply);
        }
        let len: usize = parts.iter().map(Part::len).sum();
        if context.gone.get() {
            continue;
        }
        if connection.send(parts).await.is_err() {
            // The reader sees it too, and ends the connection.
            context.gone.set(true);
            connection.shutdown();
        }
        context.stats.add_sent(len as u64);
    }
}
