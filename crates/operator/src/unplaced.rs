//! Why no node takes a pod, and what helps: the devices where these are the cause, else what the scheduler says.
use kube::ResourceExt as _;
use lathe_api::AcceleratorProfile;

use crate::{
    devices::{self, Capacity},
    pods::{Trouble, UNSCHEDULABLE},
};

/// Reason of a pod for which no device, or core, is free.
pub const NO_DEVICE: &str = "AcceleratorUnavailable";

/// The scheduler's words where the cluster has no node at all.
const NO_NODES: &str = "no nodes available";

/// What a pod asks for.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    pub profile: &'a AcceleratorProfile,
    pub count: i64,
    /// " of a new FineTuneJob", where the spec's words on pods cannot be changed.
    pub anew: &'a str,
}

/// The trouble of a pod of which the scheduler says `said`. `since` is what else is known, after a semicolon or nothing.
pub fn trouble(said: &str, asked: Asked<'_>, capacity: Option<&Capacity>, since: &str) -> Trouble {
    let Asked { profile, count, anew } = asked;
    let next = |said: &str, profile: &str| next(said, profile, anew);
    let (name, resource) = (profile.name_any(), profile.spec.resource.as_str());
    let trouble =
        |reason: &str, message: String| Trouble { reason: reason.to_owned(), message, stalled: false };
    if said.to_ascii_lowercase().contains("persistentvolumeclaim") {
        let next = "Next: check the claims (`kubectl get pvc`) and the storage class.";
        return trouble("VolumeNotBound", format!("{said}{since}. {next}"));
    }
    let lacks = said.contains(&format!("Insufficient {resource}")) || said.starts_with(NO_NODES);
    if resource == "cpu" {
        let reason = if lacks { NO_DEVICE } else { UNSCHEDULABLE };
        return trouble(reason, format!("no node has room: {said}{since}. {}", next(said, &name)));
    }
    let free = devices::words(capacity, &name);
    let none_free = capacity.map_or(lacks, |capacity| capacity.free.map_or(lacks, |free| free < count));
    if none_free {
        let next = "Next: free one, or allow another profile in `spec.accelerator.profiles`.";
        return trouble(NO_DEVICE, format!("{free}{since}; the scheduler says: {said}. {next}"));
    }
    // What is free may be spread over nodes that have too little of something else.
    let known = if capacity.is_some_and(|c| c.free.is_some()) { format!("; {free}") } else { String::new() };
    trouble(UNSCHEDULABLE, format!("no node takes the pod: {said}{known}{since}. {}", next(said, &name)))
}

/// What helps. The scheduler looks at taints and labels first: a node that lacks something has passed them.
fn next(said: &str, profile: &str, anew: &str) -> String {
    let lacks = |resource: &str| said.contains(&format!("Insufficient {resource}"));
    let tainted =
        said.split("untolerated taint").skip(1).any(|rest| !rest.starts_with(" {node-role.kubernetes.io/"));
    if said.starts_with(NO_NODES) {
        "Next: add a node to the cluster.".to_owned()
    } else if lacks("memory") {
        format!("Next: free memory on a node, or ask for less (`spec.pod.memory`{anew}).")
    } else if lacks("cpu") {
        format!("Next: free a node, or ask for less (`spec.accelerator.count`, `spec.pod.cpu`{anew}).")
    } else if lacks("ephemeral-storage") {
        "Next: free disk on a node.".to_owned()
    } else if said.contains("volume") {
        "Next: check on which nodes the volumes can be mounted (`kubectl describe pv`).".to_owned()
    } else if tainted {
        format!(
            "Next: tolerate the taint in AcceleratorProfile {profile} or `spec.pod.tolerations`{anew}, or take it off."
        )
    } else if said.contains("affinity") || said.contains("selector") {
        format!(
            "Next: correct `nodeSelectorTerms` of AcceleratorProfile {profile}, or `spec.pod.nodeSelector`{anew}."
        )
    } else {
        "Next: free a node, or allow another profile in `spec.accelerator.profiles`.".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::testing::object;

    fn profile(resource: &str) -> AcceleratorProfile {
        object(json!({
            "apiVersion": "lathe.dev/v1alpha1", "kind": "AcceleratorProfile", "metadata": {"name": "p"},
            "spec": {"resource": resource, "runtime": "CUDA"},
        }))
    }

    fn capacity(all: i64, free: Option<i64>) -> Option<Capacity> {
        Some(Capacity { all, free, ..Capacity::default() })
    }

    const GPU: &str = "nvidia.com/gpu";
    const TAINT: &str =
        "0/2 nodes are available: 1 node(s) had untolerated taint {team: b}, 1 Insufficient nvidia.com/gpu";

    #[rstest]
    #[case::all_are_held(
        GPU,
        "0/1 nodes are available: 1 Insufficient nvidia.com/gpu",
        capacity(1, Some(0)),
        NO_DEVICE,
        "0 of 1 p devices are free; the scheduler says: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu. Next: free one"
    )]
    #[case::nobody_knows_but_the_scheduler(
        GPU,
        "1 Insufficient nvidia.com/gpu",
        None,
        NO_DEVICE,
        "free devices unknown; the scheduler says"
    )]
    #[case::none_are_there(
        GPU,
        "2 node(s) didn't match Pod's node affinity/selector",
        capacity(0, Some(0)),
        NO_DEVICE,
        "no node of the cluster has p devices; the scheduler says: 2 node(s) didn't match"
    )]
    #[case::a_taint_beside_held_ones(
        GPU,
        TAINT,
        capacity(2, Some(1)),
        UNSCHEDULABLE,
        "1 of 2 p devices are free. Next: tolerate the taint"
    )]
    #[case::memory(
        GPU,
        "0/1 nodes are available: 1 Insufficient memory",
        capacity(1, Some(1)),
        UNSCHEDULABLE,
        "1 Insufficient memory; 1 of 1 p devices are free. Next: free memory"
    )]
    #[case::affinity(
        GPU,
        "1 node(s) didn't match Pod's node affinity/selector",
        None,
        UNSCHEDULABLE,
        "`spec.pod.nodeSelector` of a new one."
    )]
    #[case::a_control_planes_taint_is_no_cause(
        GPU,
        "1 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, 1 node(s) didn't match Pod's node affinity/selector",
        None,
        UNSCHEDULABLE,
        "`nodeSelectorTerms` of AcceleratorProfile p"
    )]
    #[case::unbound(
        GPU,
        "pod has unbound immediate PersistentVolumeClaims",
        capacity(1, Some(0)),
        "VolumeNotBound",
        "kubectl get pvc"
    )]
    #[case::of_another_zone(
        GPU,
        "1 node(s) had volume node affinity conflict",
        capacity(1, Some(1)),
        UNSCHEDULABLE,
        "kubectl describe pv"
    )]
    #[case::cores(
        "cpu",
        "1 Insufficient cpu",
        None,
        NO_DEVICE,
        "no node has room: 1 Insufficient cpu. Next: free a node, or ask for less"
    )]
    #[case::no_node_at_all("cpu", "no nodes available to schedule pods", None, NO_DEVICE, "Next: add a node")]
    #[case::cores_of_tainted_nodes(
        "cpu",
        "1 node(s) had untolerated taint {team: b}",
        None,
        UNSCHEDULABLE,
        "tolerate the taint"
    )]
    fn the_true_cause_is_told(
        #[case] resource: &str,
        #[case] said: &str,
        #[case] capacity: Option<Capacity>,
        #[case] reason: &str,
        #[case] words: &str,
    ) {
        let profile = profile(resource);
        let asked = Asked { profile: &profile, count: 1, anew: " of a new one" };
        let found = trouble(said, asked, capacity.as_ref(), "");
        assert_eq!(found.reason, reason, "{}", found.message);
        assert!(found.message.contains(words) && found.message.contains(said), "{}", found.message);
    }

    #[test]
    fn fewer_free_devices_than_are_asked_for_are_none() {
        let profile = profile(GPU);
        let said = "1 Insufficient nvidia.com/gpu";
        let asked = Asked { profile: &profile, count: 4, anew: "" };
        assert_eq!(trouble(said, asked, capacity(8, Some(3)).as_ref(), "").reason, NO_DEVICE);
    }
}
