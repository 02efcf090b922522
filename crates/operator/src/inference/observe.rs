//! Every read: what the cluster and the workers say about one InferenceService.
use std::{collections::BTreeMap, fmt::Debug, time::Duration};

use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Node, PersistentVolumeClaim, Pod, Service},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::ListParams,
    core::NamespaceResourceScope,
    runtime::reflector::{ObjectRef, Store},
};
use lathe_api::{AcceleratorProfile, InferenceService, Model, names};
use lathe_contract::Report;
use lathe_resolve::inference::model_ids;
use serde::de::DeserializeOwned;

use super::Names;
use crate::{
    channel::Channel,
    error::Error,
    mounting,
    pods::{self, Trouble},
    runtime::{Guard, lookup, readable},
};

/// Workers that are asked at a time.
const ASKED: usize = 8;
/// How long the workers of one service are asked, or told, in one round.
pub const ASKING: Duration = Duration::from_secs(5);

/// Objects as the watches last saw them.
#[derive(Clone)]
pub struct Stores {
    pub services: Store<Guard<InferenceService>>,
    pub models: Store<Guard<Model>>,
    pub profiles: Store<Guard<AcceleratorProfile>>,
    pub deployments: Store<Deployment>,
    pub endpoints: Store<Service>,
    pub contracts: Store<ConfigMap>,
    pub budgets: Store<PodDisruptionBudget>,
    pub policies: Store<NetworkPolicy>,
    pub pods: Store<Pod>,
    pub claims: Store<PersistentVolumeClaim>,
}

/// Everything that a round decides from.
#[derive(Debug, Default)]
pub struct Observed {
    /// The Model of `modelRef`.
    pub base: Option<Model>,
    /// The Models of `adapterRefs`, in their order.
    pub adapters: Vec<Option<Model>>,
    /// Every profile.
    pub profiles: Vec<AcceleratorProfile>,
    /// Other services of the namespace.
    pub rivals: Vec<Rival>,
    /// Our objects.
    pub children: Children,
    /// An object under one of our names that is not ours.
    pub taken: Option<Taken>,
    /// Pods that are not going away.
    pub pods: Vec<Pod>,
    /// What ready pods said, by their names.
    pub reports: BTreeMap<String, Report>,
    /// What nodes say of pods that do not start, by their names.
    pub told: BTreeMap<String, Trouble>,
    /// Nodes, read only where a pod finds none; `None` also where they may not be read.
    pub nodes: Option<Vec<Node>>,
}

/// Our objects.
#[derive(Debug, Default)]
pub struct Children {
    /// One for each revision.
    pub contracts: Vec<ConfigMap>,
    pub policy: Option<NetworkPolicy>,
    pub endpoint: Option<Service>,
    pub budget: Option<PodDisruptionBudget>,
    pub deployment: Option<Deployment>,
}

impl Children {
    /// The contract of this name.
    pub fn contract(&self, name: &str) -> Option<&ConfigMap> {
        self.contracts.iter().find(|contract| contract.name_any() == name)
    }
}

/// Another service, and the ids under which it answers.
#[derive(Debug)]
pub struct Rival {
    pub name: String,
    pub created: Option<Timestamp>,
    pub model_ids: Vec<String>,
}

/// An object that is in the way.
#[derive(Debug)]
pub struct Taken {
    pub kind: String,
    pub name: String,
    /// It belongs to an InferenceService, which is going away.
    pub leaving: bool,
}

/// Reads all of it.
///
/// # Errors
/// [`Error::Read`]
pub async fn observe(
    service: &InferenceService,
    stores: &Stores,
    client: &Client,
    channel: &Channel,
) -> Result<Observed, Error> {
    let namespace = service.namespace().unwrap_or_default();
    let uid = service.uid().unwrap_or_default();
    let model = |name: &str| lookup(&stores.models, &namespace, name);
    let find = Finder { client, namespace: &namespace, uid: &uid };
    let names = Names::of(service);
    let mut taken = None;
    let children = Children {
        contracts: own(&stores.contracts, &namespace, &uid),
        policy: find.child(&stores.policies, &names.serve, &mut taken).await?,
        endpoint: find.child(&stores.endpoints, &names.endpoint, &mut taken).await?,
        budget: find.child(&stores.budgets, &names.serve, &mut taken).await?,
        deployment: find.child(&stores.deployments, &names.serve, &mut taken).await?,
    };
    let pods = own_pods(&stores.pods, &namespace, &service.name_any());
    let reports = reports(&pods, channel, &uid).await;
    let homeless = pods.iter().filter_map(pods::trouble).any(|t| t.reason == pods::UNSCHEDULABLE);
    let mut told = BTreeMap::new();
    // One cause is told: a few pods are enough to know it.
    for pod in pods.iter().filter(|pod| !pods::is_ready(pod) && pods::trouble(pod).is_none()).take(ASKED) {
        let trouble = mounting::trouble(client, pod, Timestamp::now()).await;
        told.extend(trouble.map(|trouble| (pod.name_any(), trouble)));
    }
    let nodes = if homeless { nodes(client).await } else { None };
    Ok(Observed {
        base: model(&service.spec.model_ref.name),
        adapters: service.spec.adapter_refs.iter().map(|adapter| model(&adapter.name)).collect(),
        profiles: profiles(&stores.profiles),
        rivals: rivals(service, &stores.services),
        children,
        taken,
        pods,
        reports,
        told,
        nodes,
    })
}

/// Contracts of this service: applying one that the watch has not brought yet changes nothing, so nobody else is asked.
fn own(store: &Store<ConfigMap>, namespace: &str, uid: &str) -> Vec<ConfigMap> {
    let ours = |map: &ConfigMap| {
        map.namespace().as_deref() == Some(namespace)
            && map.owner_references().iter().any(|o| o.controller == Some(true) && o.uid == uid)
    };
    store.state().iter().filter(|map| ours(map)).map(|map| (**map).clone()).collect()
}

struct Finder<'a> {
    client: &'a Client,
    namespace: &'a str,
    uid: &'a str,
}

impl Finder<'_> {
    /// A child by name. One that the watch has not seen may be new, or somebody else's: the API server knows.
    async fn child<K>(
        &self,
        store: &Store<K>,
        name: &str,
        taken: &mut Option<Taken>,
    ) -> Result<Option<K>, Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
    {
        let seen = store.get(&ObjectRef::new(name).within(self.namespace)).map(|found| (*found).clone());
        let found = match seen {
            Some(found) => Some(found),
            None => {
                let api: Api<K> = Api::namespaced(self.client.clone(), self.namespace);
                api.get_opt(name)
                    .await
                    .map_err(|source| Error::Read { what: "an object of a service", source: source.into() })?
            }
        };
        let Some(found) = found else { return Ok(None) };
        let owner = found.owner_references().iter().find(|owner| owner.controller == Some(true));
        if owner.is_some_and(|owner| owner.uid == self.uid) {
            return Ok(Some(found));
        }
        taken.get_or_insert_with(|| Taken {
            kind: K::kind(&()).into_owned(),
            name: name.to_owned(),
            leaving: owner.is_some_and(|owner| owner.kind == InferenceService::kind(&())),
        });
        Ok(None)
    }
}

fn own_pods(store: &Store<Pod>, namespace: &str, service: &str) -> Vec<Pod> {
    let ours = |pod: &Pod| {
        pod.namespace().as_deref() == Some(namespace)
            && pod.labels().get(names::LABEL_NAME).is_some_and(|name| name == service)
            && pod.metadata.deletion_timestamp.is_none()
    };
    let mut pods: Vec<Pod> =
        store.state().iter().filter(|pod| ours(pod)).map(|pod| (**pod).clone()).collect();
    pods.sort_by_key(ResourceExt::name_any);
    pods
}

/// A worker that does not answer is no error: its probes speak for it. All of them together have [`ASKING`], since whoever
/// makes pods could keep a round, and with it other tenants' objects, waiting.
async fn reports(pods: &[Pod], channel: &Channel, uid: &str) -> BTreeMap<String, Report> {
    let ask = |(name, ip): (String, String)| async move {
        match channel.report(&ip, uid).await {
            Ok(report) => Some((name, report)),
            Err(error) => {
                tracing::debug!(pod = name, %error, "a worker gave no report");
                None
            }
        }
    };
    let ready = pods.iter().filter(|pod| pods::is_ready(pod));
    let asked: Vec<(String, String)> = ready.filter_map(|pod| Some((pod.name_any(), ip(pod)?))).collect();
    let answers = stream::iter(asked).map(ask).buffer_unordered(ASKED);
    answers.filter_map(|answer| async { answer }).take_until(tokio::time::sleep(ASKING)).collect().await
}

/// The IP of a pod.
pub fn ip(pod: &Pod) -> Option<String> {
    pod.status.as_ref()?.pod_ip.clone()
}

async fn nodes(client: &Client) -> Option<Vec<Node>> {
    let api: Api<Node> = Api::all(client.clone());
    match api.list(&ListParams::default()).await {
        Ok(list) => Some(list.items),
        Err(error) => {
            tracing::debug!(%error, "nodes cannot be read");
            None
        }
    }
}

fn profiles(store: &Store<Guard<AcceleratorProfile>>) -> Vec<AcceleratorProfile> {
    let mut all = readable(store);
    all.sort_by_key(ResourceExt::name_any);
    all
}

fn rivals(service: &InferenceService, store: &Store<Guard<InferenceService>>) -> Vec<Rival> {
    let other =
        |other: &InferenceService| other.namespace() == service.namespace() && other.uid() != service.uid();
    let rival = |other: InferenceService| Rival {
        name: other.name_any(),
        created: other.metadata.creation_timestamp.as_ref().map(|time| time.0),
        model_ids: model_ids(&other.name_any(), &other.spec),
    };
    readable(store).into_iter().filter(other).map(rival).collect()
}
