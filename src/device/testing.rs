//! A device for unit tests: a new cache of a mebibyte, and a core on it that nobody carries anything out for.

use std::path::Path;
use std::sync::Arc;

use super::{Core, Gate, Hydration, Mode, Phase};
use crate::cache::{Cache, CacheOptions, SourceFacts};
use crate::engine::{Engine, EngineConfig};
use crate::uring::Mailbox;

pub(super) fn cache(dir: &Path) -> Cache {
    let options = CacheOptions {
        data: dir.join("disk"),
        metadata: dir.join("disk.ferry"),
        live_dir: dir.into(),
        block_bytes: None,
        forget_unflushed: false,
        overwrite: false,
        standby: false,
        home: false,
    };
    let source = SourceFacts { uri: "nbd://a/".into(), size_bytes: 1 << 20, identity: "it".into(), disk: None };
    Cache::open(&options, &source).unwrap()
}

pub(super) fn core(cache: &Cache) -> Arc<Core> {
    let config = EngineConfig { max_fetch_bytes: 4096, questions: None, compact: false, max_zero_bytes: 4096 };
    let engine = Engine::new(cache.maps.clone(), config);
    let gate = Gate::new(Phase::Active, 1, None);
    let (commits, _) = crossbeam::channel::unbounded();
    Arc::new(Core::new(engine, 1, Mailbox::default(), commits, Hydration::new(Mode::Off), gate))
}
