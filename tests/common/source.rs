//! A source under the test's control: an NBD server of its own that logs every read, holds replies until it is
//! told to let them go, in any order, and breaks the rules on demand.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blkferry::nbd::{Command, NbdError, Request, put_simple_reply};

use super::manners::{Manners, shake_hands};
use super::reply::{Lie, extents_reply, read_reply};

/// How long the device may take to ask for something: only ends a test that would hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// A read that the device asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Place in the order of arrival, from 0.
    pub number: usize,
    /// The connection that it came on, from 0 in the order of connecting.
    pub connection: usize,
    pub offset: u64,
    pub len: u32,
    cookie: u64,
}

/// A client. Hanging up does not wait for a reply that is stuck.
struct Peer {
    raw: UnixStream,
    replies: Mutex<UnixStream>,
    /// What it is served, whatever newcomers get.
    image: Arc<Vec<u8>>,
}

impl Peer {
    fn new(stream: &UnixStream, image: Arc<Vec<u8>>) -> Arc<Self> {
        let replies = Mutex::new(stream.try_clone().unwrap());
        Arc::new(Self { raw: stream.try_clone().unwrap(), replies, image })
    }

    fn send(&self, bytes: &[u8]) {
        // The device may have hung up meanwhile.
        let _ = self.replies.lock().unwrap().write_all(bytes);
    }

    fn hang_up(&self) {
        // Gone already is as good.
        let _ = self.raw.shutdown(std::net::Shutdown::Both);
    }
}

type Filter = Box<dyn Fn(&Asked) -> bool + Send>;

struct State {
    image: Arc<Vec<u8>>,
    manners: Manners,
    connections: HashMap<usize, Arc<Peer>>,
    accepted: usize,
    asked: Vec<Asked>,
    held: Vec<Asked>,
    hold: Filter,
    lies: VecDeque<Lie>,
    closing: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

pub struct Source {
    pub uri: String,
    path: PathBuf,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Source {
    pub fn start(path: &Path, image: Vec<u8>, manners: Manners) -> Self {
        let state = State {
            image: Arc::new(image),
            manners,
            connections: HashMap::new(),
            accepted: 0,
            asked: Vec::new(),
            held: Vec::new(),
            hold: Box::new(|_| false),
            lies: VecDeque::new(),
            closing: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let uri = format!("nbd+unix:///?socket={}", path.display());
        let mut source = Self { uri, path: path.into(), shared, accepting: None };
        source.open();
        source
    }

    /// Listens (again).
    pub fn open(&mut self) {
        assert!(self.accepting.is_none(), "it is open already");
        let listener = UnixListener::bind(&self.path).unwrap();
        self.lock().closing = false;
        let shared = self.shared.clone();
        self.accepting = Some(std::thread::spawn(move || accept(&listener, &shared)));
    }

    /// Stops listening and hangs up, as a source that is switched off.
    pub fn close(&mut self) {
        let Some(accepting) = self.accepting.take() else { return };
        self.lock().closing = true;
        // Wakes the thread that accepts.
        UnixStream::connect(&self.path).expect("the socket is there until here");
        accepting.join().unwrap();
        std::fs::remove_file(&self.path).unwrap();
        self.cut();
    }

    /// Breaks all connections; new ones are welcome.
    pub fn cut(&self) {
        let connections = std::mem::take(&mut self.lock().connections);
        connections.values().for_each(|peer| peer.hang_up());
        self.lock().held.clear();
        self.shared.changed.notify_all();
    }

    /// Breaks one connection.
    pub fn cut_connection(&self, number: usize) {
        let mut state = self.lock();
        if let Some(peer) = state.connections.remove(&number) {
            peer.hang_up();
        }
        state.held.retain(|asked| asked.connection != number);
        self.shared.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- what it has ---------------------------------------------------------------------------------

    /// What those who connect from now on are served.
    pub fn set_image(&self, image: Vec<u8>) {
        self.lock().image = Arc::new(image);
    }

    pub fn set_identity(&self, identity: Option<&str>) {
        self.lock().manners.identity = identity.map(str::to_owned);
    }

    /// The next reads are answered with these lies, one each.
    pub fn lie(&self, lie: Lie) {
        self.lock().lies.push_back(lie);
    }

    pub fn lies_left(&self) -> usize {
        self.lock().lies.len()
    }

    pub fn be_honest(&self) {
        self.lock().lies.clear();
    }

    // ---- what it was asked ---------------------------------------------------------------------------

    pub fn asked(&self) -> Vec<Asked> {
        self.lock().asked.clone()
    }

    /// How often each block was asked for.
    pub fn times_asked(&self, block_bytes: u64) -> Vec<u32> {
        let state = self.lock();
        let mut times = vec![0; (state.image.len() as u64).div_ceil(block_bytes) as usize];
        for asked in &state.asked {
            let end = (asked.offset + u64::from(asked.len)).div_ceil(block_bytes);
            (asked.offset / block_bytes..end).for_each(|block| times[block as usize] += 1);
        }
        times
    }

    pub fn forget_asked(&self) {
        self.lock().asked.clear();
    }

    /// Connections accepted since the start.
    pub fn accepted(&self) -> usize {
        self.lock().accepted
    }

    pub fn connected(&self) -> usize {
        self.lock().connections.len()
    }

    // ---- holding replies -----------------------------------------------------------------------------

    /// From now on replies to such reads are held.
    pub fn hold(&self, filter: impl Fn(&Asked) -> bool + Send + 'static) {
        self.lock().hold = Box::new(filter);
    }

    pub fn hold_all(&self) {
        self.hold(|_| true);
    }

    pub fn held(&self) -> Vec<Asked> {
        self.lock().held.clone()
    }

    /// Waits until that many replies are held.
    pub fn wait_held(&self, count: usize) -> Vec<Asked> {
        self.wait_until("replies to hold", |state| state.held.len() >= count);
        self.held()
    }

    /// Waits until so many reads have arrived, held or not.
    pub fn wait_asked(&self, count: usize) {
        self.wait_until("reads", |state| state.asked.len() >= count);
    }

    pub fn wait_connected(&self, count: usize) {
        self.wait_until("connections", |state| state.connections.len() >= count);
    }

    fn wait_until(&self, what: &str, done: impl Fn(&State) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            let (asked, held) = (state.asked.len(), state.held.len());
            assert!(!left.is_zero(), "not enough {what}: {asked} reads were asked, {held} are held");
            state = self.shared.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Answers the held reads that `which` picks, in the order in which they were asked; says how many.
    pub fn release(&self, which: impl Fn(&Asked) -> bool) -> usize {
        let mut state = self.lock();
        let (go, stay): (Vec<Asked>, Vec<Asked>) = state.held.drain(..).partition(|asked| which(asked));
        state.held = stay;
        drop(state);
        go.iter().for_each(|asked| reply(&self.shared, asked));
        go.len()
    }

    /// Answers everything that is held, and holds nothing more.
    pub fn let_go(&self) {
        self.hold(|_| false);
        self.release(|_| true);
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Whoever waits for an answer goes on, or ends.
            self.cut();
        } else {
            self.close();
        }
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let mut state = shared.state.lock().unwrap();
        if state.closing {
            return;
        }
        let number = state.accepted;
        state.accepted += 1;
        let peer = Peer::new(&stream, state.image.clone());
        state.connections.insert(number, peer.clone());
        drop(state);
        shared.changed.notify_all();
        let shared = shared.clone();
        std::thread::spawn(move || {
            // However it ended: the client is gone, or broke a rule, which its own tests would see.
            let _ = serve(stream, number, &peer, &shared);
            let mut state = shared.state.lock().unwrap();
            state.connections.remove(&number);
            state.held.retain(|asked| asked.connection != number);
            drop(state);
            shared.changed.notify_all();
        });
    }
}

fn serve(mut stream: UnixStream, connection: usize, peer: &Peer, shared: &Shared) -> io::Result<()> {
    let manners = shared.state.lock().unwrap().manners.clone();
    shake_hands(&mut stream, &manners, peer.image.len() as u64)?;
    loop {
        let mut header = [0; Request::LEN];
        stream.read_exact(&mut header)?;
        let request = Request::decode(&header).expect("the device knows how to ask");
        let Request { command, cookie, offset, len, .. } = request;
        match command {
            Command::Read => on_read(shared, connection, request),
            Command::BlockStatus => peer.send(&extents_reply(cookie, &peer.image, offset, len)),
            Command::Disc => return Ok(()),
            _ => {
                let mut out = Vec::new();
                put_simple_reply(&mut out, cookie, Some(NbdError::Inval));
                peer.send(&out);
            }
        }
    }
}

fn on_read(shared: &Shared, connection: usize, request: Request) {
    let mut state = shared.state.lock().unwrap();
    let Request { cookie, offset, len, .. } = request;
    let asked = Asked { number: state.asked.len(), connection, offset, len, cookie };
    state.asked.push(asked);
    let held = (state.hold)(&asked);
    if held {
        state.held.push(asked);
    }
    drop(state);
    shared.changed.notify_all();
    if !held {
        reply(shared, &asked);
    }
}

fn reply(shared: &Shared, asked: &Asked) {
    let mut state = shared.state.lock().unwrap();
    let Some(peer) = state.connections.get(&asked.connection).cloned() else { return };
    let (manners, lie) = (state.manners.clone(), state.lies.pop_front());
    drop(state);
    let (bytes, then_hang_up) = read_reply(&peer.image, &manners, asked.cookie, asked.offset, asked.len, lie);
    peer.send(&bytes);
    if then_hang_up {
        peer.hang_up();
    }
}
