//! What passes on a connection, understood as far as the rules need it: which reads are asked, which are answered, and
//! which bytes are framing. Both directions; only what our own two ends say to each other.

/// Something that was said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// A read was asked.
    Read { cookie: u64, offset: u64, len: u32 },
    /// An answer has come to its end.
    Answered { cookie: u64, error: bool },
}

/// Bytes that make up a message of the kind that comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// What opens the connection.
    Opening,
    /// The first bytes of a message, which say what it is.
    Magic,
    /// The rest of its header.
    Header,
    /// What follows a header; so much of it is framing, too.
    Payload { left: u64, framing: u64 },
    /// Not understood any more.
    Lost,
}

const OPTION: u32 = 0x4948_4156;
const REQUEST: u32 = 0x2560_9513;
const OPTION_REPLY: u32 = 0x0003_e889;
const CHUNK: u32 = 0x668e_33ef;
const MAGIC_BYTES: usize = 4;
const CHUNK_BYTES: usize = 20;

/// One direction of a connection.
pub struct Wire {
    state: State,
    head: Vec<u8>,
    want: usize,
    /// An answer of several chunks has had an error.
    error: bool,
    /// What is said when the payload is complete.
    then: Option<Said>,
}

impl Wire {
    pub fn from_client() -> Self {
        Self { state: State::Opening, head: Vec::new(), want: 4, error: false, then: None }
    }

    pub fn from_server() -> Self {
        Self { want: 18, ..Self::from_client() }
    }

    /// Takes what passes. `hear` is called for each thing said, `framing` with each index of a byte of the framing of
    /// an answer.
    pub fn pass(&mut self, bytes: &[u8], mut hear: impl FnMut(Said), mut framing: impl FnMut(usize)) {
        let mut at = 0;
        while at < bytes.len() {
            match &mut self.state {
                State::Lost => return,
                State::Payload { left: 0, .. } => self.expect(State::Magic, MAGIC_BYTES),
                State::Payload { left, framing: heads } => {
                    let len = (*left).min((bytes.len() - at) as u64);
                    (at..at + (*heads).min(len) as usize).for_each(&mut framing);
                    *heads = heads.saturating_sub(len);
                    *left -= len;
                    at += len as usize;
                    if *left == 0 {
                        self.then.take().into_iter().for_each(&mut hear);
                    }
                }
                _ => {
                    let is_chunk = self.head.len() >= MAGIC_BYTES && self.head[..4] == CHUNK.to_be_bytes();
                    if is_chunk {
                        framing(at);
                    }
                    self.head.push(bytes[at]);
                    at += 1;
                    if self.head.len() == self.want {
                        self.understand(&mut hear);
                    }
                }
            }
        }
    }

    fn expect(&mut self, state: State, want: usize) {
        (self.state, self.want) = (state, want);
        self.head.clear();
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.head[at..at + 4].try_into().expect("four bytes"))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.head[at..at + 8].try_into().expect("eight bytes"))
    }

    fn understand(&mut self, hear: &mut impl FnMut(Said)) {
        let magic = if self.head.len() >= 4 { self.u32_at(0) } else { 0 };
        match (self.state, magic) {
            (State::Opening, _) => self.expect(State::Magic, MAGIC_BYTES),
            (State::Magic, OPTION) => (self.state, self.want) = (State::Header, 16),
            (State::Magic, REQUEST) => (self.state, self.want) = (State::Header, 28),
            (State::Magic, OPTION_REPLY | CHUNK) => (self.state, self.want) = (State::Header, CHUNK_BYTES),
            (State::Header, OPTION) => self.payload(u64::from(self.u32_at(12)), 0),
            (State::Header, OPTION_REPLY) => self.payload(u64::from(self.u32_at(16)), 0),
            (State::Header, REQUEST) => {
                if self.head[6..8] == [0, 0] {
                    hear(Said::Read { cookie: self.u64_at(8), offset: self.u64_at(16), len: self.u32_at(24) });
                }
                self.expect(State::Magic, MAGIC_BYTES);
            }
            (State::Header, CHUNK) => {
                let (is_last, is_error, kind) = (self.head[5] & 1 != 0, self.head[6] & 0x80 != 0, self.head[7]);
                self.error |= is_error;
                if is_last {
                    let (cookie, error) = (self.u64_at(8), std::mem::take(&mut self.error));
                    self.then = Some(Said::Answered { cookie, error });
                }
                // Data and holes begin with an offset.
                let framing = if !is_error && (kind == 1 || kind == 2) { 8 } else { 0 };
                self.payload(u64::from(self.u32_at(16)), framing);
                if self.state == (State::Payload { left: 0, framing: 0 }) {
                    self.then.take().into_iter().for_each(hear);
                }
            }
            _ => self.state = State::Lost,
        }
    }

    fn payload(&mut self, left: u64, framing: u64) {
        self.expect(State::Payload { left, framing: framing.min(left) }, 0);
    }
}

#[test]
fn reads_answers_and_framing_are_told_apart() {
    let mut request = vec![0; 4];
    request.extend(REQUEST.to_be_bytes());
    request.extend([0, 0, 0, 0]);
    request.extend(7u64.to_be_bytes());
    request.extend(4096u64.to_be_bytes());
    request.extend(512u32.to_be_bytes());
    let mut said = Vec::new();
    let mut client = Wire::from_client();
    request.chunks(5).for_each(|piece| client.pass(piece, |what| said.push(what), |_| ()));
    assert_eq!(said, [Said::Read { cookie: 7, offset: 4096, len: 512 }]);

    let mut answer = vec![0; 18];
    answer.extend(CHUNK.to_be_bytes());
    answer.extend([0, 1, 0, 1]);
    answer.extend(7u64.to_be_bytes());
    answer.extend(520u32.to_be_bytes());
    answer.extend([0; 520]);
    answer.extend(CHUNK.to_be_bytes());
    let (mut said, mut framing) = (Vec::new(), Vec::new());
    let mut server = Wire::from_server();
    server.pass(&answer[..500], |what| said.push(what), |at| framing.push(at));
    assert!(said.is_empty(), "it is not complete");
    server.pass(&answer[500..], |what| said.push(what), |_| ());
    assert_eq!(said, [Said::Answered { cookie: 7, error: false }]);
    // All of the header but its magic, and the offset.
    assert_eq!(framing, (22..46).collect::<Vec<_>>());
}
