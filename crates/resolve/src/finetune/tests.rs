use lathe_api::{FineTuneJobSpec, ModelStatus};
use rstest::rstest;
use serde_json::{Value, json};

use super::*;

fn images() -> Images {
    Images { cpu: "worker:1".to_owned(), cuda: None }
}

fn model(over: Value) -> Model {
    let mut model = json!({
        "apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": "base", "namespace": "ns"},
        "spec": {"source": {"uri": "pvc://models/base"}},
        "status": {
            "observedGeneration": 1, "architecture": "LlamaForCausalLM", "contextLength": 2048, "digest": format!("sha256:{}", "a".repeat(64)),
            "weights": [{"precision": "BF16", "bytes": 2_200_000_000_i64}],
            "shape": {"vocab": 32000, "hidden": 2048, "layers": 22, "heads": 32, "kvHeads": 4, "headDim": 64, "intermediate": 5632},
        },
    });
    json_patch::merge(&mut model, &over);
    serde_json::from_value(model).expect("a model")
}

fn spec(over: Value) -> FineTuneJobSpec {
    let mut spec = json!({
        "baseModelRef": {"name": "base"},
        "dataset": {"train": {"uri": "pvc://data/train.jsonl"}},
        "output": {"modelName": "tuned"},
        "accelerator": {"profiles": ["cpu"], "count": 2},
    });
    json_patch::merge(&mut spec, &over);
    serde_json::from_value(spec).expect("a spec")
}

fn profiles() -> Vec<AcceleratorProfile> {
    let profile = |name: &str, spec: Value| -> AcceleratorProfile {
        serde_json::from_value(json!({
            "apiVersion": "lathe.dev/v1alpha1", "kind": "AcceleratorProfile", "metadata": {"name": name}, "spec": spec
        }))
        .expect("a profile")
    };
    let card = |memory: &str, rate: &str, price: &str| {
        json!({"resource": "nvidia.com/gpu", "runtime": "CUDA", "image": "cuda:1", "memory": memory, "computeBF16": rate,
            "price": {"perHour": price}})
    };
    vec![
        profile(
            "cpu",
            json!({"resource": "cpu", "runtime": "CPU", "devicesPerNode": 4, "computeBF16": "0.05"}),
        ),
        profile("small", card("8Gi", "100", "1.00")),
        profile("large", card("80Gi", "900", "4.00")),
        profile("bare", json!({"resource": "nvidia.com/gpu", "runtime": "CUDA", "memory": "80Gi"})),
    ]
}

fn facts<'a>(base: &'a Model, profiles: &'a [AcceleratorProfile], images: &'a Images) -> TrainFacts<'a> {
    TrainFacts {
        name: "job",
        attempt: 1,
        base,
        profiles,
        images,
        dataset: Some(Dataset { tokens: Some(1_000_000), digest: "sha256:d" }),
    }
}

fn planned(base: Value, over: Value) -> Result<Training, Rejection> {
    let (base, profiles, images) = (model(base), profiles(), images());
    training(&spec(over), &facts(&base, &profiles, &images))
}

#[test]
fn every_default_is_filled_in_and_every_location_mounted() {
    let plan = planned(json!({}), json!({})).expect("fits");
    let micro = plan.task.training.micro_batch_tokens;
    let found = serde_json::to_value(&plan.task).expect("json");
    let expected = json!({
        "attempt": 1, "inputs": plan.inputs_hash,
        "base": {"name": "base", "source": {"uri": "pvc://models/base", "digest": format!("sha256:{}", "a".repeat(64))}},
        "dataset": {"train": {"uri": "pvc://data/train.jsonl"}, "format": "Auto"},
        "method": {"lora": {"rank": 16, "alpha": 32, "dropout": 0.0, "basePrecision": "BFloat16",
            "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}},
        "training": {"epochs": 3.0, "learningRate": 2e-4, "schedule": "Cosine", "warmup": 0.03, "batchTokens": 16384,
            "microBatchTokens": micro, "sequenceLength": 1024, "weightDecay": 0.0, "maxGradNorm": 1.0, "seed": 42},
        "checkpoint": {"intervalSeconds": 300, "keep": 2, "destination": {"uri": "pvc://lathe-artifacts/checkpoints/job"}},
        "evaluation": {"metrics": ["Perplexity"], "gates": []},
        "output": {"modelName": "tuned", "destination": {"uri": "pvc://lathe-artifacts/models"}},
    });
    assert_eq!(found, expected);
    assert_eq!(plan.mounts.claims().collect::<Vec<_>>(), ["data", "lathe-artifacts", "models"]);
    assert_eq!((plan.cpu_millis, plan.count, plan.image.as_str()), (2000, 2, "worker:1"));
    assert!(micro >= 1024);
    let total = plan.plan.memory.iter().find(|row| row.name == "total").expect("a total");
    assert!(total.value.ends_with("Mi") || total.value.ends_with("Gi"));
    assert!(plan.plan.duration.is_some() && plan.plan.cost.is_none());
}

#[rstest]
#[case::in_order(json!({"accelerator": {"profiles": ["large", "small"], "count": null}}), "large")]
#[case::cheapest(json!({"accelerator": {"profiles": ["cpu", "large", "small"], "strategy": "Cheapest", "count": null}}), "large")]
#[case::fastest(json!({"accelerator": {"profiles": ["cpu", "small", "large"], "strategy": "Fastest", "count": null}}), "large")]
#[case::any_takes_the_cheapest_that_fits(json!({"accelerator": {"profiles": [], "count": null}}), "small")]
#[case::what_has_no_worker_is_passed_over(json!({"accelerator": {"profiles": ["bare", "cpu"]}}), "cpu")]
#[case::what_is_too_small_is_passed_over(
    json!({"accelerator": {"profiles": ["small", "large"], "count": null}, "trainable": {"full": {}}}), "large")]
fn the_strategy_chooses(#[case] over: Value, #[case] expected: &str) {
    let plan = planned(json!({}), over).expect("fits");
    assert_eq!(plan.plan.profile.as_deref(), Some(expected));
}

#[rstest]
#[case::unknown_profile(json!({"accelerator": {"profiles": ["h900"]}}), json!({}), "ProfileNotFound", "h900: there is no such")]
#[case::no_runtime(json!({"accelerator": {"profiles": ["bare"], "count": null}}), json!({}), "RuntimeUnavailable", "bare: there is no worker")]
#[case::too_large(
    json!({"accelerator": {"profiles": ["small"], "count": null}, "trainable": {"full": {}}}), json!({}),
    "DoesNotFit", "the largest allowed is 1 x small with 7537Mi to use. Next: make a new FineTuneJob with `trainable.lora`")]
#[case::a_larger_profile_is_named(
    json!({"accelerator": {"profiles": ["small"], "count": null}, "training": {"sequenceLength": 2048, "batchTokens": 32768},
        "trainable": {"lora": {"basePrecision": "Float32"}}}), json!({"status": {"shape": {"layers": 40}}}),
    "DoesNotFit", "Next: add large to `spec.accelerator.profiles`")]
#[case::pod_memory(json!({"pod": {"memory": "2Gi"}}), json!({}), "DoesNotFit", "`spec.pod.memory` allows 2048Mi. Next: set `spec.pod.memory` to ")]
#[case::several_devices(json!({"accelerator": {"profiles": ["large"], "count": 2}}), json!({}), "CountUnsupported", "more than one device")]
#[case::rows_beyond_the_context(json!({"training": {"sequenceLength": 4096}}), json!({}), "InvalidSettings", "2048 tokens")]
#[case::unknown_target(json!({"trainable": {"lora": {"targets": ["wq"]}}}), json!({}), "UnknownTarget", "found wq")]
#[case::adapter_as_base(json!({}), json!({"spec": {"adapterOf": {"name": "root"}}}), "AdapterBaseUnsupported", "`baseModelRef.name: root`")]
#[case::not_inspected(json!({}), json!({"status": {"shape": null}}), "ModelNotReady", "kubectl describe model base")]
#[case::no_price(json!({"budget": {"maxCost": "5"}}), json!({}), "PriceUnknown", "AcceleratorProfile cpu has no `price`")]
#[case::bad_claim(json!({"dataset": {"train": {"uri": "pvc://../x"}}}), json!({}), "InvalidLocation", "`dataset.train`")]
fn what_cannot_be_is_told_with_the_next_step(
    #[case] over: Value,
    #[case] base: Value,
    #[case] reason: &str,
    #[case] part: &str,
) {
    let rejection = planned(base, over).expect_err("must be rejected");
    assert_eq!(rejection.reason, reason, "{rejection}");
    assert!(rejection.message.contains(part), "{rejection}");
    assert!(rejection.message.contains("Next: "), "{rejection}");
}

#[test]
fn moments_of_8_bits_are_the_last_resort_and_are_told() {
    let full = |memory: &str| {
        planned(
            json!({}),
            json!({"trainable": {"full": {}}, "pod": {"memory": memory}, "training": {"steps": 10}}),
        )
    };
    let [roomy, tight] = ["32Gi", "18Gi"].map(|memory| full(memory).expect("fits"));
    let state = |plan: &Training| {
        let choice = plan.plan.choices.iter().find(|choice| choice.name == "optimizerState").expect("told");
        (choice.value.clone(), plan.task.training.optimizer_state)
    };
    assert_eq!(state(&roomy), ("Float32".to_owned(), lathe_contract::OptimizerState::Float32));
    assert_eq!(state(&tight), ("Int8".to_owned(), lathe_contract::OptimizerState::Int8));
    assert!(caveat(&roomy.plan).is_none() && caveat(&tight.plan).is_some_and(|text| text.contains("8 bits")));
    assert_ne!(roomy.inputs_hash, tight.inputs_hash);
    // What is told of the least arrangement is that with 8 bits: 6 bytes of the optimizer a weight and not 12.
    let rejection = full("10Gi").expect_err("too little");
    assert_eq!(rejection.reason, "DoesNotFit");
    assert!(rejection.message.contains("optimizer 6.6 GB"), "{rejection}");
    assert_eq!(state(&planned(json!({}), json!({"pod": {"memory": "8Gi"}})).expect("fits")).0, "Float32");
}

#[test]
fn equal_inputs_have_equal_hashes_wherever_they_lie() {
    let hash = |over: Value| planned(json!({}), over).expect("fits").inputs_hash.expect("known");
    let same = hash(json!({}));
    assert_eq!(
        same,
        hash(
            json!({"dataset": {"train": {"uri": "https://host/train.jsonl"}}, "output": {"modelName": "other"}})
        )
    );
    let unpinned = json!({"status": {"digest": null}});
    let unpinned = planned(unpinned, json!({})).expect("fits");
    assert!(unpinned.task.inputs.is_none() && unpinned.inputs_hash.is_some_and(|hash| hash != same));
    assert_eq!(same, hash(json!({"checkpoint": {"interval": "1m"}, "pod": {"cpu": "1"}})));
    assert_ne!(same, hash(json!({"training": {"seed": 43}})));
    assert_ne!(same, hash(json!({"trainable": {"lora": {"rank": 8}}})));
}

#[test]
fn answers_that_are_measured_are_part_of_the_memory() {
    let memory = |over: Value| planned(json!({}), over).expect("fits").memory;
    let plain = memory(json!({}));
    let measured = memory(json!({
        "dataset": {"holdout": "0.1"}, "evaluation": {"metrics": ["BLEU"]},
        "training": {"sequenceLength": 1024, "batchTokens": 1024},
    }));
    let small = memory(json!({"training": {"sequenceLength": 1024, "batchTokens": 1024}}));
    assert!(plain >= small && measured >= small, "{plain} {measured} {small}");
}

#[test]
fn rows_that_are_fetched_have_room_and_rows_that_are_held_have_memory() {
    let remote = json!({"dataset": {"train": {"uri": "s3://data/train.jsonl"},
        "evaluation": {"uri": "https://host/test.jsonl"}}});
    let room = |over: &Value| {
        let check = checking(&spec(over.clone()), &model(json!({}))).expect("plans").cache;
        assert_eq!(planned(json!({}), over.clone()).expect("fits").cache, check);
        check
    };
    assert_eq!(room(&remote) - room(&json!({})), 2 * DATASET_BYTES);
    let memory = |tokens: i64, over: Value| {
        let (base, profiles, images) = (model(json!({})), profiles(), images());
        let dataset = Some(Dataset { tokens: Some(tokens), digest: "sha256:d" });
        let facts = TrainFacts { dataset, ..facts(&base, &profiles, &images) };
        training(&spec(over), &facts).map(|plan| plan.memory)
    };
    let steps = json!({"training": {"steps": 10}});
    let more = memory(1_000_000_000, steps.clone()).expect("fits") - memory(0, steps.clone()).expect("fits");
    assert!(more >= 8_000_000_000, "{more}");
    let small = json!({"training": {"steps": 10}, "pod": {"memory": "12Gi"}});
    assert!(memory(0, small.clone()).is_ok());
    assert_eq!(memory(1_000_000_000, small).expect_err("too little").reason, "DoesNotFit");
}

#[test]
fn the_check_reads_rows_and_model_and_writes_nothing() {
    let found = checking(&spec(json!({})), &model(json!({}))).expect("plans");
    assert_eq!(found.mounts.claims().collect::<Vec<_>>(), ["data", "models"]);
    assert_eq!(found.task.sequence_length, 1024);
    assert_eq!(found.task.evaluation, planned(json!({}), json!({})).expect("fits").task.evaluation);
}

#[rstest]
#[case::read_in_place(json!({}), json!({}), 0)]
#[case::fetched(json!({"spec": {"source": {"uri": "hf://org/base"}}}), json!({}), 2_420_000_000)]
#[case::whole_weights_are_written_where_they_stay(json!({}), full(), 0)]
#[case::whole_weights_are_written_before_they_are_sent(json!({}), sent(full()), 2_200_000_000)]
#[case::both(json!({"spec": {"source": {"uri": "hf://org/base"}}}), sent(full()), 4_620_000_000)]
#[case::an_adapter_is_small(json!({}), sent(json!({})), 0)]
fn there_is_room_for_what_is_fetched_and_for_what_is_sent(
    #[case] base: Value,
    #[case] over: Value,
    #[case] least: i64,
) {
    let beside = planned(base, over).expect("fits").cache - least;
    // The tokenizer, and an adapter where one is sent.
    assert!((1 << 30..(1 << 30) + (1 << 28)).contains(&beside), "{beside}");
}

fn sent(mut over: Value) -> Value {
    json_patch::merge(&mut over, &json!({"output": {"destination": {"uri": "s3://models/x"}}}));
    over
}

fn full() -> Value {
    json!({"trainable": {"full": {}}, "accelerator": {"profiles": ["large"], "count": null}})
}

#[test]
fn what_is_made_is_read_by_pods_like_the_jobs_own_but_for_their_size() {
    let made = |pod: Value| {
        let mut job = lathe_api::FineTuneJob::new("job", spec(json!({})));
        job.spec.pod = serde_json::from_value(pod).expect("pods");
        let trained = Trained {
            uri: "pvc://lathe-artifacts/models/tuned/x".to_owned(),
            digest: format!("sha256:{}", "b".repeat(64)),
            dataset_digest: String::new(),
            inputs_hash: None,
            adapter: true,
            license: None,
            failed_gates: Vec::new(),
        };
        super::model(&job, &trained).spec.pod
    };
    let pod = made(json!({"cpu": "8", "memory": "64Gi", "imagePullSecrets": [{"name": "registry"}]}))
        .expect("kept");
    assert_eq!(serde_json::to_value(pod).expect("json"), json!({"imagePullSecrets": [{"name": "registry"}]}));
    assert_eq!(made(json!({"cpu": "8"})), None);
    assert_eq!(made(Value::Null), None);
}

#[test]
fn a_status_without_weights_is_no_panic() {
    let mut bare = model(json!({}));
    bare.status = Some(ModelStatus::default());
    let (profiles, images) = (profiles(), images());
    let rejection = training(&spec(json!({})), &facts(&bare, &profiles, &images)).expect_err("rejected");
    assert_eq!(rejection.reason, "ModelNotReady");
}
