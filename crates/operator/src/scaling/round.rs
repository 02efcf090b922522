//! One round of one service: read, decide, write what changed.
use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{ResourceExt as _, runtime::reflector::ObjectRef};
use lathe_api::{Access, InferenceService, names};
use lathe_contract::Load;
use lathe_scaling::{Capacity, Replicas, Seconds, Window};

use super::{
    SCALER, Stores,
    direct::Workers,
    facts::{self, StartUp},
    notes::{Notes, Scaled},
    set,
    share::{Shares, ready_candidates},
};
use crate::{
    apply::Happened,
    context::Context,
    error::Error,
    inference::{self, has_candidate, reports},
    pods,
};

/// Seconds between two looks at the workers of a service that everybody asks directly.
const LOOK: Seconds = 2;

/// What a service's rounds hand on.
pub struct State {
    notes: Notes,
    workers: Workers,
    /// The Deployment's UID and generation after the last write.
    written: (Option<String>, Option<i64>),
    /// Of the Deployment's pods.
    revision: Option<String>,
}

/// Decides how many replicas `service` is to have, whose `pods` these are, and writes what that changes.
///
/// # Errors
/// A write was not taken: the next round decides anew.
pub async fn round(
    context: &Context,
    stores: &Stores,
    service: &InferenceService,
    pods: &[Arc<Pod>],
    state: &mut Option<State>,
) -> Result<(), Error> {
    let writer = &context.writer;
    let Some(autoscaling) = &service.spec.autoscaling else {
        *state = None;
        let old = Scaled::of(service.status.as_ref());
        return writer.status_as(SCALER, service, Some(&old), &Scaled::default()).await.map(drop);
    };
    let deployment = owned(stores, service, &names::serve(&service.name_any()));
    let Some(deployment) = deployment else { return Ok(()) };
    let pods: Vec<&Pod> = pods.iter().map(|pod| &**pod).collect();
    let state = state.get_or_insert_with(|| State {
        notes: read(service, &pods),
        workers: Workers::default(),
        written: (None, None),
        revision: None,
    });
    if state.is_ahead_of(&deployment) {
        return Ok(());
    }
    let (window, now) = state.window(context, service, &pods).await;
    state.notes.start_up.look(&pods);
    let asked = facts::asked(&deployment);
    let replicas = Replicas {
        asked,
        ready: facts::ready(&pods),
        draining: facts::draining(&pods, now),
        start_up: state.notes.start_up.seconds.unwrap_or(0),
        capacity: capacity(context, service, &deployment, &pods, &mut state.revision),
    };
    let policy = facts::policy(autoscaling);
    let decision = state.notes.decide(&policy, &window, &replicas, now);
    let changed = decision.replicas != asked;
    let (namespace, name) = (service.namespace().unwrap_or_default(), service.name_any());
    let all = i32::try_from(decision.replicas).unwrap_or(i32::MAX);
    let rollout = service.status.as_ref().and_then(|status| status.rollout.as_ref());
    let shares = Shares::now(service, rollout, all, ready_candidates(&pods));
    let candidate = owned(stores, service, &names::candidate(&service.name_any()));
    let candidate = candidate.filter(|_| has_candidate(rollout));
    let deployment = set(writer, deployment, candidate.as_ref(), shares).await?;
    context.health.metrics.scaling.decided((&namespace, &name), &decision, &replicas, &policy);
    state.written = (deployment.metadata.uid, deployment.metadata.generation);
    if changed {
        state.notes.carried_out(asked, &decision, now);
        tracing::info!(
            from = asked,
            to = decision.replicas,
            reason = decision.reason.as_str(),
            "{}",
            decision.message
        );
        let (reason, message) = (decision.reason.as_str(), decision.message.as_str());
        writer.event(service, &Happened { good: true, reason, action: "Scale", message }).await;
    }
    if let Some(scaled) = state.notes.due(&policy, decision.replicas, now) {
        let old = Scaled::of(service.status.as_ref());
        writer.status_as(SCALER, service, Some(&old), &scaled).await?;
        state.notes.were_written(scaled);
    }
    Ok(())
}

/// The Deployment of this name that the service's reconcile made.
fn owned(stores: &Stores, service: &InferenceService, name: &str) -> Option<Deployment> {
    let found = stores.deployments.get(&ObjectRef::new(name).within(&service.namespace()?))?;
    let owned = found
        .owner_references()
        .iter()
        .any(|o| o.controller == Some(true) && Some(&o.uid) == service.uid().as_ref());
    (owned && found.metadata.deletion_timestamp.is_none()).then(|| (*found).clone())
}

fn read(service: &InferenceService, pods: &[&Pod]) -> Notes {
    let written = Scaled::of(service.status.as_ref());
    let seconds = written.scaling.as_ref().and_then(|scaling| scaling.start_up_seconds);
    Notes::read(written, StartUp::remembered(seconds, pods))
}

/// What a replica can do: as its workers say, whom the reconcile asks; else as gateways were told with answers, which do not know of
/// which revision those are. What one of another revision could do is forgotten.
pub fn capacity(
    context: &Context,
    service: &InferenceService,
    deployment: &Deployment,
    pods: &[&Pod],
    revision: &mut Option<String>,
) -> Option<Capacity> {
    let uid = service.uid()?;
    let mut ledger = context.traffic.ledger();
    let before = std::mem::replace(revision, inference::revision(deployment).map(str::to_owned));
    if before != *revision || !facts::are_of_one_revision(deployment, pods) {
        ledger.forget_capacity(&uid);
    }
    let throughput = service.status.as_ref().and_then(|status| status.throughput.as_ref());
    let told = throughput.and_then(|throughput| throughput.capacity_per_replica.as_ref());
    let told = told.filter(|told| facts::holds(&told.revision, Some(deployment), pods));
    told.and_then(facts::capacity).or_else(|| ledger.capacity(&uid))
}

impl State {
    /// Whether the watch has not brought the last write yet: how many are asked for is known in a moment.
    fn is_ahead_of(&self, deployment: &Deployment) -> bool {
        let (uid, generation) = &self.written;
        *uid == deployment.metadata.uid && deployment.metadata.generation < *generation
    }

    /// What flows, and the second in which that is known.
    async fn window(
        &mut self,
        context: &Context,
        service: &InferenceService,
        pods: &[&Pod],
    ) -> (Window, Seconds) {
        let uid = service.uid().unwrap_or_default();
        let now = context.traffic.now();
        if service.spec.access == Access::GatewayOnly {
            return (context.traffic.ledger().window(&uid, now), now);
        }
        if self.workers.are_due(LOOK, now) {
            let mut said: BTreeMap<String, Option<Load>> = BTreeMap::new();
            let ready: Vec<Pod> =
                pods.iter().filter(|pod| pods::is_ready(pod)).map(|pod| (*pod).clone()).collect();
            let answers = reports(&ready, &context.channel, &uid).await;
            for pod in &ready {
                let answer = answers.get(&pod.name_any());
                said.insert(pod.uid().unwrap_or_default(), answer.and_then(|report| report.load.clone()));
            }
            let now = context.traffic.now();
            self.workers.hear(&said, now);
        }
        (self.workers.window().clone(), context.traffic.now())
    }
}
