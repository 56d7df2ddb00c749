//! A time budget for a token: how deep it may go and still be done in time.
//!
//! Generating reads every weight that a token passes once, so time follows bytes. The rate is
//! measured while the token runs; before each recursion it is asked whether that recursion and all
//! that must come after it (own last layers, logits) still fit.

#[cfg(feature = "cuda")]
use super::forward::Settings;
#[cfg(feature = "cuda")]
use crate::model::Model;
use std::time::{Duration, Instant};

/// The budget and what is known of this machine's speed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pace {
    pub budget: Option<Duration>,
    /// 0 before the first measurement.
    seconds_per_byte: f64,
}

#[cfg(feature = "cuda")]
impl Pace {
    /// For a token whose recursions run without a stop: the depth that is done in time by the speed
    /// measured so far, at least one recursion and, before any measurement, no more.
    pub fn limited(&self, model: &Model, settings: Settings) -> Settings {
        let Some(budget) = self.budget else {
            return settings;
        };
        let in_time = |depth| {
            let known = self.seconds_per_byte > 0.0;
            known && self.seconds_per_byte * bytes_to(model, depth) <= budget.as_secs_f64()
        };
        let mut limited = settings;
        while limited.depth_limit > 1 && !in_time(limited.depth_limit) {
            limited.depth_limit -= 1;
        }
        limited
    }

    /// Learns from a token that ran so deep and took so long, as [`Clock::lap`].
    pub fn learn(&mut self, model: &Model, depth: u8, time: Duration) {
        if self.budget.is_some() {
            let rate = time.as_secs_f64() / bytes_to(model, usize::from(depth));
            self.seconds_per_byte = rate.max(0.9 * self.seconds_per_byte + 0.1 * rate);
        }
    }
}

/// Bytes of weights that a token reads on its way through so many recursions.
#[cfg(feature = "cuda")]
fn bytes_to(model: &Model, depth: usize) -> f64 {
    let schedule = model.schedule();
    let within = schedule.stages.iter().filter(|s| s.recursion < depth);
    let block: u64 = within.map(|s| model.run_bytes(&s.runs)).sum();
    (model.run_bytes(&schedule.prelude) + block + model.tail_bytes()) as f64
}

/// One token's clock.
pub(crate) struct Clock<'a> {
    pace: &'a mut Pace,
    end: Option<Instant>,
    last: Instant,
    /// Bytes of what runs after the recursions.
    tail: u64,
}

impl<'a> Clock<'a> {
    /// Starts now; nothing when there is no budget. `tail`: bytes of what runs after the recursions.
    pub fn start(pace: &'a mut Pace, tail: u64) -> Option<Self> {
        let (budget, last) = (pace.budget?, Instant::now());
        Some(Clock {
            pace,
            // A time that no clock can show is no limit.
            end: last.checked_add(budget),
            last,
            tail,
        })
    }

    /// Work on so many bytes of weights is done: what it took is learned. A slower rate is
    /// believed at once, a faster one slowly, for a budget that is missed costs more than a
    /// recursion left out.
    pub fn lap(&mut self, bytes: u64) {
        let now = Instant::now();
        let time = now.duration_since(self.last).as_secs_f64();
        self.last = now;
        if bytes > 0 {
            let rate = time / bytes as f64;
            let known = self.pace.seconds_per_byte;
            self.pace.seconds_per_byte = rate.max(0.9 * known + 0.1 * rate);
        }
    }

    /// Whether nothing was ever measured.
    pub fn is_new(&self) -> bool {
        self.pace.seconds_per_byte == 0.0
    }

    /// Whether work on so many more bytes, and the tail, will be done in time. Without any
    /// measurement nothing is promised.
    pub fn allows(&self, bytes: u64) -> bool {
        let Some(end) = self.end else { return true };
        if self.is_new() {
            return false;
        }
        let needed = self.pace.seconds_per_byte * (bytes + self.tail) as f64;
        let left = end.saturating_duration_since(Instant::now());
        needed <= left.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_allows_what_the_measured_rate_says() {
        let mut pace = Pace::default();
        assert!(Clock::start(&mut pace, 10).is_none());
        pace.budget = Some(Duration::from_secs(1000));
        let clock = Clock::start(&mut pace, 100).unwrap();
        assert!(!clock.allows(1), "nothing is known yet");
        // A second a byte: 1000 seconds are enough for 850 bytes and the tail of 100, with 50 to
        // spare for a busy machine; not for 950 and the tail.
        pace.seconds_per_byte = 1.0;
        let mut clock = Clock::start(&mut pace, 100).unwrap();
        assert!(clock.allows(850));
        assert!(!clock.allows(950));
        // Faster laps lower the rate slowly: to 0.9 of it and a crumb.
        clock.lap(1 << 40);
        assert!((0.89..0.91).contains(&pace.seconds_per_byte));
        pace.budget = Some(Duration::MAX);
        assert!(Clock::start(&mut pace, 100).unwrap().allows(u64::MAX / 2));
    }
}
