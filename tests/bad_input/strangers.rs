//! Servers that are no sources: they speak something else, or NBD of another kind, or not at all.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use blkferry::nbd::{
    HandshakeFlags, NBD_MAGIC, OPTION_MAGIC, OptionHeader, OptionKind, OptionReplyKind, put_option_reply,
};

/// Starts a server that treats every client in the same way, until the test ends; gives its URI.
pub fn stranger(path: &Path, treat: impl Fn(&mut UnixStream) -> io::Result<()> + Send + Sync + 'static) -> String {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            // The client may hang up at any time.
            let _ = stream.and_then(|mut stream| treat(&mut stream));
        }
    });
    format!("nbd+unix:///?socket={}", path.display())
}

/// One that says something at once, and then listens politely.
pub fn says(path: &Path, first: &'static [u8]) -> String {
    stranger(path, move |stream| {
        stream.write_all(first)?;
        io::copy(stream, &mut io::sink()).map(drop)
    })
}

/// What a reply to an option is made of.
pub type Replies = Vec<(OptionReplyKind, Vec<u8>)>;

/// A newstyle server that answers options as the test likes, and those that the test leaves open with "unsupported".
pub fn haggler(path: &Path, answer: impl Fn(OptionKind) -> Option<Replies> + Send + Sync + 'static) -> String {
    stranger(path, move |stream| {
        stream.write_all(&greeting(HandshakeFlags::all()))?;
        stream.read_exact(&mut [0; 4])?;
        loop {
            let mut header = [0; OptionHeader::LEN];
            stream.read_exact(&mut header)?;
            let OptionHeader { option, len_bytes } = OptionHeader::decode(&header).unwrap();
            if option == OptionKind::ExportName {
                // There is no other way to say no to that.
                return Ok(());
            }
            stream.read_exact(&mut vec![0; len_bytes as usize])?;
            let mut out = Vec::new();
            let unsupported = || vec![(OptionReplyKind::ErrUnsupported, Vec::new())];
            for (kind, data) in answer(option).unwrap_or_else(unsupported) {
                put_option_reply(&mut out, option, kind, &data);
            }
            stream.write_all(&out)?;
        }
    })
}

pub fn greeting(flags: HandshakeFlags) -> Vec<u8> {
    let mut greeting = [NBD_MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat();
    greeting.extend_from_slice(&flags.bits().to_be_bytes());
    greeting
}
