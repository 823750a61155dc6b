//! Connections and listeners: of this thread's world, or the kernel's.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use super::network::{End, Network};
use super::world::{Inner, current};
use crate::uring::net::{self, BindError, Part};

/// See [`net::Connection`].
#[derive(Clone, Debug)]
pub struct Connection(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Real(net::Connection),
    Simulated(Rc<End>),
}

impl Connection {
    /// See [`net::Connection::connect_tcp`].
    pub async fn connect_tcp(host: String, port: u16, timeout: Duration) -> io::Result<Self> {
        match current() {
            Some(world) => Self::simulated(Network::connect(world, format!("{host}:{port}"), timeout).await),
            None => net::Connection::connect_tcp(host, port, timeout).await.map(|real| Self(Kind::Real(real))),
        }
    }

    /// See [`net::Connection::connect_unix`].
    pub async fn connect_unix(path: PathBuf) -> io::Result<Self> {
        match current() {
            Some(world) => Self::simulated(Network::connect(world, path.display().to_string(), Duration::MAX).await),
            None => net::Connection::connect_unix(path).await.map(|real| Self(Kind::Real(real))),
        }
    }

    fn simulated(end: io::Result<Rc<End>>) -> io::Result<Self> {
        end.map(|end| Self(Kind::Simulated(end)))
    }

    /// See [`net::Connection::recv`].
    pub async fn recv<B: AsMut<[u8]> + 'static>(&self, mut buf: B, at: Range<usize>) -> (io::Result<usize>, B) {
        match &self.0 {
            Kind::Real(real) => real.recv(buf, at).await,
            Kind::Simulated(end) => (end.recv(&mut buf.as_mut()[at]).await, buf),
        }
    }

    /// See [`net::Connection::recv_exact`].
    pub async fn recv_exact<B: AsMut<[u8]> + 'static>(&self, mut buf: B, at: Range<usize>) -> (io::Result<()>, B) {
        let end = match &self.0 {
            Kind::Real(real) => return real.recv_exact(buf, at).await,
            Kind::Simulated(end) => end,
        };
        let mut start = at.start;
        while start < at.end {
            match end.recv(&mut buf.as_mut()[start..at.end]).await {
                Ok(0) => return (Err(io::ErrorKind::UnexpectedEof.into()), buf),
                Ok(len) => start += len,
                Err(error) => return (Err(error), buf),
            }
        }
        (Ok(()), buf)
    }

    /// See [`net::Connection::send`].
    pub async fn send(&self, parts: Vec<Part>) -> io::Result<()> {
        match &self.0 {
            Kind::Real(real) => real.send(parts).await,
            Kind::Simulated(end) => end.send(&parts).await,
        }
    }

    /// See [`net::Connection::shutdown_receiving`].
    pub fn shutdown_receiving(&self) {
        match &self.0 {
            Kind::Real(real) => real.shutdown_receiving(),
            Kind::Simulated(end) => end.stop_receiving(),
        }
    }

    /// See [`net::Connection::shutdown`].
    pub fn shutdown(&self) {
        match &self.0 {
            Kind::Real(real) => real.shutdown(),
            Kind::Simulated(end) => end.leave(),
        }
    }
}

/// See [`net::Listener`].
#[derive(Debug)]
pub struct Listener(Hall);

enum Hall {
    Real(net::Listener),
    /// By its address in the world's network: a listener goes from thread to thread.
    Simulated(String),
}

impl Listener {
    /// See [`net::Listener::tcp`].
    pub fn tcp(host: &str, port: u16) -> Result<Self, BindError> {
        match current() {
            Some(world) => Self::simulated(world, format!("{host}:{port}")),
            None => net::Listener::tcp(host, port).map(|real| Self(Hall::Real(real))),
        }
    }

    /// See [`net::Listener::unix`].
    pub fn unix(path: &Path) -> Result<Self, BindError> {
        match current() {
            Some(world) => Self::simulated(world, path.display().to_string()),
            None => net::Listener::unix(path).map(|real| Self(Hall::Real(real))),
        }
    }

    fn simulated(world: Rc<Inner>, address: String) -> Result<Self, BindError> {
        if !world.network.listen(&address) {
            return Err(BindError::Refused(address, io::ErrorKind::AddrInUse.into()));
        }
        Ok(Self(Hall::Simulated(address)))
    }

    /// See [`net::Listener::local`].
    pub fn local(&self) -> &str {
        match &self.0 {
            Hall::Real(real) => real.local(),
            Hall::Simulated(address) => address,
        }
    }

    /// See [`net::Listener::accept`].
    pub async fn accept(&self) -> io::Result<Connection> {
        match &self.0 {
            Hall::Real(real) => real.accept().await.map(|real| Connection(Kind::Real(real))),
            Hall::Simulated(address) => {
                let queue = current().and_then(|world| world.network.queue(address));
                let queue = queue.expect("who listens in a world accepts in it");
                Ok(Connection(Kind::Simulated(queue.accept().await)))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Hall::Real(real) => real.as_fd(),
            Hall::Simulated(_) => unreachable!("a simulated listener has no descriptor"),
        }
    }
}

impl Drop for Hall {
    fn drop(&mut self) {
        if let (Self::Simulated(address), Some(world)) = (self, current()) {
            world.network.stop_listening(address);
        }
    }
}

impl std::fmt::Debug for Hall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Real(real) => real.fmt(f),
            Self::Simulated(address) => f.write_str(address),
        }
    }
}
