//! Knative's pod autoscaler (KPA) on concurrency.
//!
//! After knative/serving `pkg/autoscaler/scaling/autoscaler.go` and `config/core/configmaps/autoscaler.yaml`: each 2 seconds
//! the mean concurrency of 60 s (stable) and of 6 s (panic) over the target per pod; panic begins where the latter is twice what is
//! ready or more, never goes down, and ends 60 s after it was last so; at most 1000 times up and by half down at once; the last pod
//! goes 30 s after nothing is wanted.
use super::{Means, Scaler, Seen};

const TICK: i64 = 2;
/// `panic-window-percentage`, of the stable window.
const PANIC_SHARE: f64 = 0.1;
/// `panic-threshold-percentage`.
const PANIC_THRESHOLD: f64 = 2.0;
const MAX_SCALE_UP_RATE: f64 = 1000.0;
const MAX_SCALE_DOWN_RATE: f64 = 2.0;
/// `scale-to-zero-grace-period`.
const GRACE: i64 = 30;

/// An autoscaler whose `containerConcurrency` is what a replica decodes together.
#[derive(Debug)]
pub struct Knative {
    target: f64,
    window: usize,
    concurrency: Means,
    /// When it last was over the threshold, and the most that was wanted since panic began.
    panic: Option<(i64, u32)>,
    idle_since: Option<i64>,
}

impl Knative {
    /// With this `container-concurrency-target-percentage` (as a share) and this stable window.
    pub fn new(target: f64, window: usize) -> Self {
        Self { target, window, concurrency: Means::new(window), panic: None, idle_since: None }
    }
}

impl Scaler for Knative {
    fn second(&mut self, seen: &Seen<'_>) -> u32 {
        let report = &seen.report;
        self.concurrency.push(report.running + report.waiting + report.held);
        // The activator tells of a request that it holds at once, not at the next tick.
        let woken = seen.asked == 0 && report.held > 0.0;
        if seen.now % TICK != 0 && !woken {
            return seen.asked;
        }
        let per_pod = self.target * f64::from(seen.capacity.sequences);
        let desired = self.desired(seen.ready.len(), per_pod, seen.now);
        if desired > 0 || woken {
            self.idle_since = None;
            return desired.max(1);
        }
        let since = *self.idle_since.get_or_insert(seen.now);
        if seen.now - since >= GRACE { 0 } else { seen.asked.min(1) }
    }
}

impl Knative {
    /// Line by line `autoscaler.Scale`.
    fn desired(&mut self, ready: usize, per_pod: f64, now: i64) -> u32 {
        let pods = ready.max(1) as f64;
        let panic_window = ((self.window as f64 * PANIC_SHARE) as usize).max(1);
        let wanted = |concurrency: f64| (concurrency / per_pod - 1e-9).ceil();
        let (stable, panic) =
            (wanted(self.concurrency.last(self.window)), wanted(self.concurrency.last(panic_window)));
        let most = (MAX_SCALE_UP_RATE * pods).ceil();
        let least = (pods / MAX_SCALE_DOWN_RATE).floor();
        let bounded = |wanted: f64| wanted.max(least).min(most) as u32;
        let over = panic / pods >= PANIC_THRESHOLD;
        let desired = bounded(stable);
        self.panic = match self.panic {
            _ if over => Some((now, self.panic.map_or(0, |(_, most)| most))),
            Some((at, _)) if at + (self.window as i64) < now => None,
            kept => kept,
        };
        match &mut self.panic {
            None => desired,
            Some((_, most)) => {
                *most = desired.max(bounded(panic)).max(*most);
                *most
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Concurrency 10 a pod, as in autoscaler_test.go.
    fn after(seconds: &[(usize, f64)], ready: usize) -> Vec<u32> {
        let mut knative = Knative::new(1.0, 60);
        let mut now = 0;
        let mut desired = Vec::new();
        for &(count, concurrency) in seconds {
            for _ in 0..count {
                now += 1;
                knative.concurrency.push(concurrency);
                desired.push(knative.desired(ready, 10.0, now));
            }
        }
        desired
    }

    #[test]
    fn stable_mode_divides_the_mean_by_the_target() {
        assert_eq!(after(&[(60, 50.0)], 5).last(), Some(&5));
        // From 50 to 100 within a minute: half way after 30 s, and never twice what is ready.
        assert_eq!(after(&[(60, 50.0), (30, 90.0)], 5).last(), Some(&7));
    }

    #[test]
    fn panic_mode_follows_six_seconds_and_does_not_go_down() {
        let desired = after(&[(60, 10.0), (6, 100.0), (66, 10.0)], 1);
        assert_eq!(desired[65], 10);
        // The sixth second after the load is the last whose panic window has some of it; a stable window later it is over.
        assert_eq!(desired[130], 10);
        assert_eq!(desired[131], 1);
    }

    #[test]
    fn down_by_half_at_most() {
        assert_eq!(after(&[(60, 0.0)], 8).last(), Some(&4));
    }
}
