//! What the source has in its page cache, and what of it was used: a hint, what its machine used last and so will use next.
//!
//! Asked for on a connection of its own, beside everything else, so that neither a read nor hydration waits for it. What
//! is told is not believed in any further than that it is fetched first: the connection need not prove whose disk it is.

use std::time::Duration;

use futures_util::future::{Either, select};
use futures_util::{FutureExt, StreamExt, stream};

use super::dial::dial_hot;
use super::link::{Link, LinkError};
use super::source::Source;
use crate::engine::{ByteRange, HotRanges};
use crate::nbd::{FERRY_IS_HOT, FERRY_WAS_USED};
use crate::uring::sleep;

/// How long the source may take to tell.
const HOT_PATIENCE: Duration = Duration::from_secs(60);
/// Longest range that is asked about at once.
const ASKED_BYTES: u64 = 2 << 30;
/// Questions under way.
const QUESTIONS: usize = 16;
/// Ranges that are handed over at a time, at most: while they are taken in, nobody's read is answered.
const PORTION: usize = 256;

impl Source {
    /// Asks for the stretches of the disk that the source has in memory, and hands them over as they are told. Ends
    /// early, without a word, if the source does not tell or takes too long.
    pub async fn hot(&self, found: impl Fn(HotRanges)) {
        if !self.hashes_blocks() || !self.takes_several() {
            return;
        }
        let asking = self.ask_hot(found).boxed_local();
        if let Either::Right(_) = select(asking, sleep(HOT_PATIENCE).boxed_local()).await {
            log::debug!("source {}: what is hot there has not been told in time", self.uri());
        }
    }

    async fn ask_hot(&self, found: impl Fn(HotRanges)) {
        let dialed = match dial_hot(self.uri(), self.stats()).await {
            Ok(dialed) if dialed.session.hot.is_some() && dialed.session.size_bytes == self.size_bytes() => dialed,
            Ok(_) => return,
            Err(e) => return log::debug!("what is hot at the source cannot be asked: {e}"),
        };
        let link = Asked(Link::start(dialed, self.stats().clone()));
        let size = self.size_bytes();
        let ranges = (0..size).step_by(ASKED_BYTES as usize);
        let ranges = ranges.map(|start| ByteRange { start, end: size.min(start + ASKED_BYTES) });
        let mut answers = stream::iter(ranges.map(|range| hot_in(&link.0, range))).buffered(QUESTIONS);
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(portions) => {
                    for ranges in portions {
                        found(ranges);
                        // Data that somebody waits for may have come meanwhile.
                        sleep(Duration::ZERO).await;
                    }
                }
                Err(e) => {
                    log::debug!("what is hot at the source is not told: {e:?}");
                    break;
                }
            }
        }
    }
}

/// In portions that do not hold up whoever takes them.
async fn hot_in(link: &Link, range: ByteRange) -> Result<Vec<HotRanges>, LinkError> {
    let mut all = Vec::new();
    let mut hot = HotRanges::default();
    let mut at = range.start;
    for (len, bits) in link.hot(range).await? {
        if hot.used.len() + hot.in_memory.len() == PORTION {
            all.push(std::mem::take(&mut hot));
        }
        let range = ByteRange::new(at, len);
        at = range.end;
        if bits & FERRY_WAS_USED != 0 {
            hot.used.push(range);
        } else if bits & FERRY_IS_HOT != 0 {
            hot.in_memory.push(range);
        }
    }
    all.push(hot);
    Ok(all)
}

/// A connection that is closed however the asking ends: also if it is given up in the middle.
struct Asked(Link);

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.close();
    }
}
