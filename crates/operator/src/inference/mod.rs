//! InferenceService: a Deployment of workers behind a Service.
//!
//! A round is five steps: [`observe`] reads everything, [`plan`] decides, [`build`] makes the objects, the context's writer
//! applies what differs, [`status`] says what came of it. Between the last two the running workers are told their adapters
//! ([`adapters`]), which needs no new pod.
//!
//! **Invariants.** Where the service cannot be planned, what runs goes on running. `spec.replicas` of the Deployment belongs to
//! the scaler ([`scaling`]) alone, which a round here calls only where `spec.autoscaling` is not set. `replicas: 0` is a service that
//! does what its spec asks for: `Ready=True Stopped`, `Available=False`, so that those who wait for the object to settle do not
//! wait for ever; so is one that sleeps: `Ready=True ScaledToZero`.
mod adapters;
mod build;
#[cfg(test)]
mod fixtures;
mod observe;
mod plan;
mod rollout;
mod status;
mod trial;

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, future, future::BoxFuture};
use jiff::Timestamp;
use k8s_openapi::api::{apps::v1::Deployment, core::v1::PersistentVolumeClaim};
use kube::{
    Api, Resource, ResourceExt as _,
    core::NamespaceResourceScope,
    runtime::{controller::Action, reflector::Store, watcher},
};
use lathe_api::{CapacityType, InferenceService, RolloutPhase, RolloutStatus, conditions, names};
use lathe_contract::{AdapterState, AdapterStatus};
use lathe_resolve::inference::Serving;
use serde::de::DeserializeOwned;

use crate::{
    apply::{Happened, Written},
    claims,
    context::{Context, Scope},
    drift::{differs, is_current, surplus},
    error::{Error, told},
    job::look_again,
    pods,
    runtime::{Guard, Reconcile, Stop, Watches, labelled_owner, readable},
    scaling::{self, Scaler},
};
use adapters::Told;
pub use build::revision;
use build::{Candidate, Installation, Live, Wanted};
pub use observe::reports;
use observe::{Children, Observed, Stores};
pub use rollout::has_candidate;
use status::{Facts, GATE_FAILED};
use trial::Trial;

/// Value of the label `lathe.dev/kind`.
const KIND: &str = "inferenceservice";
/// Annotation of a Deployment: adapters that its pods have room for.
const SLOTS: &str = "lathe.dev/adapter-slots";
/// Annotation of a Deployment: the largest rank that its pods have room for.
const RANK: &str = "lathe.dev/adapter-rank";
/// Annotation of a Deployment: the profile that its pods are on.
const PROFILE: &str = "lathe.dev/profile";
/// Annotation of a Deployment whose value `kubectl rollout history` shows.
const CHANGE_CAUSE: &str = "kubernetes.io/change-cause";

/// Pause between two looks at what flows; throughput is written no more often.
const LOOK: Duration = Duration::from_secs(10);
/// Pause while adapters are on their way.
const SOON: Duration = Duration::from_secs(2);
/// Pause while something else must happen first.
const LATER: Duration = Duration::from_secs(60);
/// A watch that lost an event must not leave a service standing.
const IDLE: Duration = Duration::from_secs(600);

/// Names of a service's objects.
struct Names {
    /// The Service, by which users reach it.
    endpoint: String,
    /// Deployment, PodDisruptionBudget and NetworkPolicy.
    serve: String,
    /// Deployment of a revision that is tried.
    candidate: String,
}

impl Names {
    fn of(service: &InferenceService) -> Self {
        let name = service.name_any();
        Self { serve: names::serve(&name), candidate: names::candidate(&name), endpoint: name }
    }
}

/// Reconciles the services of one scope.
struct Services {
    context: Arc<Context>,
    stores: Stores,
    told: Told,
}

/// The controller of one scope; ends when `stop` says so.
pub fn controller(context: &Arc<Context>, scope: &Scope, stop: Stop) -> BoxFuture<'static, ()> {
    let client = &context.client;
    let mut watches = Watches::<InferenceService>::new(scope, client);
    let stores = Stores {
        services: watches.objects(),
        models: watches.also(scope.api(client), watcher::Config::default(), model_users),
        profiles: watches
            .also(Api::all(client.clone()), watcher::Config::default(), |_: &Guard<_>, all| everyone(all)),
        deployments: children(&mut watches, scope.api(client)),
        endpoints: children(&mut watches, scope.api(client)),
        contracts: children(&mut watches, scope.api(client)),
        budgets: children(&mut watches, scope.api(client)),
        policies: children(&mut watches, scope.api(client)),
        pods: children(&mut watches, scope.api(client)),
        claims: watches.also(
            scope.api(client),
            watcher::Config::default(),
            |_: &PersistentVolumeClaim, _| Vec::new(),
        ),
    };
    let seen = scaling::Stores {
        services: stores.services.clone(),
        deployments: stores.deployments.clone(),
        pods: stores.pods.clone(),
    };
    let scaler = Scaler::new(context.clone(), seen).run(watches.filled(), stop.clone());
    let services = Services { context: context.clone(), stores, told: Told::default() };
    future::join(watches.run(services, stop), scaler).map(drop).boxed()
}

/// Watches objects that carry a service's labels; each wakes its service.
fn children<K>(watches: &mut Watches<InferenceService>, api: Api<K>) -> Store<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    watches.also(api, ours(), |child: &K, _| labelled_owner(child))
}

fn ours() -> watcher::Config {
    watcher::Config::default().labels(&format!("{}={KIND}", names::LABEL_KIND))
}

/// Services that serve a Model.
fn model_users(
    model: &Guard<lathe_api::Model>,
    services: &Store<Guard<InferenceService>>,
) -> Vec<(String, String)> {
    let (namespace, name) = (model.namespace(), model.name_any());
    let uses = |service: &InferenceService| {
        let spec = &service.spec;
        service.namespace() == namespace
            && (spec.model_ref.name == name || spec.adapter_refs.iter().any(|adapter| adapter.name == name))
    };
    readable(services).iter().filter(|service| uses(service)).map(key).collect()
}

fn everyone(services: &Store<Guard<InferenceService>>) -> Vec<(String, String)> {
    readable(services).iter().map(key).collect()
}

fn key(service: &InferenceService) -> (String, String) {
    (service.namespace().unwrap_or_default(), service.name_any())
}

impl Reconcile for Services {
    type Object = InferenceService;
    const NAME: &'static str = "InferenceService";
    const SUMMARY: &'static str = conditions::READY;

    fn context(&self) -> &Context {
        &self.context
    }

    async fn reconcile(&self, service: &InferenceService) -> Result<Action, Error> {
        let context = &self.context;
        let now = Timestamp::now();
        let mut seen =
            observe::observe(service, &self.stores, &context.client, &context.channel, now).await?;
        let plan = plan::plan(service, &seen, &context.trust, &context.config);
        if let Ok(serving) = &plan
            && serving.profile.spec.resource != "cpu"
            && seen.is_homeless()
        {
            let namespace = service.namespace().unwrap_or_default();
            seen.capacity = context.capacity(&serving.profile, CapacityType::Any, &namespace, now).await;
        }
        let trial = Trial::of(service, plan.as_ref().ok(), &seen, &context.traffic);
        // On the heap: all objects of a service lie in it while they are written.
        let applied = self.apply(service, plan.as_ref().ok(), &seen, &trial).boxed().await;
        let (deployment, written) = match applied {
            Ok(deployment) => {
                let cleaned =
                    self.clean_up(service, plan.as_ref().ok(), &seen, deployment.as_ref(), &trial).await;
                (deployment, cleaned)
            }
            Err(error) => (seen.children.deployment.clone(), Err(error)),
        };
        let (refused, done) = told(written)?;
        let adapters = self.told.tell(service, plan.as_ref().ok(), &seen, &context.channel).await;
        let gateway_url = context.config.gateway_url();
        let facts = Facts {
            service,
            plan: plan.as_ref(),
            gateway_url: gateway_url.as_deref(),
            deployment: deployment.as_ref(),
            profiles: &seen.profiles,
            pods: &seen.pods,
            reports: &seen.reports,
            adapters: &adapters,
            told: &seen.told,
            ended: seen.ended.as_ref(),
            capacity: seen.capacity.as_ref(),
            rollout: trial.status.as_ref(),
            in_place: trial.in_place,
            refused: refused.as_ref(),
            may_write_throughput: self.told.throughput_is_due(service, LOOK),
            now,
        };
        let (namespace, name) = key(service);
        context.health.metrics.costs.tell((&namespace, &name), status::cost_per_hour(&facts));
        self.write_status(service, &facts).await?;
        self.tell_of(service, trial.status.as_ref()).await;
        done?;
        Ok(Action::requeue(next_look(plan.is_err(), &adapters, &seen)))
    }

    fn forget(&self, namespace: &str, name: &str) {
        self.told.forget(namespace, name);
        self.context.health.metrics.costs.tell((namespace, name), None);
    }
}

impl Services {
    /// All writes of a round; gives back the Deployment as it then is. Without a plan only the replicas are kept.
    async fn apply(
        &self,
        service: &InferenceService,
        serving: Option<&Serving>,
        seen: &Observed,
        trial: &Trial,
    ) -> Result<Option<Deployment>, Error> {
        let children = &seen.children;
        let mut candidate = children.candidate.clone();
        let mut deployment = children.deployment.clone();
        if let Some(serving) = serving {
            let config = &self.context.config;
            let installation = Installation {
                control_peers: &config.control_peers(),
                gateway: &config.gateway_peer(),
                pull_policy: config.pull_policy.as_deref(),
                tracing: config.tracing.as_ref(),
                one_node: &claims::one_node(
                    &self.stores.claims,
                    &service.namespace().unwrap_or_default(),
                    &config.artifacts,
                ),
            };
            // A new release replaces no worker that works: what its pods are made of and told stays as it is.
            let made = children.contract(&build::contract_name(service, serving));
            let live = Live {
                deployment: deployment.as_ref(),
                kept: made.filter(|_| plan::works(seen, &serving.checksum)),
                in_place: trial.in_place,
                candidate: trial
                    .candidate(service, serving, seen)
                    .map(|replicas| Candidate { deployment: candidate.as_ref(), replicas }),
            };
            let wanted = build::build(service, serving, live, installation)
                .map_err(|source| Error::Build { what: "a service's objects", source })?;
            let Wanted { contract, policy, endpoint, budget, deployment: whole, candidate: tried } = wanted;
            let Children { policy: l_policy, endpoint: l_endpoint, budget: l_budget, .. } = children;
            let holds_back = rollout::holds_back(trial.status.as_ref());
            if tried.is_some() || !holds_back {
                self.keep(&contract, children.contract(&contract.name_any())).await?;
            }
            self.keep(&policy, l_policy.as_ref()).await?;
            self.keep(&endpoint, l_endpoint.as_ref()).await?;
            self.keep(&budget, l_budget.as_ref()).await?;
            let stable = match deployment.as_ref().filter(|_| holds_back) {
                Some(live) => build::held(service, live, trial::contract_of(service, seen, live))
                    .map_err(|source| Error::Build { what: "a service's objects", source })?,
                None => Some(whole),
            };
            if let Some(stable) = stable {
                deployment = self.keep(&stable, deployment.as_ref()).await?.or(deployment);
            }
            match (tried, &candidate) {
                (Some(tried), _) => {
                    candidate = self.keep(&tried, candidate.as_ref()).await?.or(candidate);
                }
                (None, Some(over)) => {
                    self.context.writer.delete(over).await?;
                    candidate = None;
                }
                (None, None) => {}
            }
        }
        let Some(deployment) = deployment else { return Ok(None) };
        if service.spec.autoscaling.is_some() {
            return Ok(Some(deployment));
        }
        let shares = trial.shares(service, seen, service.spec.replicas);
        scaling::set(&self.context.writer, deployment, candidate.as_ref(), shares).await.map(Some)
    }

    /// Deletes the contracts that no pod reads any more.
    async fn clean_up(
        &self,
        service: &InferenceService,
        serving: Option<&Serving>,
        seen: &Observed,
        deployment: Option<&Deployment>,
        trial: &Trial,
    ) -> Result<(), Error> {
        let Some(serving) = serving else { return Ok(()) };
        let current = trial.contracts(service, serving, deployment);
        for contract in plan::unused(seen, deployment, &current) {
            self.context.writer.clean_up(contract).await?;
        }
        Ok(())
    }

    /// Applies an object unless it is so already, and takes out of it what must not stand beside ours.
    async fn keep<K: Written>(&self, wanted: &K, live: Option<&K>) -> Result<Option<K>, Error> {
        let writer = &self.context.writer;
        // What somebody made of ours may be what makes the API server refuse ours beside it, so it goes first. What an earlier
        // version or spec has put there goes with the apply.
        let taken = match live.filter(|live| is_current(wanted, *live)) {
            Some(live) => Some(self.take_out(wanted, live).await),
            None => None,
        };
        if !differs(wanted, live) {
            return taken.transpose().map(|_| None);
        }
        // What cannot be taken out keeps nothing else from being put right.
        let applied = writer.apply(wanted, live).await?;
        match taken {
            Some(taken) => taken?,
            None => self.take_out(wanted, &applied).await?,
        }
        Ok(Some(applied))
    }

    async fn take_out<K: Written>(&self, wanted: &K, live: &K) -> Result<(), Error> {
        let surplus = surplus(wanted, live);
        if surplus.is_empty() { Ok(()) } else { self.context.writer.take_out(live, surplus).await }
    }

    async fn write_status(&self, service: &InferenceService, facts: &Facts<'_>) -> Result<(), Error> {
        let fresh = status::status(facts);
        let writer = &self.context.writer;
        let old = service.status.clone().map(status::without_scaling);
        if !writer.status(service, old.as_ref(), &fresh).await? {
            return Ok(());
        }
        if fresh.throughput != service.status.as_ref().and_then(|old| old.throughput.clone()) {
            self.told.throughput_was_written(service);
        }
        let was =
            service.status.as_ref().and_then(|old| conditions::find(&old.conditions, conditions::READY));
        let Some(is) = status::summary(&fresh) else { return Ok(()) };
        if was.map(|was| (&was.status, &was.reason)) != Some((&is.status, &is.reason)) {
            let stalled = conditions::is_true(&fresh.conditions, conditions::STALLED);
            let good = is.status == "True" || !stalled;
            let happened = Happened { good, reason: &is.reason, action: "Reconcile", message: &is.message };
            writer.event(service, &happened).await;
        }
        Ok(())
    }
}

impl Services {
    /// Tells people what came of a candidate, once.
    async fn tell_of(&self, service: &InferenceService, rollout: Option<&RolloutStatus>) {
        let was = service.status.as_ref().and_then(|status| status.rollout.as_ref());
        let Some(is) = rollout.filter(|is| was.is_none_or(|was| was.phase != is.phase)) else { return };
        let (good, reason) = match is.phase {
            RolloutPhase::Promoting => (true, "CandidatePromoted"),
            RolloutPhase::Failed => (false, GATE_FAILED),
            RolloutPhase::Starting | RolloutPhase::Testing | RolloutPhase::Promoted => return,
        };
        self.context.health.metrics.rolled_out(good);
        let message = is.message.as_deref().unwrap_or_default();
        let happened = Happened { good, reason, action: "RollOut", message };
        self.context.writer.event(service, &happened).await;
    }
}

fn next_look(
    unplanned: bool,
    adapters: &std::collections::BTreeMap<String, AdapterStatus>,
    seen: &Observed,
) -> Duration {
    let on_the_way =
        |status: &AdapterStatus| status.adapters.iter().any(|a| a.state == AdapterState::Loading);
    let waits = seen.pods.iter().filter(|pod| !pods::is_ready(pod));
    let since = waits.filter_map(|pod| pod.metadata.creation_timestamp.as_ref()).map(|time| time.0).min();
    if adapters.values().any(on_the_way) {
        SOON
    } else if seen.pods.iter().any(pods::is_ready) {
        LOOK
    } else if unplanned {
        LATER
    } else if seen.pods.is_empty() {
        IDLE
    } else {
        look_again(since, seen.now)
    }
}

#[cfg(test)]
mod tests;
