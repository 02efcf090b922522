//! Pure: every object of a service.
use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment},
        core::v1::{
            ConfigMap, Container, EnvVar, HTTPGetAction, PodTemplateSpec, Probe, Service, ServicePort,
            ServiceSpec,
        },
        networking::v1::{
            NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
        },
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};
use kube::ResourceExt as _;
use lathe_api::{
    Access, CapacityType, InferenceService, RolloutStrategy,
    names::{CANDIDATE, LABEL_TRACK},
};
use lathe_contract::{CONTROL_PORT, SERVE_PORT, Task};
use lathe_resolve::{
    inference::Serving,
    pod::{self, CONTRACT_KEY, Placement, PodRequest},
};
use serde_json::Value;

use super::{CHANGE_CAUSE, KIND, Names, PROFILE, RANK, SLOTS};
use crate::{
    context::Tracing,
    drift::stamp,
    job::Owner,
    scaling::{SCALED, begin},
};

/// Key of the pods' template in the ConfigMap of their revision, beside their contract: what they were made of.
const TEMPLATE_KEY: &str = "template.json";
/// By it every program that sends traces knows its collector.
const OTLP_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// By these two how much it traces of what does not say so itself.
const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
const SAMPLER_ARG: &str = "OTEL_TRACES_SAMPLER_ARG";
/// How long a roll-out may be without progress; large models are fetched in it.
const PROGRESS_SECONDS: i32 = 3600;

/// All objects, in the order in which they are applied: pods see their contract and stand behind their policy from the start.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub contract: ConfigMap,
    pub policy: NetworkPolicy,
    pub endpoint: Service,
    pub budget: PodDisruptionBudget,
    pub deployment: Deployment,
    pub candidate: Option<Deployment>,
}

/// What the installation says beside the service.
#[derive(Clone, Copy, Debug)]
pub struct Installation<'a> {
    /// Whose pods may reach the control port.
    pub control_peers: &'a [NetworkPolicyPeer],
    /// The gateway's pods.
    pub gateway: &'a NetworkPolicyPeer,
    /// `imagePullPolicy` of workers.
    pub pull_policy: Option<&'a str>,
    /// Where workers send traces, and how many.
    pub tracing: Option<&'a Tracing>,
    /// Claims that only one node can mount at a time.
    pub one_node: &'a BTreeSet<String>,
}

/// What is there.
#[derive(Clone, Copy, Debug, Default)]
pub struct Live<'a> {
    pub deployment: Option<&'a Deployment>,
    /// The ConfigMap of the wanted revision, where pods of it work: they are to be what it says.
    pub kept: Option<&'a ConfigMap>,
    /// Old replicas go before new ones come, though the spec does not ask for it.
    pub in_place: bool,
    /// The candidate that is to run beside the stable revision.
    pub candidate: Option<Candidate<'a>>,
}

/// A revision that is tried.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    pub deployment: Option<&'a Deployment>,
    /// Pods that it begins with.
    pub replicas: i32,
}

/// Builds all objects.
///
/// # Errors
/// An object cannot be written as JSON.
pub fn build(
    service: &InferenceService,
    serving: &Serving,
    live: Live<'_>,
    installation: Installation<'_>,
) -> Result<Wanted, serde_json::Error> {
    let names = Names::of(service);
    let kept = live.kept.and_then(|map| map.data.as_ref());
    let mut data = pod::contract_data(&serving.contract)?;
    if let Some(contract) = kept.and_then(|kept| with_adapters(kept.get(CONTRACT_KEY)?, serving)) {
        data.insert(CONTRACT_KEY.to_owned(), contract);
    }
    let template = match kept.and_then(|kept| serde_json::from_str(kept.get(TEMPLATE_KEY)?).ok()) {
        Some(template) => template,
        None => template(service, serving, installation),
    };
    data.insert(TEMPLATE_KEY.to_owned(), serde_json::to_string(&template)?);
    let contract = ConfigMap {
        metadata: meta(service, &contract_name(service, serving)),
        data: Some(data),
        ..ConfigMap::default()
    };
    Ok(Wanted {
        contract: stamp(contract)?,
        policy: stamp(policy(service, &names, installation))?,
        endpoint: stamp(endpoint(service, &names))?,
        budget: stamp(budget(service, &names))?,
        candidate: live
            .candidate
            .map(|c| stamp(candidate(service, serving, c, template.clone())))
            .transpose()?,
        deployment: stamp(deployment(service, serving, live, template))?,
    })
}

/// The service's Deployment as it is made, while another revision is tried; `None`: nobody knows what its pods are made of.
///
/// # Errors
/// It cannot be written as JSON.
pub fn held(
    service: &InferenceService,
    live: &Deployment,
    contract: Option<&ConfigMap>,
) -> Result<Option<Deployment>, serde_json::Error> {
    let template = contract.and_then(|map| serde_json::from_str(map.data.as_ref()?.get(TEMPLATE_KEY)?).ok());
    let Some(template) = template else { return Ok(None) };
    let ours = [PROFILE, SLOTS, RANK, CHANGE_CAUSE];
    let mut annotations = live.annotations().clone();
    annotations.retain(|key, _| ours.contains(&key.as_str()));
    let mut made = of_pods(service, Names::of(service).serve, selector(service), template);
    made.metadata.annotations = Some(annotations);
    set_strategy(&mut made, service, false);
    begin_with(&mut made, Some(live), begin(service));
    stamp(made).map(Some)
}

/// The contract of pods that run, with other adapters: a worker that starts again reads what its image understands.
fn with_adapters(contract: &str, serving: &Serving) -> Option<String> {
    let Task::Serve(task) = &serving.contract.task else { return None };
    let mut kept: Value = serde_json::from_str(contract).ok()?;
    let (adapters, wanted) =
        (kept.pointer_mut("/task/serve/adapters")?, serde_json::to_value(&task.adapters).ok()?);
    if *adapters == wanted {
        return Some(contract.to_owned());
    }
    *adapters = wanted;
    serde_json::to_string_pretty(&kept).ok()
}

/// Name of the ConfigMap of a revision.
pub fn contract_name(service: &InferenceService, serving: &Serving) -> String {
    lathe_api::names::serve_contract(&service.name_any(), &serving.checksum)
}

/// Labels that tell a service's pods from all others; they never change.
pub fn selector(service: &InferenceService) -> BTreeMap<String, String> {
    let mut labels = pod::labels(KIND, &service.name_any(), None);
    labels.retain(|key, _| key.starts_with("lathe.dev/"));
    labels
}

fn meta(service: &InferenceService, name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: service.namespace(),
        labels: Some(pod::labels(KIND, &service.name_any(), None)),
        owner_references: Some(vec![Owner::of(service).reference]),
        ..ObjectMeta::default()
    }
}

fn label_selector(service: &InferenceService) -> LabelSelector {
    LabelSelector { match_labels: Some(selector(service)), match_expressions: None }
}

/// The gateway reaches the endpoint, with `access: Direct` everyone; the operator, and who reads metrics, the control port.
fn policy(service: &InferenceService, names: &Names, installation: Installation<'_>) -> NetworkPolicy {
    let clients = match service.spec.access {
        Access::GatewayOnly => Some(vec![installation.gateway.clone()]),
        Access::Direct => None,
    };
    let port = |number: u16| {
        vec![NetworkPolicyPort {
            port: Some(IntOrString::Int(number.into())),
            protocol: Some("TCP".to_owned()),
            end_port: None,
        }]
    };
    NetworkPolicy {
        metadata: meta(service, &names.serve),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(label_selector(service)),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(vec![
                NetworkPolicyIngressRule { ports: Some(port(SERVE_PORT)), from: clients },
                NetworkPolicyIngressRule {
                    ports: Some(port(CONTROL_PORT)),
                    from: Some(installation.control_peers.to_vec()),
                },
            ]),
            egress: None,
        }),
    }
}

fn endpoint(service: &InferenceService, names: &Names) -> Service {
    Service {
        metadata: meta(service, &names.endpoint),
        spec: Some(ServiceSpec {
            selector: Some(selector(service)),
            ports: Some(vec![ServicePort {
                name: Some("http".to_owned()),
                app_protocol: Some("http".to_owned()),
                port: SERVE_PORT.into(),
                target_port: Some(IntOrString::String("http".to_owned())),
                protocol: Some("TCP".to_owned()),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

/// One replica at a time may be taken away by a drain; a service of one replica does not hold up its node.
fn budget(service: &InferenceService, names: &Names) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: meta(service, &names.serve),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(label_selector(service)),
            // A replica that is not ready serves nobody.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            min_available: None,
        }),
        status: None,
    }
}

fn deployment(
    service: &InferenceService,
    serving: &Serving,
    live: Live<'_>,
    template: PodTemplateSpec,
) -> Deployment {
    let mut made = of_pods(service, Names::of(service).serve, selector(service), template);
    let mut annotations = running(serving);
    annotations.extend(change_cause(serving, live.deployment).map(|cause| (CHANGE_CAUSE.to_owned(), cause)));
    made.metadata.annotations = Some(annotations);
    set_strategy(&mut made, service, live.in_place);
    begin_with(&mut made, live.deployment, begin(service));
    made
}

/// The pods of a revision that is tried: a label tells them from the others, and their hostname does so where EndpointSlices are read.
/// Their Deployment goes before another revision is tried, so it is never rolled.
fn candidate(
    service: &InferenceService,
    serving: &Serving,
    candidate: Candidate<'_>,
    mut template: PodTemplateSpec,
) -> Deployment {
    let track = || (LABEL_TRACK.to_owned(), CANDIDATE.to_owned());
    template.metadata.get_or_insert_default().labels.get_or_insert_default().extend([track()]);
    if let Some(spec) = &mut template.spec {
        spec.hostname = Some(CANDIDATE.to_owned());
        // An endpoint has the hostname of its pod where this names its Service.
        spec.subdomain = Some(Names::of(service).endpoint);
    }
    let mut selector = selector(service);
    selector.extend([track()]);
    let mut made = of_pods(service, Names::of(service).candidate, selector, template);
    made.metadata.annotations = Some(running(serving));
    begin_with(&mut made, candidate.deployment, candidate.replicas);
    made
}

/// What the pods of a Deployment have room for, and where they are.
fn running(serving: &Serving) -> BTreeMap<String, String> {
    BTreeMap::from([
        (PROFILE.to_owned(), serving.profile.name_any()),
        (SLOTS.to_owned(), serving.room.slots.to_string()),
        (RANK.to_owned(), serving.room.rank.to_string()),
    ])
}

fn of_pods(
    service: &InferenceService,
    name: String,
    selector: BTreeMap<String, String>,
    template: PodTemplateSpec,
) -> Deployment {
    Deployment {
        metadata: meta(service, &name),
        spec: Some(DeploymentSpec {
            selector: LabelSelector { match_labels: Some(selector), match_expressions: None },
            strategy: Some(rolling(false)),
            progress_deadline_seconds: Some(PROGRESS_SECONDS),
            revision_history_limit: Some(3),
            template,
            ..DeploymentSpec::default()
        }),
        status: None,
    }
}

/// Until the scaler has the field, leaving it out would set it to 1.
fn begin_with(made: &mut Deployment, live: Option<&Deployment>, replicas: i32) {
    let scaled = live.is_some_and(|live| live.annotations().contains_key(SCALED));
    if let Some(spec) = &mut made.spec {
        spec.replicas = (!scaled).then_some(replicas);
    }
}

fn set_strategy(made: &mut Deployment, service: &InferenceService, in_place: bool) {
    let recreates = service.spec.rollout.as_ref().is_some_and(|r| r.strategy == RolloutStrategy::Recreate);
    let recreate = DeploymentStrategy { type_: Some("Recreate".to_owned()), rolling_update: None };
    if let Some(spec) = &mut made.spec {
        spec.strategy = Some(if recreates { recreate } else { rolling(in_place) });
    }
}

/// A new replica before an old one goes, or the other way round.
fn rolling(in_place: bool) -> DeploymentStrategy {
    let (surge, unavailable) = if in_place { (0, 1) } else { (1, 0) };
    DeploymentStrategy {
        type_: Some("RollingUpdate".to_owned()),
        rolling_update: Some(RollingUpdateDeployment {
            max_surge: Some(IntOrString::Int(surge)),
            max_unavailable: Some(IntOrString::Int(unavailable)),
        }),
    }
}

/// Whether old replicas go before new ones come, one at a time.
pub fn is_in_place(deployment: &Deployment) -> bool {
    let strategy = deployment.spec.as_ref().and_then(|spec| spec.strategy.as_ref());
    let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
    rolling.is_some_and(|rolling| rolling.max_surge == Some(IntOrString::Int(0)))
}

fn template(
    service: &InferenceService,
    serving: &Serving,
    installation: Installation<'_>,
) -> PodTemplateSpec {
    let task = &serving.contract.task;
    let mut mounts = serving.mounts.clone();
    mounts.on_one_node(installation.one_node);
    let mut template = pod::template(&PodRequest {
        labels: pod::labels(KIND, &service.name_any(), Some(pod::task_name(task))),
        image: &serving.image,
        pull_policy: installation.pull_policy,
        task,
        contract: &contract_name(service, serving),
        checksum: &serving.checksum,
        mounts: &mounts,
        cpu_millis: serving.cpu_millis,
        least_cpu_millis: serving.least_cpu_millis,
        memory: serving.memory,
        cache: serving.cache,
        placement: Some(Placement {
            profile: &serving.profile.spec,
            count: serving.count,
            capacity: CapacityType::Any,
        }),
        overrides: service.spec.pod.as_ref(),
        grace_seconds: serving.grace_seconds,
        restart_policy: "Always",
    });
    for container in template.spec.iter_mut().flat_map(|spec| &mut spec.containers) {
        probed(container);
        traced(container, installation.tracing);
    }
    template
}

/// Traces go where the user says and are as many, or else where and as many as the installation does. Running pods are not replaced for it.
fn traced(container: &mut Container, tracing: Option<&Tracing>) {
    let Some(Tracing { endpoint, sampling }) = tracing else { return };
    let env = container.env.get_or_insert_default();
    let collector = [(OTLP_ENDPOINT, endpoint.as_str())];
    let sampler = [(SAMPLER, "parentbased_traceidratio"), (SAMPLER_ARG, sampling)];
    // An argument of ours is none of the user's sampler.
    for ours in [&collector[..], &sampler] {
        if ours.iter().any(|(name, _)| env.iter().any(|variable| variable.name == *name)) {
            continue;
        }
        env.extend(ours.iter().map(|(name, value)| EnvVar {
            name: (*name).to_owned(),
            value: Some((*value).to_owned()),
            ..EnvVar::default()
        }));
    }
}

/// `/healthz` answers from the first second on, `/readyz` once a token was produced: reading a large model kills no pod.
fn probed(container: &mut Container) {
    let probe = |path: &str, period: i32, failures: i32| Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String("control".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        failure_threshold: Some(failures),
        timeout_seconds: Some(5),
        ..Probe::default()
    };
    container.startup_probe = Some(probe("/healthz", 1, 120));
    container.liveness_probe = Some(probe("/healthz", 10, 6));
    container.readiness_probe = Some(probe("/readyz", 2, 2));
}

/// Why the next revision is made; while it is being rolled out, why it was.
fn change_cause(serving: &Serving, live: Option<&Deployment>) -> Option<String> {
    let live = live?;
    let template = &live.spec.as_ref()?.template;
    if revision(live) == Some(&serving.checksum) {
        return live.annotations().get(CHANGE_CAUSE).cloned();
    }
    let volumes = template.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let mounted: Vec<&str> =
        volumes.filter_map(|v| Some(v.persistent_volume_claim.as_ref()?.claim_name.as_str())).collect();
    let more: Vec<&str> = serving.mounts.claims().filter(|claim| !mounted.contains(claim)).collect();
    Some(if !more.is_empty() {
        format!("the running pods do not mount {}, where a model's files lie", more.join(", "))
    } else if has_other(live, SLOTS, serving.room.slots) {
        format!("the running pods have no room for more adapters (now {})", serving.room.slots)
    } else if has_other(live, RANK, serving.room.rank) {
        format!("the running pods have no room for an adapter of rank {}", serving.room.rank)
    } else {
        "the spec changed".to_owned()
    })
}

fn has_other(live: &Deployment, annotation: &str, wanted: i32) -> bool {
    live.annotations().get(annotation).is_some_and(|had| *had != wanted.to_string())
}

/// The hash of the contract that a Deployment's pods are made for.
pub fn revision(deployment: &Deployment) -> Option<&str> {
    crate::pods::checksum(deployment.spec.as_ref()?.template.metadata.as_ref())
}

#[cfg(test)]
mod tests;
