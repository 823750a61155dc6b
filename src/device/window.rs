//! How much hydration asks the source for at a time: enough to fill the link, and not so many that whoever wants
//! one of their blocks waits for all that is ahead of it, or that the source is busy with them when somebody waits.
//!
//! By Little's law a link on which `n` bytes are under way and each takes `t` delivers `n / t` of them a second. What
//! takes longer than the fastest fetch has stood in a queue, and a short queue is enough: so as much is to be under way
//! as would take the fastest one's time and a little more. The fastest time is looked for again from time to time, with next
//! to nothing under way: links change. (The idea is that of TCP Vegas, and the probe that of BBR.)
//!
//! It begins with what a link of 1 Gbit/s holds in a round trip: a long link must be filled in its first one, and what has
//! been asked for of a slow one cannot be taken back when it turns out what the guest needs. While none takes much longer
//! than the fastest it grows by what has come, twofold in a round trip. Where little is to be fetched at all it begins with
//! all that there is room for.
//!
//! What somebody waits for, and what is read ahead for them, comes first: connections share a link, so while much of that
//! is under way hydration asks for less, or for nothing. A few small reads do not slow it down.

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::fetch_bytes::{MAX_FETCH_BYTES, SMALL_FETCH_BYTES};
use crate::engine::Lane;

/// How much longer than the fastest fetch one may take, at least: a link that stutters must not run dry.
const QUEUE: Duration = Duration::from_millis(40);
/// The same, as a part of what the fastest takes.
const QUEUE_PART: u32 = 3;
/// The same, as a multiple of what of the fastest is no round trip. Two that come at the same time on two connections take
/// twice as long to come, and none stands in a queue.
const QUEUE_COMING: f64 = 1.5;
/// So many bytes always.
const LEAST: u64 = 2 << 20;
/// What a link is taken for at first, in bytes a second.
const AT_FIRST: u64 = 125_000_000;
/// How long the fastest time is believed in.
const BELIEVED: Duration = Duration::from_secs(30);

/// A byte of others stands in the place of so many of hydration's.
const FRONT_WEIGHT: u64 = 8;

/// A fetch that has been asked for.
pub(super) enum Flight {
    /// For somebody who waits, or will.
    Front { bytes: u64 },
    /// For hydration; `flying` bytes with its own.
    Bulk { at: Instant, bytes: u64, flying: u64 },
}

/// See the module's page.
pub(super) struct Window {
    limit: u64,
    most: Cell<u64>,
    flying: Cell<u64>,
    round_trip: Cell<Option<Duration>>,
    front_bytes: Cell<u64>,
    fastest: Cell<Option<Fastest>>,
    /// When the first one ended well.
    began: Cell<Option<Instant>>,
    /// The fastest time is being looked for again.
    probing: Cell<bool>,
}

#[derive(Clone, Copy)]
struct Fastest {
    took: Duration,
    at: Instant,
}

impl Window {
    /// Of at most so many bytes.
    pub(super) fn new(limit: u64) -> Self {
        let limit = limit.max(LEAST);
        Self {
            limit,
            most: Cell::new(limit),
            flying: Cell::new(0),
            round_trip: Cell::new(None),
            front_bytes: Cell::new(0),
            fastest: Cell::new(None),
            began: Cell::new(None),
            probing: Cell::new(false),
        }
    }

    /// Nothing has been asked for yet, and the source's round trip is this.
    pub(super) fn begin(&self, round_trip: Duration) {
        let holds = (AT_FIRST as f64 * round_trip.as_secs_f64()) as u64;
        self.most.set(self.limit.min(LEAST + holds));
        self.round_trip.set(Some(round_trip));
    }

    /// May hydration ask for one more?
    pub(super) fn has_room(&self) -> bool {
        // A few small reads take no room.
        let front = (self.front_bytes.get() * FRONT_WEIGHT) / MAX_FETCH_BYTES * MAX_FETCH_BYTES;
        self.flying.get() + front < if self.probing.get() { LEAST } else { self.most.get() }
    }

    pub(super) fn depart(&self, lane: Lane, bytes: u64, now: Instant) -> Flight {
        if lane != Lane::Bulk {
            self.front_bytes.set(self.front_bytes.get() + bytes);
            return Flight::Front { bytes };
        }
        let bytes = bytes.max(SMALL_FETCH_BYTES);
        self.flying.set(self.flying.get() + bytes);
        Flight::Bulk { at: now, bytes, flying: self.flying.get() }
    }

    /// It has ended, `well` if its data is here.
    pub(super) fn arrive(&self, flight: &Flight, now: Instant, well: bool) {
        let (at, bytes, flying) = match *flight {
            Flight::Front { bytes } => return self.front_bytes.set(self.front_bytes.get() - bytes),
            Flight::Bulk { at, bytes, flying } => (at, bytes, flying),
        };
        self.flying.set(self.flying.get() - bytes);
        if !well {
            return;
        }
        let took = now.saturating_duration_since(at).max(Duration::from_micros(1));
        let fastest = self.fastest(took, flying - bytes, now);
        let coming = self.round_trip.get().map_or(Duration::ZERO, |round_trip| fastest.saturating_sub(round_trip));
        let wanted = fastest + QUEUE.max(fastest / QUEUE_PART).max(coming.mul_f64(QUEUE_COMING));
        let began = self.began.get().unwrap_or(now);
        self.began.set(Some(began));
        if took > wanted {
            // Those of the beginning were asked for at once, of an idle link: each took the time of those before it.
            let (bytes_ahead, for_them) = if at < began { (flying - bytes, took - fastest) } else { (flying, took) };
            let as_much = (bytes_ahead as f64 * wanted.as_secs_f64() / for_them.as_secs_f64()) as u64;
            self.most.set(self.most.get().min(as_much).max(LEAST));
        } else if flying >= self.most.get() || at < began {
            self.most.set(self.limit.min(self.most.get() + bytes));
        }
    }

    /// What the fastest takes, now that one took this.
    fn fastest(&self, took: Duration, ahead: u64, now: Instant) -> Duration {
        let before = self.fastest.get();
        // With no more than the least ahead of it: what it took is what the link takes.
        let proves = self.probing.get() && ahead < LEAST;
        if proves || before.is_none_or(|before| took <= before.took) {
            self.probing.set(false);
            self.fastest.set(Some(Fastest { took, at: now }));
            return took;
        }
        let before = before.expect("there is one");
        if now.saturating_duration_since(before.at) > BELIEVED {
            self.probing.set(true);
        }
        before.took
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link in simulated time: fetches of one size, one after the other.
    struct Link {
        window: Window,
        fetch_bytes: u64,
        start: Instant,
        now_ms: f64,
        free_ms: f64,
        flights: std::collections::VecDeque<(Flight, f64)>,
    }

    impl Link {
        fn new(limit: u64) -> Self {
            let flights = std::collections::VecDeque::new();
            Self {
                window: Window::new(limit),
                fetch_bytes: 1 << 20,
                start: Instant::now(),
                now_ms: 0.0,
                free_ms: 0.0,
                flights,
            }
        }

        fn at(&self, ms: f64) -> Instant {
            self.start + Duration::from_secs_f64(ms / 1000.0)
        }

        /// Fetches of which each takes the link for so long; returns how much of the time it was taken.
        fn run(&mut self, fetches: usize, fetch_ms: f64, rtt_ms: f64) -> f64 {
            let (began_ms, mut taken_ms) = (self.now_ms, 0.0);
            for _ in 0..fetches {
                while self.window.has_room() {
                    self.free_ms = f64::max(self.free_ms, self.now_ms + rtt_ms) + fetch_ms;
                    let flight = self.window.depart(Lane::Bulk, self.fetch_bytes, self.at(self.now_ms));
                    self.flights.push_back((flight, self.free_ms));
                }
                let (flight, arrives_ms) = self.flights.pop_front().unwrap();
                self.now_ms = arrives_ms;
                taken_ms += fetch_ms;
                self.window.arrive(&flight, self.at(self.now_ms), true);
            }
            taken_ms / (self.now_ms - began_ms)
        }
    }

    #[test]
    fn a_link_is_filled_and_not_crammed() {
        // A mebibyte at 1 Gbit/s, 100 Mbit/s, 10 Mbit/s.
        for (fetch_ms, rtt_ms, least, most) in [
            (8.4, 0.0, 4, 7),
            (8.4, 20.0, 6, 10),
            (8.4, 150.0, 20, 24),
            (84.0, 0.0, 2, 3),
            (84.0, 50.0, 2, 4),
            (84.0, 150.0, 3, 6),
            (840.0, 50.0, 2, 3),
        ] {
            let mut link = Link::new(24 << 20);
            link.run(100, fetch_ms, rtt_ms);
            let taken = link.run(400, fetch_ms, rtt_ms);
            let flying = link.flights.len() + 1;
            assert!((least..=most).contains(&flying), "{fetch_ms} ms, RTT {rtt_ms}: {flying} under way");
            assert!(taken > 0.97, "{fetch_ms} ms, RTT {rtt_ms}: only {taken} of the link");
        }
    }

    /// As one that begins with all that there is room for fills it, but for the second round trip of a very fast one.
    #[test]
    fn a_link_is_filled_from_the_beginning_with_little_more_than_it_holds() {
        for (fetch_ms, rtt_ms, most, share) in [
            (8.4, 1.0, 3, 0.99),
            (8.4, 20.0, 5, 0.99),
            (8.4, 150.0, 20, 0.98),
            (84.0, 50.0, 8, 0.99),
            (840.0, 50.0, 8, 0.99),
            (0.84, 5.0, 3, 0.9),
        ] {
            let fill = |begins: bool| {
                let mut link = Link::new(24 << 20);
                if begins {
                    link.window.begin(Duration::from_secs_f64(rtt_ms / 1000.0));
                }
                link.run(1, fetch_ms, rtt_ms);
                let at_first = link.flights.len() + 1;
                link.run(99, fetch_ms, rtt_ms);
                (at_first, link.now_ms)
            };
            let ((all, best_ms), (at_first, took_ms)) = (fill(false), fill(true));
            assert_eq!(all, 24);
            assert!(at_first <= most, "{fetch_ms} ms, RTT {rtt_ms}: {at_first} at once");
            assert!(best_ms / took_ms > share, "{fetch_ms} ms, RTT {rtt_ms}: {took_ms} ms, {best_ms} at best");
        }
    }

    /// Two connections, of which each has an even share of the link while it has something to send. Two fetches at a time
    /// take longer than one, although nothing stands in a queue.
    fn share_of_link_with_two_connections(fetches: usize, fetch_ms: f64, rtt_ms: f64) -> f64 {
        let window = Window::new(24 << 20);
        let start = Instant::now();
        let at = |ms: f64| start + Duration::from_secs_f64(ms / 1000.0);
        window.begin(Duration::from_secs_f64(rtt_ms / 1000.0));
        // Of each connection: what was asked for when, from when on it can be sent, and how much of it is left.
        let mut connections: [std::collections::VecDeque<(Flight, f64, f64)>; 2] = Default::default();
        let (mut now_ms, mut arrived, step_ms) = (0.0, 0, fetch_ms / 100.0);
        while arrived < fetches {
            while window.has_room() {
                // The second one comes up a little later.
                let has_second = window.flying.get() + (3 << 20) > window.most.get();
                let least = usize::from(has_second && connections[1].len() < connections[0].len());
                let flight = window.depart(Lane::Bulk, 1 << 20, at(now_ms));
                connections[least].push_back((flight, now_ms + rtt_ms, fetch_ms));
            }
            now_ms += step_ms;
            let has_data = |queue: &std::collections::VecDeque<(Flight, f64, f64)>| {
                queue.front().is_some_and(|(_, ready_ms, _)| *ready_ms <= now_ms)
            };
            let busy = connections.iter().filter(|queue| has_data(queue)).count() as f64;
            for queue in connections.iter_mut().filter(|queue| has_data(queue)) {
                let (_, _, left_ms) = queue.front_mut().unwrap();
                *left_ms -= step_ms / busy;
                if *left_ms < step_ms / 1000.0 {
                    let (flight, _, _) = queue.pop_front().unwrap();
                    window.arrive(&flight, at(now_ms), true);
                    arrived += 1;
                }
            }
        }
        fetches as f64 * fetch_ms / (now_ms - rtt_ms)
    }

    #[test]
    fn two_connections_fill_a_link_as_well() {
        for (fetch_ms, rtt_ms) in [
            (8.4, 1.0),
            (8.4, 20.0),
            (8.4, 150.0),
            (84.0, 1.0),
            (84.0, 20.0),
            (84.0, 50.0),
            (84.0, 100.0),
            (84.0, 150.0),
        ] {
            let share = share_of_link_with_two_connections(256, fetch_ms, rtt_ms);
            assert!(share > 0.985, "{fetch_ms} ms, RTT {rtt_ms}: only {share} of the link");
        }
    }

    #[test]
    fn a_link_that_becomes_longer_is_filled_again() {
        let mut link = Link::new(24 << 20);
        link.run(500, 8.4, 10.0);
        // Three minutes later it has found out, whatever it thought in between.
        link.run(20_000, 8.4, 120.0);
        let taken = link.run(10_000, 8.4, 120.0);
        assert!(taken > 0.97, "only {taken} of the link");
    }

    /// Of fetches that are no whole part of what is the least, a little more than that is under way while it is looked
    /// for.
    #[test]
    fn the_fastest_time_is_found_again_with_fetches_of_any_size() {
        for fetch_bytes in [1 << 20, (1 << 20) - 4096, 700 << 10, 64 << 10] {
            let mut link = Link::new(24 << 20);
            link.fetch_bytes = fetch_bytes;
            let fetch_ms = 8.4 * fetch_bytes as f64 / (1 << 20) as f64;
            link.run(500, fetch_ms, 10.0);
            let three_minutes = (180_000.0 / fetch_ms) as usize;
            link.run(three_minutes, fetch_ms, 120.0);
            let taken = link.run(three_minutes, fetch_ms, 120.0);
            assert!(taken > 0.9, "{fetch_bytes} bytes: only {taken} of the link");
        }
    }

    #[test]
    fn what_failed_says_nothing_and_a_stall_is_got_over() {
        let window = Window::new(8 << 20);
        let start = Instant::now();
        let fly = |took_ms: u64, well| {
            let flight = window.depart(Lane::Bulk, 1 << 20, start);
            window.arrive(&flight, start + Duration::from_millis(took_ms), well);
        };
        fly(10, true);
        fly(60_000, false);
        assert_eq!(window.most.get(), 8 << 20);
        fly(20_000, true);
        assert_eq!(window.most.get(), LEAST);
        for _ in 0..20 {
            let flights: Vec<Flight> =
                (0..window.most.get() >> 20).map(|_| window.depart(Lane::Bulk, 1 << 20, start)).collect();
            flights.iter().for_each(|flight| window.arrive(flight, start + Duration::from_millis(20), true));
        }
        assert_eq!((window.most.get(), window.flying.get()), (8 << 20, 0));
    }

    #[test]
    fn who_waits_comes_first() {
        let (window, now) = (Window::new(LEAST), Instant::now());
        let small: Vec<Flight> = (0..16).map(|_| window.depart(Lane::Demand, 4096, now)).collect();
        assert!(window.has_room(), "small reads take no place");
        let ahead = window.depart(Lane::Ahead, 512 << 10, now);
        assert!(!window.has_room());
        small.iter().chain([&ahead]).for_each(|flight| window.arrive(flight, now, false));
        assert!(window.has_room());
    }
}
