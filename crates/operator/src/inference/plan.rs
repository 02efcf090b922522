//! Pure: what the service needs, or the one reason why that cannot be said.
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Pod},
};
use kube::ResourceExt as _;
use lathe_api::{Access, InferenceService, conditions};
use lathe_contract::{AdapterRoom, ObjectRef, Trust};
use lathe_resolve::{
    Rejection,
    inference::{ServeFacts, Serving, model_ids, serving},
    model::is_ready,
};

use super::{PROFILE, RANK, SLOTS, build, observe::Observed};
use crate::{context::Config, pods, scaling::is_candidate};

/// Reason of a service that only a gateway may ask where there is none.
pub const GATEWAY_DISABLED: &str = "GatewayDisabled";

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// The cause and the next step.
    pub why: Rejection,
    /// False: something that is under way will end it; true: only a person can.
    pub stalled: bool,
}

/// Checks of what was seen before anything is computed, in this order; the first that holds is the cause.
const CHECKS: [fn(&InferenceService, &Observed) -> Option<Blocked>; 3] =
    [id_taken, model_missing, model_not_ready];

/// Plans the service.
///
/// # Errors
/// The first reason why it cannot be.
pub fn plan(
    service: &InferenceService,
    seen: &Observed,
    trust: &Trust,
    config: &Config,
) -> Result<Serving, Blocked> {
    let blocked = no_gateway(service, config);
    if let Some(blocked) = blocked.or_else(|| CHECKS.iter().find_map(|check| check(service, seen))) {
        return Err(blocked);
    }
    let (Some(base), Some(adapters)) =
        (&seen.base, seen.adapters.iter().map(Option::as_ref).collect::<Option<Vec<_>>>())
    else {
        return Err(waits("ModelNotFound", "a Model is missing.".to_owned()));
    };
    let facts = ServeFacts {
        object: ObjectRef {
            kind: "InferenceService".to_owned(),
            namespace: service.namespace().unwrap_or_default(),
            name: service.name_any(),
            uid: service.uid().unwrap_or_default(),
        },
        trust: trust.clone(),
        base,
        adapters: &adapters,
        profiles: &seen.profiles,
        images: &config.images,
        room: running_room(seen),
        profile: at_work(seen).then(|| running(seen, PROFILE)).flatten(),
    };
    serving(&service.spec, &facts).map_err(|why| Blocked { why, stalled: true })
}

/// Adapters that the running pods have room for.
fn running_room(seen: &Observed) -> Option<AdapterRoom> {
    let number = |key: &str| running(seen, key)?.parse().ok();
    Some(AdapterRoom { slots: number(SLOTS)?, rank: number(RANK).unwrap_or(0) })
}

fn running<'a>(seen: &'a Observed, annotation: &str) -> Option<&'a str> {
    seen.children.deployment.as_ref()?.annotations().get(annotation).map(String::as_str)
}

/// True where a pod of the Deployment's revision works, or is on its way to: replacing it would be felt. Pods that find no node or
/// crash are better made as this version makes them.
pub fn at_work(seen: &Observed) -> bool {
    seen.children.deployment.as_ref().and_then(build::revision).is_some_and(|revision| works(seen, revision))
}

/// As [`at_work`], of this revision.
pub fn works(seen: &Observed, revision: &str) -> bool {
    let runs = |pod: &&Pod| pods::phase(pod) == Some("Running");
    let current = seen.pods.iter().filter(|pod| pods::is_of(pod, Some(revision)));
    current.filter(|pod| pods::is_ready(pod) || runs(pod)).any(|pod| pods::trouble(pod).is_none())
}

/// Contracts of other revisions than these that no pod reads any more: while a roll-out is under way, or a pod is made again for an
/// earlier revision, they stay.
pub fn unused<'a>(
    seen: &'a Observed,
    deployment: Option<&Deployment>,
    current: &[String],
) -> Vec<&'a ConfigMap> {
    let settled = deployment.is_some_and(|deployment| {
        let status = deployment.status.clone().unwrap_or_default();
        let observed = status.observed_generation.is_some_and(|g| Some(g) >= deployment.metadata.generation);
        observed
            && status.replicas == status.updated_replicas
            && deployment.metadata.uid
                == seen.children.deployment.as_ref().and_then(|d| d.metadata.uid.clone())
            && seen.pods.iter().all(|pod| pods::is_of(pod, build::revision(deployment)))
    });
    let mut contracts: Vec<_> = seen.children.contracts.iter().collect();
    contracts.retain(|contract| settled && !current.contains(&contract.name_any()));
    contracts
}

/// Whether old replicas go before new ones come: a device is missing for one more, and they hold some. It stays so until the last
/// of them is gone.
pub fn in_place(seen: &Observed, serving: &Serving, service: &str) -> bool {
    let own = |pod: &&Pod| !is_candidate(pod);
    let wanted = |pod: &&Pod| pods::is_of(pod, Some(&serving.checksum));
    if seen.pods.iter().filter(own).all(|pod| wanted(&pod)) {
        return false;
    }
    let nowhere = |pod: &Pod| pods::trouble(pod).is_some_and(|trouble| trouble.reason == pods::UNSCHEDULABLE);
    let waits = seen.pods.iter().filter(own).filter(wanted).any(nowhere);
    let lacks = seen.capacity.as_ref().is_some_and(|capacity| {
        capacity.here.contains_key(service) && capacity.free.is_some_and(|free| free < serving.count.into())
    });
    (waits && lacks) || seen.children.deployment.as_ref().is_some_and(build::is_in_place)
}

/// Nobody could ask it: no pod is made that would only cost.
fn no_gateway(service: &InferenceService, config: &Config) -> Option<Blocked> {
    if config.gateway || service.spec.access == Access::Direct {
        return None;
    }
    let next = "Next: set `gateway.enabled: true` in the values of Lathe's chart, or `spec.access: Direct` here, with which every pod of the cluster may ask it.";
    let message = format!(
        "`spec.access` is GatewayOnly, and this installation has no gateway to ask it through. {next}"
    );
    Some(stalls(GATEWAY_DISABLED, message))
}

/// The older service keeps an id; of two that are equally old, the first by name.
fn id_taken(service: &InferenceService, seen: &Observed) -> Option<Blocked> {
    let own = model_ids(&service.name_any(), &service.spec);
    let age = (service.metadata.creation_timestamp.as_ref().map(|time| time.0), service.name_any());
    let older = seen.rivals.iter().filter(|rival| (rival.created, rival.name.clone()) < age);
    let (rival, id) =
        older.filter_map(|r| Some((r, own.iter().find(|id| r.model_ids.contains(id))?))).next()?;
    let next = format!("Next: remove {id} from one of the two, or rename the service.");
    let message = format!(
        "InferenceService {} is older and already answers to the model id `{id}`. {next}",
        rival.name
    );
    Some(stalls("ModelIdConflict", message))
}

fn model_missing(service: &InferenceService, seen: &Observed) -> Option<Blocked> {
    let spec = &service.spec;
    let adapters = spec.adapter_refs.iter().zip(&seen.adapters);
    let mut all = std::iter::once((&spec.model_ref, &seen.base)).chain(adapters);
    let (missing, _) = all.find(|(_, found)| found.is_none())?;
    let next = "Next: apply it, or correct the name.";
    Some(waits("ModelNotFound", format!("Model {} does not exist in this namespace. {next}", missing.name)))
}

fn model_not_ready(_: &InferenceService, seen: &Observed) -> Option<Blocked> {
    let all = seen.base.iter().chain(seen.adapters.iter().flatten());
    let model = all.into_iter().find(|model| !is_ready(model))?;
    let name = model.name_any();
    let status = model.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    let said = conditions::find(status, conditions::READY)
        .filter(|ready| !ready.message.is_empty())
        .map_or_else(|| "it has not been looked at yet.".to_owned(), |ready| ready.message.clone());
    let stalled = conditions::is_true(status, conditions::STALLED);
    let why = Rejection::new("ModelNotReady", format!("Model {name} is not ready: {said}"));
    Some(Blocked { why, stalled })
}

fn waits(reason: &'static str, message: String) -> Blocked {
    Blocked { why: Rejection::new(reason, message), stalled: false }
}

fn stalls(reason: &'static str, message: String) -> Blocked {
    Blocked { why: Rejection::new(reason, message), stalled: true }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::inference::{
        fixtures::{condition, config, deployment, pod, read, ready, seen, service, trust},
        observe::Rival,
    };

    fn rejected(spec: Value, change: impl FnOnce(&mut Observed)) -> Blocked {
        let service = service(spec);
        let mut seen = seen(&service);
        change(&mut seen);
        plan(&service, &seen, &trust(), &config()).unwrap_err()
    }

    #[rstest]
    #[case::older("2026-01-01T00:00:00Z", "z", true)]
    #[case::equally_old_and_first_by_name("2026-01-02T00:00:00Z", "a", true)]
    #[case::equally_old_and_second("2026-01-02T00:00:00Z", "z", false)]
    #[case::younger("2026-01-03T00:00:00Z", "a", false)]
    fn the_older_service_keeps_an_id(#[case] created: &str, #[case] name: &str, #[case] conflict: bool) {
        let service = service(json!({"adapterRefs": [{"name": "tone"}]}));
        let mut seen = seen(&service);
        let model_ids = vec![name.to_owned(), "tone".to_owned()];
        seen.rivals = vec![Rival { name: name.into(), created: Some(created.parse().unwrap()), model_ids }];
        match plan(&service, &seen, &trust(), &config()) {
            Ok(_) => assert!(!conflict),
            Err(blocked) => {
                assert!(conflict && blocked.stalled, "{blocked:?}");
                assert_eq!(blocked.why.reason, "ModelIdConflict");
                assert!(blocked.why.message.contains(&format!("InferenceService {name} is older")));
            }
        }
    }

    #[rstest]
    #[case::by_default(json!({"access": "GatewayOnly"}), false, true)]
    #[case::through_the_gateway(json!({"access": "GatewayOnly"}), true, false)]
    #[case::by_everybody(json!({"access": "Direct"}), false, false)]
    fn what_nobody_could_ask_is_not_made(#[case] own: Value, #[case] gateway: bool, #[case] blocked: bool) {
        let service = service(own);
        let config = Config { gateway, ..config() };
        let found = plan(&service, &seen(&service), &trust(), &config).err();
        assert_eq!(
            found.as_ref().map(|b| (b.why.reason, b.stalled)),
            blocked.then_some((GATEWAY_DISABLED, true))
        );
        assert!(found.is_none_or(|b| b.why.message.contains("`gateway.enabled: true`")));
    }

    #[rstest]
    #[case::ready(ready(), true)]
    #[case::loads(json!({"phase": "Running"}), true)]
    #[case::waits_for_a_node(json!({"phase": "Pending"}), false)]
    #[case::crashes(json!({"phase": "Running", "containerStatuses": [{"name": "worker", "image": "i", "imageID": "", "ready": false,
        "restartCount": 3, "lastState": {"terminated": {"exitCode": 1}}}]}), false)]
    fn only_what_works_is_kept_as_it_is(#[case] status: Value, #[case] expected: bool) {
        let mut seen = seen(&service(json!({})));
        seen.children.deployment = Some(deployment("now", json!({})));
        seen.pods = vec![pod("p", "now", status), pod("old", "before", ready())];
        assert_eq!(at_work(&seen), expected);
    }

    #[test]
    fn models_that_are_not_there_or_not_ready_are_waited_for_unless_they_are_stuck() {
        let blocked = rejected(json!({"adapterRefs": [{"name": "none"}]}), |_| {});
        assert_eq!((blocked.why.reason, blocked.stalled), ("ModelNotFound", false));
        assert!(blocked.why.message.starts_with("Model none does not exist"));

        let unready = |stalled: &str| {
            let conditions = [
                condition("Ready", "False", "X", "the source is empty."),
                condition("Stalled", stalled, "X", ""),
            ];
            let status: lathe_api::ModelStatus =
                read(json!({"observedGeneration": 1, "conditions": conditions}));
            move |seen: &mut Observed| seen.base.as_mut().unwrap().status = Some(status)
        };
        let blocked = rejected(json!({}), unready("False"));
        assert_eq!((blocked.why.reason, blocked.stalled), ("ModelNotReady", false));
        assert_eq!(blocked.why.message, "Model base is not ready: the source is empty.");
        assert!(rejected(json!({}), unready("True")).stalled);
    }
}
