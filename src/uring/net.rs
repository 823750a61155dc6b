//! Stream sockets: listeners, connections, and the parts that are sent over them.

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use super::buffer::Buffer;
use super::peer::{DYING, connect_to_living};
use super::reactor::submit;

/// Zeros that are sent or written without being stored.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// Most that is tried to be sent on the spot.
const MAX_SENT_NOW_BYTES: usize = 32 << 10;
/// Parts handed to one sendmsg(2); the kernel's own limit (IOV_MAX) is 1024.
const MAX_PARTS_PER_SEND: usize = 256;

/// Room for what is sent over a unix socket. The kernel's own is one answer of 128 KiB and a half, and the sender waits and
/// is woken for each.
const UNIX_SEND_BYTES: usize = 1 << 20;

/// An idle peer is asked for a sign of life after this long, in seconds.
const KEEPALIVE_S: u32 = 5;
/// A peer that acknowledges nothing for this long, in milliseconds, is dead; the kernel's own limit is a quarter of an hour.
const DEAD_PEER_MS: u32 = 15_000;

/// A piece of memory on its way to a socket or a file. It owns what it points at.
#[derive(Clone, Debug)]
pub enum Part {
    /// Bytes of its own.
    Owned(Buffer),
    /// A range of a buffer that others may read too.
    Shared {
        /// The buffer.
        bytes: Arc<Buffer>,
        /// The range of it that this part is.
        range: Range<usize>,
    },
    /// That many zero bytes.
    Zeros(usize),
}

impl Part {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Owned(bytes) => bytes.len(),
            Self::Shared { range, .. } => range.len(),
            Self::Zeros(len) => *len,
        }
    }

    /// Nothing in it?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A small part of a shared buffer becomes one of its own, so that it does not keep the rest of it in memory.
    pub fn let_go_of_the_rest(&mut self) {
        if let Self::Shared { bytes, range } = self
            && range.len() <= bytes.len() / 4
        {
            *self = Self::Owned(bytes[range.clone()].to_vec().into());
        }
    }

    /// At most `max` bytes from `start`; zeros come in pieces of 64 KiB.
    pub(super) fn slice_at(&self, start: usize, max: usize) -> &[u8] {
        match self {
            Self::Owned(bytes) => &bytes[start..bytes.len().min(start + max)],
            Self::Shared { bytes, range } => &bytes[range.start + start..range.end.min(range.start + start + max)],
            Self::Zeros(len) => &ZEROS[..ZEROS.len().min(*len - start).min(max)],
        }
    }

    /// Appends the bytes to `out`.
    pub fn append_to(&self, out: &mut Vec<u8>) {
        match self {
            Self::Zeros(len) => out.resize(out.len() + len, 0),
            other => out.extend_from_slice(other.slice_at(0, usize::MAX >> 1)),
        }
    }
}

/// A connected stream socket.
#[derive(Clone, Debug)]
pub struct Connection {
    fd: Arc<OwnedFd>,
}

struct RecvOp<B> {
    _fd: Arc<OwnedFd>,
    buf: B,
}

struct SendOp {
    _fd: Arc<OwnedFd>,
    parts: Vec<Part>,
    vectors: Vec<libc::iovec>,
    header: libc::msghdr,
}

impl Connection {
    fn new(fd: OwnedFd) -> Self {
        // These fail on a unix socket, which has nothing to delay and whose peer cannot vanish.
        let _ = setsockopt(&fd, sockopt::TcpNoDelay, &true);
        let _ = setsockopt(&fd, sockopt::KeepAlive, &true);
        let _ = setsockopt(&fd, sockopt::TcpKeepIdle, &KEEPALIVE_S);
        let _ = setsockopt(&fd, sockopt::TcpKeepInterval, &KEEPALIVE_S);
        let _ = setsockopt(&fd, sockopt::TcpUserTimeout, &DEAD_PEER_MS);
        Self { fd: Arc::new(fd) }
    }

    /// Over a unix socket. More than the system's limit takes a privilege; without it, that limit will do.
    fn new_unix(fd: OwnedFd) -> Self {
        if setsockopt(&fd, sockopt::SndBufForce, &UNIX_SEND_BYTES).is_err() {
            let _ = setsockopt(&fd, sockopt::SndBuf, &UNIX_SEND_BYTES);
        }
        Self::new(fd)
    }

    /// Connects over TCP. Resolving and connecting run on a thread of their own: nothing blocks a ring.
    pub async fn connect_tcp(host: String, port: u16, timeout: Duration) -> io::Result<Self> {
        let connect = move || {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            for address in (host.as_str(), port).to_socket_addrs()? {
                match TcpStream::connect_timeout(&address, timeout) {
                    Ok(stream) => return Ok(OwnedFd::from(stream)),
                    Err(e) => last = e,
                }
            }
            Err(last)
        };
        elsewhere(connect).await.map(Self::new)
    }

    /// Connects to a unix socket.
    pub async fn connect_unix(path: PathBuf) -> io::Result<Self> {
        elsewhere(move || UnixStream::connect(path).map(OwnedFd::from)).await.map(Self::new_unix)
    }

    /// Receives at most `at.len()` bytes into `buf[at]`; 0 means that the peer has closed.
    pub async fn recv<B: AsMut<[u8]> + 'static>(&self, buf: B, at: Range<usize>) -> (io::Result<usize>, B) {
        self.recv_flags(buf, at, 0).await
    }

    /// Receives exactly `at.len()` bytes into `buf[at]`. A peer that closes before is an `UnexpectedEof`.
    pub async fn recv_exact<B: AsMut<[u8]> + 'static>(&self, mut buf: B, at: Range<usize>) -> (io::Result<()>, B) {
        let mut start = at.start;
        while start < at.end {
            let (result, back) = self.recv_flags(buf, start..at.end, libc::MSG_WAITALL).await;
            buf = back;
            match result {
                Ok(0) => return (Err(io::ErrorKind::UnexpectedEof.into()), buf),
                Ok(n) => start += n,
                Err(e) => return (Err(e), buf),
            }
        }
        (Ok(()), buf)
    }

    async fn recv_flags<B: AsMut<[u8]> + 'static>(
        &self,
        mut buf: B,
        at: Range<usize>,
        flags: i32,
    ) -> (io::Result<usize>, B) {
        loop {
            let fd = types::Fd(self.fd.as_raw_fd());
            let range = at.clone();
            // SAFETY: socket and buffer are owned by the resource; indexing checks the range.
            let op = unsafe {
                submit(RecvOp { _fd: self.fd.clone(), buf }, |r| {
                    let target = &mut r.buf.as_mut()[range];
                    opcode::Recv::new(fd, target.as_mut_ptr(), target.len() as u32).flags(flags).build()
                })
            };
            let (result, resource) = op.await;
            buf = resource.buf;
            match result {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return (other.map(|n| n as usize), buf),
            }
        }
    }

    /// Sends all parts, in order. The caller makes sure that one send runs at a time.
    pub async fn send(&self, mut parts: Vec<Part>) -> io::Result<()> {
        // What is short fits into the socket's buffer: no way through the ring for it.
        let is_short = parts.iter().map(Part::len).sum::<usize>() <= MAX_SENT_NOW_BYTES;
        let sent = if is_short { self.send_now(&parts) } else { 0 };
        let (mut first, mut skip) = after(&parts, 0, 0, sent);
        while first < parts.len() {
            let (result, back) = self.send_some(parts, first, skip).await;
            parts = back;
            let sent = match result {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
                Err(e) => return Err(e),
            };
            (first, skip) = after(&parts, first, skip, sent);
        }
        Ok(())
    }

    /// Sends what the socket takes without waiting; how many bytes. An error comes again from the ring.
    fn send_now(&self, parts: &[Part]) -> usize {
        let vectors = vectors(parts, 0);
        // SAFETY: a msghdr of zeros is a valid empty message.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = vectors.as_ptr().cast_mut();
        header.msg_iovlen = vectors.len();
        // SAFETY: the vectors name bytes of `parts`, borrowed for the call, which only reads them.
        let sent =
            unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        usize::try_from(sent).unwrap_or(0)
    }

    async fn send_some(&self, parts: Vec<Part>, first: usize, skip: usize) -> (io::Result<usize>, Vec<Part>) {
        let fd = types::Fd(self.fd.as_raw_fd());
        // SAFETY: a msghdr of zeros is a valid empty message.
        let header: libc::msghdr = unsafe { std::mem::zeroed() };
        let send = SendOp { _fd: self.fd.clone(), parts, vectors: Vec::new(), header };
        // SAFETY: socket, parts, vectors and header are owned by the resource, at their final addresses
        // when the entry is built; nothing touches them until the completion.
        let op = unsafe {
            submit(send, |s| {
                s.vectors = vectors(&s.parts[first..], skip);
                s.header.msg_iov = s.vectors.as_mut_ptr();
                s.header.msg_iovlen = s.vectors.len();
                let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
                opcode::SendMsg::new(fd, ptr::from_ref(&s.header)).flags(flags).build()
            })
        };
        let (result, resource) = op.await;
        (result.map(|n| n as usize), resource.parts)
    }

    /// Ends the receiving direction: whoever reads sees the end of the stream, what is sent still goes out.
    pub fn shutdown_receiving(&self) {
        let _ = nix::sys::socket::shutdown(self.fd.as_raw_fd(), nix::sys::socket::Shutdown::Read);
    }

    /// Ends both directions; what waits on the socket wakes up.
    pub fn shutdown(&self) {
        let _ = nix::sys::socket::shutdown(self.fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }
}

/// What to hand to sendmsg(2), from byte `skip` of the first part.
fn vectors(parts: &[Part], skip: usize) -> Vec<libc::iovec> {
    let mut vectors = Vec::with_capacity(parts.len().min(MAX_PARTS_PER_SEND));
    let mut start = skip;
    for part in parts {
        while start < part.len() && vectors.len() < MAX_PARTS_PER_SEND {
            let slice = part.slice_at(start, usize::MAX >> 1);
            start += slice.len();
            vectors.push(libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() });
        }
        start = 0;
        if vectors.len() == MAX_PARTS_PER_SEND {
            break;
        }
    }
    vectors
}

/// Where to go on (part, byte of it) when `sent` more bytes are gone. Never at the end of a part.
fn after(parts: &[Part], mut first: usize, mut skip: usize, mut sent: usize) -> (usize, usize) {
    while first < parts.len() && sent >= parts[first].len() - skip {
        sent -= parts[first].len() - skip;
        skip = 0;
        first += 1;
    }
    (first, skip + sent)
}

/// Runs a blocking call on a thread of its own.
async fn elsewhere<T: Send + 'static>(call: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let (sender, receiver) = futures_channel::oneshot::channel();
    std::thread::Builder::new().name("connect".into()).spawn(move || {
        // The receiver is gone if the caller gave up; then nobody wants the result.
        let _ = sender.send(call());
    })?;
    receiver.await.unwrap_or_else(|_| Err(io::Error::other("the helper thread died")))
}

/// A listening socket. A unix socket's file goes away with it.
#[derive(Debug)]
pub struct Listener {
    fd: Arc<OwnedFd>,
    socket_file: Option<PathBuf>,
    local: String,
}

/// Why a listener could not be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The path does not fit into a sockaddr_un.
    #[error("socket path {0} is too long: {1} bytes, the system allows 107; choose a shorter one")]
    PathTooLong(PathBuf, usize),
    /// Somebody answers there already.
    #[error("socket {0} is taken: another process is listening there; choose another path or stop it")]
    Taken(PathBuf),
    /// There is a file that is not a socket.
    #[error("{0} exists and is not a socket; choose another path or remove it")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot listen on {0}: {1}{hint}", hint = what_to_do(.1))]
    Refused(String, #[source] io::Error),
}

fn what_to_do(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; the directory has to be there",
        io::ErrorKind::PermissionDenied => "; this user may not: choose another place, or be root",
        io::ErrorKind::AddrInUse => "; choose another port, or stop who listens there",
        io::ErrorKind::AddrNotAvailable => "; it has to be an address of this host",
        _ => "",
    }
}

impl Listener {
    /// Listens on a TCP address; port 0 takes a free one (see [`Listener::local`]).
    pub fn tcp(host: &str, port: u16) -> Result<Self, BindError> {
        let refused = |e| BindError::Refused(format!("{host}:{port}"), e);
        let listener = TcpListener::bind((host, port)).map_err(refused)?;
        let local = listener.local_addr().map_err(refused)?.to_string();
        Ok(Self { fd: Arc::new(listener.into()), socket_file: None, local })
    }

    /// Listens on a unix socket; see [`bind_private`].
    pub fn unix(path: &Path) -> Result<Self, BindError> {
        let listener = bind_private(path)?;
        let local = path.display().to_string();
        Ok(Self { fd: Arc::new(listener.into()), socket_file: Some(path.into()), local })
    }

    /// Where it listens: `HOST:PORT` as bound, or the path of the socket.
    pub fn local(&self) -> &str {
        &self.local
    }

    /// Waits for the next connection.
    pub async fn accept(&self) -> io::Result<Connection> {
        loop {
            let fd = types::Fd(self.fd.as_raw_fd());
            // SAFETY: the socket is owned by the resource; no address is asked for.
            let op = unsafe {
                submit(self.fd.clone(), |_| {
                    opcode::Accept::new(fd, ptr::null_mut(), ptr::null_mut()).flags(libc::SOCK_CLOEXEC).build()
                })
            };
            match op.await.0 {
                Ok(fd) => {
                    // SAFETY: accept gave this descriptor to us and to nobody else.
                    let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd as i32) };
                    let is_unix = self.socket_file.is_some();
                    return Ok(if is_unix { Connection::new_unix(fd) } else { Connection::new(fd) });
                }
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::ECONNABORTED | libc::EAGAIN)) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Binds a unix socket that only its owner may open. A socket that a dead process left is replaced.
pub fn bind_private(path: &Path) -> Result<UnixListener, BindError> {
    let len = path.as_os_str().len();
    if len > 107 {
        return Err(BindError::PathTooLong(path.into(), len));
    }
    let refused = |e| BindError::Refused(path.display().to_string(), e);
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(BindError::NotASocket(path.into())),
        Ok(_) if is_taken(path) => return Err(BindError::Taken(path.into())),
        Ok(_) => fs::remove_file(path).map_err(refused)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(refused)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(refused)?;
    Ok(listener)
}

/// Does somebody listen there, and go on doing so? A process that was just killed takes a moment to be gone.
fn is_taken(path: &Path) -> bool {
    let started = Instant::now();
    loop {
        match listener_of(path) {
            None => return false,
            Some(pid) if pid == std::process::id() as i32 || started.elapsed() > DYING => return true,
            Some(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// The process that listens on a socket; 0 for one that this process cannot see.
fn listener_of(path: &Path) -> Option<i32> {
    connect_to_living(path).ok().map(|(_, pid)| pid)
}

impl AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.socket_file {
            // Already gone is as good.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::getsockopt;

    use super::super::{Reactor, spawn};
    use super::*;

    #[test]
    fn a_small_part_does_not_keep_the_whole() {
        let bytes = Arc::new(Buffer::from(vec![7; 4096]));
        for (range, is_kept) in [(0..1024, false), (1024..2049, true), (0..4096, true)] {
            let mut part = Part::Shared { bytes: bytes.clone(), range: range.clone() };
            part.let_go_of_the_rest();
            assert_eq!((part.len(), Arc::strong_count(&bytes)), (range.len(), 1 + usize::from(is_kept)));
            assert!(part.slice_at(0, 10_000).iter().all(|byte| *byte == 7));
        }
    }

    #[test]
    fn parts_arrive_in_order_over_a_unix_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::unix(&path).unwrap();
        assert!(matches!(Listener::unix(&path), Err(BindError::Taken(_))));
        let reactor = Reactor::new().unwrap();
        let target = path.clone();
        reactor
            .block_on(async move {
                let big: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
                let big: Arc<Buffer> = Arc::new(big.into());
                let sent = big.clone();
                let client = spawn(async move {
                    let connection = Connection::connect_unix(target).await.unwrap();
                    let shared = Part::Shared { bytes: sent.clone(), range: 10..2_999_999 };
                    let parts = vec![
                        Part::Owned(b"head".to_vec().into()),
                        Part::Zeros(200_000),
                        Part::Owned(Buffer::default()),
                        shared,
                    ];
                    connection.send(parts).await.unwrap();
                });
                let _probe_of_the_second_bind = listener.accept().await.unwrap();
                let connection = listener.accept().await.unwrap();
                let len = 4 + 200_000 + 2_999_989;
                let (result, got) = connection.recv_exact(vec![1; len], 0..len).await;
                result.unwrap();
                assert_eq!(&got[..4], b"head");
                assert!(got[4..200_004].iter().all(|&b| b == 0));
                assert_eq!(&got[200_004..], &big[10..2_999_999]);
                client.await;
                // As the kernel counts, with what it needs for itself.
                let limit =
                    fs::read_to_string("/proc/sys/net/core/wmem_max").ok().and_then(|text| text.trim().parse().ok());
                let room = getsockopt(&connection.fd, sockopt::SndBuf).unwrap();
                assert!(room >= 2 * UNIX_SEND_BYTES.min(limit.unwrap_or(100_000)), "{room}");
                let (end, _) = connection.recv(vec![0; 1], 0..1).await;
                assert_eq!(end.unwrap(), 0);
            })
            .unwrap();
        assert!(!path.exists());
    }
}
