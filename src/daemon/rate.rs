//! How fast blocks become present, lately.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How far back "lately" goes.
const WINDOW: Duration = Duration::from_secs(10);

/// A moving average over samples of a growing count.
#[derive(Debug, Default)]
pub(super) struct RateMeter {
    samples: VecDeque<(Instant, u64)>,
}

impl RateMeter {
    pub(super) fn sample(&mut self, now: Instant, bytes: u64) {
        self.samples.push_back((now, bytes));
        while self.samples.len() > 2 && self.samples.front().is_some_and(|(at, _)| now.duration_since(*at) > WINDOW) {
            self.samples.pop_front();
        }
    }

    /// Bytes a second.
    pub(super) fn rate(&self) -> f64 {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else { return 0.0 };
        let seconds = last.0.duration_since(first.0).as_secs_f64();
        if seconds > 0.0 { last.1.saturating_sub(first.1) as f64 / seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_samples_do_not_count() {
        let mut meter = RateMeter::default();
        let start = Instant::now();
        for second in 0..30 {
            let bytes = if second < 15 { 0 } else { (second - 15) * 100 };
            meter.sample(start + Duration::from_secs(second), bytes);
        }
        assert!((meter.rate() - 100.0).abs() < 1.0, "{}", meter.rate());
    }
}
