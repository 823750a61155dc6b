//! A link that is slow on purpose, for `scripts/bench`: relays TCP connections, delays them, paces them to a
//! rate, and counts their bytes.
//!
//! ```text
//!   client ──► reader ──► line: leaves when the link is free, arrives RTT/2 later ──► writer ──► server
//! ```
//! All connections share the link's rate, a rate for each direction, and take turns chunk by chunk. What does
//! not fit waits in the sender's socket. Neither slow start nor loss is imitated: what is measured is what the
//! programs do with a link, not what TCP does.
//!
//! The first line on stdout is the address. Every line on stdin is answered with the bytes that have gone to
//! the server and to the client so far. Ends with stdin.

use std::collections::VecDeque;
use std::io::{self, BufRead, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;

/// What is read at once, and how connections take turns: 0.13 ms at 1 Gbit/s, 1.3 ms at 100 Mbit/s.
const CHUNK_BYTES: usize = 16 << 10;
/// How far the link may be behind and still catch up: threads wake up late.
const SLACK: Duration = Duration::from_millis(3);
/// How far ahead of the link's turn a sender is read from, so that the link does not run dry in between.
const AHEAD: Duration = Duration::from_millis(1);
/// Most bytes under way on a connection, beside what the rate and the delay hold.
const LINE_BYTES: usize = 4 << 20;

/// A link that is slow on purpose.
#[derive(Parser)]
struct Args {
    /// The server's address
    to: SocketAddr,
    /// Megabits a second in each direction; 0: as many as there are
    #[arg(long, default_value_t = 0)]
    mbit: u64,
    /// Round trip time in milliseconds, half of it in each direction
    #[arg(long, default_value_t = 0)]
    rtt_ms: u64,
}

/// A direction of the link.
struct Direction {
    bits_per_s: u64,
    delay: Duration,
    free: Mutex<Instant>,
    bytes: AtomicU64,
}

impl Direction {
    fn new(args: &Args) -> Arc<Self> {
        let delay = Duration::from_micros(args.rtt_ms * 500);
        Arc::new(Self {
            bits_per_s: args.mbit * 1_000_000,
            delay,
            free: Mutex::new(Instant::now()),
            bytes: AtomicU64::new(0),
        })
    }

    /// Takes the link for so many bytes; when they have left, and it is free again.
    fn transmit(&self, bytes: usize) -> Instant {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let now = Instant::now();
        if self.bits_per_s == 0 {
            return now;
        }
        let took = Duration::from_nanos(bytes as u64 * 8 * 1_000_000_000 / self.bits_per_s);
        let mut free = self.free.lock().expect("nobody panics with it");
        *free = (*free).max(now - SLACK) + took;
        // What the link has to catch up with makes it faster, but nothing leaves before it came.
        (*free).max(now)
    }

    fn line_bytes(&self) -> usize {
        LINE_BYTES + (self.bits_per_s as f64 / 8.0 * self.delay.as_secs_f64()) as usize
    }
}

/// What is under way on a connection in one direction: when it arrives, and what it is. Empty is the end.
#[derive(Default)]
struct Line {
    state: Mutex<LineState>,
    changed: Condvar,
}

#[derive(Default)]
struct LineState {
    chunks: VecDeque<(Instant, Vec<u8>)>,
    spare: Vec<Vec<u8>>,
    bytes: usize,
    broken: bool,
}

impl Line {
    /// A buffer, as soon as the line has room; none if the other end is gone.
    fn buffer(&self, most: usize) -> Option<Vec<u8>> {
        let state = self.state.lock().expect("nobody panics with it");
        let full = |s: &mut LineState| s.bytes >= most && !s.broken;
        let mut state = self.changed.wait_while(state, full).expect("nobody panics with it");
        if state.broken {
            return None;
        }
        Some(state.spare.pop().unwrap_or_else(|| vec![0; CHUNK_BYTES]))
    }

    fn send(&self, arrives: Instant, chunk: Vec<u8>) {
        let mut state = self.state.lock().expect("nobody panics with it");
        state.bytes += chunk.len();
        state.chunks.push_back((arrives, chunk));
        self.changed.notify_all();
    }

    fn receive(&self) -> (Instant, Vec<u8>) {
        let state = self.state.lock().expect("nobody panics with it");
        let mut state = self.changed.wait_while(state, |s| s.chunks.is_empty()).expect("nobody panics with it");
        state.chunks.pop_front().expect("just looked")
    }

    fn done(&self, len: usize, mut chunk: Vec<u8>, broken: bool) {
        let mut state = self.state.lock().expect("nobody panics with it");
        state.bytes -= len;
        state.broken |= broken;
        chunk.resize(CHUNK_BYTES, 0);
        state.spare.push(chunk);
        self.changed.notify_all();
    }
}

fn sleep_until(at: Instant) {
    let now = Instant::now();
    if at > now {
        thread::sleep(at - now);
    }
}

/// Reads from a sender, and takes the link for what it read.
fn read(mut from: TcpStream, line: &Line, direction: &Direction) {
    nix::sys::prctl::set_timerslack(1).ok();
    while let Some(mut chunk) = line.buffer(direction.line_bytes()) {
        let n = from.read(&mut chunk).unwrap_or(0);
        chunk.truncate(n);
        let free = direction.transmit(n);
        line.send(free + direction.delay, chunk);
        if n == 0 {
            return;
        }
        // The next chunk waits for its turn in the sender's socket.
        sleep_until(free - AHEAD);
    }
    let _ = from.shutdown(Shutdown::Read);
}

/// Writes to a receiver what has arrived.
fn write(mut to: TcpStream, line: &Line) {
    nix::sys::prctl::set_timerslack(1).ok();
    loop {
        let (arrives, chunk) = line.receive();
        sleep_until(arrives);
        let len = chunk.len();
        if len == 0 {
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
        let broken = to.write_all(&chunk).is_err();
        line.done(len, chunk, broken);
        if broken {
            return;
        }
    }
}

fn pump(from: &TcpStream, to: &TcpStream, direction: &Arc<Direction>) -> io::Result<()> {
    let (from, to) = (from.try_clone()?, to.try_clone()?);
    let (line, direction) = (Arc::new(Line::default()), direction.clone());
    let other_end = line.clone();
    thread::spawn(move || read(from, &line, &direction));
    thread::spawn(move || write(to, &other_end));
    Ok(())
}

fn connect(client: &TcpStream, to: SocketAddr, up: &Arc<Direction>, down: &Arc<Direction>) -> io::Result<()> {
    // TCP's own round trip before the first byte.
    thread::sleep(up.delay + down.delay);
    // No server: the client sees its connection end.
    let server = TcpStream::connect(to)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    pump(client, &server, up)?;
    pump(&server, client, down)
}

fn serve(listener: &TcpListener, to: SocketAddr, up: &Arc<Direction>, down: &Arc<Direction>) {
    for client in listener.incoming().map_while(Result::ok) {
        let (up, down) = (up.clone(), down.clone());
        thread::spawn(move || connect(&client, to, &up, &down));
    }
}

fn main() -> io::Result<()> {
    let args = Args::parse();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    let (up, down) = (Direction::new(&args), Direction::new(&args));
    let (to_server, to_client) = (up.clone(), down.clone());
    thread::spawn(move || serve(&listener, args.to, &up, &down));
    for line in io::stdin().lock().lines() {
        line?;
        println!("{} {}", to_server.bytes.load(Ordering::Relaxed), to_client.bytes.load(Ordering::Relaxed));
    }
    Ok(())
}
