//! The log: lines on standard error, and no more of them than anybody reads.
//!
//! A fault that repeats, at a disk, a source or a guest, and a client that means ill, could fill a disk with lines, or
//! the memory that a run directory lies in. So all lines pass here, whoever writes them; [`limit`] says how many of a
//! kind. Those for finding faults (`debug`, `trace`) are on only when somebody wants all of them, and all are said.

mod limit;

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use log::{Level, Log, Metadata, Record};

use limit::{LeftOut, Limit, PERIOD};

/// What a file of its own gets needs the time of day; a terminal and a journal have their own.
static WITH_TIME: AtomicBool = AtomicBool::new(false);

/// From now on each line begins with the time of day.
pub(super) fn with_time() {
    WITH_TIME.store(true, Ordering::Relaxed);
}

/// Once a process, before anything is said. BLKFERRY_LOG goes before `verbose`.
pub(super) fn init(verbose: u8) {
    let level = ["info", "debug", "trace"][usize::from(verbose.min(2))];
    let environment = env_logger::Env::new().filter_or("BLKFERRY_LOG", level);
    let inner = env_logger::Builder::from_env(environment)
        .format(|out, record| {
            if WITH_TIME.load(Ordering::Relaxed) {
                write!(out, "{} ", out.timestamp_seconds())?;
            }
            match record.level() {
                Level::Info => writeln!(out, "blkferry: {}", record.args()),
                level => writeln!(out, "blkferry: {}: {}", level.as_str().to_lowercase(), record.args()),
            }
        })
        .build();
    log::set_max_level(inner.filter());
    let shared = Shared { inner, limit: Mutex::default(), has_teller: AtomicBool::new(false) };
    log::set_boxed_logger(Box::new(Limited(Arc::new(shared)))).expect("this is called once");
}

/// Says what was left out so far: the process ends.
pub(super) fn conclude() {
    log::logger().flush();
}

struct Limited(Arc<Shared>);

struct Shared {
    inner: env_logger::Logger,
    limit: Mutex<Limit>,
    /// A thread waits until what was left out is to be told.
    has_teller: AtomicBool,
}

impl Log for Limited {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.inner.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if record.level() > Level::Info {
            return self.0.inner.log(record);
        }
        if !self.0.inner.matches(record) {
            return;
        }
        let place = (record.file_static().unwrap_or_default(), record.line().unwrap_or_default());
        let now = Instant::now();
        let (due, admitted, owes) = {
            let mut limit = self.0.limit();
            let due = limit.due(now);
            (due, limit.admit(now, place, record.level(), &record.args().to_string()), limit.owes())
        };
        self.0.tell(due);
        if admitted {
            self.0.inner.log(record);
        }
        if owes {
            self.0.tell_in_time();
        }
    }

    fn flush(&self) {
        let rest = self.0.limit().rest(Instant::now());
        self.0.tell(rest);
        self.0.inner.flush();
    }
}

impl Shared {
    fn limit(&self) -> MutexGuard<'_, Limit> {
        // It counts: after a panic in the middle of it the worst is a wrong number.
        self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, left_out: Vec<LeftOut>) {
        for LeftOut { count, last, level } in left_out {
            let lines = if count == 1 { "line" } else { "lines" };
            let told = format_args!("{count} more {lines} like this were left out: {last}");
            self.inner.log(&Record::builder().level(level).target(module_path!()).args(told).build());
        }
    }

    /// Sees to it that what was left out is told also when nothing else is said ever after.
    fn tell_in_time(self: &Arc<Self>) {
        if self.has_teller.swap(true, Ordering::Relaxed) {
            return;
        }
        let this = self.clone();
        let teller = move || {
            loop {
                std::thread::sleep(PERIOD);
                let due = this.limit().due(Instant::now());
                this.tell(due);
                let limit = this.limit();
                if !limit.owes() {
                    // Under the lock: whoever is left out next starts another one.
                    return this.has_teller.store(false, Ordering::Relaxed);
                }
            }
        };
        if std::thread::Builder::new().name("log".into()).spawn(teller).is_err() {
            // The next line tries again, and the end of the process tells it in any case.
            self.has_teller.store(false, Ordering::Relaxed);
        }
    }
}
