//! What users give by mistake, and what they are told.
use std::fs;

use lathe_contract::{CheckDataTask, EvaluateTask, InspectTask, Metric, Task};
use rstest::rstest;

use crate::model;
use crate::world::{Ended, World, chats, input, source};

fn check_data(world: &World) -> Ended {
    let dataset = world.train_task().dataset;
    world.run(Task::CheckData(CheckDataTask { dataset, model: input("base"), sequence_length: 64 }))
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
fn a_bad_file_is_named(#[case] content: &[u8], #[case] reason: &str) {
    let world = World::new();
    fs::write(world.path("train.jsonl"), content).expect("rows");
    assert!(check_data(&world).refused(reason).contains("train.jsonl"));
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
    // Under another name too.
    fs::rename(base.join("pytorch_model.bin"), base.join("model.safetensors")).expect("renamed");
    inspect(&world, "base").refused("PickleRefused");
}

#[test]
fn another_digest_is_refused() {
    let world = World::new();
    let mut task = world.train_task();
    task.base.source.digest = Some(format!("sha256:{}", "0".repeat(64)));
    let message = world.train(task).refused("DigestMismatch");
    assert!(message.contains("base model `tiny`") && message.contains(&"0".repeat(64)), "{message}");
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

#[test]
fn kernels_that_there_are_not_are_named_before_anything_is_fetched() {
    let world = World::new();
    let task = Task::Train(Box::new(world.train_task()));
    let ended = world.start_in(task, &[("LATHE_CPU", "avx9")]).end();
    assert!(!ended.log.contains("fetching"), "{}", ended.log);
    let message = ended.refused("InvalidSettings");
    assert!(
        message.contains("`LATHE_CPU` must be one of portable, ") && message.contains("`avx9`"),
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
    let mut task = world.train_task();
    task.dataset.evaluation = None;
    let gate = lathe_contract::Gate {
        metric: Metric::BLEU,
        at_least: Some(1.0),
        at_most: None,
        min_improvement: None,
    };
    task.evaluation.gates = vec![gate];
    world.train(task).refused("InvalidSettings");
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
