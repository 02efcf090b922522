//! How many replicas a service has, where `spec.autoscaling` says that the tokens that flow decide it.
//!
//! [`gateways`] asks each gateway once a second what flowed; [`ledger`] sums that up for each service. Each second, and at once
//! when a request begins to be held, a [`round`] of each service decides (`lathe_scaling`) and writes what changed. A service whose
//! workers everybody asks themselves (`access: Direct`) is told of by its workers instead ([`direct`]).
//!
//! **Invariants.** A Deployment's `spec.replicas` belongs to the field manager [`SCALER`], which writes it in [`set`] alone: where
//! `autoscaling` is set nobody calls it but a round here, and elsewhere nobody but the service's reconcile. Of the service's status
//! `decisions` and `scaling` are the scaler's and everything else the reconcile's. No service waits for another: a round has a task of
//! its own, and what takes long leaves out its own seconds alone.
mod direct;
mod facts;
mod gateway;
pub mod gateways;
mod ledger;
mod metrics;
mod notes;
mod refused;
mod round;
mod share;
#[cfg(test)]
mod tests;
mod traffic;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{ResourceExt as _, runtime::reflector::Store};
use lathe_api::{Access, InferenceService};
use serde_json::json;
use tokio::{task::JoinSet, time::MissedTickBehavior};
use tracing::Instrument as _;

use crate::{
    apply::Writer,
    context::Context,
    error::Error,
    runtime::{Guard, Stop, labelled_owner, stopped},
};
pub use facts::{asked, capacity as capacity_of, holds};
pub use ledger::mean;
pub use metrics::ScalingMetrics;
#[cfg(test)]
pub(crate) use metrics::tests as metrics_tests;
use notes::Scaled;
use round::State;
pub use share::{Shares, is_candidate, ready_candidates};
pub use traffic::Traffic;

/// Field manager of a Deployment's `spec.replicas`, and of what a service's status says of scaling.
pub const SCALER: &str = "lathe-scaler";
/// Annotation of a Deployment: the replicas that the scaler asked for last, those of a candidate beside it with them; absent until
/// it has the field.
pub const SCALED: &str = "lathe.dev/replicas";
/// Between two rounds of a service.
const ROUND: Duration = Duration::from_secs(1);

/// Sets the replicas of a service's Deployment, and of its candidate's where there is one, as the scaler, who alone owns them from
/// then on. Gives back the Deployment as it then is.
///
/// # Errors
/// [`Error::Write`]
pub async fn set(
    writer: &Writer,
    deployment: Deployment,
    candidate: Option<&Deployment>,
    shares: Shares,
) -> Result<Deployment, Error> {
    if let Some(candidate) = candidate {
        write(writer, candidate.clone(), shares.candidate, shares.candidate).await?;
    }
    write(writer, deployment, shares.stable, shares.all).await
}

/// Sets one Deployment's `replicas`, of which `asked` were asked for with those of another.
async fn write(
    writer: &Writer,
    deployment: Deployment,
    replicas: i32,
    asked: i32,
) -> Result<Deployment, Error> {
    if has(&deployment, replicas, asked) {
        return Ok(deployment);
    }
    let fields = json!({
        "metadata": {"annotations": {SCALED: asked.to_string()}},
        "spec": {"replicas": replicas},
    });
    writer.apply_fields(SCALER, &deployment, fields).await
}

fn has(deployment: &Deployment, replicas: i32, asked: i32) -> bool {
    deployment.spec.as_ref().and_then(|spec| spec.replicas) == Some(replicas)
        && deployment.annotations().get(SCALED).is_some_and(|set| *set == asked.to_string())
}

/// Whether [`set`] would write nothing.
fn is_set(deployment: &Deployment, candidate: Option<&Deployment>, shares: Shares) -> bool {
    has(deployment, shares.stable, shares.all)
        && candidate.is_none_or(|candidate| has(candidate, shares.candidate, shares.candidate))
}

/// Replicas that a Deployment is made with: as many as were asked for last, else as `spec.replicas` says.
pub fn begin(service: &InferenceService) -> i32 {
    let Some(autoscaling) = &service.spec.autoscaling else { return service.spec.replicas };
    let last = service.status.as_ref().and_then(|status| Some(status.scaling.as_ref()?.replicas));
    autoscaling.bounded(last.unwrap_or(service.spec.replicas))
}

/// Objects as the watches last saw them.
#[derive(Clone)]
pub struct Stores {
    pub services: Store<Guard<InferenceService>>,
    pub deployments: Store<Deployment>,
    pub pods: Store<Pod>,
}

/// Scales the services of one scope.
pub struct Scaler {
    context: Arc<Context>,
    stores: Stores,
    /// What is remembered of each service, by its UID.
    states: Mutex<HashMap<String, Known>>,
}

/// One service that is scaled.
struct Known {
    place: (String, String),
    /// Held by the round that is under way.
    state: Arc<tokio::sync::Mutex<Option<State>>>,
}

/// Rounds that were begun.
#[derive(Default)]
struct Rounds {
    /// Each gives back its service's UID.
    under_way: JoinSet<String>,
    /// Services for which a request began to be held during a round.
    woken: HashSet<String>,
}

impl Scaler {
    /// A scaler that knows nothing yet.
    pub fn new(context: Arc<Context>, stores: Stores) -> Self {
        Self { context, stores, states: Mutex::default() }
    }

    /// Scales, once the stores are `filled`, until `stop`; then finishes the rounds that are under way.
    pub async fn run(self, filled: BoxFuture<'static, ()>, stop: Stop) {
        // They end with this: whoever drops it is the leader no more.
        let mut rounds = Rounds::default();
        let scaling = async {
            filled.await;
            let mut holds = self.context.traffic.holds();
            let mut seconds = tokio::time::interval(ROUND);
            seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    _ = seconds.tick() => {
                        let now = self.context.traffic.now();
                        self.context.traffic.ledger().sweep(now);
                        self.begin_rounds(None, &mut rounds);
                    }
                    Ok(()) = holds.changed() => {
                        self.begin_rounds(Some(&self.context.traffic.held()), &mut rounds);
                    }
                    Some(ended) = rounds.under_way.join_next() => {
                        // One that ended in a bug has its next round with the next second.
                        let Ok(uid) = ended else { continue };
                        if rounds.woken.remove(&uid) {
                            self.begin_rounds(Some(&HashSet::from([uid])), &mut rounds);
                        }
                    }
                }
            }
        };
        tokio::select! {
            () = scaling => {}
            () = stopped(stop) => {}
        }
        while rounds.under_way.join_next().await.is_some() {}
    }

    /// Begins a round of every service, or of those that are named by their UIDs, for which a request is held. Where the last one is
    /// still under way, those are begun after it.
    fn begin_rounds(&self, only: Option<&HashSet<String>>, rounds: &mut Rounds) {
        let services = self.stores.services.state();
        let services: Vec<&InferenceService> =
            services.iter().filter_map(|guard| guard.0.as_ref().ok()).filter(|s| is_scaled(s)).collect();
        if only.is_none() {
            self.forget_others(&services);
        }
        let mut pods = by_service(&self.stores.pods);
        let is_settled = self.context.traffic.is_settled();
        for service in services {
            let uid = service.uid().unwrap_or_default();
            let waits = !is_settled && service.spec.access == Access::GatewayOnly;
            if only.map_or(waits, |only| !only.contains(&uid)) {
                continue;
            }
            let state = self.state(uid.clone(), service);
            // The last round is still under way, and may have looked before the request was held.
            let Ok(mut state) = state.try_lock_owned() else {
                if only.is_some() {
                    rounds.woken.insert(uid);
                }
                continue;
            };
            rounds.woken.remove(&uid);
            let (context, stores, service) = (self.context.clone(), self.stores.clone(), service.clone());
            let pods = pods.remove(&place(&service)).unwrap_or_default();
            let span =
                tracing::info_span!("scale", namespace = service.namespace(), name = service.name_any());
            let round = async move {
                if let Err(error) = round::round(&context, &stores, &service, &pods, &mut state).await {
                    context.health.metrics.failed("InferenceService", error.category());
                    tracing::warn!(%error, "a service could not be scaled; it is tried again");
                }
                drop(state);
                uid
            };
            rounds.under_way.spawn(round.instrument(span));
        }
    }

    fn state(&self, uid: String, service: &InferenceService) -> Arc<tokio::sync::Mutex<Option<State>>> {
        let known = || Known { place: place(service), state: Arc::default() };
        self.states().entry(uid).or_insert_with(known).state.clone()
    }

    fn forget_others(&self, services: &[&InferenceService]) {
        let there: HashSet<String> = services.iter().filter_map(|service| service.uid()).collect();
        self.states().retain(|uid, known| {
            let stays = there.contains(uid);
            if !stays {
                self.context.health.metrics.scaling.forget((&known.place.0, &known.place.1));
            }
            stays
        });
    }

    fn states(&self) -> std::sync::MutexGuard<'_, HashMap<String, Known>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn place(service: &InferenceService) -> (String, String) {
    (service.namespace().unwrap_or_default(), service.name_any())
}

/// The pods of each service by its place: all of them are looked through once for all services.
fn by_service(pods: &Store<Pod>) -> HashMap<(String, String), Vec<Arc<Pod>>> {
    let mut all: HashMap<_, Vec<_>> = HashMap::new();
    for pod in pods.state() {
        for place in labelled_owner(&*pod) {
            all.entry(place).or_default().push(pod.clone());
        }
    }
    all
}

/// Whether there is anything to do for it: it is scaled, or its status still says that it was.
fn is_scaled(service: &InferenceService) -> bool {
    service.metadata.deletion_timestamp.is_none()
        && (service.spec.autoscaling.is_some() || Scaled::of(service.status.as_ref()) != Scaled::default())
}
