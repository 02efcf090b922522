//! What a job has used: the time in which its pods held their devices.
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use lathe_api::{AcceleratorProfile, FineTuneJobStatus};
use lathe_resolve::finetune;

/// What a job has used so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// Seconds times devices.
    pub device_seconds: i64,
    /// Up to when they count (Unix seconds).
    pub until: Option<i64>,
    /// Cost and its currency, where the profile has a price.
    pub cost: Option<(f64, String)>,
}

/// Adds what passed since the status was last written. A pod that vanished unseen is counted up to then.
pub fn account<'a>(
    status: Option<&FineTuneJobStatus>,
    pods: impl Iterator<Item = &'a Pod>,
    profiles: &[AcceleratorProfile],
    now: Timestamp,
) -> Usage {
    let plan = status.and_then(|s| s.plan.as_ref());
    let devices = i64::from(plan.and_then(|p| p.count).unwrap_or(1)).max(1);
    let before = status.and_then(|s| s.accounted_until.as_ref()).map(|t| t.0.as_second());
    let mut device_seconds = status.and_then(|s| s.device_seconds).unwrap_or(0);
    let mut until = before;
    for (start, end) in pods.filter_map(|pod| held(pod, now)) {
        let fresh = end.saturating_sub(start.max(before.unwrap_or(i64::MIN)));
        if fresh > 0 {
            device_seconds = device_seconds.saturating_add(fresh.saturating_mul(devices));
            until = until.max(Some(end));
        }
    }
    let name = plan.and_then(|p| p.profile.as_deref());
    let profile = profiles.iter().find(|p| p.metadata.name.as_deref() == name);
    let cost = profile.and_then(|profile| finetune::cost(device_seconds, profile));
    Usage { device_seconds, until, cost }
}

/// Start and end (Unix seconds) of the time in which a pod held its devices.
fn held(pod: &Pod, now: Timestamp) -> Option<(i64, i64)> {
    let status = pod.status.as_ref()?;
    let start = status.start_time.as_ref()?.0.as_second();
    let containers = status.container_statuses.iter().flatten();
    let ended = containers.filter_map(|c| c.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref());
    let end = ended.map(|t| t.0.as_second()).max();
    let over = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    match (end, over) {
        (Some(end), _) => Some((start, end)),
        (None, false) => Some((start, now.as_second())),
        // Its end is not known.
        (None, true) => None,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use lathe_api::PlanStatus;
    use serde_json::json;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn pod(start: i64, end: Option<i64>) -> Pod {
        let state = end.map_or(
            json!({"running": {}}),
            |end| json!({"terminated": {"exitCode": 0, "finishedAt": at(end).to_string()}}),
        );
        serde_json::from_value(json!({"status": {"phase": if end.is_some() { "Succeeded" } else { "Running" },
            "startTime": at(start).to_string(),
            "containerStatuses": [{"name": "worker", "image": "", "imageID": "", "ready": true, "restartCount": 0, "state": state}]}}))
        .unwrap()
    }

    #[test]
    fn each_second_of_each_device_counts_once() {
        let plan = PlanStatus { count: Some(4), profile: Some("p".to_owned()), ..PlanStatus::default() };
        let mut status = FineTuneJobStatus { plan: Some(plan), ..FineTuneJobStatus::default() };
        let mut round = |pods: &[Pod], now: i64| {
            let usage = account(Some(&status), pods.iter(), &[], at(now));
            status.device_seconds = Some(usage.device_seconds);
            status.accounted_until = usage.until.and_then(|s| Timestamp::from_second(s).ok()).map(Time);
            usage.device_seconds
        };
        assert_eq!(round(&[], 5), 0);
        assert_eq!(round(&[pod(10, None)], 15), 20);
        assert_eq!(round(&[pod(10, None)], 15), 20);
        // The operator was away; the pod ended meanwhile, and the next one has begun.
        assert_eq!(round(&[pod(10, Some(40)), pod(50, None)], 60), 160);
        // Pods that are gone took nothing with them.
        assert_eq!(round(&[], 100), 160);
        assert_eq!(round(&[pod(110, Some(120))], 130), 200);
    }
}
