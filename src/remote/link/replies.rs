//! What comes back on a link: replies, chunk by chunk, to whoever waits for them.

use std::time::Duration;

use super::{Asked, Inner, Link, LinkError, LinkFailure, MAX_MARKED_BYTES, Pending, Waiting};
use crate::engine::{Errno, Extent};
use crate::nbd::chunk::{BlockStatus, ErrorChunk, FerryHashes, Hole, decode_data_offset};
use crate::nbd::{ChunkKind, NbdError, ReplyHeader, StateFlags, Told};
#[cfg(feature = "planted-faults")]
use crate::remote::planted::{PlantedFault, is_planted};
use crate::remote::read::ReadAssembly;
use crate::uring::{BufferedReader, now};

/// Longest chunk payload that is read into the receive buffer rather than past it.
const MAX_SMALL_PAYLOAD: usize = 8 << 10;
/// Data is received in pieces, between so many bytes: a slow link that delivers is told from a silent one. They are as
/// large as what comes in a short while.
pub(super) const RECEIVE_PIECE: (usize, usize) = (8 << 10, 256 << 10);
/// A piece that takes longer is too large.
const PIECE_TIME: Duration = Duration::from_millis(100);

impl Link {
    pub(super) async fn receive(&self, mut reader: BufferedReader) -> LinkFailure {
        loop {
            let result = self.receive_reply(&mut reader).await;
            self.inner.stats.add_received(reader.take_received_bytes());
            self.inner.receiving.set(false);
            self.inner.incoming.set(None);
            // The end of a connection says nothing; a reply that ends it does.
            if !matches!(result, Err(LinkFailure::Io(_) | LinkFailure::Closed)) {
                self.inner.last_heard.set(now());
            }
            if let Err(failure) = result {
                return failure;
            }
        }
    }

    async fn receive_reply(&self, reader: &mut BufferedReader) -> Result<(), LinkFailure> {
        let Some(common) = reader.read(ReplyHeader::COMMON_LEN).await? else { return Err(LinkFailure::Closed) };
        let common: [u8; ReplyHeader::COMMON_LEN] = common.try_into().expect("read what was asked for");
        self.inner.receiving.set(true);
        self.inner.last_heard.set(now());
        let mut extra = [0; 4];
        if ReplyHeader::needs_more(&common) > 0 {
            extra = small(reader, 4).await?.try_into().expect("read what was asked for");
        }
        let header = ReplyHeader::decode(&common, extra)?;
        let cookie = header.cookie();
        #[cfg(feature = "planted-faults")]
        let cookie = self.misdirected(cookie);
        let taken = self.inner.pending.borrow_mut().remove(&cookie);
        let mut pending = taken.ok_or(LinkFailure::UnknownCookie(cookie))?;
        if let Waiting::Read { read, .. } = &pending.waiting {
            self.inner.incoming.set(Some(read.range()));
        }
        match header {
            ReplyHeader::Simple { error, .. } => {
                pending.error = error;
                if error.is_none() {
                    self.simple_data(reader, &mut pending).await?;
                }
            }
            ReplyHeader::Chunk { kind, len, .. } => {
                header.check(self.inner.session.max_payload_bytes())?;
                self.chunk(reader, &mut pending, kind, len as usize).await?;
            }
        }
        if pending.error == Some(NbdError::Shutdown) {
            // It is going away: what is asked here is asked again when it is back (spec: "NBD_ESHUTDOWN").
            return Err(LinkFailure::Leaving);
        }
        if header.is_last() {
            finish(pending)?;
            self.inner.answers.set(self.inner.answers.get() + 1);
        } else {
            self.inner.pending.borrow_mut().insert(cookie, pending);
        }
        Ok(())
    }

    /// The cookie of another read of the same length, if there is one.
    #[cfg(feature = "planted-faults")]
    fn misdirected(&self, cookie: u64) -> u64 {
        let pending = self.inner.pending.borrow();
        let len_of = |cookie: &u64| match pending.get(cookie).map(|pending| &pending.waiting) {
            Some(Waiting::Read { read, .. }) => Some(read.range().len()),
            _ => None,
        };
        let len = len_of(&cookie).filter(|_| is_planted(PlantedFault::AnswerOfAnother));
        let other = len.and_then(|_| pending.keys().filter(|other| **other != cookie && len_of(other) == len).min());
        other.copied().unwrap_or(cookie)
    }

    async fn simple_data(&self, reader: &mut BufferedReader, pending: &mut Pending) -> Result<(), LinkFailure> {
        match &mut pending.waiting {
            Waiting::Read { read, .. } => {
                let range = read.range();
                receive_data(reader, read, range.start, range.len(), &self.inner).await
            }
            // Without structured replies there is nothing to say beyond "done".
            _ => Ok(()),
        }
    }

    async fn chunk(
        &self,
        reader: &mut BufferedReader,
        pending: &mut Pending,
        kind: ChunkKind,
        len: usize,
    ) -> Result<(), LinkFailure> {
        match (kind, &mut pending.waiting) {
            (ChunkKind::None, _) => {}
            (ChunkKind::OffsetData, Waiting::Read { read, .. }) => {
                let offset = decode_data_offset(small(reader, 8).await?.try_into().expect("read what was asked for"));
                #[cfg(feature = "planted-faults")]
                let offset = if is_planted(PlantedFault::AnswerOfAnother) { read.range().start } else { offset };
                receive_data(reader, read, offset, len as u64 - 8, &self.inner).await?;
            }
            (ChunkKind::OffsetHole, Waiting::Read { read, .. }) => {
                let hole = Hole::decode(small(reader, len).await?)?;
                read.place(hole.offset, u64::from(hole.len), true)?;
            }
            (ChunkKind::BlockStatus, Waiting::Extents { extents, .. }) => {
                let status = BlockStatus::decode(&payload(reader, len).await?)?;
                if Some(status.context_id) == self.inner.session.base_allocation {
                    // One chunk a context (spec: "NBD_REPLY_TYPE_BLOCK_STATUS"): they would add up without end.
                    if !extents.is_empty() {
                        return Err(LinkFailure::UnexpectedChunk(kind));
                    }
                    let zero = |flags: StateFlags| flags.contains(StateFlags::ZERO);
                    let told = status.extents.iter();
                    extents.extend(told.map(|e| Extent { len_bytes: u64::from(e.len), zero: zero(e.flags) }));
                }
            }
            (ChunkKind::FerryHashes, Waiting::Hashes { hashes, .. }) => {
                hashes.add(FerryHashes::decode(&payload(reader, len).await?)?)?;
            }
            (ChunkKind::FerryTold, Waiting::Told { told, .. }) => {
                *told = Some(Told::decode(&payload(reader, len).await?)?)
            }
            // It may be withheld what ends this: it must not be much that is kept until then.
            (ChunkKind::BlockStatus, Waiting::Marked { .. }) if len > MAX_MARKED_BYTES => {
                return Err(LinkFailure::TooLong(len));
            }
            (ChunkKind::BlockStatus, Waiting::Marked { context, bits, after, stretches, .. }) => {
                let status = BlockStatus::decode(&payload(reader, len).await?)?;
                // Of before that step: what was so then need not be so after it.
                if after.is_some_and(|Asked { cookie }| self.inner.pending.borrow().contains_key(&cookie)) {
                    pending.error = Some(NbdError::Inval);
                }
                if status.context_id == *context {
                    if !stretches.is_empty() {
                        return Err(LinkFailure::UnexpectedChunk(kind));
                    }
                    let told = status.extents.iter();
                    stretches.extend(told.map(|e| (u64::from(e.len), e.flags.bits() & *bits)));
                }
            }
            (kind, _) if kind.is_error() => {
                let error = ErrorChunk::decode(kind, &payload(reader, len).await?)?;
                log::debug!("the source refused a request: {} ({})", error.error, error.message);
                pending.error = Some(error.error);
            }
            (kind, _) => return Err(LinkFailure::UnexpectedChunk(kind)),
        }
        Ok(())
    }
}

async fn small(reader: &mut BufferedReader, len: usize) -> Result<&[u8], LinkFailure> {
    reader.read(len).await?.ok_or(LinkFailure::Closed)
}

async fn payload(reader: &mut BufferedReader, len: usize) -> Result<Vec<u8>, LinkFailure> {
    if len <= MAX_SMALL_PAYLOAD {
        return Ok(small(reader, len).await?.to_vec());
    }
    let (result, bytes) = reader.read_into(vec![0; len], 0, len).await;
    result?;
    Ok(bytes)
}

async fn receive_data(
    reader: &mut BufferedReader,
    read: &mut ReadAssembly,
    offset: u64,
    len: u64,
    inner: &Inner,
) -> Result<(), LinkFailure> {
    let place = read.place(offset, len, false)?;
    let mut start = place.start;
    while start < place.end {
        let (asked, most) = (now(), inner.piece.get());
        let piece = most.min(place.end - start);
        let (result, bytes) = reader.read_into(read.take_buffer(), start, piece).await;
        read.give_buffer(bytes);
        result?;
        start += piece;
        let heard = now();
        inner.last_heard.set(heard);
        let better = if heard - asked > PIECE_TIME { most / 2 } else { most * 2 };
        inner.piece.set(better.clamp(RECEIVE_PIECE.0, RECEIVE_PIECE.1));
    }
    inner.stats.add_data(len);
    Ok(())
}

fn finish(pending: Pending) -> Result<(), LinkFailure> {
    let refused = pending.error.map(|error| LinkError::Refused(Errno(error.to_errno())));
    // A receiver that is gone no longer wants the answer.
    match (pending.waiting, refused) {
        (Waiting::Read { answer, .. }, Some(refused)) => drop(answer.send(Err(refused))),
        (Waiting::Read { read, answer }, None) => drop(answer.send(Ok(read.finish()?))),
        (Waiting::Extents { extents, answer }, refused) => drop(answer.send(refused.map_or(Ok(extents), Err))),
        (Waiting::Told { told, answer }, refused) => drop(answer.send(refused.map_or(Ok(told), Err))),
        (Waiting::Marked { stretches, answer, .. }, refused) => {
            drop(answer.send(refused.map_or(Ok(stretches), Err)));
        }
        (Waiting::Hashes { hashes, answer }, refused) => {
            drop(answer.send(refused.map_or(Ok(hashes.finish()), Err)));
        }
    }
    Ok(())
}
