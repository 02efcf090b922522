//! How many devices there are and who holds them: in numbers, never in names of other tenants.
//!
//! One look at nodes and pods serves every object that waits for a device, and is repeated only when somebody still waits some
//! time later: what it costs grows neither with the objects nor with how often they are looked at. Nodes and pods are read in
//! pages, of which only the figures are kept.
use std::{collections::BTreeMap, fmt::Debug, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{Api, Client, Resource, ResourceExt as _, api::ListParams};
use lathe_api::{AcceleratorProfile, CapacityType, names};
use lathe_resolve::pod::{matches, node_selector_terms};
use serde::de::DeserializeOwned;
use tokio::sync::Mutex;

use crate::context::Scope;

/// So long a look is good for everybody.
const FRESH: SignedDuration = SignedDuration::from_secs(30);
/// Objects of a page: an API server sends a few megabytes at a time.
const PAGE: u32 = 500;
/// A cluster that takes longer to tell is not waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// The devices of the cluster, as they were last seen.
#[derive(Default)]
pub struct Devices {
    last: Mutex<Option<(Timestamp, Option<Arc<Seen>>)>>,
}

/// What nodes have, and what pods hold of it.
#[derive(Debug, Default)]
struct Seen {
    nodes: Vec<Has>,
    pods: Vec<Holds>,
    /// Pods of all namespaces were read.
    of_all: bool,
}

/// A node's devices.
#[derive(Debug)]
struct Has {
    name: String,
    labels: BTreeMap<String, String>,
    devices: BTreeMap<String, i64>,
}

/// A pod's devices.
#[derive(Debug)]
struct Holds {
    namespace: String,
    /// Name of the object, or of the pod where it is not ours.
    holder: String,
    node: String,
    devices: BTreeMap<String, i64>,
}

/// Devices of a profile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// On all nodes that match.
    pub all: i64,
    /// Not held; `None` where not all pods may be read.
    pub free: Option<i64>,
    /// Held in the object's own namespace: name of the object (or pod) and devices.
    pub here: BTreeMap<String, i64>,
    /// Held in other namespaces, of those that may be read.
    pub elsewhere: i64,
}

impl Devices {
    /// Devices of a profile; `None` where the operator may not read nodes: then nobody knows. Whoever asks while a look is under
    /// way waits for it and gets the same.
    pub async fn of(
        &self,
        client: &Client,
        scopes: &[Scope],
        profile: &AcceleratorProfile,
        capacity_type: CapacityType,
        namespace: &str,
        now: Timestamp,
    ) -> Option<Capacity> {
        let mut last = self.last.lock().await;
        let seen = match last.as_ref() {
            Some((at, seen)) if now.duration_since(*at) < FRESH => seen.clone(),
            _ => {
                let seen = look(client, scopes).await.map(Arc::new);
                *last = Some((now, seen.clone()));
                seen
            }
        };
        drop(last);
        seen.map(|seen| seen.count(profile, capacity_type, namespace))
    }
}

async fn look(client: &Client, scopes: &[Scope]) -> Option<Seen> {
    let read = async {
        let mut seen = Seen { of_all: scopes.contains(&Scope::All), ..Seen::default() };
        pages(Api::<Node>::all(client.clone()), "", |node| seen.nodes.extend(Has::of(&node))).await?;
        for scope in scopes {
            let bound = "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed";
            pages(scope.api::<Pod>(client), bound, |pod| seen.pods.extend(Holds::of(&pod))).await?;
        }
        Ok::<_, kube::Error>(seen)
    };
    match tokio::time::timeout(PATIENCE, read).await {
        Ok(Ok(seen)) => Some(seen),
        Ok(Err(error)) => {
            tracing::debug!(%error, "free devices are not known");
            None
        }
        Err(_) => {
            tracing::warn!(
                "free devices are not known: the API server takes too long to list nodes and pods"
            );
            None
        }
    }
}

/// Everything that there is of a kind, a page at a time.
async fn pages<K>(api: Api<K>, fields: &str, mut take: impl FnMut(K)) -> Result<(), kube::Error>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    let mut params = ListParams::default().limit(PAGE);
    if !fields.is_empty() {
        params = params.fields(fields);
    }
    loop {
        let page = api.list(&params).await?;
        let next = page.metadata.continue_.clone().filter(|next| !next.is_empty());
        page.items.into_iter().for_each(&mut take);
        match next {
            Some(next) => params = params.continue_token(&next),
            None => return Ok(()),
        }
    }
}

impl Has {
    fn of(node: &Node) -> Option<Self> {
        let allocatable = node.status.as_ref()?.allocatable.as_ref()?;
        let devices: BTreeMap<_, _> =
            allocatable.iter().filter_map(|(resource, quantity)| device(resource, &quantity.0)).collect();
        let has = || Self { name: node.name_any(), labels: node.labels().clone(), devices: devices.clone() };
        (!devices.is_empty()).then(has)
    }
}

impl Holds {
    fn of(pod: &Pod) -> Option<Self> {
        let spec = pod.spec.as_ref()?;
        let mut devices = BTreeMap::new();
        for container in &spec.containers {
            let limits = container.resources.as_ref().and_then(|r| r.limits.as_ref()).into_iter().flatten();
            for (resource, count) in limits.filter_map(|(resource, quantity)| device(resource, &quantity.0)) {
                *devices.entry(resource).or_default() += count;
            }
        }
        if devices.is_empty() {
            return None;
        }
        let holder = pod.labels().get(names::LABEL_NAME).cloned().unwrap_or_else(|| pod.name_any());
        let namespace = pod.namespace().unwrap_or_default();
        Some(Self { namespace, holder, node: spec.node_name.clone()?, devices })
    }
}

/// An extended resource, of which there is a whole number.
fn device(resource: &str, quantity: &str) -> Option<(String, i64)> {
    let count = quantity.parse::<i64>().ok().filter(|count| *count > 0)?;
    resource.contains('/').then(|| (resource.to_owned(), count))
}

impl Seen {
    /// Counts devices on nodes on which a pod of the profile may run.
    fn count(&self, profile: &AcceleratorProfile, capacity_type: CapacityType, namespace: &str) -> Capacity {
        let terms = node_selector_terms(&profile.spec, capacity_type);
        let resource = &profile.spec.resource;
        let mut capacity = Capacity::default();
        let mut fitting = Vec::new();
        for node in self.nodes.iter().filter(|node| matches(&terms, &node.labels)) {
            if let Some(devices) = node.devices.get(resource) {
                capacity.all += devices;
                fitting.push(&node.name);
            }
        }
        for pod in self.pods.iter().filter(|pod| fitting.contains(&&pod.node)) {
            let Some(held) = pod.devices.get(resource) else { continue };
            if pod.namespace == namespace {
                *capacity.here.entry(pod.holder.clone()).or_default() += held;
            } else {
                capacity.elsewhere += held;
            }
        }
        let held = capacity.elsewhere + capacity.here.values().sum::<i64>();
        capacity.free = (self.of_all || capacity.all == 0).then(|| (capacity.all - held).max(0));
        capacity
    }
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
    match free {
        Some(free) => format!("{free} of {all} {profile} devices are free{holders}"),
        None => format!(
            "none of the {all} {profile} devices is free for it{holders}; namespaces that this operator does not look after may hold others"
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{Server, failure, object, paths};

    const NODES: &str = "GET /api/v1/nodes";
    const PODS: &str = "GET /api/v1/pods";

    fn profile() -> AcceleratorProfile {
        object(json!({
            "apiVersion": "lathe.dev/v1alpha1", "kind": "AcceleratorProfile", "metadata": {"name": "h100"},
            "spec": {"resource": "nvidia.com/gpu", "runtime": "CUDA", "memory": "80Gi", "nodeSelectorTerms": [
                {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h100"]}]},
                {"matchExpressions": [{"key": "cloud", "operator": "Exists"}, {"key": "memory", "operator": "Gt", "values": ["70000"]}]},
            ]},
        }))
    }

    fn node(name: &str, labels: Value, devices: &str) -> Value {
        json!({"metadata": {"name": name, "labels": labels}, "status": {"allocatable": {"nvidia.com/gpu": devices, "cpu": "8"}}})
    }

    fn pod(namespace: &str, name: &str, node: &str, devices: i64) -> Value {
        json!({
            "metadata": {"namespace": namespace, "name": format!("{name}-x"), "labels": {"lathe.dev/name": name}},
            "spec": {"nodeName": node, "containers": [{"name": "c", "resources": {"limits": {"nvidia.com/gpu": devices.to_string()}}}]},
        })
    }

    fn list(kind: &str, items: Value) -> Value {
        json!({"apiVersion": "v1", "kind": kind, "metadata": {}, "items": items})
    }

    fn nodes() -> Value {
        list(
            "NodeList",
            json!([
                node("a", json!({"gpu": "h100"}), "2"),
                node("b", json!({"cloud": "x", "memory": "81559"}), "1"),
                node("c", json!({"cloud": "x", "memory": "24000"}), "8"),
                node("d", json!({"gpu": "l4"}), "8"),
            ]),
        )
    }

    fn pods() -> Value {
        list(
            "PodList",
            json!([
                pod("mine", "train-7", "a", 1),
                pod("theirs", "secret-project", "a", 1),
                pod("theirs", "secret-project", "b", 1),
                pod("theirs", "other", "d", 4),
            ]),
        )
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    async fn told(answers: &[(&str, u16, Value)], scopes: &[Scope], capacity: CapacityType) -> String {
        let (client, _server) = Server::start(answers);
        let found = Devices::default().of(&client, scopes, &profile(), capacity, "mine", at(0)).await;
        words(found.as_ref(), "h100")
    }

    #[tokio::test]
    async fn devices_are_counted_on_matching_nodes_and_other_tenants_stay_unnamed() {
        let both = [(NODES, 200, nodes()), (PODS, 200, pods())];
        assert_eq!(
            told(&both, &[Scope::All], CapacityType::Any).await,
            "0 of 3 h100 devices are free (1 is held by train-7 here, 2 are held by other namespaces)"
        );
        // Nodes that may be taken back are none of those that stay.
        let none = "no node of the cluster has h100 devices";
        assert_eq!(told(&both, &[Scope::All], CapacityType::Spot).await, none);
    }

    /// An operator of some namespaces sees what these hold, and says that there may be others.
    #[tokio::test]
    async fn an_operator_of_some_namespaces_counts_what_it_sees() {
        let mine = "GET /api/v1/namespaces/mine/pods";
        let some =
            [(NODES, 200, nodes()), (mine, 200, list("PodList", json!([pod("mine", "train-7", "a", 1)])))];
        let scopes = [Scope::Namespace("mine".to_owned())];
        let found = told(&some, &scopes, CapacityType::Any).await;
        assert!(
            found.starts_with("none of the 3 h100 devices is free for it (1 is held by train-7 here)"),
            "{found}"
        );
        let refused = [(NODES, 403, failure(403, "Forbidden"))];
        let found = told(&refused, &scopes, CapacityType::Any).await;
        assert!(found.ends_with("free devices unknown"), "{found}");
    }

    #[tokio::test]
    async fn one_look_serves_everybody_for_a_while() {
        let (client, server) = Server::start(&[(NODES, 200, nodes()), (PODS, 200, pods())]);
        let (devices, profile) = (Devices::default(), profile());
        for (second, namespace) in [(0, "mine"), (1, "theirs"), (29, "mine"), (30, "mine"), (31, "theirs")] {
            let found =
                devices.of(&client, &[Scope::All], &profile, CapacityType::Any, namespace, at(second)).await;
            assert_eq!(found.and_then(|found| found.free), Some(0));
        }
        drop(client);
        assert_eq!(paths(&server.calls().await), [NODES, PODS, NODES, PODS]);
    }
}
