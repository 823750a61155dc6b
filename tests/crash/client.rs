//! A small NBD client: blocking, several requests in flight, and it survives the death of its server.
//!
//! What a server sent before it died is still read: an acknowledgement counts whether or not somebody looked
//! at it in time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use blkferry::nbd::chunk::decode_data_offset;
use blkferry::nbd::{
    Address, ChunkKind, ClientHandshake, ClientSession, ClientStep, Command, CommandFlags, ErrorChunk, Hole, NbdError,
    ReplyHeader, Request, Uri, Wants,
};

/// A daemon that answers nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// The answer to one request.
#[derive(Debug)]
pub struct Answer {
    pub cookie: u64,
    /// What was read; empty for other requests.
    pub result: Result<Vec<u8>, NbdError>,
}

/// What is needed to take an answer apart.
struct Sent {
    cookie: u64,
    offset: u64,
    /// Bytes that a read returns.
    read_len: usize,
    data: Vec<u8>,
    filled: usize,
    error: Option<NbdError>,
}

pub struct Client {
    stream: UnixStream,
    session: ClientSession,
    sent: Vec<Sent>,
}

impl Client {
    /// Connects to a device; with structured replies or without.
    pub fn connect(uri: &str, structured: bool) -> io::Result<Self> {
        let uri: Uri = uri.parse().expect("the daemon names itself by a good URI");
        let Address::Unix(path) = &uri.address else { panic!("devices are on unix sockets") };
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let wants = Wants { structured, ..Wants::default() };
        let mut handshake = ClientHandshake::new(uri.export.clone(), wants);
        loop {
            let mut bytes = vec![0; handshake.needs()];
            stream.read_exact(&mut bytes)?;
            match handshake.feed(&bytes).expect("a blkferry daemon speaks NBD") {
                ClientStep::Send(send) => stream.write_all(&send)?,
                ClientStep::Ready { session, send } => {
                    stream.write_all(&send)?;
                    assert_eq!(session.structured, structured);
                    return Ok(Self { stream, session, sent: Vec::new() });
                }
                ClientStep::Listed { .. } => unreachable!("no list was asked for"),
            }
        }
    }

    pub fn session(&self) -> &ClientSession {
        &self.session
    }

    /// Requests that were sent and not answered.
    pub fn in_flight(&self) -> usize {
        self.sent.len()
    }

    /// Sends a request. On an error it may have arrived or not.
    pub fn send(&mut self, request: &Request, payload: &[u8]) -> io::Result<()> {
        let read_len = if request.command == Command::Read { request.len as usize } else { 0 };
        self.sent.push(Sent {
            cookie: request.cookie,
            offset: request.offset,
            read_len,
            data: vec![0; read_len],
            filled: 0,
            error: None,
        });
        let mut message = request.encode().to_vec();
        message.extend_from_slice(payload);
        self.stream.write_all(&message)
    }

    /// Waits for the next answer. An error: no more will come.
    pub fn receive(&mut self) -> io::Result<Answer> {
        loop {
            let mut common = [0; ReplyHeader::COMMON_LEN];
            self.stream.read_exact(&mut common)?;
            let mut extra = [0; 4];
            self.stream.read_exact(&mut extra[..ReplyHeader::needs_more(&common)])?;
            let header = ReplyHeader::decode(&common, extra).expect("a reply");
            header.check(1 << 25).expect("a chunk as it should be");
            let at = self.sent.iter().position(|sent| sent.cookie == header.cookie());
            let at = at.expect("an answer to something that was asked");
            let sent = &mut self.sent[at];
            match header {
                ReplyHeader::Simple { error, .. } => {
                    sent.error = error;
                    if error.is_none() {
                        self.stream.read_exact(&mut sent.data)?;
                        sent.filled = sent.read_len;
                    }
                }
                ReplyHeader::Chunk { kind, len, .. } => {
                    let mut payload = vec![0; len as usize];
                    self.stream.read_exact(&mut payload)?;
                    sent.take(kind, &payload);
                }
            }
            if header.is_last() {
                let sent = self.sent.swap_remove(at);
                let result = sent.error.map_or(Ok(sent.data), Err);
                assert!(result.is_err() || sent.filled == sent.read_len, "a read was answered in part");
                return Ok(Answer { cookie: sent.cookie, result });
            }
        }
    }

    /// Reads a range and waits for it. Nothing else may be in flight.
    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.ask(Command::Read, CommandFlags::empty(), offset, len, &[])
    }

    /// Writes, and waits for the acknowledgement. Nothing else may be in flight.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.ask(Command::Write, CommandFlags::empty(), offset, data.len() as u32, data);
    }

    fn ask(&mut self, command: Command, flags: CommandFlags, offset: u64, len: u32, payload: &[u8]) -> Vec<u8> {
        assert_eq!(self.in_flight(), 0);
        self.send(&Request { flags, command, cookie: u64::MAX, offset, len }, payload).unwrap();
        self.receive().unwrap().result.unwrap_or_else(|e| panic!("{command} at {offset}: {e}"))
    }
}

impl Sent {
    fn take(&mut self, kind: ChunkKind, payload: &[u8]) {
        match kind {
            ChunkKind::None => {}
            ChunkKind::OffsetData => {
                let (offset, data) = payload.split_first_chunk().expect("the length was checked");
                let at = (decode_data_offset(*offset) - self.offset) as usize;
                self.data[at..at + data.len()].copy_from_slice(data);
                self.filled += data.len();
            }
            ChunkKind::OffsetHole => self.filled += Hole::decode(payload).unwrap().len as usize,
            kind if kind.is_error() => self.error = Some(ErrorChunk::decode(kind, payload).unwrap().error),
            kind => panic!("{kind} was not asked for"),
        }
    }
}
