//! A TCP relay that counts what crossed between a source and blkferry, by somebody who belongs to neither; and a link
//! that can be cut, or fall silent.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::bench::poll;

#[derive(Default)]
struct Counters {
    from_source: AtomicU64,
    to_source: AtomicU64,
    connections: AtomicU64,
    pumps: AtomicU64,
    stopping: AtomicBool,
    /// Nobody gets through.
    is_down: AtomicBool,
    /// Bytes stay where they are.
    is_silent: AtomicBool,
    /// Milliseconds that each piece takes in each direction.
    delay_ms: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
    /// When the last bytes from the source were about to be passed on.
    last_heard: Mutex<Option<Instant>>,
}

/// A running relay; ends when dropped.
pub struct Relay {
    counters: Arc<Counters>,
    address: SocketAddr,
    acceptor: Option<JoinHandle<()>>,
}

impl Relay {
    /// Relays to the server at an `nbd://HOST:PORT/EXPORT` URI.
    pub fn before(uri: &str) -> Self {
        let to: SocketAddr = uri.strip_prefix("nbd://").unwrap().trim_end_matches('/').parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let counters = Arc::new(Counters::default());
        let shared = counters.clone();
        let acceptor = std::thread::spawn(move || {
            for client in listener.incoming() {
                if shared.stopping.load(Ordering::SeqCst) {
                    return;
                }
                let client = client.unwrap();
                shared.connections.fetch_add(1, Ordering::SeqCst);
                if shared.is_down.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(server) = TcpStream::connect(to) else { continue };
                let (c, s) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                shared.open.lock().unwrap().push(client.try_clone().unwrap());
                pump(server, client, shared.clone(), true);
                pump(c, s, shared.clone(), false);
            }
        });
        Self { counters, address, acceptor: Some(acceptor) }
    }

    /// The same, with a long way to go.
    pub fn far(uri: &str, delay: Duration) -> Self {
        let relay = Self::before(uri);
        relay.counters.delay_ms.store(delay.as_millis() as u64, Ordering::SeqCst);
        relay
    }

    pub fn uri(&self) -> String {
        format!("nbd://{}", self.address)
    }

    /// Bytes of payload that came from the source.
    pub fn received(&self) -> u64 {
        self.counters.from_source.load(Ordering::SeqCst)
    }

    /// Bytes of payload that went to the source.
    pub fn to_source(&self) -> u64 {
        self.counters.to_source.load(Ordering::SeqCst)
    }

    /// Connections that were ever made.
    pub fn connections(&self) -> u64 {
        self.counters.connections.load(Ordering::SeqCst)
    }

    /// Ends all connections, and lets no new ones through until [`Relay::mend`].
    pub fn cut(&self) {
        self.counters.is_down.store(true, Ordering::SeqCst);
        for connection in self.counters.open.lock().unwrap().drain(..) {
            // Whoever has hung up already needs no cut.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Holds everything back until [`Relay::mend`]; connections stay.
    pub fn fall_silent(&self) {
        self.counters.is_silent.store(true, Ordering::SeqCst);
    }

    /// The link is as it should be.
    pub fn mend(&self) {
        self.counters.is_down.store(false, Ordering::SeqCst);
        self.counters.is_silent.store(false, Ordering::SeqCst);
    }

    /// When something of the source got through last, or a moment before that.
    pub fn last_heard(&self) -> Instant {
        self.counters.last_heard.lock().unwrap().expect("the source was heard")
    }

    /// Waits until both ends of every connection have hung up: from then on the counts stand still.
    pub fn wait_quiet(&self) {
        poll("the relay's connections to close", || self.counters.pumps.load(Ordering::SeqCst) == 0);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.counters.stopping.store(true, Ordering::SeqCst);
        // Wakes the acceptor. The pumps end with their connections.
        let _ = TcpStream::connect(self.address);
        let _ = self.acceptor.take().unwrap().join();
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, counters: Arc<Counters>, is_from_source: bool) {
    counters.pumps.fetch_add(1, Ordering::SeqCst);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 256 << 10];
        while let Ok(n) = from.read(&mut buffer) {
            std::thread::sleep(Duration::from_millis(counters.delay_ms.load(Ordering::SeqCst)));
            while counters.is_silent.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            let now = Instant::now();
            if n == 0 || to.write_all(&buffer[..n]).is_err() {
                break;
            }
            let count = if is_from_source { &counters.from_source } else { &counters.to_source };
            count.fetch_add(n as u64, Ordering::SeqCst);
            if is_from_source {
                *counters.last_heard.lock().unwrap() = Some(now);
            }
        }
        // The end of one direction is passed on as such; the other may still have something to say.
        let _ = to.shutdown(Shutdown::Write);
        let _ = from.shutdown(Shutdown::Read);
        counters.pumps.fetch_sub(1, Ordering::SeqCst);
    });
}
