//! Every read: what the cluster and the workers say about one InferenceService.
use std::{collections::BTreeMap, time::Duration};

use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Service},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};
use kube::{Api, Client, Resource, ResourceExt, runtime::reflector::Store};
use lathe_api::{AcceleratorProfile, InferenceService, Model, names};
use lathe_contract::Report;
use lathe_resolve::inference::model_ids;

use super::{Names, build};
use crate::{
    channel::Channel,
    devices::Capacity,
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
    /// Pods that are not going away.
    pub pods: Vec<Pod>,
    /// How the newest one ended that its node ended: such pods are left behind, and replaced.
    pub ended: Option<Trouble>,
    /// What ready pods said, by their names.
    pub reports: BTreeMap<String, Report>,
    /// What nodes say of pods that do not start, by their names.
    pub told: BTreeMap<String, Trouble>,
    /// Devices of the profile, looked for only where a pod finds no node; `None` also where nobody knows.
    pub capacity: Option<Capacity>,
    /// Now.
    pub now: Timestamp,
}

/// Our objects.
#[derive(Clone, Debug, Default)]
pub struct Children {
    /// One for each revision.
    pub contracts: Vec<ConfigMap>,
    pub policy: Option<NetworkPolicy>,
    pub endpoint: Option<Service>,
    pub budget: Option<PodDisruptionBudget>,
    pub deployment: Option<Deployment>,
    /// That of the revision that is tried beside it.
    pub candidate: Option<Deployment>,
}

impl Observed {
    /// True where a pod finds no node.
    pub fn is_homeless(&self) -> bool {
        self.pods.iter().filter_map(pods::trouble).any(|trouble| trouble.reason == pods::UNSCHEDULABLE)
    }
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

/// Reads all of it.
///
/// # Errors
/// [`Error::Read`]
pub async fn observe(
    service: &InferenceService,
    stores: &Stores,
    client: &Client,
    channel: &Channel,
    now: Timestamp,
) -> Result<Observed, Error> {
    let namespace = service.namespace().unwrap_or_default();
    let uid = service.uid().unwrap_or_default();
    let model = |name: &str| lookup(&stores.models, &namespace, name);
    let names = Names::of(service);
    let children = Children {
        contracts: own(&stores.contracts, &namespace, &uid),
        policy: own(&stores.policies, &namespace, &uid).pop(),
        endpoint: own(&stores.endpoints, &namespace, &uid).pop(),
        budget: own(&stores.budgets, &namespace, &uid).pop(),
        candidate: own(&stores.deployments, &namespace, &uid)
            .into_iter()
            .find(|found| found.name_any() == names.candidate),
        deployment: deployment(&stores.deployments, client, (&namespace, &uid, &names.serve)).await?,
    };
    let (over, pods): (Vec<Pod>, Vec<Pod>) =
        own_pods(&stores.pods, &namespace, &service.name_any()).into_iter().partition(pods::is_over);
    let revision = children.deployment.as_ref().and_then(build::revision);
    let current = over.iter().filter(|pod| pods::is_of(pod, revision));
    let newest = current.max_by_key(|pod| pod.metadata.creation_timestamp.clone());
    let reports = reports(&pods, channel, &uid).await;
    let mut told = BTreeMap::new();
    // One cause is told: a few pods are enough to know it.
    for pod in pods.iter().filter(|pod| !pods::is_ready(pod) && pods::trouble(pod).is_none()).take(ASKED) {
        let trouble = mounting::trouble(client, pod, now).await;
        told.extend(trouble.map(|trouble| (pod.name_any(), trouble)));
    }
    Ok(Observed {
        base: model(&service.spec.model_ref.name),
        adapters: service.spec.adapter_refs.iter().map(|adapter| model(&adapter.name)).collect(),
        profiles: profiles(&stores.profiles),
        rivals: rivals(service, &stores.services),
        children,
        ended: newest.and_then(pods::trouble),
        pods,
        reports,
        told,
        capacity: None,
        now,
    })
}

/// Objects of a kind that this service controls. The writer asks for those that the watch has not brought yet.
fn own<K>(store: &Store<K>, namespace: &str, uid: &str) -> Vec<K>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    store
        .state()
        .iter()
        .filter(|found| is_own(&***found, namespace, uid))
        .map(|found| (**found).clone())
        .collect()
}

fn is_own<K: Resource>(found: &K, namespace: &str, uid: &str) -> bool {
    found.namespace().as_deref() == Some(namespace)
        && found.owner_references().iter().any(|owner| owner.controller == Some(true) && owner.uid == uid)
}

/// The Deployment. One that the watch has not brought yet may be there: what its pods are made of must not be decided anew.
async fn deployment(
    store: &Store<Deployment>,
    client: &Client,
    (namespace, uid, name): (&str, &str, &str),
) -> Result<Option<Deployment>, Error> {
    if let Some(seen) = own(store, namespace, uid).into_iter().find(|seen| seen.name_any() == name) {
        return Ok(Some(seen));
    }
    let api: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let found = api.get_opt(name).await;
    let found = found.map_err(|source| Error::Read { what: "the Deployment", source: source.into() })?;
    Ok(found.filter(|found| is_own(found, namespace, uid)))
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

/// What the ready ones among `pods` say, by their names. A worker that does not answer is no error: its probes speak for it. All of
/// them together have [`ASKING`], since whoever makes pods could keep a round, and with it other tenants' objects, waiting.
pub async fn reports(pods: &[Pod], channel: &Channel, uid: &str) -> BTreeMap<String, Report> {
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
