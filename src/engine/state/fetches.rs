//! What is asked of the source: for who waits, ahead of who reads on, and in the background; and what becomes of it.

use super::*;

impl Engine {
    pub(super) fn start_fetch(&mut self, run: BlockRun, lane: Lane, out: &mut Vec<Action>) -> FetchId {
        let fetch = self.new_fetch(run, lane);
        if lane == Lane::Ahead {
            self.ahead_blocks += run.len();
        }
        self.inflight.give(run, Owner::Wire(fetch));
        out.push(Action::Fetch { fetch, run, lane });
        fetch
    }

    fn new_fetch(&mut self, run: BlockRun, lane: Lane) -> FetchId {
        let fetch = FetchId(self.fresh_id());
        let state = Fetch { run, lane, readers: Vec::new(), after: Vec::new(), stores: 0, store_error: None };
        self.fetches.insert(fetch, state);
        fetch
    }

    pub(super) fn fetched(&mut self, id: FetchId, out: &mut Vec<Action>) {
        let fetch = self.fetches.get_mut(&id).expect("a fetch ends once");
        let run = fetch.run;
        for reader in std::mem::take(&mut fetch.readers) {
            let io = IoId(self.fresh_id());
            self.ios.insert(io, LocalIo { op: reader.op, overwrites: None });
            out.push(Action::Deliver { io, op: reader.op, fetch: id, range: reader.range });
        }
        // What the guest overwrote meanwhile belongs to that write (I3).
        #[allow(unused_mut)]
        let mut ours = self.inflight.owned(run, Owner::Wire(id));
        #[cfg(feature = "planted-faults")]
        match self.fault {
            Some(PlantedFault::FetchOverwrites) => ours = vec![run],
            Some(PlantedFault::BitBeforeData) => ours.iter().for_each(|run| self.maps.mark_present(*run)),
            _ => {}
        }
        for run in &ours {
            self.inflight.give(*run, Owner::Storing(id));
            out.push(Action::Store { fetch: id, run: *run });
        }
        let fetch = self.fetches.get_mut(&id).expect("still there");
        fetch.stores = ours.len();
        if ours.is_empty() {
            self.end_fetch(id, out);
        }
    }

    pub(super) fn fetch_failed(&mut self, id: FetchId, error: FetchError, out: &mut Vec<Action>) {
        let fetch = self.remove_fetch(id);
        let absent = self.inflight.owned(fetch.run, Owner::Wire(id));
        absent.iter().for_each(|part| self.inflight.free(*part));
        out.push(Action::Release { fetch: id });
        match error {
            FetchError::Refused(_) if fetch.run.len() > 1 && !absent.is_empty() => self.halve(fetch, &absent, out),
            // Whoever came to wait for it meanwhile is served by a fetch on demand: that needs no room.
            FetchError::NoRoom => fetch.waiting().for_each(|segment| self.start(segment, out)),
            FetchError::Refused(_) | FetchError::Unreachable => {
                if fetch.lane == Lane::Bulk {
                    self.planner.failed();
                }
                let errno = if let FetchError::Refused(errno) = error { errno } else { Errno::EIO };
                fetch.waiting().for_each(|segment| self.fail_or_start(segment, errno, out));
            }
        }
    }

    /// A bad block costs that block only: each half of a fetch is asked for again, down to the block that is bad.
    fn halve(&mut self, fetch: Fetch, absent: &[BlockRun], out: &mut Vec<Action>) {
        let nobody_waits = fetch.readers.is_empty() && fetch.after.is_empty();
        let lane = if nobody_waits { fetch.lane } else { Lane::Demand };
        let middle = fetch.run.start + fetch.run.len() / 2;
        for half in [BlockRun::new(fetch.run.start, middle), BlockRun::new(middle, fetch.run.end)] {
            for part in absent.iter().map(|part| part.clip(half)).filter(|part| !part.is_empty()) {
                self.start_fetch(part, lane, out);
            }
        }
        // They find the new fetches, or that their blocks have come in another way.
        fetch.waiting().for_each(|segment| self.start(segment, out));
    }

    pub(super) fn stored(&mut self, id: FetchId, run: BlockRun, result: Result<(), Errno>, out: &mut Vec<Action>) {
        for part in self.inflight.owned(run, Owner::Storing(id)) {
            self.inflight.free(part);
        }
        if result.is_ok() {
            self.maps.mark_present(run);
        }
        let fetch = self.fetches.get_mut(&id).expect("a fetch outlives its stores");
        fetch.store_error = fetch.store_error.or(result.err());
        fetch.stores -= 1;
        if fetch.stores == 0 {
            self.end_fetch(id, out);
        }
    }

    fn remove_fetch(&mut self, id: FetchId) -> Fetch {
        let fetch = self.fetches.remove(&id).expect("a fetch ends once");
        if fetch.lane == Lane::Ahead {
            self.ahead_blocks -= fetch.run.len();
        }
        fetch
    }

    fn end_fetch(&mut self, id: FetchId, out: &mut Vec<Action>) {
        let fetch = self.remove_fetch(id);
        out.push(Action::Release { fetch: id });
        for segment in fetch.after {
            match fetch.store_error {
                // A read can still be answered from the network, and whole blocks need not be there to be changed.
                Some(errno) if self.needs_presence(segment) => self.fail_or_start(segment, errno, out),
                _ => self.start(segment, out),
            }
        }
    }

    /// What is on its way ahead is bounded: demand shares its connection.
    pub(super) fn read_ahead(&mut self, range: ByteRange, out: &mut Vec<Action>) {
        let geometry = self.maps.geometry();
        if self.failed.is_some() {
            return;
        }
        if let Some(together) = self.planner.missed(geometry, geometry.covering(range)) {
            self.fetch_ahead(together, out);
        }
        match self.readahead.missed(geometry, range) {
            Wanted::Nothing => {}
            Wanted::Run(run) => self.fetch_ahead(run, out),
            Wanted::Steps(steps) => steps.runs(geometry).for_each(|run| self.fetch_ahead(run, out)),
        }
    }

    fn fetch_ahead(&mut self, wanted: BlockRun, out: &mut Vec<Action>) {
        let most = self.maps.geometry().blocks_in(self.config.max_fetch_bytes);
        let mut at = wanted.start;
        while at < wanted.end && self.ahead_blocks < most.get() {
            let (state, until) = self.look(at, wanted.end.min(at + most.get() - self.ahead_blocks));
            if matches!(state, State::Absent) {
                self.start_fetch(BlockRun::new(at, until), Lane::Ahead, out);
            }
            at = until;
        }
    }

    pub(super) fn hydrate(&mut self, out: &mut Vec<Action>) {
        let max = self.maps.geometry().blocks_in(self.config.max_fetch_bytes);
        match self.planner.next(&self.maps, &self.inflight, max) {
            Next::Fetch(run) => {
                self.start_fetch(run, Lane::Bulk, out);
            }
            Next::Zero(run) => {
                let fetch = self.new_fetch(run, Lane::Bulk);
                self.inflight.give(run, Owner::Storing(fetch));
                self.fetches.get_mut(&fetch).expect("just made").stores = 1;
                out.push(Action::StoreZero { fetch, run });
            }
            Next::Query(run) => out.push(Action::QueryExtents { run }),
            Next::Wait => out.push(Action::HydrationWaits),
            Next::Rest => out.push(Action::HydrationRests),
            Next::Done => out.push(Action::HydrationDone),
        }
    }
}
