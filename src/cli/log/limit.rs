//! How much of what repeats is said. Pure: the time is told.
//!
//! ```text
//!            said at once            counted                     forgotten
//!   first ──► FEW lines ──► all others ──► period over ──► nothing for a whole period
//!                              ▲              │ one line: how many, and the last of them
//!                              └──────────────┘
//! ```
//!
//! What repeats is told by its place in the code and by its words without digits: an offset or the number of a
//! connection makes no new reason, another error does, and is said although a flood of the first one goes on. Invariant:
//! each line is said or counted, and each count is said.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use log::Level;

/// Lines of a reason that are said one by one.
pub(super) const FEW: u64 = 5;
/// Pace at which what was left out is told.
pub(super) const PERIOD: Duration = Duration::from_secs(60);
/// Reasons that are told apart at one place. A peer may choose the words: what is more counts as one.
const REASONS: usize = 8;
/// Bytes of its words by which a reason is known.
const KNOWN_BY: usize = 256;

/// Where a line comes from: file and line of the code. There are only so many.
pub(super) type Place = (&'static str, u32);

/// What was not said.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LeftOut {
    /// How many lines.
    pub(super) count: u64,
    /// The last one.
    pub(super) last: String,
    /// Its level.
    pub(super) level: Level,
}

#[derive(Debug)]
struct Reason {
    /// `None`: all that came when there was no more room.
    known_by: Option<String>,
    /// When its period began.
    since: Instant,
    /// Lines in this period, and before it while it goes on.
    said: u64,
    /// Those of this period that were not said.
    left_out: Option<LeftOut>,
    /// When it came last.
    last: Instant,
}

/// See the module's page.
#[derive(Debug, Default)]
pub(super) struct Limit {
    places: HashMap<Place, Vec<Reason>>,
}

impl Limit {
    /// May this line be said? If not, it is counted.
    pub(super) fn admit(&mut self, now: Instant, place: Place, level: Level, words: &str) -> bool {
        let reasons = self.places.entry(place).or_default();
        let known_by = without_digits(words);
        let at = reasons.iter().position(|reason| reason.known_by.as_ref() == Some(&known_by)).unwrap_or_else(|| {
            let known_by = (reasons.len() < REASONS).then_some(known_by);
            reasons.iter().position(|reason| reason.known_by.is_none() && known_by.is_none()).unwrap_or_else(|| {
                reasons.push(Reason { known_by, since: now, said: 0, left_out: None, last: now });
                reasons.len() - 1
            })
        });
        let reason = &mut reasons[at];
        reason.last = now;
        if reason.said < FEW {
            reason.said += 1;
            return true;
        }
        let count = reason.left_out.take().map_or(0, |left_out| left_out.count) + 1;
        reason.left_out = Some(LeftOut { count, last: words.to_owned(), level });
        false
    }

    /// What was left out of reasons whose period is over; those that were quiet for one are forgotten.
    pub(super) fn due(&mut self, now: Instant) -> Vec<LeftOut> {
        self.take(|reason| now.duration_since(reason.since) >= PERIOD, now)
    }

    /// All that was left out, whenever it was.
    pub(super) fn rest(&mut self, now: Instant) -> Vec<LeftOut> {
        self.take(|_| true, now)
    }

    /// Is there anything that has been counted and not said?
    pub(super) fn owes(&self) -> bool {
        self.places.values().flatten().any(|reason| reason.left_out.is_some())
    }

    fn take(&mut self, is_over: impl Fn(&Reason) -> bool, now: Instant) -> Vec<LeftOut> {
        let mut told = Vec::new();
        self.places.retain(|_, reasons| {
            reasons.retain_mut(|reason| {
                if !is_over(reason) {
                    return true;
                }
                told.extend(reason.left_out.take());
                reason.since = now;
                now.duration_since(reason.last) < PERIOD
            });
            !reasons.is_empty()
        });
        told
    }
}

fn without_digits(words: &str) -> String {
    words.chars().filter(|letter| !letter.is_ascii_digit()).take(KNOWN_BY).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Place = ("here.rs", 1);
    const THERE: Place = ("here.rs", 2);

    /// What is said, and how much of it was counted instead, with a clock of its own.
    struct Listener {
        limit: Limit,
        now: Instant,
        said: Vec<String>,
    }

    impl Listener {
        fn new() -> Self {
            Self { limit: Limit::default(), now: Instant::now(), said: Vec::new() }
        }

        fn say(&mut self, place: Place, words: &str) {
            let due = self.limit.due(self.now);
            self.hear(due);
            if self.limit.admit(self.now, place, Level::Warn, words) {
                self.said.push(words.to_owned());
            }
        }

        fn hear(&mut self, left_out: Vec<LeftOut>) {
            self.said.extend(left_out.into_iter().map(|left_out| format!("{} {}", left_out.count, left_out.last)));
        }

        fn wait(&mut self, seconds: u64) {
            self.now += Duration::from_secs(seconds);
            let due = self.limit.due(self.now);
            self.hear(due);
        }

        fn heard(&mut self) -> Vec<String> {
            std::mem::take(&mut self.said)
        }
    }

    #[test]
    fn the_first_few_are_said_and_then_their_number_once_a_period() {
        let mut log = Listener::new();
        (0..1000).for_each(|at| log.say(HERE, &format!("cannot read at {at}")));
        let first: Vec<String> = (0..FEW).map(|at| format!("cannot read at {at}")).collect();
        assert_eq!(log.heard(), first);
        log.wait(30);
        (0..10).for_each(|at| log.say(HERE, &format!("cannot read at {at}")));
        log.wait(29);
        assert!(log.heard().is_empty());
        log.wait(1);
        assert_eq!(log.heard(), ["1005 cannot read at 9"]);
        // It goes on: nothing but its number.
        log.say(HERE, "cannot read at 8");
        log.wait(30);
        log.say(HERE, "cannot read at 9");
        log.wait(30);
        assert_eq!(log.heard(), ["2 cannot read at 9"]);
        // It is quiet for a period: what comes then is news.
        log.wait(60);
        log.say(HERE, "cannot read at 7");
        assert_eq!(log.heard(), ["cannot read at 7"]);
        assert!(!log.limit.owes());
    }

    #[test]
    fn a_few_now_and_then_are_all_said() {
        let mut log = Listener::new();
        for _ in 0..100 {
            (0..3).for_each(|_| log.say(HERE, "connection 1 lost"));
            log.wait(120);
        }
        assert_eq!(log.heard().len(), 300);
        assert!(log.limit.places.is_empty(), "nothing is kept of what is over");
    }

    #[test]
    fn another_reason_or_place_is_said_in_the_middle_of_a_flood() {
        let mut log = Listener::new();
        (0..100).for_each(|_| log.say(HERE, "cannot store: no space"));
        log.heard();
        log.say(HERE, "cannot store: input/output error");
        log.say(THERE, "cannot store: no space");
        assert_eq!(log.heard(), ["cannot store: input/output error", "cannot store: no space"]);
        let rest = log.limit.rest(log.now);
        log.hear(rest);
        assert_eq!(log.heard(), ["95 cannot store: no space"]);
        assert!(!log.limit.owes());
    }

    #[test]
    fn words_that_a_peer_chooses_do_not_make_it_say_or_keep_more() {
        let mut log = Listener::new();
        let name = |n: u32| (0..20).map(|bit| if n >> bit & 1 == 0 { 'a' } else { 'b' }).collect::<String>();
        for n in 0..100_000 {
            log.say(HERE, &format!("no export {}{}", name(n), "x".repeat(1000)));
        }
        // One each of those that are told apart, and a few of all others.
        let said = log.heard().len() as u64;
        assert_eq!(said, REASONS as u64 + FEW);
        assert_eq!(log.limit.places[&HERE].len(), REASONS + 1);
        let rest = log.limit.rest(log.now);
        assert_eq!(rest.iter().map(|left_out| left_out.count).sum::<u64>(), 100_000 - said);
    }

    #[test]
    fn each_line_is_said_or_counted_whatever_comes_when() {
        let mut log = Listener::new();
        let (mut rng, mut lines) = (fastrand::Rng::with_seed(3), 0);
        for _ in 0..20_000 {
            match rng.u64(..50) {
                0 => log.wait(rng.u64(..100)),
                _ => {
                    log.say([HERE, THERE][rng.usize(..2)], ["a", "b", "c"][rng.usize(..3)]);
                    lines += 1;
                }
            }
        }
        let rest = log.limit.rest(log.now);
        log.hear(rest);
        let number = |said: &String| said.split_once(' ').map_or(1, |(count, _)| count.parse::<u64>().unwrap());
        assert_eq!(log.heard().iter().map(number).sum::<u64>(), lines);
    }
}
