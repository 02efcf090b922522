//! KEDA: from and to zero by its own operator, from one up by an HPA on an external metric.
//!
//! After <https://keda.sh/docs/latest/reference/scaledobject-spec/> and <https://keda.sh/docs/latest/concepts/scaling-deployments/>:
//! `pollingInterval` 30 s and `cooldownPeriod` 300 s hold for 0 and 1 alone; from 1 to n an HPA asks KEDA's metrics server with
//! `metricType: AverageValue`, that is `ceil(total / target)`.
use super::hpa::{Behavior, SYNC, ceil, within};
use super::{CATCH_UP, Means, Scaler, Seen};

const POLLING_INTERVAL: i64 = 30;
const COOLDOWN_PERIOD: i64 = 300;

/// A ScaledObject whose trigger is, summed over the service, the replicas' worth of tokens that flow and wait.
#[derive(Debug)]
pub struct Keda {
    target: f64,
    load: Means,
    behavior: Behavior,
    last_active: i64,
}

impl Keda {
    /// With this share of a replica's capacity as the target, and `stabilization` seconds before its HPA goes down.
    pub fn new(target: f64, stabilization: i64) -> Self {
        let (load, behavior) = (Means::new(SYNC as usize), Behavior::new(stabilization));
        Self { target, load, behavior, last_active: 0 }
    }
}

impl Scaler for Keda {
    fn second(&mut self, seen: &Seen<'_>) -> u32 {
        let flows: f64 = seen.ready.iter().map(|pod| pod.busy).sum();
        let waits = seen.report.waiting + seen.report.held;
        self.load.push(flows + waits * seen.work / CATCH_UP);
        let load = self.load.last(SYNC as usize);
        if seen.now % POLLING_INTERVAL == 0 {
            let active = load > 0.0;
            if active {
                self.last_active = seen.now;
            }
            if active && seen.asked == 0 {
                return 1;
            }
            if !active && seen.now - self.last_active >= COOLDOWN_PERIOD {
                return 0;
            }
        }
        // The HPA does nothing at zero.
        if seen.asked == 0 || seen.now % SYNC != 0 {
            return seen.asked;
        }
        let desired = match within(load / (self.target * f64::from(seen.asked))) {
            true => seen.asked,
            false => ceil(load / self.target).max(1),
        };
        self.behavior.apply(seen.asked, desired, seen.now)
    }
}

#[cfg(test)]
mod tests {
    use lathe_scaling::Report;

    use super::super::super::replica::SERVER;
    use super::super::super::service::Pod;
    use super::*;

    fn seen(now: i64, asked: u32, held: f64, ready: &[Pod]) -> Seen<'_> {
        let report = Report { held, ..Report::default() };
        Seen {
            now,
            report,
            asked,
            draining: 0,
            start_up: 5,
            ready,
            capacity: SERVER.capacity(),
            work: 0.3,
            load: 0.0,
        }
    }

    #[test]
    fn a_held_request_is_seen_at_the_next_poll() {
        let mut keda = Keda::new(0.7, 300);
        let asked: Vec<u32> = (1..=30).map(|now| keda.second(&seen(now, 0, 1.0, &[]))).collect();
        assert_eq!(asked[..29], [0; 29]);
        assert_eq!(asked[29], 1);
    }

    #[test]
    fn the_last_replica_goes_after_the_cooldown() {
        let mut keda = Keda::new(0.7, 300);
        let busy = [Pod { id: 0, busy: 0.5, waiting: 0.0 }];
        let idle = [Pod { id: 0, busy: 0.0, waiting: 0.0 }];
        (1..=30).for_each(|now| assert_eq!(keda.second(&seen(now, 1, 0.0, &busy)), 1));
        let gone = (31..).find(|now| keda.second(&seen(*now, 1, 0.0, &idle)) == 0);
        assert_eq!(gone, Some(330));
    }

    #[test]
    fn the_total_is_divided_by_the_target() {
        let mut keda = Keda::new(0.5, 300);
        let pods = [Pod { id: 0, busy: 0.9, waiting: 0.0 }, Pod { id: 1, busy: 0.9, waiting: 0.0 }];
        let asked = (1..=15).map(|now| keda.second(&seen(now, 2, 0.0, &pods))).last();
        assert_eq!(asked, Some(4));
    }
}
