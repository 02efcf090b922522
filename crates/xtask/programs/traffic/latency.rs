//! Latency at a rate: when a request is due, and what is said of how long all of them took.

use std::time::Duration;

/// When the request of this number (of one of so many connections) is due after the beginning, if together they send `rate` a
/// second. It does not move when the answer before is late: what waits for it has waited since then.
pub fn due(number: usize, connection: usize, connections: usize, rate: f64) -> Duration {
    Duration::from_secs_f64((number * connections + connection) as f64 / rate)
}

/// The smallest value that at least this share of all values does not exceed.
pub fn percentile(sorted: &[Duration], share: f64) -> Option<Duration> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_due_evenly_over_all_connections() {
        let all: Vec<u128> =
            (0..2).flat_map(|n| (0..3).map(move |c| due(n, c, 3, 1000.0).as_millis())).collect();
        assert_eq!(all, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let all: Vec<Duration> = (1..=200).map(Duration::from_micros).collect();
        let of = |share| percentile(&all, share).map(|value| value.as_micros());
        assert_eq!((of(0.5), of(0.99), of(1.0), of(0.0)), (Some(100), Some(198), Some(200), Some(1)));
        assert_eq!(percentile(&all[..1], 0.99), Some(all[0]));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
