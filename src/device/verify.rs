//! Is the cache what the source is, block for block?
//!
//! Blocks that the guest wrote here are none of the source's business and are left out; so are blocks
//! that are absent. A block may be written while it is compared: its dirty bit is set before the write
//! starts, so a difference counts only if the bit is still clear after both sides were read.

use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::TrySendError;
use futures_util::FutureExt;
use futures_util::future::{Either, select};

use super::core::Core;
use super::messages::{FetchRequest, VerifyMessage, VerifyProgress, VerifyReport, VerifyRequest};
use crate::engine::{BlockRun, ByteRange, Lane};
use crate::nbd::UriError;
use crate::remote::{Beforehand, LossPolicy, OnLoss, Source};
use crate::server::HASH_PIECE_BYTES;
use crate::uring::{FileIo, Mailbox, sleep};

/// Bytes compared at a time.
const STEP_BYTES: u64 = 4 << 20;
/// Differences that are named one by one.
const MAX_NAMED: usize = 16;

/// Runs verifications on the fetch thread.
#[derive(Clone)]
pub struct Verifier {
    fetcher: Mailbox<FetchRequest>,
}

impl Verifier {
    pub(super) fn new(fetcher: Mailbox<FetchRequest>) -> Self {
        Self { fetcher }
    }

    /// Compares the cache with the source at `uri`, which must be known by `identity`. Blocks; `progress`
    /// says whether to go on. An error is one clear line.
    pub fn run(
        &self,
        uri: &str,
        identity: &str,
        progress: &mut dyn FnMut(VerifyProgress) -> bool,
    ) -> Result<VerifyReport, String> {
        let uri = uri.parse().map_err(|e: UriError| e.to_string())?;
        let (answer, messages) = crossbeam::channel::bounded(4);
        self.fetcher.send(FetchRequest::Verify(VerifyRequest { uri, identity: identity.into(), answer }));
        for message in messages {
            match message {
                VerifyMessage::Done(result) => return result,
                VerifyMessage::Progress(now) => {
                    if !progress(now) {
                        return Err("cancelled".into());
                    }
                }
            }
        }
        Err("the device is stopping".into())
    }
}

pub(super) async fn verify(core: Arc<Core>, cache: FileIo, request: VerifyRequest) {
    let mut done = VerifyMessage::Done(compare(&core, &cache, &request).await);
    // Room comes when the display has caught up; whoever asked may also have gone away.
    while let Err(TrySendError::Full(back)) = request.answer.try_send(done) {
        done = back;
        sleep(Duration::from_millis(10)).await;
    }
}

async fn compare(core: &Core, cache: &FileIo, request: &VerifyRequest) -> Result<VerifyReport, String> {
    let source = Source::open(request.uri.clone(), LossPolicy::new(OnLoss::Wait), Beforehand::default())
        .await
        .map_err(|e| e.to_string())?;
    if source.identity() != request.identity {
        let (now, then) = (source.identity(), &request.identity);
        return Err(format!(
            "source {}: it is not the disk that this cache belongs to ({now}, not {then})",
            request.uri
        ));
    }
    let lost = format!(
        "source {}: the connection was lost during the comparison; nothing was changed, try again",
        request.uri
    );
    match select(compare_all(core, cache, &source, request).boxed_local(), source.gone().boxed_local()).await {
        Either::Left((result, _)) => result,
        Either::Right(_) => Err(lost),
    }
}

async fn compare_all(
    core: &Core,
    cache: &FileIo,
    source: &Source,
    request: &VerifyRequest,
) -> Result<VerifyReport, String> {
    let by_hash = source.hashes_blocks();
    let method = if by_hash { "hash" } else { "data" };
    let mut report = VerifyReport { method: method.into(), ..VerifyReport::default() };
    let total_bytes = core.geometry().size_bytes();
    let step = STEP_BYTES.max(core.geometry().block_bytes());
    for start in (0..total_bytes).step_by(step as usize) {
        let range = ByteRange { start, end: total_bytes.min(start + step) };
        compare_step(core, cache, source, by_hash, range, &mut report).await?;
        let progress = VerifyProgress { done_bytes: range.end, total_bytes };
        // Never blocks the ring: a display that is behind misses a step.
        if let Err(TrySendError::Disconnected(_)) = request.answer.try_send(VerifyMessage::Progress(progress)) {
            return Err("cancelled".into());
        }
    }
    report.received_bytes = source.stats().received_bytes();
    Ok(report)
}

async fn compare_step(
    core: &Core,
    cache: &FileIo,
    source: &Source,
    by_hash: bool,
    range: ByteRange,
    report: &mut VerifyReport,
) -> Result<(), String> {
    let (maps, geometry) = (core.maps(), core.geometry());
    let one = |block| BlockRun::new(block, block + 1);
    let blocks: Vec<u64> = (geometry.covering(range).start..geometry.covering(range).end).collect();
    let mut wanted = Vec::with_capacity(blocks.len());
    for block in blocks {
        let len = geometry.bytes_of(one(block)).len();
        if !maps.is_present(block) {
            report.absent_bytes += len;
        } else if maps.any_dirty(one(block)) {
            report.dirty_bytes += len;
        } else {
            wanted.push(block);
        }
    }
    if wanted.is_empty() {
        return Ok(());
    }
    let theirs = if by_hash { Theirs::hashes(source, range).await? } else { Theirs::data(source, range).await? };
    let (result, ours) = cache.read_exact_at(vec![0; range.len() as usize], 0..range.len() as usize, range.start).await;
    result.map_err(|e| format!("cache: read at {}: {e}", range.start))?;
    for block in wanted {
        let bytes = geometry.bytes_of(one(block));
        let at = (bytes.start - range.start) as usize..(bytes.end - range.start) as usize;
        if theirs.equals(at.clone(), &ours[at]) {
            report.same_bytes += bytes.len();
        } else if maps.any_dirty(one(block)) {
            report.dirty_bytes += bytes.len();
        } else {
            report.different_bytes += bytes.len();
            if report.first_differences.len() < MAX_NAMED {
                report.first_differences.push(bytes.start);
            }
        }
    }
    Ok(())
}

enum Theirs {
    Hashes(Vec<[u8; 32]>),
    Data(Vec<u8>),
}

impl Theirs {
    async fn hashes(source: &Source, range: ByteRange) -> Result<Self, String> {
        let hashes = source.hashes(range).await.map_err(|e| format!("the source cannot hash: {e}"))?;
        if hashes.len() as u64 != range.len().div_ceil(u64::from(HASH_PIECE_BYTES)) {
            return Err("the source sent another number of hashes than was asked for".into());
        }
        Ok(Self::Hashes(hashes))
    }

    async fn data(source: &Source, range: ByteRange) -> Result<Self, String> {
        let mut bytes = Vec::with_capacity(range.len() as usize);
        let piece_bytes = source.max_read_bytes().min(1 << 20);
        for start in (range.start..range.end).step_by(piece_bytes as usize) {
            let piece = ByteRange { start, end: range.end.min(start + piece_bytes) };
            let data = source.read(piece, Lane::Bulk).await;
            let data = data.map_err(|e| format!("the source cannot read {} bytes at {start}: {e}", piece.len()))?;
            data.pieces(piece).iter().for_each(|part| part.append_to(&mut bytes));
        }
        Ok(Self::Data(bytes))
    }

    fn equals(&self, at: std::ops::Range<usize>, ours: &[u8]) -> bool {
        let piece = HASH_PIECE_BYTES as usize;
        match self {
            Self::Data(bytes) => bytes[at] == *ours,
            Self::Hashes(hashes) => ours
                .chunks(piece)
                .zip(&hashes[at.start / piece..])
                .all(|(ours, hash)| blake3::hash(ours).as_bytes() == hash),
        }
    }
}
