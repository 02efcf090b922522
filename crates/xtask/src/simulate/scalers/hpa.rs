//! Kubernetes' HorizontalPodAutoscaler on a Pods metric.
//!
//! After <https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/> ("Algorithm details", "Configurable
//! scaling behavior") and kubernetes/kubernetes `pkg/controller/podautoscaler/{horizontal,replica_calculator}.go`: each
//! 15 seconds `ceil(current * metric / target)`, nothing within 10 % of the target; pods without a metric count as idle where it
//! would rise and as on target where it would fall, and where that turns the direction, nothing happens; up by at most the larger
//! of 4 pods and 100 % in 15 seconds; down to the most that was recommended in 300 seconds.
use std::collections::{BTreeMap, VecDeque};

use super::{CATCH_UP, Means, Scaler, Seen};

/// `--horizontal-pod-autoscaler-sync-period`.
pub const SYNC: i64 = 15;
const TOLERANCE: f64 = 0.1;
/// `behavior.scaleUp.policies` where none are given: `Pods` 4 and `Percent` 100 in `periodSeconds` 15, `selectPolicy: Max`.
const UP_PODS: u32 = 4;
const UP_PERIOD: i64 = 15;

/// An autoscaler whose metric is, per pod, the share of its measured tokens a second that flows and waits.
#[derive(Debug)]
pub struct Hpa {
    target: f64,
    loads: BTreeMap<u32, Means>,
    behavior: Behavior,
}

impl Hpa {
    /// With this share of the capacity as the target, and `stabilization` seconds before it goes down.
    pub fn new(target: f64, stabilization: i64) -> Self {
        Self { target, loads: BTreeMap::new(), behavior: Behavior::new(stabilization) }
    }
}

impl Scaler for Hpa {
    fn second(&mut self, seen: &Seen<'_>) -> u32 {
        self.loads.retain(|id, _| seen.ready.iter().any(|pod| pod.id == *id));
        for pod in seen.ready {
            let load = pod.busy + pod.waiting * seen.work / CATCH_UP;
            self.loads.entry(pod.id).or_insert_with(|| Means::new(SYNC as usize)).push(load);
        }
        if seen.now % SYNC != 0 {
            return seen.asked;
        }
        let loads: Vec<f64> = self.loads.values().map(|load| load.last(SYNC as usize)).collect();
        let desired = desired(seen.asked, &loads, self.target);
        // Kubernetes does not go below `minReplicas: 1` without a feature gate.
        self.behavior.apply(seen.asked, desired.max(1), seen.now)
    }
}

/// Replicas for the metric of those pods that have one; `current` counts all.
fn desired(current: u32, loads: &[f64], target: f64) -> u32 {
    let missing = (current as usize).saturating_sub(loads.len());
    if loads.is_empty() {
        return current;
    }
    let total: f64 = loads.iter().sum();
    let ratio = total / loads.len() as f64 / target;
    if missing == 0 {
        let wanted = if within(ratio) { current } else { ceil(ratio * loads.len() as f64) };
        return wanted;
    }
    let filled = if ratio < 1.0 { total + missing as f64 * target } else { total };
    let pods = loads.len() + missing;
    let new_ratio = filled / pods as f64 / target;
    let turned = (ratio < 1.0 && new_ratio > 1.0) || (ratio > 1.0 && new_ratio < 1.0);
    if within(new_ratio) || turned {
        return current;
    }
    let wanted = ceil(new_ratio * pods as f64);
    let against = (new_ratio < 1.0 && wanted > current) || (new_ratio > 1.0 && wanted < current);
    if against { current } else { wanted }
}

/// Whether a ratio is so near to 1 that nothing is done.
pub fn within(ratio: f64) -> bool {
    (ratio - 1.0).abs() <= TOLERANCE
}

/// The next whole number.
pub fn ceil(number: f64) -> u32 {
    (number - 1e-9).ceil() as u32
}

/// `spec.behavior` with its defaults: what becomes of a recommendation.
#[derive(Debug)]
pub struct Behavior {
    stabilization: i64,
    recommendations: VecDeque<(i64, u32)>,
    rises: VecDeque<(i64, u32)>,
}

impl Behavior {
    /// Goes down to the most of `stabilization` seconds.
    pub fn new(stabilization: i64) -> Self {
        Self { stabilization, recommendations: VecDeque::new(), rises: VecDeque::new() }
    }

    /// Replicas to ask for where `desired` was computed and `current` are asked for.
    pub fn apply(&mut self, current: u32, desired: u32, now: i64) -> u32 {
        let Self { stabilization, recommendations, rises } = self;
        recommendations.retain(|(at, _)| now - at < *stabilization);
        recommendations.push_back((now, desired));
        let most = recommendations.iter().map(|(_, desired)| *desired).max().unwrap_or(desired);
        let stabilized = if desired < current { most.min(current) } else { desired };
        if stabilized <= current {
            return stabilized;
        }
        rises.retain(|(at, _)| now - at < UP_PERIOD);
        let start = current.saturating_sub(rises.iter().map(|(_, by)| by).sum());
        let limit = (start + UP_PODS).max(start * 2).max(current);
        let replicas = stabilized.min(limit);
        rises.push_back((now, replicas - current));
        replicas
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_follow_the_ratio_as_the_documentation_says() {
        // "if the current metric value is 200m, and the desired value is 100m, the number of replicas will be doubled".
        assert_eq!(desired(3, &[0.2; 3], 0.1), 6);
        // "If the current value is instead 50m, you'll halve the number of replicas".
        assert_eq!(desired(4, &[0.05; 4], 0.1), 2);
        // "skips any scaling action if the ratio is sufficiently close to 1.0 (within a configurable tolerance, 0.1 by default)".
        assert_eq!(desired(5, &[0.109; 5], 0.1), 5);
        assert_eq!(desired(10, &[0.111; 10], 0.1), 12);
    }

    #[test]
    fn pods_without_a_metric_dampen_what_is_done() {
        // Up: the missing two count as idle, so 2 x 200 % are spread over 4: nothing to do.
        assert_eq!(desired(4, &[0.2; 2], 0.1), 4);
        assert_eq!(desired(3, &[0.4], 0.1), 4);
        // Down: the missing ones count as on target.
        assert_eq!(desired(4, &[0.05; 2], 0.1), 3);
        assert_eq!(desired(4, &[], 0.1), 4);
    }

    #[test]
    fn up_by_four_pods_or_twice_in_fifteen_seconds() {
        let mut behavior = Behavior::new(300);
        assert_eq!(behavior.apply(1, 100, 0), 5);
        assert_eq!(behavior.apply(5, 100, 5), 5);
        assert_eq!(behavior.apply(5, 100, 15), 10);
        assert_eq!(behavior.apply(10, 100, 30), 20);
        assert_eq!(behavior.apply(20, 21, 45), 21);
    }

    #[test]
    fn down_to_the_most_of_the_stabilization_window() {
        let mut behavior = Behavior::new(300);
        assert_eq!(behavior.apply(10, 10, 0), 10);
        assert_eq!(behavior.apply(10, 4, 15), 10);
        assert_eq!(behavior.apply(10, 6, 150), 10);
        assert_eq!(behavior.apply(10, 2, 299), 10);
        assert_eq!(behavior.apply(10, 2, 300), 6);
        assert_eq!(behavior.apply(6, 2, 450), 2);
    }
}
