//! How many devices of a profile there are, and who holds them: in numbers, never in names of other tenants.
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{Api, Client, ResourceExt as _, api::ListParams};
use lathe_api::{AcceleratorProfile, CapacityType, names};
use lathe_resolve::pod::{matches, node_selector_terms};

/// Devices of a profile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// On all nodes that match.
    pub all: i64,
    /// Not held.
    pub free: i64,
    /// Held in the job's own namespace: name of the object (or pod) and devices.
    pub here: BTreeMap<String, i64>,
    /// Held in other namespaces.
    pub elsewhere: i64,
}

/// Asks the cluster; `None` where the operator may not read nodes or all pods, then nobody knows.
pub async fn read(
    client: &Client,
    profile: &AcceleratorProfile,
    capacity_type: CapacityType,
    namespace: &str,
) -> Option<Capacity> {
    let nodes: Api<Node> = Api::all(client.clone());
    let pods: Api<Pod> = Api::all(client.clone());
    let bound = ListParams::default().fields("spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed");
    let nodes = nodes.list(&ListParams::default()).await;
    let pods = pods.list(&bound).await;
    match (nodes, pods) {
        (Ok(nodes), Ok(pods)) => Some(count(profile, capacity_type, &nodes.items, &pods.items, namespace)),
        (Err(error), _) | (_, Err(error)) => {
            tracing::debug!(%error, "free devices are not known");
            None
        }
    }
}

/// Counts devices on nodes on which a pod of the profile may run.
fn count(
    profile: &AcceleratorProfile,
    capacity_type: CapacityType,
    nodes: &[Node],
    pods: &[Pod],
    namespace: &str,
) -> Capacity {
    let terms = node_selector_terms(&profile.spec, capacity_type);
    let resource = &profile.spec.resource;
    let mut capacity = Capacity::default();
    let mut fitting = Vec::new();
    for node in nodes.iter().filter(|node| matches(&terms, node.labels())) {
        let allocatable = node.status.as_ref().and_then(|s| s.allocatable.as_ref());
        let devices = allocatable.and_then(|a| a.get(resource)).and_then(|q| q.0.parse::<i64>().ok());
        if let Some(devices) = devices.filter(|devices| *devices > 0) {
            capacity.all += devices;
            fitting.push(node.name_any());
        }
    }
    for pod in pods {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
        if !node.is_some_and(|node| fitting.contains(node)) {
            continue;
        }
        let held = devices(pod, resource);
        if held == 0 {
            continue;
        }
        if pod.namespace().as_deref() == Some(namespace) {
            let holder = pod.labels().get(names::LABEL_NAME).cloned().unwrap_or_else(|| pod.name_any());
            *capacity.here.entry(holder).or_default() += held;
        } else {
            capacity.elsewhere += held;
        }
    }
    capacity.free = (capacity.all - capacity.elsewhere - capacity.here.values().sum::<i64>()).max(0);
    capacity
}

fn devices(pod: &Pod, resource: &str) -> i64 {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let limits = containers.filter_map(|c| c.resources.as_ref()?.limits.as_ref()?.get(resource));
    limits.filter_map(|quantity| quantity.0.parse::<i64>().ok()).sum()
}

/// "0 of 3 nvidia-h100 devices are free (1 is held by train-7 here, 2 by other namespaces)".
pub fn words(capacity: Option<&Capacity>, profile: &str) -> String {
    let Some(Capacity { all, free, here, elsewhere }) = capacity else {
        return format!("no {profile} device is free for it; free devices unknown");
    };
    if *all == 0 {
        return format!("no node of the cluster has {profile} devices");
    }
    let is = |count: i64| if count == 1 { "1 is".to_owned() } else { format!("{count} are") };
    let mut holders: Vec<String> =
        here.iter().take(3).map(|(name, count)| format!("{} held by {name} here", is(*count))).collect();
    if *elsewhere > 0 {
        holders.push(format!("{} held by other namespaces", is(*elsewhere)));
    }
    let holders = if holders.is_empty() { String::new() } else { format!(" ({})", holders.join(", ")) };
    format!("{free} of {all} {profile} devices are free{holders}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn profile() -> AcceleratorProfile {
        serde_json::from_value(json!({
            "apiVersion": "lathe.dev/v1alpha1", "kind": "AcceleratorProfile", "metadata": {"name": "h100"},
            "spec": {"resource": "nvidia.com/gpu", "runtime": "CUDA", "memory": "80Gi", "nodeSelectorTerms": [
                {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h100"]}]},
                {"matchExpressions": [{"key": "cloud", "operator": "Exists"}, {"key": "memory", "operator": "Gt", "values": ["70000"]}]},
            ]},
        }))
        .unwrap()
    }

    fn node(name: &str, labels: serde_json::Value, devices: &str) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels}, "status": {"allocatable": {"nvidia.com/gpu": devices}},
        }))
        .unwrap()
    }

    fn pod(namespace: &str, name: &str, node: &str, devices: i64) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"namespace": namespace, "name": format!("{name}-x"), "labels": {"lathe.dev/name": name}},
            "spec": {"nodeName": node, "containers": [{"name": "c", "resources": {"limits": {"nvidia.com/gpu": devices.to_string()}}}]},
        }))
        .unwrap()
    }

    #[test]
    fn devices_are_counted_on_matching_nodes_and_other_tenants_stay_unnamed() {
        let nodes = [
            node("a", json!({"gpu": "h100"}), "2"),
            node("b", json!({"cloud": "x", "memory": "81559"}), "1"),
            node("c", json!({"cloud": "x", "memory": "24000"}), "8"),
            node("d", json!({"gpu": "l4"}), "8"),
        ];
        let pods = [
            pod("mine", "train-7", "a", 1),
            pod("theirs", "secret-project", "a", 1),
            pod("theirs", "secret-project", "b", 1),
            pod("theirs", "other", "d", 4),
        ];
        let found = words(Some(&count(&profile(), CapacityType::Any, &nodes, &pods, "mine")), "h100");
        assert_eq!(
            found,
            "0 of 3 h100 devices are free (1 is held by train-7 here, 2 are held by other namespaces)"
        );
        assert_eq!(
            words(Some(&count(&profile(), CapacityType::Any, &[], &[], "mine")), "h100"),
            "no node of the cluster has h100 devices"
        );
        // Nodes that may be taken back are none of those that stay.
        assert_eq!(count(&profile(), CapacityType::Spot, &nodes, &pods, "mine").all, 0);
        assert!(words(None, "h100").ends_with("free devices unknown"));
    }
}
