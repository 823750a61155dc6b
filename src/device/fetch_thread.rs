//! The thread that everything runs on that waits for the source, from the moment in which it is dialled.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, select};

use super::core::Core;
use super::fetch_bytes::MAX_FETCH_BYTES;
use super::fetcher::Fetcher;
use super::messages::FetchRequest;
use super::source_side::SourceSide;
use super::verify::Verifier;
use crate::engine::{EngineConfig, Questions};
use crate::nbd::{Standing, Uri};
use crate::remote::{Beforehand, DialError, LossPolicy, Source, SourceStats};
use crate::uring::{FileIo, Mailbox, Reactor, UringError};

/// Zeros that are written at once where the cache cannot take a hole: a fraction of a second on most disks.
const MAX_WRITTEN_ZERO_BYTES: u64 = 8 << 20;

/// What the source said when it was opened.
#[derive(Clone, Debug)]
pub struct SourceHello {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// What its contents are known by.
    pub identity: String,
    /// Does it tell holes?
    pub tells_extents: bool,
    /// Does it send zeros as holes?
    pub sends_holes: bool,
    /// Does it take several connections?
    pub takes_several: bool,
    /// Largest and smallest read that it takes, in bytes.
    pub max_read_bytes: u64,
    /// Smallest unit of a read, in bytes.
    pub min_read_bytes: u64,
    /// How its disk stands, if it can change hands.
    pub standing: Option<Standing>,
    /// Its counters.
    pub stats: SourceStats,
}

/// Why the fetch thread did not come up.
#[derive(Debug, thiserror::Error)]
pub enum FetchThreadError {
    /// No ring.
    #[error(transparent)]
    Uring(#[from] UringError),
    /// No source.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// No thread.
    #[error("cannot start the fetch thread: {0}")]
    Thread(#[from] io::Error),
    /// Nobody wants it any more.
    #[error("stopped before the source had answered")]
    Interrupted,
}

/// The running thread.
pub struct FetchThread {
    handle: JoinHandle<()>,
    mailbox: Mailbox<FetchRequest>,
}

impl FetchThread {
    /// Starts the thread and connects to the source. Without one (a complete cache) it only verifies. `known_ferry`: it
    /// can only be a blkferry export. What comes on `interrupted` ends the waiting, and not the thread: the process is to
    /// end.
    pub fn start(
        source: Option<Uri>,
        known_ferry: bool,
        policy: LossPolicy,
        interrupted: &Receiver<()>,
    ) -> Result<(Self, Option<SourceHello>), FetchThreadError> {
        let mailbox = Mailbox::default();
        let requests = mailbox.clone();
        let (said, hello) = crossbeam::channel::bounded(1);
        let run = move || {
            let reactor = match Reactor::new() {
                Ok(reactor) => reactor,
                Err(e) => return drop(said.send(Err(e.into()))),
            };
            let beforehand = Beforehand { keeps_up: true, known_ferry };
            reactor
                .block_on(fetch_main(source, policy, beforehand, requests, said))
                .expect("a ring that worked goes on working");
        };
        let handle = std::thread::Builder::new().name("fetch".into()).spawn(run)?;
        let hello = select! {
            recv(hello) -> hello => hello.unwrap_or_else(|_| Err(io::Error::other("it ended at once").into()))?,
            recv(interrupted) -> _ => return Err(FetchThreadError::Interrupted),
        };
        Ok((Self { handle, mailbox }, hello))
    }

    pub(crate) fn mailbox(&self) -> Mailbox<FetchRequest> {
        self.mailbox.clone()
    }

    /// Puts the thread to work for a device.
    pub fn begin(&self, core: Arc<Core>, cache: FileIo) {
        self.mailbox.send(FetchRequest::Begin { core, cache });
    }

    /// What other threads ask of the source beside the engine.
    pub fn source_side(&self) -> SourceSide {
        SourceSide::new(self.mailbox.clone())
    }

    /// What compares the cache with the source.
    pub fn verifier(&self) -> Verifier {
        Verifier::new(self.mailbox.clone())
    }

    /// Ends the thread. Stores in flight are finished or were never said to be done.
    pub fn stop(self) {
        self.mailbox.send(FetchRequest::Stop);
        // A panic there has ended the process.
        let _ = self.handle.join();
    }
}

type Said = Sender<Result<Option<SourceHello>, FetchThreadError>>;

impl SourceHello {
    pub(super) fn of(source: &Source) -> Self {
        Self {
            size_bytes: source.size_bytes(),
            identity: source.identity(),
            standing: source.standing(),
            tells_extents: source.tells_extents(),
            sends_holes: source.sends_holes(),
            takes_several: source.takes_several(),
            max_read_bytes: source.max_read_bytes(),
            min_read_bytes: source.min_read_bytes(),
            stats: source.stats().clone(),
        }
    }
}

/// What the engine must know of a source, or of there being none, and of a cache: can it turn a range into zeros without
/// writing them?
pub fn engine_config(hello: Option<&SourceHello>, punches_holes: bool) -> EngineConfig {
    let asked = |hello: &SourceHello| if hello.takes_several { Questions::AHEAD } else { Questions::SHARED };
    EngineConfig {
        max_fetch_bytes: hello.map_or(MAX_FETCH_BYTES, |hello| hello.max_read_bytes.min(MAX_FETCH_BYTES)),
        questions: hello.filter(|hello| hello.tells_extents).map(asked),
        compact: hello.is_some_and(|hello| hello.sends_holes),
        max_zero_bytes: if punches_holes { u64::MAX } else { MAX_WRITTEN_ZERO_BYTES },
    }
}

async fn fetch_main(
    uri: Option<Uri>,
    policy: LossPolicy,
    beforehand: Beforehand,
    requests: Mailbox<FetchRequest>,
    said: Said,
) {
    let source = match uri {
        None => None,
        Some(uri) => match Source::open(uri, policy, beforehand).await {
            Ok(source) => Some(source),
            Err(e) => return drop(said.send(Err(e.into()))),
        },
    };
    if said.send(Ok(source.as_ref().map(SourceHello::of))).is_err() {
        return;
    }
    let mut early = Vec::new();
    loop {
        match requests.recv().await {
            FetchRequest::Begin { core, cache } => {
                early.into_iter().for_each(|request| requests.send(request));
                return Fetcher::new(core, cache, source).run(requests).await;
            }
            FetchRequest::Expect { expect, identity } => {
                source.iter().for_each(|source| source.expect(expect, identity.clone()));
            }
            FetchRequest::Stop => return,
            // The guest's, who may have waited at the socket and is quicker than we are.
            request => early.push(request),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::testing;
    use super::*;
    use crate::remote::OnLoss;

    #[test]
    fn a_request_that_is_quicker_than_the_device_is_answered_when_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let cache = testing::cache(dir.path());
        let (_interrupt, interrupted) = crossbeam::channel::bounded(1);
        let (fetch, _) = FetchThread::start(None, false, LossPolicy::new(OnLoss::Wait), &interrupted).unwrap();
        let side = fetch.source_side();
        let asking = std::thread::spawn(move || side.identify(Duration::from_secs(20)));
        std::thread::sleep(Duration::from_millis(50));
        fetch.begin(testing::core(&cache), cache.data.io().clone());
        assert!(asking.join().unwrap().is_err(), "there is no source that could be asked");
        fetch.mailbox.send(FetchRequest::Stop);
        assert!(fetch.handle.join().is_ok(), "it lives until it is told to stop");
    }
}
