//! A device on one thread, for a simulated world: the parts that the daemon puts together, with tasks where it has
//! threads. Only with the feature `simulation`.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::Receiver;
use futures_util::FutureExt;
use futures_util::future::select;

use super::committer::Thread;
use super::core::Core;
use super::fetch_thread::{SourceHello, engine_config};
use super::fetcher::Fetcher;
use super::gate::{Gate, Phase};
use super::hydration::{Hydration, Mode};
use super::messages::{CommitRequest, FetchRequest};
use super::queue::Queue;
use crate::cache::{Cache, CacheOptions, OpenError, SourceFacts};
use crate::engine::Engine;
use crate::nbd::Uri;
use crate::remote::{Beforehand, DialError, LossPolicy, Source};
use crate::uring::{Mailbox, now, sleep, spawn};

/// Why a device did not come up.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No source.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// No cache.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// A device that runs; its tasks belong to the process that started it.
pub struct Simulated {
    /// What its parts share.
    pub core: Arc<Core>,
    /// The way in for the guest.
    pub queue: Rc<Queue>,
    fetcher: Rc<Fetcher>,
    requests: Mailbox<FetchRequest>,
}

impl Simulated {
    /// Brings a device up, in the order of the daemon. `commit_delay` is drawn for each commit.
    pub async fn start(
        uri: Uri,
        policy: LossPolicy,
        options: CacheOptions,
        mode: Mode,
        commit_delay: impl Fn() -> Duration + 'static,
    ) -> Result<Self, StartError> {
        let source = Source::open(uri.clone(), policy, Beforehand { keeps_up: true, known_ferry: false }).await?;
        let hello = SourceHello::of(&source);
        let config = engine_config(Some(&hello), true);
        let (size_bytes, identity) = (hello.size_bytes, hello.identity);
        let facts = SourceFacts { uri: uri.to_string(), size_bytes, identity, disk: None };
        let cache = Cache::open(&options, &facts)?;
        let engine = Engine::new(cache.maps.clone(), config);
        let (commits, asked) = crossbeam::channel::unbounded();
        let requests = Mailbox::default();
        let gate = Gate::new(Phase::Active, 1, None);
        let core = Arc::new(Core::new(engine, 1, requests.clone(), commits, Hydration::new(mode), gate));
        let thread = Thread::new(core.clone(), cache.store);
        spawn(commit(thread, core.clone(), asked, commit_delay)).detach();
        let queue = Queue::new(core.clone(), 0, cache.data.io().clone());
        spawn(queue.clone().run()).detach();
        let fetcher = Fetcher::new(core.clone(), cache.data.io().clone(), Some(source));
        spawn(fetcher.clone().run(requests.clone())).detach();
        Ok(Self { core, queue, fetcher, requests })
    }

    /// Fetches whose data or whose share of the buffers is still held, and the bytes of those shares.
    pub fn held(&self) -> (usize, usize) {
        self.fetcher.held()
    }

    /// Has it hung up on its source for good?
    pub fn has_hung_up(&self) -> bool {
        self.fetcher.source.borrow().is_none()
    }

    /// Commits a last time and leaves the cache in order.
    pub async fn stop(&self) -> std::io::Result<()> {
        self.requests.send(FetchRequest::Stop);
        let (sender, answer) = crossbeam::channel::bounded(1);
        self.core.request_commit(CommitRequest::Stop(sender));
        loop {
            match answer.try_recv() {
                Ok(result) => return result,
                Err(_) => sleep(Duration::from_millis(1)).await,
            }
        }
    }
}

/// The commit thread as a task.
async fn commit(mut thread: Thread, core: Arc<Core>, requests: Receiver<CommitRequest>, delay: impl Fn() -> Duration) {
    loop {
        let asked = core.commit_asked.listen();
        let due = thread.look_at_clock();
        let Ok(request) = requests.try_recv() else {
            select(asked, sleep(due.saturating_duration_since(now())).boxed_local()).await;
            continue;
        };
        sleep(delay()).await;
        if thread.carry_out(request).is_break() {
            return;
        }
    }
}
