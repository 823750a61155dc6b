//! Keeping the source's links up: dialling again, and looking whether it still is the same disk.

use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{Either, select};

use super::dial::{Spare, dial};
use super::link::{Link, LinkError};
#[cfg(feature = "planted-faults")]
use super::planted::{PlantedFault, is_planted};
use super::shared::{Expect, Shared, alive};
use super::{BACKOFF, CONNECT_TIMEOUT, SHORT_LIFE, WATCH_PERIOD};
use crate::engine::ByteRange;
use crate::identity::{IdentityHasher, sample_ranges};
use crate::uring::{lot, now, sleep};

/// What the disk behind a link is known by: the identity that it tells, or samples of its contents.
async fn identify(link: &Link) -> Result<String, LinkError> {
    if let Some(identity) = &link.session().ferry_identity {
        return Ok(identity.clone());
    }
    let size_bytes = link.session().size_bytes;
    let unit = u64::from(link.session().min_block);
    let mut hasher = IdentityHasher::new(size_bytes, None);
    for range in sample_ranges(size_bytes) {
        // Whole units of the source's block size around the sample.
        let start = range.start / unit * unit;
        let aligned = ByteRange { start, end: range.end.next_multiple_of(unit).min(size_bytes) };
        let data = link.read(aligned).await?;
        let mut bytes = Vec::new();
        data.pieces(range).iter().for_each(|part| part.append_to(&mut bytes));
        hasher.sample(&bytes);
    }
    Ok(hasher.finish("sampled"))
}

pub(super) async fn identify_in_time(link: &Link) -> Option<Result<String, LinkError>> {
    match select(identify(link).boxed_local(), sleep(CONNECT_TIMEOUT).boxed_local()).await {
        Either::Left((identified, _)) => Some(identified),
        Either::Right(_) => None,
    }
}

/// A connection that is closed unless it is taken.
pub(super) struct Candidate(Option<Link>);

impl Candidate {
    pub(super) fn link(&self) -> &Link {
        self.0.as_ref().expect("it is here until it is taken")
    }

    pub(super) fn take(mut self) -> Link {
        self.0.take().expect("it is taken once")
    }
}

impl Drop for Candidate {
    fn drop(&mut self) {
        if let Some(link) = &self.0 {
            link.close();
        }
    }
}

/// Keeps one slot filled for ever, at first with a spare connection if there is one.
pub(super) async fn keep_link(shared: Rc<Shared>, slot: usize, mut spare: Option<Spare>) {
    let mut pause = BACKOFF.0;
    let mut is_first = true;
    loop {
        let held = shared.slots.borrow()[slot].clone();
        if let Some(link) = held {
            let (since, answers) = (now(), link.answers());
            link.dead().await;
            shared.listen();
            is_first = false;
            if let Some(proven) = shared.proven.take().filter(Link::is_alive) {
                shared.set(slot, Some(proven));
                pause = BACKOFF.0;
                continue;
            }
            shared.set(slot, None);
            log::warn!("source {}: connection {slot} lost", shared.uri);
            shared.report_lost("the connection was lost".into(), link.lost_since());
            if now().duration_since(since) < SHORT_LIFE && link.answers() == answers {
                sleep(pause + jitter(pause)).await;
                pause = (pause * 2).min(BACKOFF.1);
            } else {
                pause = BACKOFF.0;
            }
        }
        match reconnect(&shared, is_first, spare.take()).await {
            Ok(candidate) => {
                // Whichever comes first: hydration gives its own links a chance to come up.
                shared.bulk_refused.set(false);
                shared.set(slot, Some(candidate.take()));
                continue;
            }
            Err(reason) => {
                log::debug!("{reason}");
                is_first = false;
                shared.bulk_refused.set(true);
                shared.link_up.notify(usize::MAX);
                shared.report_lost(reason, now());
            }
        }
        sleep(pause + jitter(pause)).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

/// A new link to the *same* disk; anything else is refused, in words. `is_first`: nothing was lost before it.
pub(super) async fn reconnect(shared: &Shared, is_first: bool, spare: Option<Spare>) -> Result<Candidate, String> {
    let dialed = match spare {
        Some(spare) => spare.await,
        None => dial(&shared.uri, &shared.stats, shared.is_ferry).await,
    };
    let dialed = dialed.map_err(|e| e.to_string())?;
    let candidate = Candidate(Some(Link::start(dialed, shared.stats.clone())));
    let link = candidate.link();
    if link.session().size_bytes != shared.size_bytes {
        let now = link.session().size_bytes;
        return Err(format!("source {}: it has {now} bytes now, {} before: refused", shared.uri, shared.size_bytes));
    }
    let checked = check_disk(shared, link, is_first).await;
    checked.map(|()| candidate).map_err(|reason| format!("source {}: {reason}", shared.uri))
}

/// Is it still what it has to be?
async fn check_disk(shared: &Shared, link: &Link, is_first: bool) -> Result<(), String> {
    #[cfg(feature = "planted-faults")]
    if is_planted(PlantedFault::IdentityUnchecked) {
        return Ok(());
    }
    let standing = link.session().standing.clone();
    shared.standing.borrow_mut().clone_from(&standing);
    match (shared.expect.get(), standing) {
        (Expect::Size, _) => return Ok(()),
        (Expect::Disk(disk), Some(now)) if now.disk == disk => return Ok(()),
        (Expect::Disk(disk), _) => return Err(format!("it is not disk {disk} any more: refused")),
        (Expect::Gift { to, epoch }, Some(now)) if now.given_to == Some(to) && now.epoch == epoch => {}
        (Expect::Gift { epoch, .. }, now) => {
            let now = now.map_or("unknown".into(), |now| now.epoch.to_string());
            return Err(format!(
                "the disk was given to us in epoch {epoch}, and was taken back there since (its epoch is {now}): refused"
            ));
        }
        (Expect::Contents, _) => {}
    }
    // Samples cost bytes: when the links come up one after the other, those of a foreign server show them once.
    if is_first && shared.stats.links() > 0 && link.session().ferry_identity.is_none() {
        return Ok(());
    }
    let before = shared.identity.borrow().clone();
    match identify_in_time(link).await.unwrap_or(Err(LinkError::Lost)) {
        Ok(identity) if identity == before => Ok(()),
        Ok(identity) => {
            Err(format!("it is not the same disk any more, or was written to ({identity}, before {before}): refused"))
        }
        Err(_) => Err("the connection broke while the disk was identified".into()),
    }
}

/// Up to half of a pause, so that many clients of one source do not return in step.
fn jitter(pause: Duration) -> Duration {
    pause.mul_f64(f64::from(lot(1000)) / 2000.0)
}

/// Closes links whose source has fallen silent with requests under way, and ends the patience of those who wait for
/// a source that is lost.
pub(super) async fn watch(shared: Rc<Shared>) {
    // The loss of which those who wait have been told. It may be found and lost again between two looks.
    let mut told = None;
    loop {
        sleep(WATCH_PERIOD).await;
        let silence = shared.longest_silence();
        #[cfg(feature = "planted-faults")]
        if is_planted(PlantedFault::SilenceUnnoticed) {
            continue;
        }
        shared.listen();
        let slots = shared.slots.borrow();
        let alive = || alive(&slots);
        let too_long = |since: &Instant| now().duration_since(*since) > silence;
        // On one connection, or on all of them together: requests of one that broke are with another.
        let of_one = alive().filter_map(Link::silent_since).filter(too_long).min();
        let of_all = shared.silence.since().filter(too_long);
        if let Some(since) = of_all.or(of_one)
            && alive().next().is_some()
        {
            log::warn!("source {}: no answer for {} s, connections given up", shared.uri, silence.as_secs_f32());
            let given_up = alive().filter(|link| of_all.is_some() || link.is_no_better(since));
            given_up.for_each(|link| link.close_silent(since));
        }
        drop(slots);
        let given_up = shared.lost_since.get().filter(|_| shared.is_given_up());
        #[cfg(feature = "planted-faults")]
        if told.is_some() && is_planted(PlantedFault::GivenUpOnce) {
            continue;
        }
        if given_up.is_some() && given_up != told {
            log::warn!("source {}: lost for too long, requests for absent blocks fail until it is back", shared.uri);
            shared.link_up.notify(usize::MAX);
        }
        told = given_up;
    }
}
