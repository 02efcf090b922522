//! What is wrong with a pod, in words of its status: the scheduler's, the kubelet's, and the worker's own last ones.
use k8s_openapi::{
    api::core::v1::{ContainerStatus, Pod, PodCondition},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use lathe_api::names;
use lathe_contract::{Outcome, ReportError, Summary};
use lathe_resolve::pod::{CHECKSUM, CONTAINER};

/// Longest text of others that is repeated in a status.
const MAX_TEXT: usize = 400;

/// Why a pod does not do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// CamelCase.
    pub reason: String,
    /// The cause, without the next step where `next` has it.
    pub message: String,
    /// True where only a person can take it away.
    pub stalled: bool,
}

impl Trouble {
    fn new(reason: &str, message: String, stalled: bool) -> Self {
        Self { reason: reason.to_owned(), message, stalled }
    }
}

/// Reason of a pod that was killed at its memory limit.
pub const OUT_OF_MEMORY: &str = "OutOfMemory";
/// Reason of a pod that the scheduler cannot place.
pub const UNSCHEDULABLE: &str = "Unschedulable";

/// The cluster takes no pod: a quota, an admission rule.
pub fn refused(said: &str) -> Trouble {
    let next = "Next: raise the quota, or correct what refuses the pod; it is tried again.";
    Trouble::new("PodsRefused", format!("the cluster takes no pod: {}. {next}", shown(said)), true)
}

/// True where the pod runs no more, and never will.
#[must_use]
pub fn is_over(pod: &Pod) -> bool {
    matches!(phase(pod), Some("Failed" | "Succeeded"))
}

/// Pending, Running, Succeeded, Failed.
#[must_use]
pub fn phase(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.phase.as_deref()
}

/// What keeps this pod from working; `None`: nothing that its status knows.
#[must_use]
pub fn trouble(pod: &Pod) -> Option<Trouble> {
    unschedulable(pod)
        .or_else(|| own_words(pod))
        .or_else(|| ended_by_node(pod))
        .or_else(|| container(pod).and_then(|status| waiting(pod, status).or_else(|| ended(pod, status))))
}

/// True where a node was found for the pod.
#[must_use]
pub fn is_placed(pod: &Pod) -> bool {
    let node = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
    condition(pod, "PodScheduled").map_or(node, |scheduled| scheduled.status == "True")
}

/// True where the pod is ready and is not going away.
#[must_use]
pub fn is_ready(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none() && condition(pod, "Ready").is_some_and(|c| c.status == "True")
}

/// The hash of the contract that the pod was made for.
#[must_use]
pub fn checksum(meta: Option<&ObjectMeta>) -> Option<&str> {
    meta?.annotations.as_ref()?.get(CHECKSUM).map(String::as_str)
}

/// Whether the pod was made for the contract of this hash.
#[must_use]
pub fn is_of(pod: &Pod, revision: Option<&str>) -> bool {
    checksum(Some(&pod.metadata)) == revision
}

/// The worker's last words of this run or, where it runs again, of the one before; `None` where it said nothing.
#[must_use]
pub fn last_words(pod: &Pod) -> Option<Result<Summary, ReportError>> {
    let status = container(pod)?;
    let ended =
        |state: &Option<k8s_openapi::api::core::v1::ContainerState>| state.as_ref()?.terminated.clone();
    let message = ended(&status.state).or_else(|| ended(&status.last_state))?.message?;
    (!message.is_empty()).then(|| Summary::parse(message.as_bytes()))
}

/// A condition of the pod.
pub fn condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == type_)
}

fn container(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.iter().find(|c| c.name == CONTAINER)
}

fn unschedulable(pod: &Pod) -> Option<Trouble> {
    let scheduled = condition(pod, "PodScheduled")?;
    if scheduled.status != "False" || scheduled.reason.as_deref() != Some("Unschedulable") {
        return None;
    }
    // What pre-emption would do helps nobody to find a node.
    let said =
        scheduled.message.as_deref().unwrap_or_default().split("preemption:").next().unwrap_or_default();
    let mut message = shown(said.trim_end_matches([',', ' ']));
    // The scheduler's words for "pre-emption has nothing to say".
    for empty in [". not found", ". no new claims to deallocate"] {
        message.truncate(message.strip_suffix(empty).map_or(message.len(), str::len));
    }
    if message.contains("persistentvolumeclaim") && message.contains("not found") {
        let next = "Next: make the PersistentVolumeClaim, or correct the `pvc://` address.";
        // It goes on by itself once the claim is there.
        return Some(Trouble::new("VolumeNotFound", format!("{message}. {next}"), false));
    }
    Some(Trouble::new(UNSCHEDULABLE, message, false))
}

fn waiting(pod: &Pod, status: &ContainerStatus) -> Option<Trouble> {
    let waiting = status.state.as_ref()?.waiting.as_ref()?;
    let message = shown(waiting.message.as_deref().unwrap_or_default());
    match waiting.reason.as_deref()? {
        reason @ ("ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull") => {
            let said = if message.is_empty() { reason } else { &message };
            let next = "Next: check the image's name and that nodes may pull it (`imagePullSecrets` of `spec.pod`, or of the pod's ServiceAccount).";
            let stalled = matches!(reason, "InvalidImageName" | "ErrImageNeverPull") || is_refused(said);
            Some(Trouble::new("ImagePullFailed", format!("image {}: {said}. {next}", status.image), stalled))
        }
        "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
            let next = format!("Next: `kubectl describe pod {}` has the node's words.", name(pod));
            Some(Trouble::new("ContainerFailed", format!("{message}. {next}"), true))
        }
        _ => None,
    }
}

/// A registry's answer that trying again does not change; anything else may be a hiccup, and the node tries again.
fn is_refused(said: &str) -> bool {
    const FINAL: [&str; 6] =
        ["not found", "manifest unknown", "denied", "nauthorized", "orbidden", "no matching manifest"];
    FINAL.iter().any(|words| said.contains(words))
}

/// What the worker itself said of its failure, now or before it was started again.
fn own_words(pod: &Pod) -> Option<Trouble> {
    let words = last_words(pod).filter(|_| container(pod).is_some_and(|status| !status.ready));
    match words?.ok()?.outcome {
        Outcome::Failed(failure) => Some(Trouble::new(&failure.reason, failure.message, failure.user_error)),
        _ => None,
    }
}

/// A node that is short of something, goes down or cannot take the pod after all ends it, and so does the scheduler for one
/// of a higher priority: whatever its container says.
fn ended_by_node(pod: &Pod) -> Option<Trouble> {
    let status = pod.status.as_ref().filter(|_| phase(pod) == Some("Failed"))?;
    let disrupted = condition(pod, "DisruptionTarget").filter(|c| c.status == "True");
    let told = |text: Option<&String>| text.filter(|text| !text.is_empty()).cloned();
    let reason = told(status.reason.as_ref()).or_else(|| told(disrupted?.reason.as_ref()))?;
    let said = told(status.message.as_ref()).or_else(|| told(disrupted?.message.as_ref()));
    let said = shown(said.as_ref().unwrap_or(&reason));
    let by_scheduler = disrupted.and_then(|c| c.reason.as_deref()) == Some("PreemptionByScheduler");
    if by_scheduler || reason == "Preempting" {
        let next = "Next: nothing, another pod waits for room; a higher `spec.pod.priorityClassName` of a new object keeps its room.";
        let message = format!("pods of a higher priority took the pod's place: {said}. {next}");
        return Some(Trouble::new("Preempted", message, false));
    }
    let own_disk = said.contains("mptyDir volume") || said.contains("local ephemeral storage");
    let next = if own_disk {
        "Next: keep models and rows on a PersistentVolumeClaim (`pvc://`), where they are read in place."
    } else {
        "Next: nothing, another pod takes its place; if that one ends so too, make room on the nodes."
    };
    let name = if reason == "Evicted" { "Evicted" } else { "PodEndedByNode" };
    Some(Trouble::new(name, format!("its node ended the pod: {said}. {next}"), false))
}

/// How the worker ended, now or before it was started again.
fn ended(pod: &Pod, status: &ContainerStatus) -> Option<Trouble> {
    if status.ready {
        return None;
    }
    let terminated =
        |state: &Option<k8s_openapi::api::core::v1::ContainerState>| state.as_ref()?.terminated.clone();
    let end = terminated(&status.state).or_else(|| terminated(&status.last_state))?;
    if end.reason.as_deref() == Some("OOMKilled") {
        return Some(out_of_memory(pod));
    }
    if end.exit_code == 0 && status.restart_count == 0 {
        return None;
    }
    let next = format!("Next: `kubectl logs {} --previous` says more.", name(pod));
    let message = format!(
        "the worker ended with exit code {} ({} restarts). {next}",
        end.exit_code, status.restart_count
    );
    Some(Trouble::new("CrashLoop", message, false))
}

/// Whose memory a user can set, and how, depends on what the pod does.
fn out_of_memory(pod: &Pod) -> Trouble {
    let limit = memory_limit(pod).map_or(String::new(), |limit| format!(" of {limit}"));
    let task = pod.metadata.labels.as_ref().and_then(|labels| labels.get(names::LABEL_TASK));
    let next = match task.map(String::as_str) {
        Some("train") => {
            "make a new FineTuneJob with more `spec.pod.memory`, a smaller `spec.training.sequenceLength`, or `spec.trainable.lora`"
        }
        Some("serve") => {
            "raise `spec.pod.memory`, or lower `spec.serving.contextLength` or `spec.serving.maxSequences`"
        }
        // Nobody can set its size: it reads headers, or one row at a time.
        _ => {
            "report this to Lathe's maintainers, with the sizes of the model's small files and of the longest row"
        }
    };
    let message = format!("the worker was killed at its memory limit{limit}. Next: {next}.");
    Trouble::new(OUT_OF_MEMORY, message, true)
}

fn memory_limit(pod: &Pod) -> Option<String> {
    let container = pod.spec.as_ref()?.containers.iter().find(|c| c.name == CONTAINER)?;
    Some(container.resources.as_ref()?.limits.as_ref()?.get("memory")?.0.clone())
}

fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

/// Text of the cluster's own components, bounded, on one line, without its full stop.
pub fn shown(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    lathe_api::cut(line.trim().trim_end_matches('.'), MAX_TEXT)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn pod(status: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "labels": {"lathe.dev/task": "serve"}},
            "spec": {"containers": [{"name": "worker", "resources": {"limits": {"memory": "8Gi"}}}]},
            "status": status,
        }))
        .unwrap()
    }

    fn container(state: Value, last: Value, ready: bool, restarts: i32) -> Value {
        json!({"containerStatuses": [{
            "name": "worker", "image": "r/worker:1", "imageID": "", "ready": ready, "restartCount": restarts,
            "state": state, "lastState": last,
        }]})
    }

    fn waiting(reason: &str, message: &str) -> Value {
        container(json!({"waiting": {"reason": reason, "message": message}}), json!({}), false, 0)
    }

    fn ended(reason: &str, code: i32, message: &str) -> Value {
        let end = json!({"terminated": {"reason": reason, "exitCode": code, "message": message}});
        container(json!({"waiting": {"reason": "CrashLoopBackOff"}}), end, false, 3)
    }

    /// A pod that the cluster ended: its container knows of a signal alone.
    fn taken(reason: Value, message: &str, disrupted: &str) -> Value {
        let mut status = container(
            json!({"terminated": {"reason": "Error", "exitCode": 137, "message": ""}}),
            json!({}),
            false,
            0,
        );
        let more = json!({"phase": "Failed", "reason": reason, "message": message, "conditions": [
            {"type": "DisruptionTarget", "status": "True", "reason": disrupted, "message": "m"}]});
        status.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        status
    }

    fn unschedulable(message: &str) -> Value {
        json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]})
    }

    #[rstest]
    #[case::no_node(
        unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        "Unschedulable",
        "Insufficient",
        false
    )]
    #[case::no_cpu(
        unschedulable(
            "0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: 0/1"
        ),
        "Unschedulable",
        "1 Insufficient cpu",
        false
    )]
    #[case::no_claim(
        unschedulable("0/1 nodes are available: persistentvolumeclaim \"x\" not found. not found"),
        "VolumeNotFound",
        "\"x\" not found. Next: make the PersistentVolumeClaim",
        false
    )]
    #[case::image(
        waiting("ImagePullBackOff", "manifest unknown"),
        "ImagePullFailed",
        "image r/worker:1: manifest unknown. Next:",
        true
    )]
    #[case::image_once(waiting("ErrImagePull", ""), "ImagePullFailed", "ErrImagePull", false)]
    #[case::registry_is_away(
        waiting("ImagePullBackOff", "Back-off pulling image: dial tcp: i/o timeout"),
        "ImagePullFailed",
        "i/o timeout",
        false
    )]
    #[case::no_name_of_an_image(waiting("InvalidImageName", "bad"), "ImagePullFailed", "bad", true)]
    #[case::secret(
        waiting("CreateContainerConfigError", "secret \"s\" not found"),
        "ContainerFailed",
        "kubectl describe pod p",
        true
    )]
    #[case::memory(
        ended("OOMKilled", 137, ""),
        "OutOfMemory",
        "of 8Gi. Next: raise `spec.pod.memory`, or lower",
        true
    )]
    #[case::evicted_for_its_own_disk(
        taken(json!("Evicted"), "Usage of EmptyDir volume \"cache\" exceeds the limit \"1Gi\". ", "TerminationByKubelet"),
        "Evicted", "exceeds the limit \"1Gi\". Next: keep models and rows on a PersistentVolumeClaim", false)]
    #[case::evicted_for_the_nodes_memory(
        taken(json!("Evicted"), "The node was low on resource: memory.", "TerminationByKubelet"),
        "Evicted", "The node was low on resource: memory. Next: nothing, another pod", false)]
    #[case::preempted(
        taken(Value::Null, "", "PreemptionByScheduler"),
        "Preempted",
        "took the pod's place: m. Next: nothing",
        false
    )]
    #[case::node_is_lost(
        taken(Value::Null, "", "DeletionByTaintManager"),
        "PodEndedByNode",
        "ended the pod: m. Next: nothing",
        false
    )]
    #[case::node_shuts_down(
        taken(json!("Terminated"), "Pod was terminated in response to imminent node shutdown.", "TerminationByKubelet"),
        "PodEndedByNode", "imminent node shutdown. Next:", false)]
    #[case::not_admitted(
        json!({"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no devices"}),
        "PodEndedByNode", "no devices. Next: nothing", false)]
    #[case::own_words(
        ended("Error", 64, r#"{"outcome":{"failed":{"reason":"ModelNotFound","message":"no such file. Next: look.","userError":true}}}"#),
        "ModelNotFound", "no such file. Next: look.", true
    )]
    #[case::no_words(
        ended("Error", 101, "thread panicked"),
        "CrashLoop",
        "exit code 101 (3 restarts)",
        false
    )]
    fn each_trouble_has_one_name_and_a_next_step(
        #[case] status: Value,
        #[case] reason: &str,
        #[case] words: &str,
        #[case] stalled: bool,
    ) {
        let found = trouble(&pod(status)).unwrap();
        assert_eq!((found.reason.as_str(), found.stalled), (reason, stalled), "{}", found.message);
        assert!(found.message.contains(words), "{}", found.message);
    }

    #[rstest]
    #[case::training(
        "train",
        "Next: make a new FineTuneJob with more `spec.pod.memory`, a smaller `spec.training.sequenceLength`, or `spec.trainable.lora`."
    )]
    #[case::a_check_has_no_memory_to_set("check-data", "Next: report this")]
    #[case::an_inspection_neither("inspect", "Next: report this")]
    fn out_of_memory_names_what_can_be_set(#[case] task: &str, #[case] next: &str) {
        let mut pod = pod(ended("OOMKilled", 137, ""));
        pod.metadata.labels = Some([(names::LABEL_TASK.to_owned(), task.to_owned())].into());
        let found = trouble(&pod).unwrap().message;
        assert!(found.contains(next), "{found}");
    }

    #[test]
    fn what_the_worker_said_counts_more_than_who_took_its_pod() {
        let mut status = taken(json!("Evicted"), "low on memory", "TerminationByKubelet");
        let words =
            r#"{"outcome":{"failed":{"reason":"DiskFull","message":"full. Next: free.","userError":true}}}"#;
        status["containerStatuses"][0]["state"]["terminated"]["message"] = json!(words);
        assert_eq!(trouble(&pod(status)).unwrap().reason, "DiskFull");
    }

    #[rstest]
    #[case::starting(json!({}))]
    #[case::being_made(waiting("ContainerCreating", ""))]
    #[case::ready_again_after_a_crash(container(
        json!({"running": {}}), json!({"terminated": {"reason": "Error", "exitCode": 1}}), true, 1
    ))]
    #[case::first_end_well(container(json!({"terminated": {"reason": "Completed", "exitCode": 0}}), json!({}), false, 0))]
    fn no_trouble(#[case] status: Value) {
        assert_eq!(trouble(&pod(status)), None);
    }
}
