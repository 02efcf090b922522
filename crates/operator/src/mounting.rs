//! What a node says of a pod that it cannot start: a Secret or ConfigMap that is not there, a volume that another node holds.
//! The pod's own status does not tell; the node's events do.
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod, events::v1::Event};
use kube::{Api, Client, Resource, ResourceExt as _, api::ListParams};

use lathe_resolve::pod::CONTRACT_VOLUME;

use crate::{
    beside,
    pods::{self, Trouble, condition, shown},
};

/// Reason of a pod whose image is on its way.
pub const PULLING: &str = "PullingImage";

/// Reason of a pod whose contract is gone.
const CONTRACT_LOST: &str = "ContractLost";

/// A start without trouble is over by then.
const USUAL: SignedDuration = SignedDuration::from_secs(10);
/// A node that has said nothing for so long is told of all the same.
const LONG: SignedDuration = SignedDuration::from_secs(60);

/// Why a pod that has its node does not start; `None` while that is nothing to speak of.
pub async fn trouble(client: &Client, pod: &Pod, now: Timestamp) -> Option<Trouble> {
    let waited = waits(pod, now).filter(|waited| *waited > USUAL)?;
    diagnose(pod, events(client, pod).await).or_else(|| (waited > LONG).then(|| silent(pod)))
}

/// Why a Job has no pod; `None` while that is nothing to speak of.
pub async fn no_pod(client: &Client, job: &Job, now: Timestamp) -> Option<Trouble> {
    let since = job.metadata.creation_timestamp.as_ref()?.0;
    if now.duration_since(since) <= USUAL {
        return None;
    }
    let last = events(client, job).await.into_iter().max_by_key(time)?;
    let refused = last.reason.as_deref() == Some("FailedCreate");
    refused.then(|| pods::refused(last.note.as_deref().unwrap_or_default()))
}

/// The words on a lost contract, where the Job that it is for keeps no copy: an operator of an earlier version made it.
pub fn without_copy(trouble: Trouble, job: &Job) -> Trouble {
    if trouble.reason != CONTRACT_LOST || job.annotations().contains_key(beside::CONTRACT) {
        return trouble;
    }
    let message = format!(
        "the pod waits for its contract, whose ConfigMap was lost, and the Job of an earlier version keeps no copy of it. Next: delete Job {}, another one is made.",
        job.name_any()
    );
    Trouble { message, stalled: true, ..trouble }
}

/// What is told of an object; nothing where that may not be read.
async fn events<K: Resource>(client: &Client, object: &K) -> Vec<Event> {
    let api: Api<Event> = Api::namespaced(client.clone(), &object.namespace().unwrap_or_default());
    let own = ListParams::default().fields(&format!("regarding.uid={}", object.uid().unwrap_or_default()));
    match api.list(&own).await {
        Ok(events) => events.items,
        Err(error) => {
            tracing::debug!(object = object.name_any(), %error, "events cannot be read");
            Vec::new()
        }
    }
}

/// When an event was last seen.
fn time(event: &Event) -> Option<Timestamp> {
    let seen = event.series.as_ref().map(|series| series.last_observed_time.0);
    let old = event.deprecated_last_timestamp.as_ref().map(|time| time.0);
    seen.or(old).or(event.event_time.as_ref().map(|time| time.0))
}

/// How long a node has been preparing the pod; `None` where none is.
fn waits(pod: &Pod, now: Timestamp) -> Option<SignedDuration> {
    let status = pod.status.as_ref()?;
    let begun = status.container_statuses.iter().flatten().any(|container| {
        let state = container.state.as_ref();
        let creating = state.and_then(|s| s.waiting.as_ref()?.reason.as_deref()) == Some("ContainerCreating");
        state.is_some() && !creating
    });
    let scheduled = condition(pod, "PodScheduled").filter(|c| c.status == "True")?;
    let since = scheduled.last_transition_time.as_ref()?.0;
    (status.phase.as_deref() == Some("Pending") && !begun).then(|| now.duration_since(since))
}

/// The node's last word.
fn diagnose(pod: &Pod, mut events: Vec<Event>) -> Option<Trouble> {
    events.retain(|event| event.reason.as_deref() != Some("Scheduled"));
    let last = events.into_iter().max_by_key(time)?;
    let said = shown(last.note.as_deref().unwrap_or_default());
    let trouble =
        |reason: &str, message: String| Trouble { reason: reason.to_owned(), message, stalled: false };
    match last.reason.as_deref()? {
        "FailedMount" | "FailedAttachVolume" => Some(volume(pod, &said)),
        "FailedCreatePodSandBox" => {
            let next = "Next: ask who looks after the nodes.";
            Some(trouble("PodNotStarting", format!("the node cannot start the pod: {said}. {next}")))
        }
        "Pulling" => Some(trouble(PULLING, format!("the node fetches the image: {said}."))),
        _ => None,
    }
}

/// The kubelet's and the attach controller's words on a volume.
fn volume(pod: &Pod, said: &str) -> Trouble {
    if missing(said, "configmap").is_some_and(|name| is_contract(pod, name)) {
        let message = "the pod waits for its contract, whose ConfigMap was lost. Next: nothing, the operator makes it again.";
        return Trouble { reason: CONTRACT_LOST.to_owned(), message: message.to_owned(), stalled: false };
    }
    // The volume is well: the node could not ask the API server in time.
    if said.contains("failed to sync") && said.contains("cache: timed out") {
        let message = format!(
            "the node has not got the pod's ConfigMaps and Secrets yet: {said}. Next: nothing, it tries again; if it stays so, ask who looks after the nodes."
        );
        return Trouble { reason: "PodNotStarting".to_owned(), message, stalled: false };
    }
    let (reason, next) = if let Some(name) = missing(said, "secret") {
        ("SecretNotFound", format!("make Secret {name} in this namespace, or correct `secretRef`"))
    } else if let Some(name) = missing(said, "configmap") {
        ("ConfigMapNotFound", format!("make ConfigMap {name} in this namespace"))
    } else if let Some(name) = missing(said, "persistentvolumeclaim") {
        ("VolumeNotFound", format!("make PersistentVolumeClaim {name}, or correct the `pvc://` address"))
    } else if said.contains("Multi-Attach") {
        let next = "wait for the other pod, move it to this node, or use a ReadWriteMany volume";
        ("VolumeInUse", next.to_owned())
    } else {
        ("VolumeMountFailed", "check the claim (`kubectl describe pvc`) and its storage".to_owned())
    };
    let message = match reason {
        "SecretNotFound" | "ConfigMapNotFound" | "VolumeNotFound" => format!(
            "the pod waits for what is not there: {}. Next: {next}.",
            said.rsplit(" : ").next().unwrap_or(said)
        ),
        _ => format!("a volume cannot be mounted: {said}. Next: {next}."),
    };
    // It goes on by itself once that is there.
    Trouble { reason: reason.to_owned(), message, stalled: false }
}

/// True where it is a ConfigMap of ours.
fn is_contract(pod: &Pod, name: &str) -> bool {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let mut maps =
        volumes.filter(|volume| volume.name == CONTRACT_VOLUME).filter_map(|v| v.config_map.as_ref());
    maps.any(|map| map.name == name)
}

/// The name in `secret "name" not found`.
fn missing<'a>(said: &'a str, kind: &str) -> Option<&'a str> {
    let (_, rest) = said.split_once(&format!("{kind} \""))?;
    let (name, rest) = rest.split_once('"')?;
    rest.trim_start().starts_with("not found").then_some(name)
}

fn silent(pod: &Pod) -> Trouble {
    let next = format!("Next: `kubectl describe pod {}` names what is missing.", pod.name_any());
    let message =
        format!("a node has been preparing volumes, Secrets and image for more than a minute. {next}");
    Trouble { reason: "PodNotStarting".to_owned(), message, stalled: false }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{Server, object};

    const EVENTS: &str = "GET /apis/events.k8s.io/v1/namespaces/ns/events";

    fn pod(over: Value) -> Pod {
        let mut status = json!({
            "phase": "Pending",
            "conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
        });
        status.as_object_mut().unwrap().extend(over.as_object().unwrap().clone());
        let volumes = json!([{"name": "contract", "configMap": {"name": "p-contract"}}]);
        object(json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"},
            "spec": {"containers": [], "volumes": volumes}, "status": status}))
    }

    fn event(at: &str, reason: &str, note: &str) -> Value {
        json!({"metadata": {"name": "e"}, "eventTime": null, "deprecatedLastTimestamp": at, "reason": reason, "note": note})
    }

    async fn told(pod: Pod, now: &str, events: Value) -> Option<Trouble> {
        let list =
            json!({"apiVersion": "events.k8s.io/v1", "kind": "EventList", "metadata": {}, "items": events});
        let (client, _server) = Server::start(&[(EVENTS, 200, list)]);
        trouble(&client, &pod, now.parse().unwrap()).await
    }

    #[rstest]
    #[case::slow_node(
        "FailedMount",
        "MountVolume.SetUp failed for volume \"contract\" : failed to sync configmap cache: timed out waiting for the condition",
        "PodNotStarting",
        "Next: nothing, it tries again"
    )]
    #[case::secret(
        "FailedMount",
        "MountVolume.SetUp failed for volume \"secret-0\" : secret \"hub\" not found",
        "SecretNotFound",
        "secret \"hub\" not found. Next: make Secret hub"
    )]
    #[case::config_map(
        "FailedMount",
        "MountVolume.SetUp failed for volume \"istiod\" : configmap \"c\" not found",
        "ConfigMapNotFound",
        "make ConfigMap c"
    )]
    #[case::our_config_map(
        "FailedMount",
        "MountVolume.SetUp failed for volume \"contract\" : configmap \"p-contract\" not found",
        "ContractLost",
        "Next: nothing, the operator makes it again"
    )]
    #[case::claim(
        "FailedMount",
        "error processing PVC ns/x: persistentvolumeclaim \"x\" not found",
        "VolumeNotFound",
        "make PersistentVolumeClaim x"
    )]
    #[case::held(
        "FailedAttachVolume",
        "Multi-Attach error for volume \"pvc-1\" Volume is already used by pod(s) q",
        "VolumeInUse",
        "used by pod(s) q"
    )]
    #[case::storage(
        "FailedMount",
        "MountVolume.SetUp failed for volume \"v\" : mount failed: exit status 32",
        "VolumeMountFailed",
        "exit status 32. Next: check the claim"
    )]
    #[case::node(
        "FailedCreatePodSandBox",
        "Failed to create pod sandbox: no network",
        "PodNotStarting",
        "no network"
    )]
    #[case::image("Pulling", "Pulling image \"r/worker:1\"", "PullingImage", "r/worker:1")]
    #[tokio::test]
    async fn the_nodes_last_word_is_told(
        #[case] reason: &str,
        #[case] note: &str,
        #[case] expected: &str,
        #[case] words: &str,
    ) {
        let events = json!([
            event("2026-01-01T00:00:05Z", reason, note),
            event("2026-01-01T00:00:01Z", "FailedMount", "an older one"),
            event("2026-01-01T00:00:06Z", "Scheduled", "assigned"),
        ]);
        let found = told(pod(json!({})), "2026-01-01T00:00:11Z", events).await.unwrap();
        assert_eq!((found.reason.as_str(), found.stalled), (expected, false));
        assert!(found.message.contains(words), "{}", found.message);
    }

    #[test]
    fn a_contract_of_which_no_copy_is_kept_is_not_made_again() {
        let lost = |annotations: Value| {
            let trouble =
                Trouble { reason: CONTRACT_LOST.to_owned(), message: "m".to_owned(), stalled: false };
            without_copy(trouble, &object(json!({"metadata": {"name": "j", "annotations": annotations}})))
        };
        assert_eq!(lost(json!({"lathe.dev/contract": "{}"})).message, "m");
        let Trouble { message, stalled, .. } = lost(json!({}));
        assert!(stalled && message.ends_with("Next: delete Job j, another one is made."), "{message}");
    }

    #[rstest]
    #[case::at_once("2026-01-01T00:00:10Z", "FailedCreate", None)]
    #[case::refused("2026-01-01T00:00:11Z", "FailedCreate", Some("PodsRefused"))]
    #[case::made_after_all("2026-01-01T00:00:11Z", "SuccessfulCreate", None)]
    #[tokio::test]
    async fn why_a_job_has_no_pod_is_told(
        #[case] now: &str,
        #[case] reason: &str,
        #[case] expected: Option<&str>,
    ) {
        let job: Job = object(json!({
            "metadata": {"name": "j", "namespace": "ns", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"},
        }));
        let items = json!([
            event("2026-01-01T00:00:02Z", reason, "pods \"j-x\" is forbidden: exceeded quota: small"),
            event("2026-01-01T00:00:01Z", "FailedCreate", "an older one"),
        ]);
        let list =
            json!({"apiVersion": "events.k8s.io/v1", "kind": "EventList", "metadata": {}, "items": items});
        let (client, _server) = Server::start(&[(EVENTS, 200, list)]);
        let found = no_pod(&client, &job, now.parse().unwrap()).await;
        assert_eq!(found.as_ref().map(|trouble| trouble.reason.as_str()), expected);
        if let Some(Trouble { message, stalled, .. }) = found {
            assert!(stalled && message.contains("exceeded quota: small. Next: raise the quota"), "{message}");
        }
    }

    #[rstest]
    #[case::at_once("2026-01-01T00:00:09Z", json!({}), None)]
    #[case::after_a_minute("2026-01-01T00:01:01Z", json!({}), Some("PodNotStarting"))]
    #[case::it_runs("2026-01-01T00:02:00Z", json!({"phase": "Running"}), None)]
    #[case::its_container_says_more("2026-01-01T00:02:00Z", json!({"containerStatuses": [{"name": "worker", "image": "", "imageID": "",
        "ready": false, "restartCount": 0, "state": {"waiting": {"reason": "ImagePullBackOff"}}}]}), None)]
    #[tokio::test]
    async fn a_silent_node_is_told_of_after_a_while(
        #[case] now: &str,
        #[case] over: Value,
        #[case] expected: Option<&str>,
    ) {
        let found = told(pod(over), now, json!([])).await;
        assert_eq!(found.map(|trouble| trouble.reason).as_deref(), expected);
    }
}
