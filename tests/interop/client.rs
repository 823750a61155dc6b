//! An NBD client that says exactly what a test wants said: several requests at once, any flag, any range.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use blkferry::nbd::chunk::{BlockStatus, ErrorChunk, Hole, decode_data_offset};
use blkferry::nbd::{
    Address, ChunkKind, ClientHandshake, ClientSession, ClientStep, Command, CommandFlags, NbdError, ReplyHeader,
    Request, StateFlags, Uri, Wants,
};

/// A server that is silent for so long has failed the test.
const PATIENCE: Duration = Duration::from_secs(60);

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// What came back for a request: the bytes of a read, or why not.
pub type Answer = Result<Vec<u8>, NbdError>;

struct Open {
    offset: u64,
    bytes: Vec<u8>,
    /// Bytes of the answer that have come: all of them must.
    covered: usize,
    extents: Vec<(u64, bool)>,
    error: Option<NbdError>,
}

/// One connection.
pub struct Client {
    stream: Box<dyn Stream>,
    pub session: ClientSession,
    next: u64,
    open: HashMap<u64, Open>,
    extents: Vec<(u64, bool)>,
}

impl Client {
    /// Connects with structured replies and extents.
    pub fn connect(uri: &str) -> Self {
        Self::with(uri, Wants { structured: true, base_allocation: true, ..Wants::default() })
    }

    /// Connects as an old client does, with simple replies.
    pub fn plain(uri: &str) -> Self {
        Self::with(uri, Wants::default())
    }

    fn with(uri: &str, wants: Wants) -> Self {
        let uri: Uri = uri.parse().unwrap();
        let mut stream: Box<dyn Stream> = match &uri.address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                Box::new(stream)
            }
            Address::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                Box::new(stream)
            }
        };
        let mut handshake = ClientHandshake::new(uri.export.clone(), wants);
        loop {
            let mut bytes = vec![0; handshake.needs()];
            stream.read_exact(&mut bytes).expect("the server answers the handshake");
            match handshake.feed(&bytes).unwrap() {
                ClientStep::Send(bytes) => stream.write_all(&bytes).unwrap(),
                ClientStep::Ready { session, send } => {
                    stream.write_all(&send).unwrap();
                    return Self { stream, session, next: 1, open: HashMap::new(), extents: Vec::new() };
                }
                ClientStep::Listed { .. } => unreachable!("no list was asked for"),
            }
        }
    }

    /// Sends a request and does not wait; gives its cookie.
    pub fn send(&mut self, command: Command, flags: CommandFlags, offset: u64, len: u32, payload: &[u8]) -> u64 {
        let cookie = self.next;
        self.next += 1;
        let reads = if command == Command::Read { len as usize } else { 0 };
        let open = Open { offset, bytes: vec![0xee; reads], covered: 0, extents: Vec::new(), error: None };
        self.open.insert(cookie, open);
        let mut message = Request { flags, command, cookie, offset, len }.encode().to_vec();
        message.extend_from_slice(payload);
        self.stream.write_all(&message).unwrap();
        cookie
    }

    /// Waits until any one of the requests under way is answered.
    pub fn receive(&mut self) -> (u64, Answer) {
        loop {
            let mut common = [0; ReplyHeader::COMMON_LEN];
            self.stream.read_exact(&mut common).expect("the server answers");
            let mut extra = [0; 4];
            let more = ReplyHeader::needs_more(&common);
            self.stream.read_exact(&mut extra[..more]).unwrap();
            let header = ReplyHeader::decode(&common, extra).unwrap();
            let mut open = self.open.remove(&header.cookie()).expect("an answer to a request that was made");
            match header {
                ReplyHeader::Simple { error, .. } => {
                    open.error = error;
                    if error.is_none() {
                        self.stream.read_exact(&mut open.bytes).unwrap();
                        open.covered = open.bytes.len();
                    }
                }
                ReplyHeader::Chunk { kind, len, .. } => {
                    header.check(self.session.max_payload_bytes()).unwrap();
                    let mut payload = vec![0; len as usize];
                    self.stream.read_exact(&mut payload).unwrap();
                    self.chunk(&mut open, kind, &payload);
                }
            }
            if !header.is_last() {
                self.open.insert(header.cookie(), open);
                continue;
            }
            self.extents = open.extents;
            let answer = match open.error {
                Some(error) => Err(error),
                None => {
                    assert_eq!(open.covered, open.bytes.len(), "an answer with gaps");
                    Ok(open.bytes)
                }
            };
            return (header.cookie(), answer);
        }
    }

    fn chunk(&self, open: &mut Open, kind: ChunkKind, payload: &[u8]) {
        let mut place = |offset: u64, len: usize| {
            open.covered += len;
            let at = (offset - open.offset) as usize;
            at..at + len
        };
        match kind {
            ChunkKind::None => {}
            ChunkKind::OffsetData => {
                let offset = decode_data_offset(payload[..8].try_into().unwrap());
                let place = place(offset, payload.len() - 8);
                open.bytes[place].copy_from_slice(&payload[8..]);
            }
            ChunkKind::OffsetHole => {
                let hole = Hole::decode(payload).unwrap();
                let place = place(hole.offset, hole.len as usize);
                open.bytes[place].fill(0);
            }
            ChunkKind::BlockStatus => {
                let status = BlockStatus::decode(payload).unwrap();
                assert_eq!(Some(status.context_id), self.session.base_allocation);
                let zero = |e: &blkferry::nbd::Extent| (u64::from(e.len), e.flags.contains(StateFlags::ZERO));
                open.extents.extend(status.extents.iter().map(zero));
            }
            kind if kind.is_error() => open.error = Some(ErrorChunk::decode(kind, payload).unwrap().error),
            kind => panic!("a {kind:?} chunk"),
        }
    }

    /// One request, to its answer.
    pub fn ask(&mut self, command: Command, flags: CommandFlags, offset: u64, len: u32, payload: &[u8]) -> Answer {
        assert!(self.open.is_empty(), "for a client with nothing under way");
        let cookie = self.send(command, flags, offset, len, payload);
        let (answered, answer) = self.receive();
        assert_eq!(answered, cookie);
        answer
    }

    pub fn read(&mut self, offset: u64, len: u32) -> Answer {
        self.ask(Command::Read, CommandFlags::empty(), offset, len, &[])
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.ask(Command::Write, CommandFlags::empty(), offset, data.len() as u32, data).unwrap();
    }

    pub fn zero(&mut self, flags: CommandFlags, offset: u64, len: u32) -> Result<(), NbdError> {
        self.ask(Command::WriteZeroes, flags, offset, len, &[]).map(drop)
    }

    pub fn trim(&mut self, offset: u64, len: u32) {
        self.ask(Command::Trim, CommandFlags::empty(), offset, len, &[]).unwrap();
    }

    pub fn flush(&mut self) {
        self.ask(Command::Flush, CommandFlags::empty(), 0, 0, &[]).unwrap();
    }

    /// (length, reads as zeros) of each extent from `offset` on.
    #[allow(dead_code)]
    pub fn extents(&mut self, offset: u64, len: u32) -> Vec<(u64, bool)> {
        self.ask(Command::BlockStatus, CommandFlags::empty(), offset, len, &[]).unwrap();
        std::mem::take(&mut self.extents)
    }

    /// All of the disk.
    pub fn read_all(&mut self) -> Vec<u8> {
        let mut disk = Vec::new();
        let size = self.session.size_bytes;
        for offset in (0..size).step_by(1 << 20) {
            disk.extend(self.read(offset, (size - offset).min(1 << 20) as u32).unwrap());
        }
        disk
    }
}
