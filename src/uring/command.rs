//! Commands to a driver (`IORING_OP_URING_CMD`): within a reactor, or one at a time without one.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::probe::{UringError, uring_error};
use super::reactor::submit;

struct CommandOp<R> {
    _fd: Arc<OwnedFd>,
    resource: R,
}

/// Sends a command to the driver behind `fd` through the ring of whichever thread calls, and waits for its
/// end. Drivers do not let go of a command because its future was dropped: the reactor waits for it when it
/// goes away.
///
/// # Safety
/// All memory that the driver reads or writes because of this command must be owned by `resource`.
pub unsafe fn command<R: 'static>(
    fd: Arc<OwnedFd>,
    code: u32,
    payload: [u8; 16],
    resource: R,
) -> impl Future<Output = (io::Result<u32>, R)> {
    let raw = types::Fd(fd.as_raw_fd());
    // SAFETY: the descriptor is owned by the resource, and so is the memory, as the caller promises.
    let op =
        unsafe { submit(CommandOp { _fd: fd, resource }, |_| opcode::UringCmd16::new(raw, code).cmd(payload).build()) };
    async move {
        let (result, op) = op.await;
        (result, op.resource)
    }
}

/// A small ring for drivers that want 80 bytes of command, one command at a time.
pub struct CommandRing {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
}

impl CommandRing {
    /// Makes one.
    pub fn new() -> Result<Self, UringError> {
        let ring = IoUring::<squeue::Entry128, cqueue::Entry>::builder().build(2).map_err(uring_error)?;
        Ok(Self { ring })
    }

    /// Sends a command and blocks until the driver has answered, however long that takes.
    ///
    /// # Safety
    /// The memory that the driver reads or writes because of this command must not be touched by anybody
    /// else until this returns.
    pub unsafe fn run(&mut self, fd: BorrowedFd<'_>, code: u32, payload: [u8; 80]) -> io::Result<u32> {
        let entry = opcode::UringCmd80::new(types::Fd(fd.as_raw_fd()), code).cmd(payload).build();
        // SAFETY: the descriptor is borrowed until the completion, which is waited for below; the memory is
        // the caller's promise.
        unsafe { self.ring.submission().push(&entry) }.expect("a ring that is used by one at a time has room");
        loop {
            match self.ring.submit_and_wait(1) {
                Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
                _ => {}
            }
            if let Some(done) = self.ring.completion().next() {
                return u32::try_from(done.result()).map_err(|_| io::Error::from_raw_os_error(-done.result()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::super::Reactor;
    use super::*;

    #[test]
    fn a_file_that_takes_no_commands_says_so() {
        let file = File::open("/dev/null").unwrap();
        // SAFETY: /dev/null takes commands and ignores them; a plain file refuses them. No memory is named.
        let plain = unsafe { CommandRing::new().unwrap().run(tempfile::tempfile().unwrap().as_fd(), 1, [0; 80]) };
        assert!(plain.is_err());
        let fd = Arc::new(OwnedFd::from(file));
        let reactor = Reactor::new().unwrap();
        // SAFETY: as above.
        let (result, resource) = reactor.block_on(async move { unsafe { command(fd, 1, [0; 16], 42) }.await }).unwrap();
        assert_eq!((result.unwrap(), resource), (0, 42));
    }
}
