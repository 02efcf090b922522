use k8s_openapi::api::apps::v1::DeploymentCondition;
use lathe_api::{
    ThroughputStatus,
    conditions::find,
    kstatus::{Kstatus, kstatus},
};
use rstest::rstest;
use serde_json::{Value, json};

use super::*;
use crate::context::Config;
use crate::inference::{
    fixtures::{config, deployment, pod, read, ready, seen, service, trust},
    observe::Observed,
    plan::plan,
};

/// What a case changes; the service asks for one replica, has a plan and a Deployment of that plan.
struct World {
    service: InferenceService,
    seen: Observed,
    deployment: bool,
    gateway: bool,
    /// Conditions of the Deployment.
    made: Option<Vec<DeploymentCondition>>,
    checksum: Option<&'static str>,
    /// Of the Deployment.
    replicas: i32,
    pods: Vec<Pod>,
    adapters: BTreeMap<String, AdapterStatus>,
    reports: BTreeMap<String, Report>,
    capacity: Option<Capacity>,
    rollout: Option<RolloutStatus>,
    in_place: bool,
    refused: Option<Trouble>,
    may_write_throughput: bool,
}

impl World {
    fn new(spec: Value) -> Self {
        let service = service(spec);
        Self {
            seen: seen(&service),
            service,
            deployment: true,
            gateway: true,
            made: None,
            checksum: None,
            replicas: 1,
            pods: Vec::new(),
            adapters: BTreeMap::new(),
            reports: BTreeMap::new(),
            capacity: None,
            rollout: None,
            in_place: false,
            refused: None,
            may_write_throughput: true,
        }
    }

    /// With pods of the wanted revision.
    fn pods(mut self, statuses: &[Value]) -> Self {
        let checksum = self.checksum();
        self.pods =
            statuses.iter().enumerate().map(|(i, s)| pod(&format!("p{i}"), &checksum, s.clone())).collect();
        self
    }

    /// One ready pod that says this of its adapters.
    fn adapter(mut self, state: &str, message: Option<&str>) -> Self {
        self = self.pods(&[ready()]);
        let entry = json!({"adapters": [{"modelId": "tone", "state": state, "message": message}]});
        self.adapters.insert("p0".to_owned(), read(entry));
        self
    }

    fn checksum(&self) -> String {
        plan(&self.service, &self.seen, &trust(), &config())
            .map_or("none".to_owned(), |serving| serving.checksum)
    }

    fn status(&self) -> InferenceServiceStatus {
        self.with_facts(status)
    }

    fn cost_per_hour(&self) -> Option<(f64, String)> {
        self.with_facts(|facts| cost_per_hour(facts).map(|(amount, currency)| (amount, currency.to_owned())))
    }

    fn with_facts<T>(&self, say: impl FnOnce(&Facts<'_>) -> T) -> T {
        let config = Config { gateway: self.gateway, ..config() };
        let plan = plan(&self.service, &self.seen, &trust(), &config);
        let checksum = self.checksum.map_or_else(|| self.checksum(), str::to_owned);
        let mut deployment =
            self.deployment.then(|| deployment(&checksum, json!({"kubernetes.io/change-cause": "a volume"})));
        if let Some(status) = deployment.as_mut().and_then(|deployment| deployment.status.as_mut()) {
            status.conditions = self.made.clone();
        }
        if let Some(spec) = deployment.as_mut().and_then(|deployment| deployment.spec.as_mut()) {
            spec.replicas = Some(self.replicas);
        }
        say(&Facts {
            service: &self.service,
            plan: plan.as_ref(),
            gateway_url: config.gateway_url().as_deref(),
            deployment: deployment.as_ref(),
            profiles: &self.seen.profiles,
            pods: &self.pods,
            reports: &self.reports,
            adapters: &self.adapters,
            told: &self.seen.told,
            ended: self.seen.ended.as_ref(),
            capacity: self.capacity.as_ref(),
            rollout: self.rollout.as_ref(),
            in_place: self.in_place,
            refused: self.refused.as_ref(),
            may_write_throughput: self.may_write_throughput,
            now: Timestamp::from_second(1_790_000_000).unwrap(),
        })
    }
}

fn refuse(mut world: World) -> World {
    let message = "the API server refuses to apply Deployment svc-serve: exceeded quota".to_owned();
    world.refused = Some(Trouble { reason: "WriteRefused".to_owned(), message, stalled: true });
    world
}

fn no_quota() -> World {
    let mut world = World::new(json!({}));
    let said = "pods \"svc-serve-x\" is forbidden: exceeded quota: small";
    world.made = Some(read(
        json!([{"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": said}]),
    ));
    world
}

fn evicted(world: World) -> World {
    let message = "its node ended the pod: low on memory. Next: nothing.".to_owned();
    let ended = Some(Trouble { reason: "Evicted".to_owned(), message, stalled: false });
    World { seen: Observed { ended, ..world.seen }, ..world }
}

fn no_gateway(mut world: World) -> World {
    world.gateway = false;
    world
}

fn gateway_only() -> World {
    World::new(json!({"access": "GatewayOnly"}))
}

fn nothing_made(mut world: World) -> World {
    world.deployment = false;
    world
}

fn worker(state: Value) -> Value {
    json!({"containerStatuses": [{
        "name": "worker", "image": "i", "imageID": "", "ready": false, "restartCount": 2, "lastState": state,
    }]})
}

fn unschedulable() -> Value {
    json!({"conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
        "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
    }]})
}

fn no_gpu() -> World {
    let mut world = World::new(json!({"accelerator": {"profiles": ["gpu"]}})).pods(&[unschedulable()]);
    world.capacity = Some(Capacity { all: 1, free: Some(0), ..Capacity::default() });
    world
}

fn foreign() -> World {
    nothing_made(World::new(json!({"adapterRefs": [{"name": "foreign"}]})))
}

fn missing() -> World {
    let mut world = nothing_made(World::new(json!({})));
    world.seen.base = None;
    world
}

fn missing_later() -> World {
    let mut world = World::new(json!({})).pods(&[ready()]);
    world.seen.base = None;
    world
}

fn old_revision() -> World {
    let mut world = World::new(json!({}));
    world.pods = vec![pod("old", "before", ready())];
    world
}

fn failed_beside_old() -> World {
    let mut world = World::new(json!({}))
        .pods(&[worker(json!({"terminated": {"reason": "OOMKilled", "exitCode": 137}}))]);
    world.pods.push(pod("old", "before", ready()));
    world
}

const TONE: &str = "tone";

fn with_tone() -> World {
    World::new(json!({"adapterRefs": [{"name": TONE}]}))
}

/// (Ready, Available, RolledOut, Reconciling, Stalled), the reason of Ready and words of its message, and what Flux makes of it.
#[rstest]
#[case::first_visit(nothing_made(World::new(json!({}))), "FFUTF", "Starting", "waiting for pods", Kstatus::InProgress)]
#[case::pods_start(World::new(json!({})).pods(&[json!({})]), "FFFTF", "Starting", "a pod is starting", Kstatus::InProgress)]
#[case::answers(World::new(json!({})).pods(&[ready()]), "TTTFF", "Answering", "1 of 1 replicas answer", Kstatus::Current)]
#[case::one_of_two(World::new(json!({"replicas": 2})).pods(&[ready()]), "TTFTF", "Answering", "1 of 2", Kstatus::InProgress)]
#[case::one_too_many(World::new(json!({})).pods(&[ready(), ready()]), "TTFTF", "Answering", "2 of 1", Kstatus::InProgress)]
#[case::old_ones_answer(old_revision(), "TTFTF", "Answering", "1 of 1", Kstatus::InProgress)]
#[case::new_ones_fail(
    failed_beside_old(),
    "FTFFT",
    "OutOfMemory",
    "What ran before goes on answering",
    Kstatus::Failed
)]
#[case::stopped(World::new(json!({"replicas": 0})), "TFTFF", "Stopped", "raise it to start", Kstatus::Current)]
#[case::stopping(World::new(json!({"replicas": 0})).pods(&[ready()]), "TTFTF", "Stopped", "raise it", Kstatus::InProgress)]
#[case::no_device(
    no_gpu(),
    "FFFTF",
    "AcceleratorUnavailable",
    "0 of 1 gpu devices are free; the scheduler says: 0/2 nodes",
    Kstatus::InProgress
)]
#[case::out_of_memory(
    World::new(json!({})).pods(&[worker(json!({"terminated": {"reason": "OOMKilled", "exitCode": 137}}))]),
    "FFFFT", "OutOfMemory", "raise `spec.pod.memory`", Kstatus::Failed
)]
#[case::own_words(
    World::new(json!({})).pods(&[worker(json!({"terminated": {"exitCode": 64, "message":
        r#"{"outcome":{"failed":{"reason":"UnknownArchitecture","message":"no. Next: x.","userError":true}}}"#}}))]),
    "FFFFT", "UnknownArchitecture", "no. Next: x.", Kstatus::Failed
)]
#[case::crashes(
    World::new(json!({})).pods(&[worker(json!({"terminated": {"exitCode": 1}}))]),
    "FFFTF", "CrashLoop", "kubectl logs p0 --previous", Kstatus::InProgress
)]
#[case::image(
    World::new(json!({})).pods(&[json!({"containerStatuses": [{"name": "worker", "image": "i:1", "imageID": "", "ready": false,
        "restartCount": 0, "state": {"waiting": {"reason": "ImagePullBackOff", "message": "denied"}}}]})]),
    "FFFFT", "ImagePullFailed", "image i:1: denied", Kstatus::Failed
)]
#[case::no_quota(
    no_quota(),
    "FFFFT",
    "PodsRefused",
    "exceeded quota: small. Next: raise the quota",
    Kstatus::Failed
)]
#[case::evicted(evicted(World::new(json!({})).pods(&[json!({})])), "FFFTF", "Evicted", "low on memory", Kstatus::InProgress)]
#[case::one_was_evicted_and_another_answers(
    evicted(World::new(json!({})).pods(&[ready()])), "TTTFF", "Answering", "1 of 1", Kstatus::Current)]
#[case::foreign_adapter(foreign(), "FFFFT", "AdapterBaseMismatch", "an adapter of other", Kstatus::Failed)]
#[case::no_model_yet(missing(), "FFFTF", "ModelNotFound", "Model base does not exist", Kstatus::InProgress)]
#[case::no_model_any_more(
    missing_later(),
    "FTFTF",
    "ModelNotFound",
    "What ran before goes on answering",
    Kstatus::InProgress
)]
#[case::no_gateway(
    no_gateway(nothing_made(gateway_only())),
    "FFFFT",
    "GatewayDisabled",
    "or `spec.access: Direct`",
    Kstatus::Failed
)]
#[case::no_gateway_any_more(
    no_gateway(gateway_only().pods(&[ready()])),
    "FFFFT",
    "GatewayDisabled",
    "`gateway.enabled: true`",
    Kstatus::Failed
)]
#[case::no_gateway_needed(no_gateway(World::new(json!({})).pods(&[ready()])), "TTTFF", "Answering", "1 of 1", Kstatus::Current)]
#[case::refused(refuse(nothing_made(World::new(json!({})))), "FFFFT", "WriteRefused", "exceeded quota", Kstatus::Failed)]
#[case::adapter_on_its_way(with_tone().adapter("Loading", None), "TTFTF", "Answering", "1 of 1", Kstatus::InProgress)]
#[case::adapter_unknown(with_tone().pods(&[ready()]), "TTFTF", "Answering", "1 of 1", Kstatus::InProgress)]
#[case::adapter_there(with_tone().adapter("Ready", None), "TTTFF", "Answering", "1 of 1", Kstatus::Current)]
#[case::adapter_fails(with_tone().adapter("Failed", Some("rank 64")), "FTFTF", "AdapterFailed", "tone cannot be loaded: rank 64", Kstatus::InProgress)]
fn one_true_cause(
    #[case] world: World,
    #[case] states: &str,
    #[case] reason: &str,
    #[case] words: &str,
    #[case] settled: Kstatus,
) {
    let status = world.status();
    let found = conditions_of(&status);
    let summary = summary(&status).unwrap();
    assert_eq!((found.as_str(), summary.reason.as_str()), (states, reason), "{:#?}", status.conditions);
    assert!(summary.message.contains(words), "{}", summary.message);
    // Every known condition from the first visit on, each with a reason that the schema takes.
    assert_eq!(status.conditions.len(), 7);
    assert!(status.conditions.iter().all(|c| c.observed_generation == Some(1) && !c.reason.is_empty()));
    let mut object = world.service.clone();
    object.status = Some(status);
    assert_eq!(kstatus(&serde_json::to_value(&object).unwrap()), settled);
}

#[rstest]
#[case::nobody_answers(false, "SecretNotFound", "FFFTF", "SecretNotFound")]
#[case::the_one_before_answers(true, "SecretNotFound", "FTFTF", "SecretNotFound")]
#[case::an_image_on_its_way(false, "PullingImage", "FFFTF", "PullingImage")]
#[case::an_image_on_its_way_beside_one_that_answers(true, "PullingImage", "TTFTF", "Answering")]
fn what_a_node_says_of_a_pod_is_told(
    #[case] beside: bool,
    #[case] told: &str,
    #[case] states: &str,
    #[case] reason: &str,
) {
    let mut world = World::new(json!({})).pods(&[json!({})]);
    if beside {
        world.pods.push(pod("old", "before", ready()));
    }
    let trouble = Trouble { reason: told.to_owned(), message: "m".to_owned(), stalled: false };
    world.seen.told.insert("p0".to_owned(), trouble);
    let status = world.status();
    assert_eq!(
        (conditions_of(&status).as_str(), summary(&status).unwrap().reason.as_str()),
        (states, reason)
    );
}

fn asleep(spec: Value) -> World {
    let mut own = json!({"access": "GatewayOnly", "adapterRefs": [{"name": TONE}],
        "autoscaling": {"minReplicas": 0, "maxReplicas": 3}});
    json_patch::merge(&mut own, &spec);
    World { replicas: 0, ..World::new(own) }
}

#[rstest]
#[case::nobody_asks(asleep(json!({})), "TFTFF", "ScaledToZero", "the next request is held", Kstatus::Current)]
#[case::the_spec_says_nothing_of_it(asleep(json!({"replicas": 2})), "TFTFF", "ScaledToZero", "wakes one", Kstatus::Current)]
#[case::it_wakes(World { replicas: 1, ..asleep(json!({})) }, "FFFTF", "Starting", "waiting for pods", Kstatus::InProgress)]
fn a_service_that_sleeps_is_ready(
    #[case] world: World,
    #[case] states: &str,
    #[case] reason: &str,
    #[case] words: &str,
    #[case] settled: Kstatus,
) {
    let status = world.status();
    let told = summary(&status).unwrap();
    assert_eq!((conditions_of(&status).as_str(), told.reason.as_str()), (states, reason), "{status:#?}");
    assert!(told.message.contains(words), "{}", told.message);
    // What wakes it can be named.
    let ids: &[&str] = if reason == "ScaledToZero" { &["svc", TONE] } else { &[] };
    assert_eq!(status.model_ids, ids);
    let mut object = world.service.clone();
    object.status = Some(status);
    assert_eq!(kstatus(&serde_json::to_value(&object).unwrap()), settled);
}

#[rstest]
#[case::by_the_user(json!({}), json!(null), "False", "Manual", "`spec.replicas` alone")]
#[case::not_yet(json!({"autoscaling": {"maxReplicas": 3}}), json!(null), "Unknown", "NotDecided", "`spec.replicas` is left alone")]
#[case::by_the_load(json!({"autoscaling": {"maxReplicas": 3}}), json!({}), "True", "FollowsThroughput", "between 1 and 3 replicas")]
#[case::by_nobody(
    json!({"autoscaling": {"maxReplicas": 3}}), json!({"blocked": "ReportsLate"}), "False", "ReportsLate", "Next: look at the gateways'")]
#[case::never_down(
    json!({"autoscaling": {"maxReplicas": 3}}), json!({"blocked": "ReportsMissing"}), "False", "ReportsMissing", "no replica is given back")]
#[case::in_the_dark(
    json!({"autoscaling": {"maxReplicas": 3}}), json!({"blocked": "CapacityUnknown"}), "False", "CapacityUnknown", "measured")]
#[case::not_allowed(
    json!({"autoscaling": {"maxReplicas": 3}}), json!({"blocked": "WriteRefused", "message": "no. Next: ask."}), "False", "WriteRefused", "Next: ask.")]
fn who_decides_the_replicas_is_told(
    #[case] spec: Value,
    #[case] scaling: Value,
    #[case] state: &str,
    #[case] reason: &str,
    #[case] words: &str,
) {
    let mut world = World::new(spec).pods(&[ready()]);
    world.service.status = Some(read(json!({"observedGeneration": 1, "scaling": scaling})));
    let status = world.status();
    let told = find(&status.conditions, SCALING_ACTIVE).unwrap();
    assert_eq!((told.status.as_str(), told.reason.as_str()), (state, reason));
    assert!(told.message.contains(words), "{}", told.message);
    assert_eq!((status.scaling, status.decisions.len()), (None, 0), "they are the scaler's");
}

/// First letters of Ready, Available, RolledOut, Reconciling, Stalled.
fn conditions_of(status: &InferenceServiceStatus) -> String {
    [READY, AVAILABLE, ROLLED_OUT, RECONCILING, STALLED]
        .iter()
        .map(|type_| find(&status.conditions, type_).unwrap().status.chars().next().unwrap())
        .collect()
}

#[test]
fn a_roll_out_for_an_adapter_says_so() {
    let mut world = World::new(json!({"adapterRefs": [{"name": "far"}]}));
    world.pods = vec![pod("old", "before", ready())];
    let status = world.status();
    let rolled_out = find(&status.conditions, ROLLED_OUT).unwrap();
    assert_eq!(rolled_out.message, "0 of 1 replicas are as the spec says (new pods, since a volume).");
    let world = with_tone().adapter("Loading", None);
    let status = world.status();
    let rolled_out = find(&status.conditions, ROLLED_OUT).unwrap();
    assert_eq!(rolled_out.message, "tone is being added to the running pods, without a restart.");
}

#[test]
fn replicas_are_all_that_there_are_for_whoever_scales() {
    let ending = json!({"phase": "Succeeded"});
    let status = World::new(json!({"replicas": 3})).pods(&[ready(), json!({}), ending]).status();
    assert_eq!((status.replicas, status.ready_replicas), (2, 1));
}

#[test]
fn ids_are_those_that_answer() {
    assert_eq!(with_tone().pods(&[json!({})]).status().model_ids, Vec::<String>::new());
    assert_eq!(with_tone().adapter("Loading", None).status().model_ids, ["svc"]);
    let status = with_tone().adapter("Ready", None).status();
    assert_eq!(status.model_ids, ["svc", "tone"]);
    // Of two replicas one does not have it: whoever was told that it is there goes on being told so, and nobody else.
    let mut one_of_two = with_tone().adapter("Ready", None).pods(&[ready(), ready()]);
    assert_eq!(one_of_two.status().model_ids, ["svc"]);
    one_of_two.service.status = Some(status.clone());
    assert_eq!(one_of_two.status().model_ids, ["svc", "tone"]);
    one_of_two.adapters.clear();
    assert_eq!(one_of_two.status().model_ids, ["svc"]);
    assert_eq!(status.url.as_deref(), Some("http://svc.n.svc:8080"));
    assert_eq!(status.selector.as_deref(), Some("lathe.dev/kind=inferenceservice,lathe.dev/name=svc"));
    assert_eq!((status.replicas, status.ready_replicas), (1, 1));
    assert_eq!(status.plan.unwrap().profile.as_deref(), Some("cpu"));
}

#[rstest]
#[case::through_the_gateway(gateway_only(), Some("http://lathe-gateway.lathe-system.svc/v1"))]
#[case::by_no_way(no_gateway(gateway_only()), None)]
#[case::by_its_own_service(World::new(json!({})), Some("http://svc.n.svc:8080"))]
fn the_address_is_where_clients_are_let_in(#[case] world: World, #[case] url: Option<&str>) {
    assert_eq!(world.status().url.as_deref(), url);
    assert_eq!(nothing_made(world).status().url, None);
}

#[rstest]
#[case::first(None, 12.0, true, Some("12"))]
#[case::moved(Some("10"), 12.0, true, Some("12"))]
#[case::moved_too_soon(Some("10"), 12.0, false, Some("10"))]
#[case::hardly_moved(Some("100"), 105.0, true, Some("100"))]
#[case::fell_silent(Some("100"), 0.0, true, Some("0.0"))]
#[case::odd(Some("10"), f64::NAN, true, Some("0.0"))]
fn throughput_is_written_when_it_moved(
    #[case] old: Option<&str>,
    #[case] generated: f64,
    #[case] due: bool,
    #[case] expected: Option<&str>,
) {
    let mut world = World::new(json!({})).pods(&[ready()]);
    world.may_write_throughput = due;
    let load = lathe_contract::Load { generation_tokens_per_second: generated, ..Default::default() };
    world.reports.insert("p0".to_owned(), Report { load: Some(load), ..Default::default() });
    let old = old.map(|rate| ThroughputStatus {
        generation: rate.into(),
        prompt: "0.0".into(),
        ..Default::default()
    });
    world.service.status = Some(InferenceServiceStatus { throughput: old, ..Default::default() });
    assert_eq!(world.status().throughput.map(|t| t.generation).as_deref(), expected);
}

#[rstest]
// Two replicas of one core each at 0.36 an hour, and 100 tokens a second.
#[case::priced(json!({"perHour": "0.36", "currency": "EUR"}), 60.0, Some("2.00 EUR"))]
#[case::no_price(Value::Null, 60.0, None)]
#[case::no_traffic(json!({"perHour": "0.36", "currency": "EUR"}), -40.0, None)]
fn tokens_cost_what_the_profile_says_of_ready_replicas(
    #[case] price: Value,
    #[case] prompt: f64,
    #[case] expected: Option<&str>,
) {
    let mut world = World::new(json!({"replicas": 2, "accelerator": {"profiles": ["cpu"], "count": 1}}));
    for profile in &mut world.seen.profiles {
        profile.spec.price = read(price.clone());
    }
    let mut world = world.pods(&[ready(), ready(), json!({})]);
    let load = lathe_contract::Load {
        prompt_tokens_per_second: prompt,
        generation_tokens_per_second: prompt.min(40.0),
        ..Default::default()
    };
    world.reports.insert("p0".to_owned(), Report { load: Some(load), ..Default::default() });
    assert_eq!(world.status().cost_per_million_tokens.as_deref(), expected);
    let hourly = world.cost_per_hour();
    assert_eq!(hourly, (!price.is_null()).then(|| (0.72, "EUR".to_owned())));
    // What one of an earlier revision costs is not known.
    world.pods.push(pod("old", "before", ready()));
    assert_eq!((world.status().cost_per_million_tokens, world.cost_per_hour()), (None, None));
    // Nobody is there, who costs nothing.
    world.pods.clear();
    let nothing = hourly.map(|(_, currency)| (0.0, currency));
    assert_eq!((world.status().cost_per_million_tokens, world.cost_per_hour()), (None, nothing));
}

#[test]
fn what_cannot_be_planned_and_goes_on_costs_what_its_deployment_says() {
    let mut world = World::new(json!({})).pods(&[ready(), ready()]);
    let checksum = world.checksum();
    for profile in &mut world.seen.profiles {
        profile.spec.price = read(json!({"perHour": "0.36", "currency": "EUR"}));
    }
    // Its Model is gone.
    world.seen.base = None;
    world.checksum = Some(Box::leak(checksum.into_boxed_str()));
    let of = |annotations: Value, limits: Value| {
        let mut made = deployment(world.checksum.unwrap(), annotations);
        made.spec.as_mut().unwrap().template.spec.as_mut().unwrap().containers[0].resources =
            read(json!({"limits": limits}));
        world.with_facts(|facts| {
            assert!(facts.plan.is_err());
            let facts = Facts { deployment: Some(&made), ..*facts };
            cost_per_hour(&facts).map(|(amount, currency)| format!("{amount:.2} {currency}"))
        })
    };
    let on = |profile: &str| json!({"lathe.dev/profile": profile});
    assert_eq!(of(on("cpu"), json!({"cpu": "1500m", "memory": "2Gi"})).as_deref(), Some("1.08 EUR"));
    assert_eq!(of(on("gpu"), json!({"nvidia.com/gpu": "2", "cpu": "4"})).as_deref(), Some("1.44 EUR"));
    // Whose price nobody knows any more.
    assert_eq!(of(on("gone"), json!({"cpu": "1500m"})), None);
    assert_eq!(of(json!({}), json!({"cpu": "1500m"})), None);
}

/// A worker's measurement of itself.
fn measured(prompt: f64, generation: f64) -> Report {
    let capacity = Some(lathe_contract::ReplicaCapacity { prompt, generation, sequences: 16 });
    Report { load: Some(lathe_contract::Load { capacity, ..Default::default() }), ..Default::default() }
}

#[rstest]
#[case::first_and_not_due(None, measured(1234.5, 3.456), false, Some(("1234", "3.46")))]
#[case::hardly_another(Some(("1300", "3.5")), measured(1234.5, 3.456), true, Some(("1300", "3.5")))]
#[case::another(Some(("1300", "5")), measured(1234.5, 3.456), true, Some(("1234", "3.46")))]
#[case::another_too_soon(Some(("1300", "5")), measured(1234.5, 3.456), false, Some(("1300", "5")))]
#[case::none_runs(Some(("1300", "5")), Report::default(), true, Some(("1300", "5")))]
#[case::nonsense(None, measured(f64::INFINITY, -1.0), true, None)]
#[case::tiny(None, measured(1e-9, 0.012_345), true, Some(("0.000000", "0.0123")))]
fn what_a_replica_can_do_is_told_at_once_and_kept(
    #[case] old: Option<(&str, &str)>,
    #[case] said: Report,
    #[case] due: bool,
    #[case] expected: Option<(&str, &str)>,
) {
    let mut world = World::new(json!({})).pods(&[ready()]);
    world.may_write_throughput = due;
    world.reports.insert("p0".to_owned(), said);
    let revision = lathe_api::names::revision(&world.checksum());
    let known = |(prompt, generation): (&str, &str)| {
        json!({"prompt": "0.0", "generation": "0.0", "capacityPerReplica":
        {"revision": revision, "prompt": prompt, "generation": generation, "sequences": 16}})
    };
    world.service.status = Some(read(json!({"observedGeneration": 1, "throughput": old.map(known)})));
    let told = world.status().throughput.and_then(|throughput| throughput.capacity_per_replica);
    let told = told.as_ref().map(|told| (told.prompt.as_str(), told.generation.as_str()));
    assert_eq!(told, expected);
}

/// Of two revisions, `before` and the one that the spec asks for now, each with the prompt speed that it measured.
#[rstest]
// Until one of the new revision has measured itself, those of the old one answer.
#[case::they_answer_still(&[("before", Some(500.0))], Some("before 100"))]
#[case::they_said_nothing_this_time(&[("before", None)], Some("before 100"))]
#[case::a_new_one_has_measured_itself(&[("before", Some(500.0)), ("before", Some(500.0)), ("", Some(20.0))], Some(" 20.0"))]
#[case::a_new_one_has_not_yet(&[("before", Some(500.0)), ("", None)], Some("before 100"))]
#[case::they_are_gone(&[("", None)], None)]
#[case::nobody_is_there(&[], None)]
fn a_capacity_does_not_outlive_its_revision(
    #[case] pods: &[(&str, Option<f64>)],
    #[case] expected: Option<&str>,
) {
    let mut world = World::new(json!({}));
    // Whether or not anything else may be written.
    world.may_write_throughput = false;
    let new = world.checksum();
    for (at, (checksum, said)) in pods.iter().enumerate() {
        let (name, checksum) = (format!("p{at}"), if checksum.is_empty() { &new } else { *checksum });
        world.pods.push(pod(&name, checksum, ready()));
        world.reports.extend(said.map(|prompt| (name, measured(prompt, 3.0))));
    }
    let known = json!({"revision": "before", "prompt": "100", "generation": "3", "sequences": 16});
    let throughput = json!({"prompt": "0.0", "generation": "0.0", "capacityPerReplica": known});
    world.service.status = Some(read(json!({"observedGeneration": 1, "throughput": throughput})));
    let told = world.status().throughput.and_then(|throughput| throughput.capacity_per_replica);
    let new = lathe_api::names::revision(&new);
    let told = told.map(|told| format!("{} {}", told.revision.replace(&new, ""), told.prompt));
    assert_eq!(told.as_deref(), expected);
}
