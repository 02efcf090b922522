//! How long to wait before trying again.
use std::time::Duration;

/// Exponential back-off with jitter.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// Tries after the first one, without progress between them.
    pub retries: u32,
    /// The longest wait before the first retry.
    pub first: Duration,
    /// The longest wait before any.
    pub longest: Duration,
}

/// A server's `Retry-After` is obeyed up to here.
const MAX_TOLD: Duration = Duration::from_secs(300);

impl Default for Retry {
    /// Seven retries over about a minute.
    fn default() -> Self {
        Self { retries: 7, first: Duration::from_millis(500), longest: Duration::from_secs(30) }
    }
}

impl Retry {
    /// The wait before retry number `retry` (from 0); `None` when there shall be no further one.
    ///
    /// It lies between half of `min(longest, first * 2^retry)` and the whole of it, chosen by `seed`, so that many
    /// readers of one server do not come back together; `told` (`Retry-After`) makes it longer.
    pub fn delay(&self, retry: u32, seed: u64, told: Option<Duration>) -> Option<Duration> {
        if retry >= self.retries {
            return None;
        }
        let whole = self.first.saturating_mul(1u32.checked_shl(retry).unwrap_or(u32::MAX)).min(self.longest);
        let share = (mix(seed ^ u64::from(retry)) >> 11) as f64 / (1u64 << 53) as f64;
        let delay = whole.mul_f64(0.5 + share / 2.0);
        Some(delay.max(told.unwrap_or_default().min(MAX_TOLD)))
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): even bits from a counter.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_stay_in_bounds_and_end() {
        let retry = Retry { retries: 40, first: Duration::from_secs(1), longest: Duration::from_secs(20) };
        for n in 0..40 {
            let whole = Duration::from_secs(20).min(Duration::from_secs(1u64 << n.min(10)));
            for seed in 0..50 {
                let delay = retry.delay(n, seed, None).unwrap();
                assert!(delay >= whole / 2 && delay <= whole, "{n} {seed} {delay:?}");
            }
        }
        assert_eq!(retry.delay(40, 0, None), None);
    }

    #[test]
    fn the_server_may_ask_for_more_but_not_for_a_day() {
        let retry = Retry::default();
        assert_eq!(retry.delay(0, 1, Some(Duration::from_secs(9))), Some(Duration::from_secs(9)));
        assert_eq!(retry.delay(0, 1, Some(Duration::from_secs(86400))), Some(MAX_TOLD));
    }

    #[test]
    fn seeds_differ() {
        let retry = Retry::default();
        assert_ne!(retry.delay(3, 1, None), retry.delay(3, 2, None));
        assert_eq!(retry.delay(3, 1, None), retry.delay(3, 1, None));
    }
}
