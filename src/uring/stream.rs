//! Reading a connection in pieces whose length is known: headers from a buffer, bulk straight into place.

use std::io;

use super::Connection;

/// A connection with a receive buffer: many small messages for one system call.
pub struct BufferedReader {
    connection: Connection,
    buf: Vec<u8>,
    start: usize,
    end: usize,
    received_bytes: u64,
}

impl BufferedReader {
    /// With a buffer of that many bytes: the most that [`BufferedReader::read`] can ask for.
    pub fn new(connection: Connection, buffer_bytes: usize) -> Self {
        Self { connection, buf: vec![0; buffer_bytes], start: 0, end: 0, received_bytes: 0 }
    }

    /// Exactly `len` bytes. `Ok(None)`: the peer closed, and not in the middle of them.
    pub async fn read(&mut self, len: usize) -> io::Result<Option<&[u8]>> {
        assert!(len <= self.buf.len(), "messages longer than the buffer are read with read_into");
        while self.end - self.start < len {
            if self.start + len > self.buf.len() || self.start == self.end {
                self.buf.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            let range = self.end..self.buf.len();
            let (result, buf) = self.connection.recv(std::mem::take(&mut self.buf), range).await;
            self.buf = buf;
            match result? {
                0 if self.start == self.end => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => {
                    self.end += n;
                    self.received_bytes += n as u64;
                }
            }
        }
        self.start += len;
        Ok(Some(&self.buf[self.start - len..self.start]))
    }

    /// Exactly `len` bytes into `target` from `at`: first what is buffered, the rest past the buffer.
    /// The buffer comes back either way.
    pub async fn read_into<B: AsMut<[u8]> + 'static>(
        &mut self,
        mut target: B,
        at: usize,
        len: usize,
    ) -> (io::Result<()>, B) {
        let buffered = len.min(self.end - self.start);
        target.as_mut()[at..at + buffered].copy_from_slice(&self.buf[self.start..self.start + buffered]);
        self.start += buffered;
        if buffered == len {
            return (Ok(()), target);
        }
        self.received_bytes += (len - buffered) as u64;
        self.connection.recv_exact(target, at + buffered..at + len).await
    }

    /// Bytes received since the last call.
    pub fn take_received_bytes(&mut self) -> u64 {
        std::mem::take(&mut self.received_bytes)
    }

    /// Reads and forgets `len` bytes.
    pub async fn skip(&mut self, mut len: usize) -> io::Result<()> {
        while len > 0 {
            let piece = len.min(self.buf.len());
            if self.read(piece).await?.is_none() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            len -= piece;
        }
        Ok(())
    }
}
