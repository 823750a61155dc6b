//! A plain NBD client on a blocking socket: requests are pipelined as the test likes, and replies are kept in
//! the order in which they came. It checks what a server may not do: cover a read twice or not at all, answer
//! what was not asked.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use blkferry::nbd::chunk::{BlockStatus, ErrorChunk, Hole};
use blkferry::nbd::{
    Address, ChunkKind, ClientHandshake, ClientSession, ClientStep, Command, CommandFlags, NbdError, ReplyHeader,
    Request, Uri, Wants,
};

/// How long a reply may take before the test fails: far longer than anything here takes, so that it only
/// ends a test that would hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// What came of a request: the data of a read (or the raw lengths and flags of a block status).
pub type Reply = Result<Vec<u8>, NbdError>;

struct Open {
    command: Command,
    offset: u64,
    data: Vec<u8>,
    covered: Vec<bool>,
    error: Option<NbdError>,
}

pub struct Client {
    stream: UnixStream,
    pub session: ClientSession,
    next_cookie: u64,
    open: HashMap<u64, Open>,
    done: Vec<(u64, Reply)>,
}

/// The socket behind an `nbd+unix` URI.
pub fn socket_of(uri: &str) -> PathBuf {
    match uri.parse::<Uri>().unwrap().address {
        Address::Unix(path) => path,
        Address::Tcp { .. } => panic!("{uri} is no unix socket"),
    }
}

/// A connection on which nothing was said yet.
pub fn dial(uri: &str) -> UnixStream {
    let stream = UnixStream::connect(socket_of(uri)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Shakes hands; the connection is in transmission after it.
pub fn shake_hands(stream: &mut UnixStream, export: &str, wants: Wants) -> ClientSession {
    let mut handshake = ClientHandshake::new(export.to_owned(), wants);
    loop {
        let mut bytes = vec![0; handshake.needs()];
        stream.read_exact(&mut bytes).unwrap();
        match handshake.feed(&bytes).unwrap() {
            ClientStep::Send(bytes) => stream.write_all(&bytes).unwrap(),
            ClientStep::Ready { session, send } => {
                stream.write_all(&send).unwrap();
                return session;
            }
            ClientStep::Listed { .. } => unreachable!("no list was asked for"),
        }
    }
}

impl Client {
    /// With structured replies and `base:allocation`.
    pub fn connect(uri: &str) -> Self {
        Self::connect_wanting(uri, Wants { structured: true, base_allocation: true, ..Wants::default() })
    }

    pub fn connect_wanting(uri: &str, wants: Wants) -> Self {
        let mut stream = dial(uri);
        let session = shake_hands(&mut stream, "", wants);
        Self { stream, session, next_cookie: 1, open: HashMap::new(), done: Vec::new() }
    }

    /// The raw connection: what is written to it is the test's own business.
    pub fn stream(&mut self) -> &mut UnixStream {
        &mut self.stream
    }

    /// How long a reply may take, for a test that expects none.
    pub fn set_patience(&self, patience: Duration) {
        self.stream.set_read_timeout(Some(patience)).unwrap();
    }

    // ---- requests that are left under way -----------------------------------------------------------

    /// Sends a request and does not wait.
    pub fn ask(&mut self, command: Command, flags: CommandFlags, offset: u64, len: u32, payload: &[u8]) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let read = if command == Command::Read { len as usize } else { 0 };
        let open = Open { command, offset, data: vec![0; read], covered: vec![false; read], error: None };
        self.open.insert(cookie, open);
        let mut bytes = Request { flags, command, cookie, offset, len }.encode().to_vec();
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes).unwrap();
        cookie
    }

    pub fn start_read(&mut self, offset: u64, len: u32) -> u64 {
        self.ask(Command::Read, CommandFlags::empty(), offset, len, &[])
    }

    pub fn start_write(&mut self, offset: u64, data: &[u8]) -> u64 {
        self.ask(Command::Write, CommandFlags::empty(), offset, data.len() as u32, data)
    }

    pub fn start(&mut self, command: Command, offset: u64, len: u32) -> u64 {
        self.ask(command, CommandFlags::empty(), offset, len, &[])
    }

    // ---- replies ------------------------------------------------------------------------------------

    /// Waits for the answer to one request; others that come first are kept.
    pub fn wait(&mut self, cookie: u64) -> Reply {
        loop {
            if let Some(at) = self.done.iter().position(|(done, _)| *done == cookie) {
                return self.done.remove(at).1;
            }
            assert!(self.open.contains_key(&cookie), "request {cookie} was never made");
            self.receive();
        }
    }

    /// Waits for whatever is answered next.
    pub fn wait_any(&mut self) -> (u64, Reply) {
        while self.done.is_empty() {
            assert!(!self.open.is_empty(), "nothing is under way");
            self.receive();
        }
        self.done.remove(0)
    }

    /// Requests that were not answered, as far as replies were received.
    pub fn unanswered(&self) -> usize {
        self.open.len()
    }

    /// The requests that were answered and not asked about yet, in the order of their answers.
    pub fn answered(&self) -> Vec<u64> {
        self.done.iter().map(|(cookie, _)| *cookie).collect()
    }

    // ---- whole requests -----------------------------------------------------------------------------

    pub fn try_read(&mut self, offset: u64, len: u32) -> Reply {
        let cookie = self.start_read(offset, len);
        self.wait(cookie)
    }

    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.try_read(offset, len).unwrap_or_else(|e| panic!("read of {len} at {offset}: {e}"))
    }

    pub fn try_write(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        let cookie = self.start_write(offset, data);
        self.wait(cookie).map(drop)
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.try_write(offset, data).unwrap_or_else(|e| panic!("write of {} at {offset}: {e}", data.len()));
    }

    pub fn perform(&mut self, command: Command, flags: CommandFlags, offset: u64, len: u32) -> Reply {
        let cookie = self.ask(command, flags, offset, len, &[]);
        self.wait(cookie)
    }

    pub fn flush(&mut self) {
        self.perform(Command::Flush, CommandFlags::empty(), 0, 0).expect("a flush");
    }

    /// Says goodbye, and waits until the server has hung up.
    pub fn disconnect(mut self) {
        let goodbye = Request { flags: CommandFlags::empty(), command: Command::Disc, cookie: 0, offset: 0, len: 0 };
        self.stream.write_all(&goodbye.encode()).unwrap();
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).unwrap();
    }

    fn exactly(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        if let Err(e) = self.stream.read_exact(&mut bytes) {
            panic!("{} requests are unanswered, and no reply came: {e}", self.open.len());
        }
        bytes
    }

    fn receive(&mut self) {
        let common: [u8; ReplyHeader::COMMON_LEN] = self.exactly(ReplyHeader::COMMON_LEN).try_into().unwrap();
        let mut extra = [0; 4];
        if ReplyHeader::needs_more(&common) > 0 {
            extra = self.exactly(4).try_into().unwrap();
        }
        let header = ReplyHeader::decode(&common, extra).unwrap();
        header.check(self.session.max_payload_bytes()).unwrap();
        let cookie = header.cookie();
        let mut open = self.open.remove(&cookie).unwrap_or_else(|| panic!("an answer to {cookie}, never asked"));
        match header {
            ReplyHeader::Simple { error: None, .. } => {
                let len = open.data.len();
                self.take_data(&mut open, 0, len);
            }
            ReplyHeader::Simple { error, .. } => open.error = error,
            ReplyHeader::Chunk { kind, len, .. } => self.take_chunk(&mut open, kind, len as usize),
        }
        if !header.is_last() {
            self.open.insert(cookie, open);
            return;
        }
        let whole = open.covered.iter().all(|covered| *covered);
        assert!(open.error.is_some() || whole, "read at {}: not all of it was answered", open.offset);
        self.done.push((cookie, open.error.map_or(Ok(open.data), Err)));
    }

    fn take_chunk(&mut self, open: &mut Open, kind: ChunkKind, len: usize) {
        match kind {
            ChunkKind::None => {}
            ChunkKind::OffsetData => {
                let offset = u64::from_be_bytes(self.exactly(8).try_into().unwrap());
                self.take_data(open, offset - open.offset, len - 8);
            }
            ChunkKind::OffsetHole => {
                let hole = Hole::decode(&self.exactly(len)).unwrap();
                self.cover(open, (hole.offset - open.offset) as usize, hole.len as usize);
            }
            ChunkKind::BlockStatus => {
                let status = BlockStatus::decode(&self.exactly(len)).unwrap();
                assert_eq!(open.command, Command::BlockStatus);
                for extent in status.extents {
                    open.data.extend_from_slice(&extent.len.to_be_bytes());
                    open.data.extend_from_slice(&extent.flags.bits().to_be_bytes());
                }
                open.covered = vec![true];
            }
            kind => {
                assert!(kind.is_error(), "a chunk of type {kind}");
                open.error = Some(ErrorChunk::decode(kind, &self.exactly(len)).unwrap().error);
            }
        }
    }

    fn take_data(&mut self, open: &mut Open, at: u64, len: usize) {
        let bytes = self.exactly(len);
        self.cover(open, at as usize, len);
        open.data[at as usize..at as usize + len].copy_from_slice(&bytes);
    }

    fn cover(&self, open: &mut Open, at: usize, len: usize) {
        for covered in &mut open.covered[at..at + len] {
            assert!(!std::mem::replace(covered, true), "a byte of the read at {} came twice", open.offset);
        }
    }
}
