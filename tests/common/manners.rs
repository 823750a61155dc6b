//! How a source under the test's control presents itself.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use blkferry::nbd::option_data::{FerryAnswer, Info, MetaContext};
use blkferry::nbd::{
    BASE_ALLOCATION, BlockSizes, FERRY_VERSION, HandshakeFlags, NBD_MAGIC, OPTION_MAGIC, OptionHeader, OptionKind,
    OptionReplyKind, TransmissionFlags, put_option_reply,
};

/// How the source presents itself.
#[derive(Clone, Debug)]
pub struct Manners {
    /// What it tells blkferry; `None`: a foreign server, known by samples of its contents.
    pub identity: Option<String>,
    /// It takes several connections.
    pub several: bool,
    /// It has structured replies.
    pub structured: bool,
    /// It tells its zeros (`base:allocation`), in units of 4 KiB.
    pub extents: bool,
    /// Replies come in several chunks, the last one first, zeros as holes.
    pub pieces: bool,
    /// Smallest unit of a read.
    pub min_block: u32,
    /// How long it takes to answer an option.
    pub delay: Duration,
}

impl Default for Manners {
    fn default() -> Self {
        let identity = Some("fake:1".to_owned());
        let (several, structured, extents, pieces) = (true, true, false, false);
        Self { identity, several, structured, extents, pieces, min_block: 1, delay: Duration::ZERO }
    }
}

/// The server's side of the handshake, as the manners have it.
pub fn shake_hands(stream: &mut UnixStream, manners: &Manners, size_bytes: u64) -> io::Result<()> {
    let mut greeting = [NBD_MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat();
    greeting.extend_from_slice(&HandshakeFlags::all().bits().to_be_bytes());
    stream.write_all(&greeting)?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; OptionHeader::LEN];
        stream.read_exact(&mut header)?;
        let OptionHeader { option, len_bytes } = OptionHeader::decode(&header).expect("the device knows options");
        stream.read_exact(&mut vec![0; len_bytes as usize])?;
        let mut out = Vec::new();
        let mut add = |kind, data: &[u8]| put_option_reply(&mut out, option, kind, data);
        match (option, &manners.identity) {
            (OptionKind::StructuredReply, _) if manners.structured => add(OptionReplyKind::Ack, &[]),
            (OptionKind::SetMetaContext, _) if manners.extents => {
                let context = MetaContext { id: 7, name: BASE_ALLOCATION.to_owned() };
                add(OptionReplyKind::MetaContext, &context.encode());
                add(OptionReplyKind::Ack, &[]);
            }
            (OptionKind::Ferry, Some(identity)) => {
                let answer = FerryAnswer { version: FERRY_VERSION, identity: identity.clone(), handoff: None };
                add(OptionReplyKind::Ferry, &answer.encode());
                add(OptionReplyKind::Ack, &[]);
            }
            (OptionKind::Go, _) => {
                let mut flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY;
                flags.set(TransmissionFlags::CAN_MULTI_CONN, manners.several);
                let sizes = BlockSizes { min: manners.min_block, preferred: 4096.max(manners.min_block), max: 1 << 25 };
                add(OptionReplyKind::Info, &Info::Export { size_bytes, flags }.encode());
                add(OptionReplyKind::Info, &Info::BlockSize(sizes).encode());
                add(OptionReplyKind::Ack, &[]);
                std::thread::sleep(manners.delay);
                return stream.write_all(&out);
            }
            _ => add(OptionReplyKind::ErrUnsupported, &[]),
        }
        std::thread::sleep(manners.delay);
        stream.write_all(&out)?;
    }
}
