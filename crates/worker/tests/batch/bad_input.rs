//! What users give by mistake, and what they are told.
use std::fs;
use std::path::Path;

use lathe_contract::{
    CheckDataTask, EvaluateTask, InspectReport, InspectTask, Inspected, Metric, Outcome, Task, TrainTask,
};
use rstest::rstest;
use serde_json::{Value, json};

use crate::model;
use crate::world::{Ended, World, chats, input, source};

fn check_data(world: &World) -> Ended {
    check(world, world.train_task())
}

/// The check of what a job trains on.
fn check(world: &World, TrainTask { dataset, training, evaluation, .. }: TrainTask) -> Ended {
    let sequence_length = training.sequence_length;
    world.run(Task::CheckData(CheckDataTask { dataset, model: input("base"), sequence_length, evaluation }))
}

fn inspect(world: &World, path: &str) -> Ended {
    world.run(Task::Inspect(InspectTask { source: source(path), summary_of: None }))
}

#[rstest]
#[case::a_number_for_a_text(
    br#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 3}]}"#,
    "MalformedRow",
    "train.jsonl line 61: `messages[1].content` must be a string (found a number)"
)]
#[case::no_json(b"{\"messages\": [", "MalformedRow", "train.jsonl line 61: a row must be a JSON object")]
#[case::not_utf8(b"{\"text\": \"\xff\"}", "NotUtf8", "train.jsonl line 61: a row must be UTF-8")]
fn a_bad_row_is_named_by_line_and_field(#[case] row: &[u8], #[case] reason: &str, #[case] says: &str) {
    let world = World::new();
    let mut text = chats(0..60).into_bytes();
    text.extend_from_slice(row);
    fs::write(world.path("train.jsonl"), text).expect("rows");
    let message = check_data(&world).refused(reason);
    assert!(message.contains(says), "{message}");
    let message = world.train(world.train_task()).refused(reason);
    assert!(message.contains(says), "{message}");
}

#[rstest]
#[case::empty(b"\n\n", "EmptyDataset")]
#[case::utf16(b"\xff\xfe{\0", "NotUtf8")]
#[case::a_list(b"[{\"text\": \"x\"}]", "MalformedDataset")]
#[case::parquet(b"PAR1\x15\x04", "MalformedDataset")]
#[case::gzip(b"\x1f\x8b\x08\0", "MalformedDataset")]
#[case::a_table(b"prompt,completion\na,b\n", "MalformedRow")]
#[case::a_pickle(b"\x80\x04\x95\x10\0\0\0\0\0\0\0]", "PickleRefused")]
#[case::of_another_format(b"{\"question\": \"a\", \"answer\": \"b\"}\n", "MalformedRow")]
fn a_bad_file_is_named(#[case] content: &[u8], #[case] reason: &str) {
    let world = World::new();
    fs::write(world.path("train.jsonl"), content).expect("rows");
    assert!(check_data(&world).refused(reason).contains("train.jsonl"));
    assert!(world.train(world.train_task()).refused(reason).contains("train.jsonl"));
}

#[test]
fn rows_in_several_files_are_no_dataset() {
    let world = World::new();
    let mut task = world.train_task();
    for name in ["rows/a.jsonl", "rows/b.jsonl"] {
        fs::write(world.path(name), chats(0..9)).expect("rows");
    }
    task.dataset.train = source("rows");
    let message = world.train(task).refused("NotOneFile");
    assert!(message.contains("training data") && message.contains("`uri`"), "{message}");
}

#[test]
fn rows_that_are_longer_than_the_context_are_counted_and_cut() {
    let world = World::new();
    let long = serde_json::json!({"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b".repeat(400)}]});
    fs::write(world.path("train.jsonl"), format!("{}{long}\n", chats(0..60))).expect("rows");
    let checked = check_data(&world);
    let Some(Outcome::DataChecked(report)) = &checked.outcome else { panic!("{}", checked.log) };
    assert_eq!((report.rows, report.over_long_rows), (61, 1));
    world.trained(world.train_task());
}

#[test]
fn what_may_not_be_read_is_named() {
    for name in ["train.jsonl", "base/model.safetensors", "base/config.json"] {
        let world = World::new();
        let path = world.path(name);
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o000)).expect("mode");
        let message =
            world.run_bound_by_modes(Task::Train(Box::new(world.train_task()))).refused("Unauthorized");
        assert!(message.contains(name) && message.contains("Next: let the pod's user"), "{message}");
    }
}

#[test]
fn rows_that_are_all_cut_before_their_answer_teach_nothing() {
    let world = World::new();
    let mut task = world.train_task();
    task.training.sequence_length = 10;
    let message = world.train(task).refused("NothingToLearn");
    assert!(message.contains("sequenceLength"), "{message}");
}

#[test]
fn what_is_not_there_is_named() {
    let world = World::new();
    let mut task = world.train_task();
    task.dataset.train = source("missing.jsonl");
    assert!(world.train(task).refused("NotFound").contains("training data: pvc://data/missing.jsonl"));
    let mut task = world.train_task();
    task.base = input("missing");
    assert!(world.train(task).refused("NotFound").contains("base model `tiny`"));
    let mut task = world.train_task();
    task.output.destination.uri = "pvc://other/x".into();
    assert!(world.train(task).refused("ClaimNotMounted").contains("`other`"));
}

#[test]
fn a_pickle_is_refused() {
    let world = World::new();
    let base = world.path("base");
    fs::remove_file(base.join("model.safetensors")).expect("removed");
    fs::write(base.join("pytorch_model.bin"), b"\x80\x02}q\x00.").expect("pickle");
    assert!(inspect(&world, "base").refused("PickleRefused").contains("pytorch_model.bin"));
    assert!(world.train(world.train_task()).refused("PickleRefused").contains("pytorch_model.bin"));
    // Under other names too, and in the archive that PyTorch makes of it.
    for bytes in [b"\x80\x02}q\x00.".as_slice(), b"PK\x03\x04\0\0\0\0archive/data.pkl"] {
        for name in ["model.safetensors", "adapter_model.safetensors", "tokenizer.json"] {
            let world = World::new();
            fs::write(world.path("base").join(name), bytes).expect("pickle");
            assert!(inspect(&world, "base").refused("PickleRefused").contains(name));
            world.train(world.train_task()).refused("PickleRefused");
        }
    }
}

/// The model's weights with a changed header, and so many bytes more.
fn weights_with(whole: &[u8], change: impl Fn(&mut Value), more: usize) -> Vec<u8> {
    let length = u64::from_le_bytes(whole[..8].try_into().expect("eight")) as usize;
    let mut header: Value = serde_json::from_slice(&whole[8..8 + length]).expect("a header");
    change(&mut header);
    let header = header.to_string().into_bytes();
    let parts =
        [&(header.len() as u64).to_le_bytes(), header.as_slice(), &whole[8 + length..], &vec![0; more]];
    parts.concat()
}

/// What is wrong, and how it comes to that.
type Lie = (&'static str, fn(&[u8]) -> Vec<u8>);

const NORM: &str = "model.norm.weight";

const LIES: [Lie; 7] = [
    ("a header of 2^63 bytes", |whole| [&(1_u64 << 63).to_le_bytes(), &whole[8..]].concat()),
    ("a header of no JSON", |whole| [&whole[..8], b"{{", &whole[10..]].concat()),
    ("more bytes than are told", |whole| weights_with(whole, |_| {}, 64)),
    ("a tensor beyond the end", |whole| {
        let change = |header: &mut Value| header[NORM]["data_offsets"][1] = json!(1_u64 << 60);
        weights_with(whole, change, 0)
    }),
    ("a tensor that ends before it begins", |whole| {
        let change = |header: &mut Value| header[NORM]["data_offsets"].as_array_mut().expect("two").reverse();
        weights_with(whole, change, 0)
    }),
    ("a shape of more elements than bytes", |whole| {
        let change = |header: &mut Value| header[NORM]["shape"] = json!([1_u64 << 40, 1_u64 << 40]);
        weights_with(whole, change, 0)
    }),
    ("an unknown type", |whole| {
        weights_with(whole, |header: &mut Value| header[NORM]["dtype"] = json!("F99"), 0)
    }),
];

#[test]
fn weights_that_lie_are_refused_in_every_way() {
    for (lie, change) in LIES {
        let world = World::new();
        let path = world.path("base").join("model.safetensors");
        fs::write(&path, change(&fs::read(&path).expect("weights"))).expect("weights");
        for ended in [inspect(&world, "base"), world.train(world.train_task())] {
            let Some(Outcome::Failed(failure)) = ended.outcome else { panic!("{lie}: {}", ended.log) };
            let malformed = ["Malformed", "MalformedModel"].contains(&failure.reason.as_str());
            assert!(malformed && failure.user_error && ended.code == Some(64), "{lie}: {failure:?}");
            let says = ["model.safetensors", ". Next: "].iter().all(|words| failure.message.contains(words));
            assert!(says, "{lie}: {}", failure.message);
        }
    }
}

#[test]
fn another_digest_is_refused() {
    let world = World::new();
    let mut task = world.train_task();
    task.base.source.digest = Some(format!("sha256:{}", "0".repeat(64)));
    let message = world.train(task).refused("DigestMismatch");
    assert!(message.contains("base model `tiny`") && message.contains(&"0".repeat(64)), "{message}");
}

/// Hashing a large model at every start is what the inspection spares; a digest that no file has shows that nothing is hashed.
#[test]
fn what_was_inspected_is_hashed_again_only_where_it_changed() {
    let world = World::new();
    let ended = inspect(&world, "base");
    let Some(Outcome::Inspected(report)) = ended.outcome else { panic!("{}", ended.log) };
    assert!(report.digest.starts_with("sha256:") && report.weights_digest.starts_with("sha256:"));
    let mut task = world.train_task();
    task.base.source.digest = Some(format!("sha256:{}", "0".repeat(64)));
    let InspectReport { fingerprint, weights_digest, .. } = report;
    task.base.inspected = Some(Inspected { fingerprint, weights_digest });
    world.trained(task.clone());
    fs::write(world.path("base").join("generation_config.json"), "{}").expect("another file");
    (task.attempt, task.output.model_name) = (2, "again".into());
    let message = world.train(task).refused("DigestMismatch");
    assert!(message.contains("Next: restore the files, or make the Model again"), "{message}");
}

#[test]
fn an_unknown_architecture_is_named_with_the_known_ones() {
    let world = World::new();
    let mut config = model::config();
    config["architectures"] = serde_json::json!(["MambaForCausalLM"]);
    fs::write(world.path("base").join("config.json"), config.to_string()).expect("config");
    for ended in [inspect(&world, "base"), world.train(world.train_task())] {
        let message = ended.refused("UnsupportedArchitecture");
        assert!(message.contains("MambaForCausalLM") && message.contains("LlamaForCausalLM"), "{message}");
    }
}

#[test]
fn cut_weights_and_missing_tensors_are_refused() {
    let world = World::new();
    let weights = world.path("base").join("model.safetensors");
    let whole = fs::read(&weights).expect("weights");
    fs::write(&weights, &whole[..whole.len() - 5]).expect("cut");
    inspect(&world, "base").refused("Malformed");
    let mut config = model::config();
    config["num_hidden_layers"] = serde_json::json!(3);
    fs::write(world.path("base").join("config.json"), config.to_string()).expect("config");
    fs::write(&weights, &whole).expect("whole");
    let message = inspect(&world, "base").refused("MalformedModel");
    assert!(message.contains("model.layers.2."), "{message}");
    world.train(world.train_task()).refused("MalformedModel");
}

#[test]
fn a_loss_that_is_no_number_names_the_step_and_the_cure() {
    let world = World::new();
    let mut task = world.train_task();
    (task.training.learning_rate, task.training.max_grad_norm) = (1e30, 0.0);
    task.training.warmup = 0.0;
    let message = world.train(task).refused("NonFiniteLoss");
    assert!(message.contains("step ") && message.contains("learningRate"), "{message}");
    assert_eq!(world.names("artefacts"), Vec::<String>::new());
}

/// The learning rate has no part in what is wrong before the first update.
#[test]
fn a_base_of_no_numbers_is_told_as_the_bases_fault() {
    let world = World::new();
    let path = world.path("base").join("model.safetensors");
    let mut bytes = fs::read(&path).expect("weights");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight")) as usize;
    bytes[8 + header..].fill(0xff);
    fs::write(&path, bytes).expect("weights");
    let mut task = world.train_task();
    task.evaluation.metrics = vec![Metric::Perplexity];
    let message = world.train(task).refused("MalformedModel");
    assert!(message.contains("base model `tiny`") && message.contains("NaN"), "{message}");
    assert!(!message.contains("learning"), "{message}");
}

#[test]
fn a_template_without_an_end_is_told_as_the_models_fault() {
    let world = World::new();
    let source = "{% for i in range(9000) %}{% for j in range(9000) %}x{% endfor %}{% endfor %}";
    fs::write(world.path("base").join("chat_template.jinja"), source).expect("a template");
    for ended in [check_data(&world), world.train(world.train_task())] {
        let message = ended.refused("ChatTemplateFailed");
        assert!(
            message.starts_with("the model's files fail at train.jsonl line 1: chat template"),
            "{message}"
        );
    }
}

#[test]
fn kernels_that_there_are_not_are_named_before_anything_is_fetched() {
    let world = World::new();
    let task = Task::Train(Box::new(world.train_task()));
    let ended = world.start_in(task, &[("LATHE_CPU", "avx9")]).end();
    assert!(!ended.log.contains("fetching"), "{}", ended.log);
    let message = ended.refused("InvalidSettings");
    assert!(
        message.contains("`LATHE_CPU` must be one of amx_emulated, portable, ") && message.contains("`avx9`"),
        "{message}"
    );
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let world = World::new();
    let trained = world.trained(world.train_task());
    let adapter = trained.uri.strip_prefix("pvc://data/").expect("on the volume");
    model::write(&world.path("other"), 2);
    let task = EvaluateTask {
        base: input("other"),
        adapter: Some(input(adapter)),
        dataset: world.train_task().dataset,
        metrics: vec![Metric::Perplexity],
        sequence_length: 64,
    };
    world.run(Task::Evaluate(task)).refused("AdapterBaseMismatch");
}

#[test]
fn settings_out_of_bounds_are_named() {
    let world = World::new();
    let mut task = world.train_task();
    task.training.sequence_length = 4096;
    let message = world.train(task).refused("InvalidSettings");
    assert!(message.contains("`sequenceLength` must be 2 to 128"), "{message}");
    let mut task = world.train_task();
    task.training.epochs = Some(1.0);
    world.train(task).refused("InvalidSettings");
}

/// The pod that reads the rows says so, and the one with the accelerator would.
#[rstest]
#[case::nothing_is_held_out(json!({"dataset": {"evaluation": null}}), "`evaluation.gates`: BLEU must have held-out rows")]
#[case::all_rows_are_equal(
    json!({"dataset": {"evaluation": null, "train": source("same.jsonl"), "holdout": 0.5}, "evaluation": {"gates": []}}),
    "`evaluation.metrics`: Perplexity must have held-out rows with something to learn within `training.sequenceLength`; there is none in 0.5 of `dataset.train`"
)]
#[case::texts_ask_nothing(
    json!({"dataset": {"evaluation": source("text.jsonl")}, "evaluation": {"gates": []}}),
    "`evaluation.metrics`: BLEU must have held-out rows with prompt and answer"
)]
#[case::a_gate_on_what_is_not_measured(
    json!({"evaluation": {"metrics": ["Perplexity"]}}), "BLEU must be one of `evaluation.metrics`")]
fn what_the_held_out_rows_cannot_tell_is_refused_before_training(#[case] change: Value, #[case] says: &str) {
    let world = World::new();
    fs::write(world.path("same.jsonl"), chats(0..1).repeat(9)).expect("rows");
    fs::write(world.path("text.jsonl"), "{\"text\": \"a text\"}\n").expect("rows");
    let mut task = serde_json::to_value(world.train_task()).expect("JSON");
    json_patch::merge(&mut task, &json!({"evaluation": {"gates": [{"metric": "BLEU", "atLeast": 1.0}]}}));
    check(&world, serde_json::from_value(task.clone()).expect("a task")).report();
    json_patch::merge(&mut task, &change);
    let task: TrainTask = serde_json::from_value(task).expect("a task");
    let checked = check(&world, task.clone()).refused("InvalidSettings");
    assert!(checked.contains(says), "{checked}");
    assert_eq!(world.train(task).refused("InvalidSettings"), checked);
}

#[test]
fn without_held_out_rows_metrics_alone_are_no_mistake() {
    let world = World::new();
    let mut task = world.train_task();
    task.dataset.evaluation = None;
    let report = check(&world, task).report();
    assert_eq!((report.rows, report.evaluation_rows), (60, 0));
}

#[rstest]
#[case::another_version(r#"{"version": 99, "anything": true}"#, "version 99 is unknown")]
#[case::no_json("{", "EOF")]
fn a_contract_that_is_not_understood_is_refused(#[case] text: &str, #[case] says: &str) {
    let world = World::new();
    let path = world.path("contract.json");
    fs::write(&path, text).expect("contract");
    let message = world.start_with("train", &path).end().refused("InvalidContract");
    assert!(message.contains(says), "{message}");
}

#[test]
fn rows_that_changed_since_their_check_are_not_learned_from() {
    let world = World::new();
    let mut task = world.train_task();
    world.trained(task.clone());
    task.inputs = world.names("artefacts/tuned/inputs").pop();
    assert!(task.inputs.is_some());
    world.trained(task.clone());
    fs::write(world.path("train.jsonl"), chats(0..61)).expect("rows");
    let message = world.train(task).refused("DatasetChanged");
    assert!(message.contains("make it again"), "{message}");
}

/// What whoever loads the model would refuse is refused before a pod waits for an accelerator.
#[rstest]
#[case::a_shard_that_is_missing(
    |base: &Path| {
        let map = json!({"weight_map": {NORM: "model-00002-of-00002.safetensors"}}).to_string();
        fs::write(base.join("model.safetensors.index.json"), map).expect("an index");
    },
    "model-00002-of-00002.safetensors is missing"
)]
#[case::a_way_up(
    |base: &Path| {
        let map = json!({"weight_map": {NORM: "../model.safetensors"}}).to_string();
        fs::write(base.join("model.safetensors.index.json"), map).expect("an index");
    },
    "weight_map"
)]
#[case::under_another_name(
    |base: &Path| fs::rename(base.join("model.safetensors"), base.join("weights.safetensors")).expect("renamed"),
    "model.safetensors is missing"
)]
#[case::a_huge_configuration(
    |base: &Path| {
        let text = fs::read_to_string(base.join("config.json")).expect("text");
        fs::write(base.join("config.json"), text + &" ".repeat(1 << 20)).expect("written");
    },
    "config.json"
)]
fn what_cannot_be_loaded_is_not_ready(#[case] change: fn(&Path), #[case] says: &str) {
    let world = World::new();
    change(&world.path("base"));
    let message = inspect(&world, "base").refused("MalformedModel");
    assert!(message.contains(says), "{message}");
    assert!(matches!(world.train(world.train_task()).outcome, Some(Outcome::Failed(_))));
}
