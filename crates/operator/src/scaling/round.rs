//! One round of one service: read, decide, write what changed.
use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{ResourceExt as _, runtime::reflector::ObjectRef};
use lathe_api::{Access, CountedStatus, InferenceService, names};
use lathe_contract::Load;
use lathe_scaling::{Capacity, Policy, Replicas, Seconds, Window};

use super::{
    SCALER, Stores,
    direct::Workers,
    facts::{self, StartUp},
    is_set,
    notes::{Notes, Scaled},
    refused::{Pause, Refused},
    set,
    share::{Shares, ready_candidates},
};
use crate::{
    apply::{Happened, Writer},
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
    /// The Deployment after the last write, until the watch has brought it.
    written: Option<Deployment>,
    /// Of the Deployment's pods.
    revision: Option<String>,
    /// The number of replicas that the API server did not take.
    refused: Option<Refused>,
    /// Since it did not take the notes.
    unwritten: Option<Pause>,
}

/// Decides how many replicas `service` is to have, whose `pods` these are, and writes what that changes.
///
/// # Errors
/// A write was not taken: the next round decides anew. One that is refused (a quota, a policy, a missing right) is told in the
/// status, and tried again after pauses that grow.
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
        workers: Workers::remembered(counted(service)),
        notes: read(service, &pods),
        written: None,
        revision: None,
        refused: None,
        unwritten: None,
    });
    let deployment = state.newest(deployment);
    let (window, now) = state.window(context, service, &pods).await;
    if service.spec.access == Access::Direct && state.workers.wait(now) {
        return Ok(());
    }
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
    let metrics = &context.health.metrics.scaling;
    metrics.decided((&namespace, &name), &decision, &replicas, &policy);
    let carried_out = state.carry_out(writer, service, deployment, candidate, shares, now).await;
    if carried_out.as_ref().is_err_and(|error| error.refusal().is_none()) {
        return carried_out.map(drop);
    }
    if changed && matches!(carried_out, Ok(true)) {
        state.notes.carried_out(asked, &decision, now);
        metrics.changed((&namespace, &name), decision.reason);
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
    let stand = if matches!(carried_out, Ok(true)) { decision.replicas } else { asked };
    let written = state.write_notes(writer, service, &policy, stand, now).await;
    carried_out.and(written)
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

/// What the service's own workers had counted, as it was written down last.
fn counted(service: &InferenceService) -> Vec<CountedStatus> {
    let scaling = service.status.as_ref().and_then(|status| status.scaling.as_ref());
    scaling.map(|scaling| scaling.counted.clone()).unwrap_or_default()
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
    /// Sets the replicas; false where that is not tried now, since the API server refused it a moment ago.
    async fn carry_out(
        &mut self,
        writer: &Writer,
        service: &InferenceService,
        deployment: Deployment,
        candidate: Option<Deployment>,
        shares: Shares,
        now: Seconds,
    ) -> Result<bool, Error> {
        let from = i32::try_from(facts::asked(&deployment)).unwrap_or(i32::MAX);
        if is_set(&deployment, candidate.as_ref(), shares) {
            // Who asks for nothing new for a moment is refused as before when he asks again.
            self.refused = self.refused.filter(|refused| refused.pause.lasts(now));
        } else if self.refused.is_some_and(|refused| refused.waits_with(shares.all, now)) {
            return Ok(false);
        } else {
            match set(writer, deployment, candidate.as_ref(), shares).await {
                Ok(deployment) => (self.written, self.refused) = (Some(deployment), None),
                Err(error) => {
                    let Some(trouble) = error.refusal() else { return Err(error) };
                    self.refused = Some(Refused::again(self.refused, (from, shares.all), now));
                    if self.notes.refused(Some(&trouble.message)) {
                        let (reason, message) = (trouble.reason.as_str(), trouble.message.as_str());
                        let happened = Happened { good: false, reason, action: "Scale", message };
                        writer.event(service, &happened).await;
                    }
                    return Err(error);
                }
            }
        }
        if self.refused.is_none() {
            self.notes.refused(None);
        }
        Ok(true)
    }

    /// Writes the notes where they are due.
    async fn write_notes(
        &mut self,
        writer: &Writer,
        service: &InferenceService,
        policy: &Policy,
        replicas: u32,
        now: Seconds,
    ) -> Result<(), Error> {
        let Some(scaled) = self.notes.due(policy, self.workers.sums(), replicas, now) else { return Ok(()) };
        if self.unwritten.is_some_and(|pause| pause.lasts(now)) {
            return Ok(());
        }
        // Not what the watch has brought: what was written a moment ago may not be in it, and would be taken for what is wanted.
        let written = writer.status_as(SCALER, service, Some(self.notes.as_written()), &scaled).await;
        self.unwritten = match &written {
            Err(error) if error.refusal().is_some() => Some(Pause::again(self.unwritten, now)),
            _ => None,
        };
        written?;
        self.notes.were_written(scaled);
        Ok(())
    }

    /// The Deployment as the watch has brought it, or as it was written last where that is newer.
    fn newest(&mut self, seen: Deployment) -> Deployment {
        let is_newer = |written: &Deployment| {
            written.metadata.uid == seen.metadata.uid
                && written.metadata.generation > seen.metadata.generation
        };
        self.written = self.written.take().filter(is_newer);
        self.written.clone().unwrap_or(seen)
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
            self.workers.hear(&said, &facts::which(&ready), now);
        }
        (self.workers.window().clone(), context.traffic.now())
    }
}
