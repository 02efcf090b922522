use lathe_api::{InferenceServiceSpec, NameRef};
use lathe_contract::AdapterRoom;
use rstest::rstest;
use serde_json::{Value, json};

use super::*;

fn model(name: &str, uri: &str, adapter_of: Option<&str>) -> Model {
    let mut model =
        Model::new(name, serde_json::from_value(json!({"source": {"uri": uri}})).expect("a spec"));
    model.spec.adapter_of = adapter_of.map(|name| NameRef { name: name.to_owned() });
    let shape = json!({
        "vocab": 1000, "hidden": 64, "layers": 2, "heads": 4, "kvHeads": 2, "headDim": 16, "intermediate": 128
    });
    let status =
        json!({"contextLength": 512, "shape": shape, "weights": [{"precision": "BF16", "bytes": 400_000}]});
    model.status = Some(serde_json::from_value(status).expect("a status"));
    model
}

fn profile(name: &str, spec: Value) -> AcceleratorProfile {
    AcceleratorProfile::new(name, serde_json::from_value(spec).expect("a profile"))
}

fn profiles() -> Vec<AcceleratorProfile> {
    vec![
        profile(
            "cpu",
            json!({"resource": "cpu", "devicesPerNode": 64, "runtime": "CPU", "bandwidth": "8", "price": {"perHour": "0.04"}}),
        ),
        profile(
            "gpu",
            json!({"resource": "nvidia.com/gpu", "memory": "24Gi", "runtime": "CUDA", "price": {"perHour": "0.70"}}),
        ),
        profile(
            "tiny",
            json!({"resource": "nvidia.com/gpu", "memory": "2Mi", "runtime": "CUDA", "image": "own/worker:1"}),
        ),
    ]
}

fn spec(value: Value) -> InferenceServiceSpec {
    let mut all = json!({"modelRef": {"name": "base"}, "access": "Direct"});
    all.as_object_mut().expect("object").extend(value.as_object().expect("object").clone());
    serde_json::from_value(all).expect("a spec")
}

fn object() -> ObjectRef {
    ObjectRef { kind: "InferenceService".into(), namespace: "n".into(), name: "svc".into(), uid: "u".into() }
}

struct World {
    base: Model,
    adapters: Vec<Model>,
    profiles: Vec<AcceleratorProfile>,
    images: Images,
    room: Option<AdapterRoom>,
    profile: Option<&'static str>,
    trust: Trust,
}

impl World {
    fn new(adapters: Vec<Model>) -> Self {
        let images = Images { cpu: "lathe-worker:1".into(), cuda: None };
        Self {
            base: model("base", "pvc://models/base", None),
            adapters,
            profiles: profiles(),
            images,
            room: None,
            profile: None,
            trust: Trust::default(),
        }
    }

    fn plan(&self, spec: &InferenceServiceSpec) -> Result<Serving, Rejection> {
        let adapters: Vec<&Model> = self.adapters.iter().collect();
        let facts = ServeFacts {
            object: object(),
            trust: self.trust.clone(),
            base: &self.base,
            adapters: &adapters,
            profiles: &self.profiles,
            images: &self.images,
            room: self.room,
            profile: self.profile,
        };
        serving(spec, &facts)
    }
}

#[test]
fn the_whole_contract_and_what_a_pod_needs() {
    let world = World::new(vec![model("tone", "pvc://results/tone", Some("base"))]);
    let found = world.plan(&spec(json!({"adapterRefs": [{"name": "tone"}]}))).expect("a plan");
    let contract = serde_json::to_value(&found.contract).expect("json");
    assert_eq!(
        contract,
        json!({
            "version": 1,
            "object": {"kind": "InferenceService", "namespace": "n", "name": "svc", "uid": "u"},
            "trust": {},
            "mounts": {
                "claims": {"models": "/lathe/volumes/models", "results": "/lathe/volumes/results"},
                "cache": "/lathe/cache",
                "cacheBytes": 1 << 30,
            },
            "task": {"serve": {
                "modelId": "svc",
                "model": {"name": "base", "source": {"uri": "pvc://models/base"}},
                "adapters": [{"modelId": "tone", "model": {"name": "tone", "source": {"uri": "pvc://results/tone"}}}],
                "adapterRoom": {"slots": 4, "rank": 32},
                "weights": "BFloat16", "contextLength": 512, "maxSequences": 16, "maxWaiting": 64,
                "cacheTokens": 2048, "direct": true, "drainSeconds": 60,
            }},
        })
    );
    assert_eq!(
        (found.plan.profile.as_deref(), found.count, found.image.as_str()),
        (Some("cpu"), 1, "lathe-worker:1")
    );
    assert_eq!((found.cpu_millis, found.room), (1000, AdapterRoom { slots: 4, rank: 32 }));
    let line = |name: &str| found.plan.memory.iter().find(|l| l.name == name).map(|l| l.value.clone());
    assert!(line("weights").is_some() && line("total").is_some());
    assert!(found.memory > 192 << 20 && found.memory < 400 << 20, "{}", found.memory);
}

#[rstest]
#[case::by_default(json!({"modelRef": {"name": "base"}}), false)]
#[case::as_the_spec_says(json!({"modelRef": {"name": "base"}, "access": "GatewayOnly"}), false)]
#[case::or_everybody(json!({"modelRef": {"name": "base"}, "access": "Direct"}), true)]
fn workers_answer_the_gateway_alone_unless_the_spec_says_otherwise(#[case] own: Value, #[case] direct: bool) {
    let spec: InferenceServiceSpec = serde_json::from_value(own).expect("a spec");
    let found = World::new(Vec::new()).plan(&spec).expect("a plan");
    let Task::Serve(task) = &found.contract.task else { panic!("serve") };
    assert_eq!(task.direct, direct);
}

#[test]
fn only_what_needs_another_pod_changes_the_checksum() {
    let one = model("tone", "pvc://models/tone", Some("base"));
    let two = model("other", "pvc://models/other", Some("base"));
    let far = model("far", "pvc://elsewhere/far", Some("base"));
    let checksum = |adapters: &[&Model], slots: Option<i32>, more: Value| {
        let refs: Vec<_> = adapters.iter().map(|m| json!({"name": m.metadata.name})).collect();
        let mut value = json!({"adapterRefs": refs});
        value.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
        let mut world = World::new(adapters.iter().map(|&m| m.clone()).collect());
        world.room = slots.map(|slots| AdapterRoom { slots, rank: 32 });
        world.plan(&spec(value)).expect("a plan").checksum
    };
    let same = checksum(&[], None, json!({}));
    assert_eq!(checksum(&[&one, &two], Some(4), json!({})), same);
    assert_ne!(checksum(&[&far], Some(4), json!({})), same);
    assert_ne!(checksum(&[], None, json!({"serving": {"contextLength": 256}})), same);
    let many: Vec<Model> = (0..5).map(|i| model(&format!("a{i}"), "pvc://models/x", Some("base"))).collect();
    let many: Vec<&Model> = many.iter().collect();
    assert_ne!(checksum(&many, Some(4), json!({})), same);
    assert_eq!(checksum(&many[..1], Some(8), json!({})), checksum(&many, Some(4), json!({})));
}

/// A hash that changes restarts every worker of everybody at the next upgrade: raise `TEMPLATE_REVISION` for a hole in their
/// security, and correct what else changed it.
#[test]
fn the_checksum_of_a_spec_is_the_same_in_every_version_of_lathe() {
    let more = json!({
        "serving": {"contextLength": 256, "maxSequences": 8}, "accelerator": {"profiles": ["cpu"], "count": 2},
        "pod": {"labels": {"team": "a"}, "env": [{"name": "A", "value": "b"}], "memory": "2Gi"},
    });
    let found =
        [json!({}), more].map(|own| World::new(Vec::new()).plan(&spec(own)).expect("a plan").checksum);
    assert_eq!(found, ["26e5c5b526d0a3127a9447554dacd963", "5d048241ef61a4f5a2dbde3c09791b9a"]);
}

#[test]
fn what_lathe_computes_and_what_it_brings_along_changes_no_checksum() {
    let plan = |world: &World, own: Value| world.plan(&spec(own)).expect("a plan");
    let same = plan(&World::new(Vec::new()), json!({}));
    let mut other = World::new(Vec::new());
    // Another version's images, figures of the catalogue, and a profile that is cheaper than the one that pods run on.
    other.images = Images { cpu: "lathe-worker:2".into(), cuda: Some("cuda-worker:2".into()) };
    other.profiles[0] = profile(
        "cpu",
        json!({"resource": "cpu", "devicesPerNode": 64, "runtime": "CPU", "bandwidth": "0.001", "price": {"perHour": "0.05"},
            "tolerations": [{"key": "new", "operator": "Exists"}]}),
    );
    let cheap =
        json!({"resource": "cpu", "devicesPerNode": 64, "runtime": "CPU", "price": {"perHour": "0.01"}});
    other.profiles.push(profile("cheap", cheap));
    other.profile = Some("cpu");
    let found = plan(&other, json!({}));
    assert_eq!((found.plan.profile.as_deref(), &found.checksum), (Some("cpu"), &same.checksum));
    assert_ne!(found.count, same.count, "computed from the bandwidth");
    other.profile = None;
    assert_eq!(plan(&other, json!({})).plan.profile.as_deref(), Some("cheap"));
    // The order of the spec counts, wherever pods run.
    other.profile = Some("cpu");
    let named = plan(&other, json!({"accelerator": {"profiles": ["cheap", "cpu"]}}));
    assert_eq!(named.plan.profile.as_deref(), Some("cheap"));
}

#[rstest]
#[case::of_the_pod(json!({"pod": {"env": [{"name": "A", "value": "b"}]}}))]
#[case::a_label(json!({"pod": {"labels": {"team": "a"}}}))]
#[case::memory(json!({"pod": {"memory": "2Gi"}}))]
#[case::cores(json!({"accelerator": {"count": 3}}))]
#[case::sequences(json!({"serving": {"maxSequences": 8}}))]
#[case::weights(json!({"serving": {"weights": "Float32"}}))]
#[case::who_may_ask(json!({"access": "GatewayOnly"}))]
fn what_the_user_writes_of_the_pods_is_a_roll_out(#[case] own: Value) {
    let checksum = |own: Value| World::new(Vec::new()).plan(&spec(own)).expect("a plan").checksum;
    assert_ne!(checksum(own), checksum(json!({})));
}

#[test]
fn what_is_served_is_what_was_inspected() {
    let digest = |letter: &str| format!("sha256:{}", letter.repeat(64));
    let inspected = |letter: &str| {
        let mut tone = model("tone", "pvc://models/tone", Some("base"));
        tone.status.as_mut().expect("inspected").digest = Some(digest("a"));
        let mut world = World::new(vec![tone]);
        world.base.status.as_mut().expect("inspected").digest = Some(digest(letter));
        world
    };
    let plan = |world: &World| world.plan(&spec(json!({"adapterRefs": [{"name": "tone"}]}))).expect("a plan");
    let found = plan(&inspected("b"));
    let Task::Serve(task) = &found.contract.task else { panic!("serve") };
    assert_eq!(task.model.source.digest, Some(digest("b")));
    assert_eq!(task.adapters[0].model.source.digest, Some(digest("a")));
    assert_eq!(task.model.inspected, None, "its files were not hashed on a volume");
    let mut known = inspected("b");
    let status = known.base.status.as_mut().expect("inspected");
    (status.fingerprint, status.weights_digest) = (Some(digest("1")), Some(digest("2")));
    let with = plan(&known);
    let Task::Serve(task) = &with.contract.task else { panic!("serve") };
    let marks = task.model.inspected.as_ref().map(|i| (i.fingerprint.clone(), i.weights_digest.clone()));
    assert_eq!(marks, Some((digest("1"), digest("2"))));
    assert_eq!(with.checksum, found.checksum, "a short cut, no other model");
    // Made again for other files, it is another model: a roll-out.
    assert_ne!(plan(&inspected("c")).checksum, found.checksum);
    // What its owner pinned counts before what was found.
    let mut pinned = inspected("b");
    pinned.base.spec.source.digest = Some(digest("c"));
    assert_eq!(plan(&pinned).checksum, plan(&inspected("c")).checksum);
}

#[test]
fn keys_and_another_model_are_a_roll_out() {
    let checksum = |world: &World| world.plan(&spec(json!({}))).expect("a plan").checksum;
    let same = checksum(&World::new(Vec::new()));
    let mut other = World::new(Vec::new());
    other.base = model("base", "pvc://models/other", None);
    assert_ne!(checksum(&other), same);
    let mut other = World::new(Vec::new());
    other.profiles[0].spec.image = Some("own/worker:2".into());
    assert_ne!(checksum(&other), same);
    let mut other = World::new(Vec::new());
    other.trust.operator_key = Some("another".into());
    assert_ne!(checksum(&other), same);
}

#[test]
fn an_adapter_that_is_larger_than_the_running_pods_have_room_for_is_a_roll_out() {
    let plan = |ranks: &[i32], room: Option<AdapterRoom>| {
        let adapter = |(i, rank): (usize, &i32)| {
            let mut model = model(&format!("a{i}"), "pvc://models/x", Some("base"));
            model.status.as_mut().expect("inspected").rank = Some(*rank);
            model
        };
        let mut world = World::new(ranks.iter().enumerate().map(adapter).collect());
        world.room = room;
        let refs: Vec<_> = (0..ranks.len()).map(|i| json!({"name": format!("a{i}")})).collect();
        world.plan(&spec(json!({"adapterRefs": refs}))).expect("a plan")
    };
    let small = plan(&[8], None);
    let large = plan(&[8, 64], Some(small.room));
    assert_eq!((small.room.rank, large.room.rank), (32, 64));
    assert_ne!(small.checksum, large.checksum);
    assert!(large.memory > small.memory, "the pods are planned for it");
    // Taken away again, it leaves its room: nothing is restarted.
    assert_eq!(plan(&[8], Some(large.room)).checksum, large.checksum);
}

#[rstest]
#[case::cheapest_with_a_worker(json!({}), "cpu", 1)]
#[case::the_next_one_that_can_run(json!({"accelerator": {"profiles": ["gpu", "cpu"]}}), "cpu", 1)]
#[case::cores_as_asked(json!({"accelerator": {"profiles": ["cpu"], "count": 3}}), "cpu", 3)]
fn the_first_profile_that_fits(#[case] own: Value, #[case] profile: &str, #[case] count: i32) {
    let found = World::new(Vec::new()).plan(&spec(own)).expect("a plan");
    assert_eq!((found.plan.profile.as_deref(), found.count), (Some(profile), count));
}

#[test]
fn a_device_holds_the_largest_cache_that_fits() {
    let mut world = World::new(Vec::new());
    world.images.cuda = Some("cuda-worker:1".into());
    let found = world.plan(&spec(json!({"accelerator": {"profiles": ["gpu"]}}))).expect("a plan");
    assert_eq!((found.image.as_str(), found.count, found.cpu_millis), ("cuda-worker:1", 1, 4000));
    let Task::Serve(task) = &found.contract.task else { panic!("serve") };
    assert_eq!(task.cache_tokens, 512 * 16);
}

#[rstest]
#[case::unknown_profile(json!({"accelerator": {"profiles": ["none"]}}), "ProfileNotFound", "none: there is no such")]
#[case::no_worker(json!({"accelerator": {"profiles": ["gpu"]}}), "RuntimeUnavailable", "`image`")]
#[case::too_small(json!({"accelerator": {"profiles": ["tiny", "gpu"]}}), "DoesNotFit", "tiny: it needs")]
#[case::too_many(json!({"accelerator": {"profiles": ["cpu"], "count": 65}}), "DoesNotFit", "a node has 64")]
#[case::little_memory(json!({"accelerator": {"profiles": ["cpu"]}, "pod": {"memory": "100Mi"}}), "DoesNotFit", "`spec.pod.memory` allows 100Mi")]
#[case::long_context(json!({"serving": {"contextLength": 513}}), "ContextTooLong", "lower it to 512")]
fn what_cannot_be_is_told_with_the_next_step(#[case] own: Value, #[case] reason: &str, #[case] words: &str) {
    let rejected = World::new(Vec::new()).plan(&spec(own)).expect_err("rejected");
    assert_eq!(rejected.reason, reason, "{}", rejected.message);
    assert!(rejected.message.contains(words) && rejected.message.contains("Next: "), "{}", rejected.message);
}

#[rstest]
#[case::other_base(
    model("tone", "pvc://m/t", Some("foreign")),
    "AdapterBaseMismatch",
    "an adapter of foreign"
)]
#[case::no_adapter(model("tone", "pvc://m/t", None), "AdapterBaseMismatch", "no adapter")]
#[case::same_id(model("svc", "pvc://m/t", Some("base")), "ModelIdConflict", "`svc`")]
#[case::odd_claim(model("tone", "pvc://../t", Some("base")), "InvalidLocation", "PersistentVolumeClaim")]
fn adapters_must_belong_to_the_base(#[case] adapter: Model, #[case] reason: &str, #[case] words: &str) {
    let refs = json!({"adapterRefs": [{"name": adapter.metadata.name}]});
    let rejected = World::new(vec![adapter]).plan(&spec(refs)).expect_err("rejected");
    assert_eq!(rejected.reason, reason, "{}", rejected.message);
    assert!(rejected.message.contains(words), "{}", rejected.message);
}

#[test]
fn a_base_that_is_an_adapter_or_unknown_cannot_be_served() {
    let mut world = World::new(Vec::new());
    world.base = model("base", "pvc://m/b", Some("root"));
    assert_eq!(world.plan(&spec(json!({}))).expect_err("rejected").reason, "ModelIsAdapter");
    world.base = model("base", "pvc://m/b", None);
    world.base.status = None;
    assert_eq!(world.plan(&spec(json!({}))).expect_err("rejected").reason, "ModelNotReady");
}
