//! Is it the source that says nothing, or only a connection?
//!
//! One may be dead and nobody tells: a firewall forgot it while it was idle, or a tunnel acknowledges what it cannot pass
//! on. To wait until silence has lasted too long would make readers wait, or fail, beside a source that is well; to close
//! a silent connection early would never let a slow source answer. So when half of that time is over, the source is asked
//! on a new connection for a little of what is awaited on the silent one. If that is answered first, the silent one is
//! given up and the new one takes its place. Once for each read: who asks for the whole of it again may wait for as long as
//! silence may last, since the source may be slow there and nowhere else. Only of reads: a step of a handoff or a question
//! may take long at a source that reads well.

use std::rc::Rc;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::{Either, select};

use super::WATCH_PERIOD;
use super::keep::{Candidate, reconnect};
use super::link::{Link, LinkError};
use super::shared::{Shared, alive};
use crate::engine::ByteRange;
use crate::uring::{now, sleep};

/// So much is asked for, or what the source gives at least: a part of a block that will be asked for again.
const PROBE_BYTES: u64 = 512;

/// Looks after connections that say nothing, one doubt at a time.
pub(super) async fn doubt(shared: Rc<Shared>) {
    loop {
        sleep(WATCH_PERIOD).await;
        let Some((silent, since)) = longest_silent(&shared) else { continue };
        let over = is_over(&silent, since).boxed_local();
        match select(probe(&shared, &silent, since).boxed_local(), over).await {
            Either::Left((Ok(proven), _)) => {
                log::warn!(
                    "source {}: it answers on a new connection, and not on an old one, which is given up",
                    shared.uri
                );
                shared.replace_silent(proven.take(), since);
            }
            Either::Left((Err(reason), over)) => {
                log::debug!(
                    "source {}: silent on a connection, and it cannot be asked on another: {reason}",
                    shared.uri
                );
                over.await;
            }
            Either::Right(_) => {}
        }
    }
}

/// The connection whose silence has lasted longest of those that owe data, if that is for half of what is too long.
fn longest_silent(shared: &Shared) -> Option<(Link, Instant)> {
    let slots = shared.slots.borrow();
    let again = shared.asked_again.borrow();
    let owing = alive(&slots).filter(|link| link.awaited_read().is_some_and(|read| !again.contains(&read)));
    let silent = owing.filter_map(|link| Some((link.clone(), link.silent_since()?)));
    let (link, since) = silent.min_by_key(|(_, since)| *since)?;
    (now().duration_since(since) > shared.longest_silence() / 2).then_some((link, since))
}

/// Waits until it speaks, or is gone.
async fn is_over(link: &Link, since: Instant) {
    while link.is_alive() && link.silent_since() == Some(since) {
        sleep(WATCH_PERIOD).await;
    }
}

/// A new connection to the same disk, on which the source has answered what the silent one owes.
async fn probe(shared: &Shared, silent: &Link, since: Instant) -> Result<Candidate, String> {
    let proven = reconnect(shared, false, None).await?;
    let link = proven.link();
    let unit = PROBE_BYTES.max(u64::from(link.session().min_block));
    if silent.silent_since() != Some(since) {
        return Err("the silent one has spoken".into());
    }
    let awaited = silent.awaited_read().ok_or("it owes no data any more")?;
    let start = awaited.start / unit * unit;
    match link.read(ByteRange { start, end: (start + unit).min(shared.size_bytes) }).await {
        // A block that cannot be read is an answer, too.
        Ok(_) | Err(LinkError::Refused(_)) => Ok(proven),
        Err(LinkError::Lost) => Err("the connection was lost".into()),
    }
}
