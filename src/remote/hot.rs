//! What the source has in its page cache: a hint, what its machine used last and so will use next.
//!
//! Asked for on a connection of its own, beside everything else, so that neither a read nor hydration waits for it. What
//! is told is not believed in any further than that it is fetched first: the connection need not prove whose disk it is.

use futures_util::future::{Either, select};
use futures_util::{FutureExt, StreamExt, stream};

use super::HOT_PATIENCE;
use super::dial::dial_hot;
use super::link::{Link, LinkError};
use super::source::Source;
use crate::engine::ByteRange;
use crate::uring::sleep;

/// Longest range that is asked about at once.
const ASKED_BYTES: u64 = 2 << 30;
/// Questions under way.
const QUESTIONS: usize = 16;

impl Source {
    /// Asks for the stretches of the disk that the source has in memory, and hands them over as they are told. Ends
    /// early, without a word, if the source does not tell or takes too long.
    pub async fn hot(&self, found: impl Fn(Vec<ByteRange>)) {
        if !self.hashes_blocks() || !self.takes_several() {
            return;
        }
        let asking = self.ask_hot(found).boxed_local();
        if let Either::Right(_) = select(asking, sleep(HOT_PATIENCE).boxed_local()).await {
            log::debug!("source {}: what is hot there has not been told in time", self.uri());
        }
    }

    async fn ask_hot(&self, found: impl Fn(Vec<ByteRange>)) {
        let dialed = match dial_hot(self.uri(), self.stats()).await {
            Ok(dialed) if dialed.session.hot.is_some() && dialed.session.size_bytes == self.size_bytes() => dialed,
            Ok(_) => return,
            Err(e) => return log::debug!("what is hot at the source cannot be asked: {e}"),
        };
        let link = Link::start(dialed, self.stats().clone());
        let size = self.size_bytes();
        let ranges = (0..size).step_by(ASKED_BYTES as usize);
        let ranges = ranges.map(|start| ByteRange { start, end: size.min(start + ASKED_BYTES) });
        let mut answers = stream::iter(ranges.map(|range| hot_in(&link, range))).buffered(QUESTIONS);
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(ranges) if ranges.is_empty() => {}
                Ok(ranges) => found(ranges),
                Err(e) => {
                    log::debug!("what is hot at the source is not told: {e:?}");
                    break;
                }
            }
        }
        drop(answers);
        link.close();
    }
}

/// All of a range, however many answers that takes.
async fn hot_in(link: &Link, range: ByteRange) -> Result<Vec<ByteRange>, LinkError> {
    let mut found = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let told = link.hot(ByteRange { start: at, end: range.end }).await?;
        let before = at;
        for (len, hot) in told {
            let end = range.end.min(at + len);
            if hot {
                found.push(ByteRange { start: at, end });
            }
            at = end;
        }
        if at == before {
            break;
        }
    }
    Ok(found)
}
