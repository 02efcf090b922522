//! Tokens a second over the last seconds; the clock is an argument.
use std::time::{Duration, Instant};

/// Seconds that a rate looks back.
pub const WINDOW: u64 = 10;

/// Sums in whole seconds.
#[derive(Clone, Debug)]
pub struct Rate {
    start: Instant,
    /// Second since `start` and its sum, by second modulo the window. The second that is still running is kept too.
    slots: [(u64, u64); WINDOW as usize + 1],
}

impl Rate {
    /// Nothing counted yet.
    pub fn new(now: Instant) -> Self {
        Self { start: now, slots: [(0, 0); WINDOW as usize + 1] }
    }

    /// Counts `amount` now.
    pub fn add(&mut self, now: Instant, amount: u64) {
        let second = self.second(now);
        let slot = &mut self.slots[(second % (WINDOW + 1)) as usize];
        if slot.0 != second {
            *slot = (second, 0);
        }
        slot.1 += amount;
    }

    /// Mean a second over the last [`WINDOW`] whole seconds and the one that is running, or since the start where that
    /// is shorter (but at least one second).
    pub fn per_second(&self, now: Instant) -> f64 {
        let second = self.second(now);
        let sum: u64 = self.slots.iter().filter(|slot| slot.0 + WINDOW >= second).map(|slot| slot.1).sum();
        let elapsed = now.saturating_duration_since(self.start);
        let partial = elapsed - Duration::from_secs(second);
        let span = Duration::from_secs(second.min(WINDOW)) + partial;
        sum as f64 / span.as_secs_f64().max(1.0)
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_secs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, seconds: f64) -> Instant {
        start + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn a_steady_flow_is_its_rate_from_the_first_second_on() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        for tenth in 0..300 {
            rate.add(at(start, f64::from(tenth) / 10.0), 5);
            let seen = rate.per_second(at(start, f64::from(tenth) / 10.0 + 0.1));
            if tenth >= 10 {
                assert!((seen - 50.0).abs() < 1.0, "{seen} at {tenth}");
            }
        }
    }

    #[test]
    fn what_is_older_than_the_window_is_forgotten() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        rate.add(at(start, 0.5), 100);
        assert_eq!(rate.per_second(at(start, 0.6)), 100.0);
        assert_eq!(rate.per_second(at(start, 9.0)), 100.0 / 9.0);
        assert_eq!(rate.per_second(at(start, 11.0)), 0.0);
        rate.add(at(start, 11.5), 20);
        assert_eq!(rate.per_second(at(start, 12.0)), 2.0);
    }
}
