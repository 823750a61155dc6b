//! Where a real server or client is fed by the test: a ring, a socket, and a thread for the other end.

use std::cell::RefCell;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};

use blkferry::uring::Reactor;
use futures_channel::oneshot;
use tempfile::TempDir;

type Job = Box<dyn FnOnce() + Send>;

pub struct Site {
    pub socket: PathBuf,
    pub reactor: Reactor,
    peer: Sender<Job>,
    _dir: TempDir,
}

thread_local! {
    /// One for all inputs: making a ring takes longer than most of them.
    static SITE: RefCell<Option<Site>> = const { RefCell::new(None) };
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("bf").tempdir().unwrap();
        let (peer, jobs) = channel::<Job>();
        std::thread::spawn(move || jobs.iter().for_each(|job| job()));
        let socket = dir.path().join("socket");
        Self { socket, reactor: Reactor::new().unwrap(), peer, _dir: dir }
    }

    pub fn with<T>(job: impl FnOnce(&Self) -> T) -> T {
        SITE.with(|site| job(site.borrow_mut().get_or_insert_with(Self::new)))
    }

    /// Lets the other end's thread do this.
    pub fn peer_does<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> oneshot::Receiver<T> {
        let (done, result) = oneshot::channel();
        let job = move || drop(done.send(job()));
        self.peer.send(Box::new(job)).unwrap();
        result
    }
}

/// Sends piece by piece, as long as somebody listens.
pub fn send(mut stream: &UnixStream, pieces: &[&[u8]]) {
    for piece in pieces {
        if stream.write_all(piece).is_err() {
            return;
        }
    }
}
