//! Pure: what the service's status says.
mod scaling;
mod throughput;
mod trial;

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::{
    api::{apps::v1::Deployment, core::v1::Pod},
    apimachinery::pkg::apis::meta::v1::Condition,
};
use kube::ResourceExt as _;
use lathe_api::{
    AcceleratorProfile, Access, InferenceService, InferenceServiceStatus, MAX_REPLICAS, Quantity,
    RolloutStatus, ThroughputStatus,
    conditions::{READY, RECONCILING, STALLED, State, set},
};
use lathe_contract::{AdapterState, AdapterStatus, Report, SERVE_PORT, Task};
use lathe_resolve::inference::{self, Serving, cost_per_million_tokens};

use super::{
    CHANGE_CAUSE, PROFILE,
    build::{revision, selector},
    plan::{Blocked, GATEWAY_DISABLED},
};
use crate::{
    claims,
    devices::Capacity,
    mounting,
    pods::{self, Trouble},
    scaling::is_candidate,
    unplaced::{self, Asked},
};

const PLANNED: &str = "Planned";
const AVAILABLE: &str = "Available";
const ROLLED_OUT: &str = "RolledOut";
/// Reason of a candidate that was given up.
pub const GATE_FAILED: &str = "GateFailed";
const SCALING_ACTIVE: &str = "ScalingActive";

/// What the status is made of.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    pub service: &'a InferenceService,
    pub plan: Result<&'a Serving, &'a Blocked>,
    /// Address of the gateway; `None`: there is none.
    pub gateway_url: Option<&'a str>,
    /// As it is after this round's writes.
    pub deployment: Option<&'a Deployment>,
    /// Every profile.
    pub profiles: &'a [AcceleratorProfile],
    /// Pods that are not going away.
    pub pods: &'a [Pod],
    /// What ready pods said, by their names.
    pub reports: &'a BTreeMap<String, Report>,
    /// What ready pods said of their adapters, by their names.
    pub adapters: &'a BTreeMap<String, AdapterStatus>,
    /// What nodes say of pods that do not start, by their names.
    pub told: &'a BTreeMap<String, Trouble>,
    /// How the newest pod ended that its node ended.
    pub ended: Option<&'a Trouble>,
    /// Devices of the profile, where a pod finds no node.
    pub capacity: Option<&'a Capacity>,
    /// Where a roll-out with a candidate stands.
    pub rollout: Option<&'a RolloutStatus>,
    /// Old replicas go before new ones come, since there is no device for one more.
    pub in_place: bool,
    /// Why a write of this round was not taken.
    pub refused: Option<&'a Trouble>,
    /// True where throughput may be written again.
    pub may_write_throughput: bool,
    pub now: Timestamp,
}

/// One observation: its value, one word and one sentence.
struct Said {
    state: State,
    reason: String,
    message: String,
}

impl Said {
    fn new(state: impl Into<State>, reason: &str, message: impl Into<String>) -> Self {
        Self { state: state.into(), reason: reason.to_owned(), message: message.into() }
    }
}

/// Counts over the pods.
struct Counts {
    wanted: i32,
    /// Pods that neither end nor have ended.
    all: i32,
    /// Ready pods of any revision.
    ready: i32,
    /// Ready pods of the revision that the Deployment is made for; a candidate's are not among them.
    current: i32,
    /// Pods of earlier revisions.
    old: i32,
}

/// Makes the status.
#[must_use]
pub fn status(facts: &Facts<'_>) -> InferenceServiceStatus {
    let service = facts.service;
    let old = service.status.clone().unwrap_or_default();
    let counts = counts(facts);
    // Where they are replaced in place it is about to end.
    let trouble = trouble(facts).filter(|trouble| !facts.in_place || trouble.reason != unplaced::NO_DEVICE);
    let planned = planned(facts);
    let available = available(facts, &counts, trouble.as_ref());
    let rolled_out = rolled_out(facts, &counts, trouble.as_ref());
    let stalled = stalled(facts, trouble.as_ref());
    let ready = ready(facts, &planned, &available, &rolled_out, trouble.as_ref());
    let reconciling = reconciling(&ready, &rolled_out, &counts, &stalled);

    let mut conditions = old.conditions.clone();
    let all = [
        (READY, ready),
        (PLANNED, planned),
        (AVAILABLE, available),
        (ROLLED_OUT, rolled_out),
        (SCALING_ACTIVE, scaling::active(service)),
        (RECONCILING, reconciling),
        (STALLED, stalled),
    ];
    let generation = service.metadata.generation.unwrap_or_default();
    for (type_, said) in all {
        set(&mut conditions, type_, said.state, &said.reason, &said.message, generation, facts.now);
    }
    let throughput = throughput::throughput(facts, old.throughput.as_ref());
    InferenceServiceStatus {
        observed_generation: generation,
        conditions,
        url: facts.deployment.and_then(|_| url(facts)),
        model_ids: model_ids(facts, &counts),
        replicas: counts.all,
        ready_replicas: counts.ready,
        selector: Some(selector_text(service)),
        cost_per_million_tokens: throughput.as_ref().and_then(|flows| cost(facts, flows)),
        throughput,
        revisions: trial::revisions(facts),
        rollout: facts.rollout.cloned(),
        decisions: Vec::new(),
        scaling: None,
        plan: facts.plan.ok().map(|serving| serving.plan.clone()).or(old.plan),
    }
}

/// Of the throughput that the status tells, so that both change together.
fn cost(facts: &Facts<'_>, flows: &ThroughputStatus) -> Option<String> {
    let hourly = cost_per_hour(facts).filter(|_| facts.pods.iter().any(pods::is_ready))?;
    let rate = flows.prompt.parse::<f64>().ok()? + flows.generation.parse::<f64>().ok()?;
    cost_per_million_tokens(hourly, rate)
}

/// What ready replicas cost in an hour. Those of an earlier revision may be on devices of another price: while they answer, nobody knows.
#[must_use]
pub fn cost_per_hour<'a>(facts: &Facts<'a>) -> Option<(f64, &'a str)> {
    let Counts { ready, .. } = Some(counts(facts)).filter(|counts| counts.ready == counts.current)?;
    let Ok(serving) = facts.plan else { return running_cost(facts, ready) };
    inference::cost_per_hour(&serving.profile, serving.count, facts.service.spec.pod.as_ref(), ready)
}

/// Of a service that cannot be planned: what runs goes on, and costs what its Deployment says.
fn running_cost<'a>(facts: &Facts<'a>, replicas: i32) -> Option<(f64, &'a str)> {
    let deployment = facts.deployment?;
    let name = deployment.annotations().get(PROFILE)?;
    let profile = facts.profiles.iter().find(|profile| profile.metadata.name.as_ref() == Some(name))?;
    let pod = deployment.spec.as_ref()?.template.spec.as_ref()?;
    let limits = pod.containers.first()?.resources.as_ref()?.limits.as_ref()?;
    let devices = Quantity::from(limits.get(&profile.spec.resource)?.0.as_str()).amount()?;
    inference::devices_per_hour(profile, devices * f64::from(replicas))
}

/// The fields that a round of the service writes.
#[must_use]
pub fn without_scaling(mut status: InferenceServiceStatus) -> InferenceServiceStatus {
    (status.decisions, status.scaling) = (Vec::new(), None);
    status
}

/// The condition that sums the others up.
#[must_use]
pub fn summary(status: &InferenceServiceStatus) -> Option<&Condition> {
    lathe_api::conditions::find(&status.conditions, READY)
}

fn stays(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none() && !pods::is_over(pod)
}

fn counts(facts: &Facts<'_>) -> Counts {
    let wanted_revision = facts.deployment.and_then(revision);
    let of = |pod: &&Pod| pods::is_of(pod, wanted_revision);
    let own = |pod: &&Pod| !is_candidate(pod);
    let ready: Vec<&Pod> = facts.pods.iter().filter(|pod| pods::is_ready(pod)).collect();
    // The schema has room for no more, and a roll-out has one more than are asked for.
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX).min(MAX_REPLICAS);
    Counts {
        wanted: scaling::wanted(facts),
        all: count(facts.pods.iter().filter(|pod| stays(pod)).count()),
        ready: count(ready.len()),
        current: count(ready.iter().copied().filter(own).filter(of).count()),
        old: count(facts.pods.iter().filter(own).filter(|pod| !of(pod)).count()),
    }
}

/// What is wrong with the pods of the revision that is wanted, the worst first.
fn trouble(facts: &Facts<'_>) -> Option<Trouble> {
    let wanted = facts.deployment.and_then(revision);
    let of = |pod: &&Pod| pods::is_of(pod, wanted) && !is_candidate(pod);
    trouble_among(facts, facts.pods.iter().filter(of))
        .or_else(|| no_pod(facts.deployment?))
        .or_else(|| facts.ended.filter(|_| !facts.pods.iter().any(pods::is_ready)).cloned())
}

/// What is wrong with some pods, the worst first.
fn trouble_among<'a>(facts: &Facts<'_>, pods: impl Iterator<Item = &'a Pod>) -> Option<Trouble> {
    let answers = facts.pods.iter().any(pods::is_ready);
    // An image on its way is worth a word only while nobody answers.
    let told = |pod: &Pod| {
        let told = facts.told.get(&pod.name_any()).filter(|t| !answers || t.reason != mounting::PULLING);
        pods::trouble(pod).or_else(|| told.cloned())
    };
    let mut all: Vec<Trouble> = pods.filter_map(told).collect();
    all.sort_by_key(|trouble| (!trouble.stalled, trouble.reason != pods::UNSCHEDULABLE));
    let first = all.into_iter().next()?;
    Some(if first.reason == pods::UNSCHEDULABLE { placed_nowhere(facts, first) } else { first })
}

/// Why the Deployment's controller could not make a pod.
fn no_pod(deployment: &Deployment) -> Option<Trouble> {
    let conditions = deployment.status.as_ref()?.conditions.as_ref()?;
    let failed = conditions.iter().find(|c| c.type_ == "ReplicaFailure" && c.status == "True")?;
    Some(pods::refused(failed.message.as_deref().unwrap_or_default()))
}

/// Why no node takes a pod.
fn placed_nowhere(facts: &Facts<'_>, trouble: Trouble) -> Trouble {
    let Ok(serving) = facts.plan else { return trouble };
    let asked = Asked { profile: &serving.profile, count: serving.count.into(), anew: "" };
    unplaced::trouble(&trouble.message, asked, facts.capacity, "")
}

fn planned(facts: &Facts<'_>) -> Said {
    match facts.plan {
        Err(blocked) => Said::new(false, blocked.why.reason, &*blocked.why.message),
        Ok(serving) => {
            let total = serving.plan.memory.iter().find(|line| line.name == "total");
            let total = total.map_or(String::new(), |line| format!(", {} in each replica", line.value));
            let count = serving.count;
            let template = facts.deployment.and_then(|d| d.spec.as_ref()?.template.metadata.as_ref());
            let beside = claims::words(template.and_then(|meta| meta.labels.as_ref()));
            let beside = if beside.is_empty() { beside } else { format!(", on one node{beside}") };
            Said::new(true, "Planned", format!("{count} x {}{total}{beside}.", serving.profile.name_any()))
        }
    }
}

fn available(facts: &Facts<'_>, counts: &Counts, trouble: Option<&Trouble>) -> Said {
    let Counts { wanted, ready, .. } = *counts;
    // Replicas that are ready are no help where nobody reaches them.
    if let Err(blocked) = facts.plan
        && blocked.why.reason == GATEWAY_DISABLED
    {
        return Said::new(false, blocked.why.reason, &*blocked.why.message);
    }
    if ready > 0 {
        return Said::new(true, "Answering", format!("{ready} of {wanted} replicas answer."));
    }
    if wanted == 0 {
        return scaling::at_rest(facts.service, false);
    }
    match (trouble, facts.plan) {
        (Some(trouble), _) => Said::new(false, &trouble.reason, &*trouble.message),
        (None, Err(blocked)) if facts.deployment.is_none() => {
            Said::new(false, blocked.why.reason, &*blocked.why.message)
        }
        (None, _) => Said::new(false, "Starting", starting(facts)),
    }
}

/// What pods do before they are ready.
fn starting(facts: &Facts<'_>) -> String {
    match facts.pods.len() {
        0 => "waiting for pods.".to_owned(),
        1 => {
            "a pod is starting: it fetches the model and produces a first token before it answers.".to_owned()
        }
        n => format!(
            "{n} pods are starting: they fetch the model and produce a first token before they answer."
        ),
    }
}

fn rolled_out(facts: &Facts<'_>, counts: &Counts, trouble: Option<&Trouble>) -> Said {
    let serving = match facts.plan {
        Err(blocked) => {
            let kept = if facts.deployment.is_some() { " What ran before goes on." } else { "" };
            return Said::new(false, blocked.why.reason, format!("{}{kept}", blocked.why.message));
        }
        Ok(serving) => serving,
    };
    if let Some(refused) = facts.refused {
        return Said::new(false, &refused.reason, &*refused.message);
    }
    let Some(deployment) = facts.deployment else {
        return Said::new(State::Unknown, "Pending", "nothing is made yet.");
    };
    if let Some(said) = trial::tried(facts) {
        return said;
    }
    let cause = deployment.annotations().get(CHANGE_CAUSE).map(|cause| format!(" (new pods, since {cause})"));
    let cause = cause.unwrap_or_default();
    let Counts { wanted, current, old, .. } = *counts;
    let settled = observed(deployment) && revision(deployment) == Some(&serving.checksum);
    if wanted == 0 && facts.pods.is_empty() {
        return scaling::at_rest(facts.service, true);
    }
    if !settled || current < wanted || old > 0 || count_of(facts) > wanted {
        let progress = format!("{current} of {wanted} replicas are as the spec says{cause}");
        let progress = match facts.in_place {
            true => format!(
                "{progress}; no device is free for one more replica, so an old one goes before a new one comes"
            ),
            false => progress,
        };
        return match trouble {
            Some(trouble) => Said::new(false, &trouble.reason, format!("{progress}: {}", trouble.message)),
            None => Said::new(false, "RollingOut", format!("{progress}.")),
        };
    }
    adapters(facts, serving)
}

fn count_of(facts: &Facts<'_>) -> i32 {
    i32::try_from(facts.pods.iter().filter(|pod| !is_candidate(pod)).count()).unwrap_or(i32::MAX)
}

/// True where the Deployment's controller has seen the newest spec.
fn observed(deployment: &Deployment) -> bool {
    let seen = deployment.status.as_ref().and_then(|status| status.observed_generation);
    seen.is_some() && seen >= deployment.metadata.generation
}

/// Adapters are set in running pods; each must have arrived in every one of them.
fn adapters(facts: &Facts<'_>, serving: &Serving) -> Said {
    let ids = adapter_ids(serving);
    for id in &ids {
        let entries = facts.adapters.values().flat_map(|status| &status.adapters);
        let failed =
            entries.filter(|entry| entry.model_id == *id).find(|entry| entry.state == AdapterState::Failed);
        if let Some(entry) = failed {
            let why = entry.message.as_deref().map(pods::shown).unwrap_or_default();
            return Said::new(false, "AdapterFailed", format!("adapter {id} cannot be loaded: {why}."));
        }
    }
    let missing: Vec<&str> = ids.into_iter().filter(|id| !everywhere(facts, id)).collect();
    if missing.is_empty() {
        return Said::new(true, "RolledOut", trial::done(facts));
    }
    let message = format!("{} being added to the running pods, without a restart.", are(&missing));
    Said::new(false, "AddingAdapters", message)
}

fn are(names: &[&str]) -> String {
    let verb = if names.len() == 1 { "is" } else { "are" };
    format!("{} {verb}", names.join(", "))
}

fn adapter_ids(serving: &Serving) -> Vec<&str> {
    match &serving.contract.task {
        Task::Serve(task) => task.adapters.iter().map(|adapter| adapter.model_id.as_str()).collect(),
        _ => Vec::new(),
    }
}

/// True where every ready pod answers to an adapter's id.
fn everywhere(facts: &Facts<'_>, id: &str) -> bool {
    let mut ready = facts.pods.iter().filter(|pod| pods::is_ready(pod)).peekable();
    ready.peek().is_some() && ready.all(|pod| answers(facts, pod, id))
}

/// True where some ready pod does.
fn anywhere(facts: &Facts<'_>, id: &str) -> bool {
    facts.pods.iter().any(|pod| pods::is_ready(pod) && answers(facts, pod, id))
}

fn answers(facts: &Facts<'_>, pod: &Pod, id: &str) -> bool {
    let status = facts.adapters.get(&pod.name_any());
    status.is_some_and(|s| s.adapters.iter().any(|e| e.model_id == id && e.state == AdapterState::Ready))
}

/// Whether the service does what its spec asks for. One that was stopped or sleeps does.
fn ready(
    facts: &Facts<'_>,
    planned: &Said,
    available: &Said,
    rolled_out: &Said,
    trouble: Option<&Trouble>,
) -> Said {
    if facts.plan.is_err() {
        return Said::new(false, &planned.reason, format!("{}{}", planned.message, goes_on(available)));
    }
    if facts.refused.is_some() {
        return Said::new(false, &rolled_out.reason, format!("{}{}", rolled_out.message, goes_on(available)));
    }
    if scaling::wanted(facts) == 0 {
        return scaling::at_rest(facts.service, true);
    }
    if available.state != State::True {
        return Said::new(false, &available.reason, &*available.message);
    }
    if let Some(trouble) = trouble {
        return Said::new(false, &trouble.reason, format!("{}{}", trouble.message, goes_on(available)));
    }
    if rolled_out.reason == "AdapterFailed" {
        return Said::new(false, &rolled_out.reason, format!("{}{}", rolled_out.message, goes_on(available)));
    }
    Said::new(true, "Answering", &*available.message)
}

fn goes_on(available: &Said) -> &'static str {
    if available.state == State::True { " What ran before goes on answering." } else { "" }
}

fn stalled(facts: &Facts<'_>, trouble: Option<&Trouble>) -> Said {
    if let Err(blocked) = facts.plan
        && blocked.stalled
    {
        return Said::new(true, blocked.why.reason, &*blocked.why.message);
    }
    if let Some(refused) = facts.refused {
        return Said::new(refused.stalled, &refused.reason, &*refused.message);
    }
    if let Some(said) = trial::stalled(facts) {
        return said;
    }
    match trouble {
        Some(trouble) if trouble.stalled => Said::new(true, &trouble.reason, &*trouble.message),
        _ => Said::new(false, "Progressing", "nothing waits for a person."),
    }
}

fn reconciling(ready: &Said, rolled_out: &Said, counts: &Counts, stalled: &Said) -> Said {
    if stalled.state == State::True {
        return Said::new(false, &stalled.reason, "a person must act; `Stalled` says what to do.");
    }
    let settled = ready.state == State::True
        && rolled_out.state == State::True
        && (counts.wanted == 0 || counts.current >= counts.wanted);
    if settled {
        return Said::new(false, "Settled", "nothing is under way.");
    }
    let cause = if ready.state == State::True { rolled_out } else { ready };
    Said::new(true, &cause.reason, &*cause.message)
}

/// Ids that every ready replica answers to; of a service that sleeps, those that wake it. One that was told stays while any
/// replica answers to it: one that has just started and does not have it yet takes it from nobody.
fn model_ids(facts: &Facts<'_>, counts: &Counts) -> Vec<String> {
    let sleeps = counts.wanted == 0 && facts.service.spec.autoscaling.is_some() && facts.deployment.is_some();
    if counts.ready == 0 && !sleeps {
        return Vec::new();
    }
    let adapters = facts.plan.map(adapter_ids).unwrap_or_default();
    let told = facts.service.status.as_ref().map(|status| status.model_ids.as_slice()).unwrap_or_default();
    let stays = |id: &str| told.iter().any(|told| told == id) && anywhere(facts, id);
    let answering =
        adapters.into_iter().filter(|id| sleeps || everywhere(facts, id) || stays(id)).map(str::to_owned);
    std::iter::once(facts.service.name_any()).chain(answering).collect()
}

/// Where the service is asked, inside the cluster.
fn url(facts: &Facts<'_>) -> Option<String> {
    let service = facts.service;
    let namespace = service.namespace().unwrap_or_default();
    match service.spec.access {
        Access::GatewayOnly => facts.gateway_url.map(str::to_owned),
        Access::Direct => Some(format!("http://{}.{namespace}.svc:{SERVE_PORT}", service.name_any())),
    }
}

fn selector_text(service: &InferenceService) -> String {
    selector(service).iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests;
