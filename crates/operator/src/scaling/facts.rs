//! Pure: what a decision is made from, beside what flows.
use std::borrow::Borrow;

use jiff::Timestamp;
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::ResourceExt as _;
use lathe_api::{Autoscaling, CapacityStatus, MAX_REPLICAS, names};
use lathe_scaling::{Capacity, Policy, Seconds};

use super::SCALED;
use crate::{inference, pods};

/// Longest start that is believed, in seconds: a pod that waited for a device for hours does not tell how long the next one takes.
const LONGEST_START: i64 = 1800;
/// Seconds after which a pod whose time to end is over is not waited for: its node is gone, or somebody's finalizer holds it.
const LOST: i64 = 30;

/// What the user asks for.
pub fn policy(autoscaling: &Autoscaling) -> Policy {
    let count = |number: i32| u32::try_from(number).unwrap_or(0);
    Policy {
        min_replicas: count(autoscaling.min_replicas),
        max_replicas: count(autoscaling.max_replicas),
        target_throughput_percent: count(autoscaling.target_throughput_percent),
        // The schema has checked it; what came another way waits as long as the default.
        scale_down_after: autoscaling.scale_down_after.seconds().unwrap_or(300),
        scale_to_zero_after: autoscaling.sleeps_after(),
    }
}

/// A capacity as the status has it.
pub fn capacity(told: &CapacityStatus) -> Option<Capacity> {
    let rate = |text: &str| text.parse::<f64>().ok();
    Some(Capacity {
        prompt: rate(&told.prompt)?,
        generation: rate(&told.generation)?,
        sequences: u32::try_from(told.sequences).ok()?,
    })
}

/// Whether what replicas of this revision measured holds for a service: they are those that its Deployment asks for, or some of
/// them answer still.
pub fn holds(revision: &str, deployment: Option<&Deployment>, pods: &[impl Borrow<Pod>]) -> bool {
    let is = |checksum: Option<&str>| checksum.is_some_and(|checksum| names::revision(checksum) == revision);
    let of = |pod: &Pod| is(pods::checksum(Some(&pod.metadata)));
    is(deployment.and_then(inference::revision))
        || pods.iter().map(Borrow::borrow).any(|pod| pods::is_ready(pod) && of(pod))
}

/// Whether every pod is of the revision that the Deployment asks for, also of those that finish what they have.
pub fn are_of_one_revision(deployment: &Deployment, pods: &[&Pod]) -> bool {
    let revision = inference::revision(deployment);
    pods.iter().filter(|pod| !pods::is_over(pod)).all(|pod| pods::is_of(pod, revision))
}

/// Replicas that were asked for: what the scaler set last, whatever somebody else has made of it.
pub fn asked(deployment: &Deployment) -> u32 {
    let set = deployment.annotations().get(SCALED).and_then(|set| set.parse().ok());
    let is = || deployment.spec.as_ref()?.replicas.and_then(|is| u32::try_from(is).ok());
    // The status has no room for more, whatever somebody wrote there.
    set.or_else(is).unwrap_or(1).min(MAX_REPLICAS.unsigned_abs())
}

/// Pods that take requests.
pub fn ready(pods: &[&Pod]) -> u32 {
    pods.iter().filter(|pod| pods::is_ready(pod)).count() as u32
}

/// Pods that take nothing new and finish what they have.
pub fn draining(pods: &[&Pod], now: Seconds) -> u32 {
    let goes =
        |pod: &&&Pod| pod.metadata.deletion_timestamp.is_some() && !pods::is_over(pod) && !is_lost(pod, now);
    pods.iter().filter(goes).count() as u32
}

/// Tells these pods, and the runs of their containers, from all others.
pub fn which(pods: &[Pod]) -> String {
    let restarts = |pod: &Pod| -> i32 {
        let status = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
        status.into_iter().flatten().map(|container| container.restart_count).sum()
    };
    let mut all: Vec<(Option<String>, i32)> = pods.iter().map(|pod| (pod.uid(), restarts(pod))).collect();
    all.sort();
    names::revision(&lathe_resolve::pod::checksum(&all).unwrap_or_default())
}

/// Whether a pod should have ended a while ago: what it is deleted at includes the time that it has for it.
pub fn is_lost(pod: &Pod, now: Seconds) -> bool {
    pod.metadata.deletion_timestamp.as_ref().is_some_and(|end| end.0.as_second() + LOST < now)
}

/// How long a pod took from being made to being ready, the last one that was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StartUp {
    /// Of these seconds.
    pub seconds: Option<i64>,
    /// When the pod was made.
    made: Option<Timestamp>,
}

impl StartUp {
    /// As it was remembered; the pods that are ready by now are those that were measured.
    pub fn remembered(seconds: Option<i64>, pods: &[&Pod]) -> Self {
        let made = pods.iter().filter(|pod| pods::is_ready(pod)).filter_map(|pod| made(pod)).max();
        Self { seconds, made: made.filter(|_| seconds.is_some()) }
    }

    /// Measures the newest of the pods that are ready, once: a pod that was not ready for a while did not start meanwhile.
    pub fn look(&mut self, pods: &[&Pod]) {
        let ready = pods.iter().filter(|pod| pods::is_ready(pod));
        let Some((made, seconds)) = ready.filter_map(|pod| took(pod)).max() else { return };
        if self.made.is_none_or(|before| made > before) {
            *self = Self { seconds: Some(seconds.clamp(1, LONGEST_START)), made: Some(made) };
        }
    }
}

fn made(pod: &Pod) -> Option<Timestamp> {
    pod.metadata.creation_timestamp.as_ref().map(|time| time.0)
}

/// When a ready pod was made, and the seconds until it was ready.
fn took(pod: &Pod) -> Option<(Timestamp, i64)> {
    let made = made(pod)?;
    let ready = pods::condition(pod, "Ready")?.last_transition_time.as_ref()?;
    Some((made, ready.0.as_second().saturating_sub(made.as_second())))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::object;

    fn pod(made: &str, ready: &str, more: Value) -> Pod {
        let mut pod = json!({
            "metadata": {"name": "p", "creationTimestamp": made},
            "status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": ready}]},
        });
        json_patch::merge(&mut pod, &more);
        object(pod)
    }

    #[test]
    fn a_start_is_measured_once_and_the_newest_counts() {
        let early = pod("2026-01-01T00:00:00Z", "2026-01-01T00:00:40Z", json!({}));
        let late = pod("2026-01-01T01:00:00Z", "2026-01-01T01:00:07Z", json!({}));
        let flapped = pod("2026-01-01T01:00:00Z", "2026-01-01T09:00:00Z", json!({}));
        let mut start = StartUp::default();
        start.look(&[]);
        assert_eq!(start.seconds, None);
        start.look(&[&early]);
        assert_eq!(start.seconds, Some(40));
        start.look(&[&late, &early]);
        assert_eq!(start.seconds, Some(7));
        start.look(&[&flapped, &early]);
        assert_eq!(start.seconds, Some(7));
        // An operator that starts anew measures nothing twice.
        let mut start = StartUp::remembered(Some(7), &[&flapped]);
        start.look(&[&flapped]);
        assert_eq!(start.seconds, Some(7));
        let mut start = StartUp::remembered(None, &[&late]);
        start.look(&[&late]);
        assert_eq!(start.seconds, Some(7));
    }

    #[test]
    fn pods_that_go_drain_until_they_are_over() {
        let time = "2026-01-01T00:00:00Z";
        let going = json!({"metadata": {"deletionTimestamp": time}});
        let over = json!({"metadata": {"deletionTimestamp": time}, "status": {"phase": "Succeeded"}});
        let all = [json!({}), going, over].map(|more| pod(time, time, more));
        let all: Vec<&Pod> = all.iter().collect();
        let end = time.parse::<Timestamp>().unwrap().as_second();
        assert_eq!((ready(&all), draining(&all, end - 60), draining(&all, end + LOST)), (1, 1, 1));
        assert_eq!(draining(&all, end + LOST + 1), 0, "its node is gone");
    }

    #[test]
    fn what_somebody_else_made_of_the_replicas_was_not_asked_for() {
        let of = |annotations: Value, replicas: Value| -> u32 {
            asked(&object(json!({
                "metadata": {"annotations": annotations},
                "spec": {"replicas": replicas, "selector": {}, "template": {}},
            })))
        };
        assert_eq!(of(json!({}), json!(3)), 3);
        assert_eq!(of(json!({"lathe.dev/replicas": "2"}), json!(3)), 2);
        assert_eq!(of(json!({"lathe.dev/replicas": "many"}), json!(3)), 3);
        assert_eq!(of(json!({}), Value::Null), 1);
        assert_eq!(of(json!({"lathe.dev/replicas": "4000000000"}), json!(3)), 10_000);
    }
}
