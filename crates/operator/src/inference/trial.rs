//! Pure: what a round does about a roll-out, beside its objects.
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Pod},
};
use kube::ResourceExt as _;
use lathe_api::{InferenceService, RolloutStatus, names};
use lathe_contract::Ended;
use lathe_resolve::inference::Serving;

use super::{
    build::{self, contract_name, revision},
    observe::Observed,
    plan::{self, at_work},
    rollout::{self, Numbers, Seen},
};
use crate::{
    pods,
    scaling::{self, Shares, Traffic, is_candidate, ready_candidates},
};

/// Where the roll-out of a service stands in one round.
#[derive(Debug, Default)]
pub struct Trial {
    /// `None`: there is no candidate, and was none.
    pub status: Option<RolloutStatus>,
    /// Old replicas go before new ones come, since there is no device for one more.
    pub in_place: bool,
}

/// What gateways tell of one service.
struct Told<'a> {
    traffic: &'a Traffic,
    uid: String,
    now: i64,
}

impl Numbers for Told<'_> {
    fn told_until(&self, after: i64) -> i64 {
        self.traffic.ledger().told_until(after, self.now)
    }

    fn ended(&self, revision: &str, after: i64, until: i64) -> Ended {
        self.traffic.ledger().ended(&self.uid, revision, after, until)
    }
}

impl Trial {
    /// As it is now. Where the service cannot be planned, what is under way stays.
    pub fn of(
        service: &InferenceService,
        serving: Option<&Serving>,
        seen: &Observed,
        traffic: &Traffic,
    ) -> Self {
        let old = service.status.as_ref().and_then(|status| status.rollout.as_ref());
        let Some(serving) = serving else { return Self { status: old.cloned(), in_place: false } };
        let deployment = seen.children.deployment.as_ref();
        let (wanted, stable) =
            (names::revision(&serving.checksum), deployment.and_then(revision).map(names::revision));
        let all = asked(service, deployment);
        // Those that are ready count where they are of the revision that is wanted.
        let ready = ready_candidates(&current(seen, serving));
        let of = |shares: Shares| ready >= shares.candidate.max(1);
        let looked = Seen {
            wanted: &wanted,
            stable: stable.as_deref(),
            comparable: all > 0 && at_work(seen),
            prepared: of(Shares::now(service, old, all, ready)),
            answers: ready > 0,
            replaced: is_replaced(seen, serving, all),
            model: seen.base.as_ref(),
        };
        let told = Told { traffic, uid: service.uid().unwrap_or_default(), now: traffic.now() };
        let status = rollout::decide(service.spec.rollout.as_ref(), old, &looked, &told, told.now);
        Self { status, in_place: plan::in_place(seen, serving, &service.name_any()) }
    }

    /// Replicas that the candidate begins with; `None`: there is to be none now, perhaps since another one is not gone yet.
    pub fn candidate(&self, service: &InferenceService, serving: &Serving, seen: &Observed) -> Option<i32> {
        let deployment = seen.children.deployment.as_ref();
        let has = rollout::has_candidate(self.status.as_ref());
        let is_other = |found: &Deployment| revision(found) != Some(&serving.checksum);
        let other = seen.children.candidate.as_ref().is_some_and(is_other);
        let goes = |pod: &Pod| is_candidate(pod) && !pods::is_of(pod, Some(&serving.checksum));
        let goes = seen.pods.iter().any(goes);
        let begins = || Shares::now(service, self.status.as_ref(), asked(service, deployment), 0).candidate;
        (has && !other && !goes).then(begins)
    }

    /// How many replicas each revision gets, of so many.
    pub fn shares(&self, service: &InferenceService, seen: &Observed, all: i32) -> Shares {
        Shares::now(service, self.status.as_ref(), all, ready_candidates(&seen.pods))
    }

    /// Names of the contracts that pods read, or are to read.
    pub fn contracts(
        &self,
        service: &InferenceService,
        serving: &Serving,
        deployment: Option<&Deployment>,
    ) -> Vec<String> {
        let rollout = self.status.as_ref();
        let wanted = !rollout::holds_back(rollout) || rollout::has_candidate(rollout);
        let stable = deployment.and_then(revision).map(|revision| name_of(service, revision));
        wanted.then(|| contract_name(service, serving)).into_iter().chain(stable).collect()
    }
}

/// The ConfigMap of the revision that a Deployment is made for.
pub fn contract_of<'a>(
    service: &InferenceService,
    seen: &'a Observed,
    deployment: &Deployment,
) -> Option<&'a ConfigMap> {
    seen.children.contract(&name_of(service, build::revision(deployment)?))
}

fn name_of(service: &InferenceService, checksum: &str) -> String {
    names::serve_contract(&service.name_any(), checksum)
}

/// Replicas that are asked for, whatever their revision.
fn asked(service: &InferenceService, deployment: Option<&Deployment>) -> i32 {
    match (&service.spec.autoscaling, deployment) {
        (None, _) => service.spec.replicas,
        (Some(_), Some(deployment)) => i32::try_from(scaling::asked(deployment)).unwrap_or(i32::MAX),
        (Some(_), None) => scaling::begin(service),
    }
}

/// Pods of the revision that is wanted.
fn current<'a>(seen: &'a Observed, serving: &Serving) -> Vec<&'a Pod> {
    seen.pods.iter().filter(|pod| pods::is_of(pod, Some(&serving.checksum))).collect()
}

/// Whether all of the service's own replicas are what is wanted, and as many ready as are asked for.
fn is_replaced(seen: &Observed, serving: &Serving, all: i32) -> bool {
    let wanted = Some(serving.checksum.as_str());
    let taken = seen.children.deployment.as_ref().and_then(revision) == wanted;
    let mut own = seen.pods.iter().filter(|pod| !is_candidate(pod)).peekable();
    let ready = own.clone().filter(|pod| pods::is_ready(pod)).count();
    taken && own.all(|pod| pods::is_of(pod, wanted)) && i32::try_from(ready).is_ok_and(|ready| ready >= all)
}
