//! Counts of what happened, to prove that the cases are about something.

use crate::search::Counts;

/// See the fields.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub cases: u64,
    /// Requests of the guest, flushes included.
    pub requests: u64,
    /// Requests answered, and how many of them with an error.
    pub answers: u64,
    pub errors: u64,
    /// Requests that the frontend handled without the engine.
    pub hits: u64,
    pub fetches: u64,
    pub zero_stores: u64,
    /// Reads answered from the network buffer, before the cache has the data.
    pub deliveries: u64,
    /// Writes of whole absent blocks.
    pub overwrites: u64,
    /// FUA writes that were durable without a commit.
    pub dsync_writes: u64,
    pub commits: u64,
    pub failed_commits: u64,
    /// Commits that failed because something could not be written back before them.
    pub untold_errors: u64,
    /// Times that the source fell silent, and requests that were open then.
    pub silences: u64,
    pub waiting_in_silence: u64,
    pub kills: u64,
    pub power_cuts: u64,
    /// Power cuts while a commit ran, and pages that a new process found torn.
    pub cuts_in_commits: u64,
    pub torn_pages: u64,
}

impl Counts for Stats {
    fn add(&mut self, other: &Self) {
        self.cases += other.cases;
        self.requests += other.requests;
        self.answers += other.answers;
        self.errors += other.errors;
        self.hits += other.hits;
        self.fetches += other.fetches;
        self.zero_stores += other.zero_stores;
        self.deliveries += other.deliveries;
        self.overwrites += other.overwrites;
        self.dsync_writes += other.dsync_writes;
        self.commits += other.commits;
        self.failed_commits += other.failed_commits;
        self.untold_errors += other.untold_errors;
        self.silences += other.silences;
        self.waiting_in_silence += other.waiting_in_silence;
        self.kills += other.kills;
        self.power_cuts += other.power_cuts;
        self.cuts_in_commits += other.cuts_in_commits;
        self.torn_pages += other.torn_pages;
    }
}

impl Stats {
    /// Did every kind of thing happen?
    pub fn saw_everything(&self) -> bool {
        let counts = [
            self.answers,
            self.errors,
            self.hits,
            self.fetches,
            self.zero_stores,
            self.deliveries,
            self.overwrites,
            self.dsync_writes,
            self.commits,
            self.failed_commits,
            self.untold_errors,
            self.silences,
            self.waiting_in_silence,
            self.kills,
            self.power_cuts,
            self.cuts_in_commits,
            self.torn_pages,
        ];
        counts.iter().all(|&count| count > 0)
    }
}
