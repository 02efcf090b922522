//! What every controller shares.
use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::{api::networking::v1::NetworkPolicyPeer, apimachinery::pkg::apis::meta::v1::LabelSelector};
use kube::{Api, Client, Resource};
use lathe_api::{AcceleratorProfile, CapacityType, names};
use lathe_contract::Trust;
use lathe_resolve::inference::Images;

use crate::{
    apply::Writer,
    channel::Channel,
    curves::Curves,
    devices::{Capacity, Devices},
    health::Health,
    scaling::Traffic,
};

/// What every controller shares.
pub struct Context {
    /// The Kubernetes API; writes go through `writer`.
    pub client: Client,
    /// How this installation is set up.
    pub config: Config,
    /// The only way to write.
    pub writer: Writer,
    /// How workers are asked.
    pub channel: Channel,
    /// Whose tokens workers believe; written into each contract.
    pub trust: Trust,
    /// Counters of reconciles, and what is missing to be ready.
    pub health: Health,
    /// Devices of the cluster, looked at for all objects together.
    pub devices: Devices,
    /// What flows through the gateways.
    pub traffic: Traffic,
    /// What the gateways are told of jobs.
    pub curves: Curves,
}

/// How this installation is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Namespace of the Lease and the key Secret.
    pub release_namespace: String,
    /// Whose pods read the metrics of workers at their control port, beside the operator; `None`: nobody's.
    pub scraper: Option<NetworkPolicyPeer>,
    /// Namespaces to look after; empty: all.
    pub namespaces: Vec<String>,
    /// Whether this installation has a gateway.
    pub gateway: bool,
    /// Worker images.
    pub images: Images,
    /// `imagePullPolicy` of workers.
    pub pull_policy: Option<String>,
    /// Where replicas of services send traces, and how many.
    pub tracing: Option<Tracing>,
    /// The volume that a namespace gets on first need.
    pub artifacts: ArtifactVolume,
}

/// Traces of services' replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracing {
    /// The collector (OTLP over HTTP).
    pub endpoint: String,
    /// Share of the requests that are traced, of those that do not say so themselves: 0 to 1.
    pub sampling: String,
}

/// The PersistentVolumeClaim `lathe-artifacts`.
#[derive(Clone, Debug)]
pub struct ArtifactVolume {
    /// Requested size.
    pub size: String,
    /// Storage class; `None`: the cluster's default.
    pub storage_class: Option<String>,
    /// Access mode.
    pub access_mode: String,
}

/// One namespace, or all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every namespace.
    All,
    /// This one.
    Namespace(String),
}

impl Config {
    /// Whose pods may reach the control port of workers.
    pub fn control_peers(&self) -> Vec<NetworkPolicyPeer> {
        std::iter::once(self.program(names::FIELD_MANAGER)).chain(self.scraper.clone()).collect()
    }

    /// The gateway's pods.
    pub fn gateway_peer(&self) -> NetworkPolicyPeer {
        self.program(names::GATEWAY)
    }

    /// Address of the gateway, as OpenAI's clients take it; `None`: there is none.
    pub fn gateway_url(&self) -> Option<String> {
        self.gateway.then(|| format!("http://{}.{}.svc/v1", names::GATEWAY, self.release_namespace))
    }

    /// Pods of a program of this installation.
    fn program(&self, name: &str) -> NetworkPolicyPeer {
        let label = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        peer(
            label("kubernetes.io/metadata.name", &self.release_namespace),
            label("app.kubernetes.io/name", name),
        )
    }

    /// Each scope has its own watches.
    pub fn scopes(&self) -> Vec<Scope> {
        if self.namespaces.is_empty() {
            return vec![Scope::All];
        }
        self.namespaces.iter().cloned().map(Scope::Namespace).collect()
    }
}

/// Pods with these labels in namespaces with those; no labels: all of them.
pub fn peer(namespaces: BTreeMap<String, String>, pods: BTreeMap<String, String>) -> NetworkPolicyPeer {
    let select = |labels: BTreeMap<String, String>| LabelSelector {
        match_labels: (!labels.is_empty()).then_some(labels),
        match_expressions: None,
    };
    NetworkPolicyPeer {
        namespace_selector: Some(select(namespaces)),
        pod_selector: Some(select(pods)),
        ip_block: None,
    }
}

impl Scope {
    /// The API for a namespaced kind in this scope.
    pub fn api<K>(&self, client: &Client) -> Api<K>
    where
        K: Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        match self {
            Scope::All => Api::all(client.clone()),
            Scope::Namespace(namespace) => Api::namespaced(client.clone(), namespace),
        }
    }
}

impl Context {
    /// Devices of a profile as they were seen a short while ago; `None`: nobody knows.
    pub async fn capacity(
        &self,
        profile: &AcceleratorProfile,
        capacity_type: CapacityType,
        namespace: &str,
        now: Timestamp,
    ) -> Option<Capacity> {
        let scopes = self.config.scopes();
        self.devices.of(&self.client, &scopes, profile, capacity_type, namespace, now).await
    }

    /// Everything that is shared.
    pub fn new(client: Client, config: Config, channel: Channel, trust: Trust, health: Health) -> Self {
        let (writer, devices) = (Writer::new(client.clone()), Devices::default());
        let (traffic, curves) = (Traffic::default(), Curves::default());
        Self { writer, client, config, channel, trust, health, devices, traffic, curves }
    }
}
