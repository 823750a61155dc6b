//! The process at the other end of a unix socket, and whether it is still there. The kernel may keep sockets and locks
//! of one that was killed for a moment, while it takes its ring apart.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a process that was killed may go on to hold its socket.
pub(super) const DYING: Duration = Duration::from_secs(1);

/// Connects to a unix socket, and tells the process that listens there; 0 for one that this process cannot see. The
/// kernel may keep the socket of a dead one open, while it takes its ring apart: that is nobody.
pub fn connect_to_living(path: &Path) -> io::Result<(UnixStream, i32)> {
    let stream = UnixStream::connect(path)?;
    let peer = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials);
    let pid = peer.map_or(0, |peer| peer.pid());
    if pid != 0 && is_dead(pid) { Err(io::ErrorKind::ConnectionRefused.into()) } else { Ok((stream, pid)) }
}

/// Is this process dead, or about to be within the moment that dying may take? It is asked about when its socket has
/// broken.
pub fn is_dying(pid: i32) -> bool {
    let started = Instant::now();
    while pid != 0 && started.elapsed() < DYING {
        if is_dead(pid) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

/// Has this process ended, though its parent may not have noticed?
fn is_dead(pid: i32) -> bool {
    // Z and X, after the name in parentheses: proc(5).
    let has_ended = |stat: &str| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['Z', 'X']));
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => has_ended(&stat),
        Err(e) => e.kind() == io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dead_are_told_from_the_living() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        assert!(!is_dead(pid));
        child.kill().unwrap();
        assert!(is_dying(pid), "nobody has waited for it yet");
        child.wait().unwrap();
        assert!(is_dead(pid));
        assert!(!is_dying(0), "nothing is known of that one");
    }
}
