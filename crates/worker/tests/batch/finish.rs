//! Tasks that come to their end.
use std::fs;

use lathe_contract::{
    CheckDataTask, DatasetFormat, EvaluateTask, EvaluationPolicy, Gate, InspectTask, Metric, Outcome, Task,
    TrainMethod,
};

use crate::world::{World, chats, input, lora, source};

fn score(trained: &crate::world::Trained, metric: Metric) -> (f64, f64) {
    let score = trained.scores.iter().find(|score| score.metric == metric).expect("measured");
    (score.before.expect("before"), score.after.expect("after"))
}

#[test]
fn an_adapter_is_tuned_measured_and_written_the_same_every_time() {
    let world = World::new();
    let mut task = world.train_task();
    (task.training.steps, task.training.learning_rate) = (Some(40), 2e-2);
    let trained = world.trained(task.clone());
    let (before, after) = score(&trained, Metric::Perplexity);
    assert!(after < 0.1 * before, "perplexity {before} to {after}");
    assert_eq!(trained.progress.step, 40);
    assert!(trained.progress.tokens > 0);
    assert_eq!((trained.model.architecture.as_str(), trained.model.rank), ("LoRA", 4));
    assert_eq!(trained.model.digest, trained.digest);
    let hex = trained.digest.strip_prefix("sha256:").expect("a digest");
    assert_eq!(trained.uri, format!("pvc://data/artefacts/tuned/{hex}"));
    let files = world.names(&format!("artefacts/tuned/{hex}"));
    let expected =
        ["LICENSE", "README.md", "adapter_config.json", "adapter_model.safetensors", "lathe-manifest.json"];
    assert_eq!(files, expected);
    assert_eq!(trained.model.license, "apache-2.0", "the base's licence goes on");
    assert_eq!(world.names("checkpoints"), Vec::<String>::new());

    let uid = "artefacts/tuned/jobs/11111111-2222-3333-4444-555555555555";
    let report = fs::read(world.path(uid).join("report.json")).expect("a report");
    let report: serde_json::Value = serde_json::from_slice(&report).expect("json");
    assert_eq!(report["answers"].as_array().map(Vec::len), Some(8));
    assert_eq!(report["progress"]["curve"].as_array().map(Vec::len), Some(40));

    // Elsewhere, from the beginning, in another cut: the same bytes.
    let other = World::new();
    task.training.micro_batch_tokens = 400;
    assert_eq!(other.trained(task).digest, trained.digest);
}

#[test]
fn work_that_is_done_is_not_done_again_and_its_summary_can_be_repeated() {
    let world = World::new();
    let first = world.train(world.train_task());
    let again = world.train(world.train_task());
    assert!(again.log.contains("an earlier run with equal inputs has done this already"), "{}", again.log);
    assert_eq!(again.code, Some(0));
    let repeated = world.run(Task::Inspect(InspectTask {
        source: source("artefacts/tuned"),
        summary_of: Some("11111111-2222-3333-4444-555555555555".into()),
    }));
    let words = |ended: &crate::world::Ended| serde_json::to_string(&ended.outcome).expect("json");
    assert_eq!(words(&again), words(&first));
    assert_eq!(words(&repeated), words(&first));

    // Where the artefact is gone, its record is no proof.
    let digest = first.trained().digest;
    let hex = digest.strip_prefix("sha256:").expect("a digest");
    fs::remove_dir_all(world.path("artefacts/tuned").join(hex)).expect("removed");
    let anew = world.train(world.train_task());
    assert!(anew.log.contains("its artefact is gone"), "{}", anew.log);
    assert_eq!(anew.trained().digest, digest);
}

#[test]
fn whole_weights_are_trained_from_text_and_can_be_tuned_further() {
    let world = World::new();
    let text: String = (0..60)
        .map(|n| {
            serde_json::json!({"text": format!("{n} and {n} are {} for sure", 2 * n)}).to_string() + "\n"
        })
        .collect();
    fs::write(world.path("text.jsonl"), text).expect("rows");
    let mut task = world.train_task();
    task.method = TrainMethod::Full {};
    task.dataset.train = source("text.jsonl");
    task.dataset.evaluation = None;
    task.dataset.holdout = Some(0.1);
    // A text asks nothing.
    task.evaluation.metrics = vec![Metric::Perplexity];
    task.dataset.format = DatasetFormat::Text;
    task.training.steps = None;
    task.training.epochs = Some(6.0);
    let trained = world.trained(task);
    let (before, after) = score(&trained, Metric::Perplexity);
    assert!(after < 0.5 * before, "perplexity {before} to {after}");
    assert_eq!(trained.model.architecture, "LlamaForCausalLM");
    assert_eq!(trained.model.license, "apache-2.0");
    let whole = trained.uri.strip_prefix("pvc://data/").expect("on the volume").to_owned();
    let names = [
        "LICENSE",
        "README.md",
        "config.json",
        "lathe-manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(world.names(&whole), names);

    let mut further = world.train_task();
    further.base = input(&whole);
    further.base.source.digest = Some(trained.digest.clone());
    assert_ne!(world.trained(further).digest, trained.digest);
}

#[test]
fn a_gate_is_not_the_workers_to_judge_and_a_job_with_another_has_nothing_to_train() {
    let world = World::new();
    let mut task = world.train_task();
    let gate = Gate { metric: Metric::ROUGEL, at_least: Some(1.5), at_most: None, min_improvement: None };
    task.evaluation.gates = vec![gate];
    let trained = world.trained(task.clone());
    assert!(score(&trained, Metric::ROUGEL).1 < 1.5);
    task.evaluation.gates.clear();
    let again = world.train(task);
    assert!(again.log.contains("an earlier run with equal inputs"), "{}", again.log);
    assert_eq!(again.trained().digest, trained.digest);
}

#[test]
fn an_adapter_is_measured_as_its_job_measured_it() {
    let world = World::new();
    let trained = world.trained(world.train_task());
    let adapter = trained.uri.strip_prefix("pvc://data/").expect("on the volume");
    let mut task = EvaluateTask {
        base: input("base"),
        adapter: Some(input(adapter)),
        dataset: world.train_task().dataset,
        metrics: vec![Metric::Perplexity, Metric::ROUGEL],
        sequence_length: 64,
    };
    let value = |ended: crate::world::Ended, metric| match ended.outcome {
        Some(Outcome::Evaluated(report)) => {
            assert_eq!((report.measured.rows, ended.code), (8, Some(0)));
            report.scores.into_iter().find(|s| s.metric == metric).and_then(|s| s.after).expect("measured")
        }
        other => panic!("{other:?}\n{}", ended.log),
    };
    let tuned = value(world.run(Task::Evaluate(task.clone())), Metric::Perplexity);
    assert_eq!(tuned, score(&trained, Metric::Perplexity).1);
    let rouge = value(world.run(Task::Evaluate(task.clone())), Metric::ROUGEL);
    assert_eq!(rouge, score(&trained, Metric::ROUGEL).1);
    task.adapter = None;
    let base = value(world.run(Task::Evaluate(task)), Metric::Perplexity);
    assert_eq!(base, score(&trained, Metric::Perplexity).0);
}

#[test]
fn a_model_is_inspected() {
    let world = World::new();
    let task = InspectTask { source: source("base"), summary_of: None };
    let ended = world.run(Task::Inspect(task));
    let Some(Outcome::Inspected(report)) = ended.outcome else {
        panic!("{:?}\n{}", ended.outcome, ended.log)
    };
    assert_eq!((report.architecture.as_str(), report.context_length), ("LlamaForCausalLM", 128));
    assert_eq!((report.license.as_str(), report.license_needs_acceptance), ("apache-2.0", false));
    // 258 x 32 embedding, 2 blocks of 2 x 32 x 32 + 2 x 16 x 32 + 3 x 64 x 32 and two norms, the last norm.
    assert_eq!(report.parameters, 258 * 32 + 2 * (2048 + 1024 + 6144 + 64) + 32);
    assert_eq!(
        (report.weights[0].precision.as_str(), report.weights[0].bytes),
        ("F32", 4 * report.parameters)
    );
    assert!(report.digest.starts_with("sha256:"));
    assert_eq!((report.shape.vocab, report.shape.kv_heads, report.shape.tie_embeddings), (258, 2, true));
}

#[test]
fn a_dataset_is_checked() {
    let world = World::new();
    fs::write(world.path("train.jsonl"), chats(0..60) + &chats(0..1) + &chats(100..101)).expect("rows");
    let dataset = world.train_task().dataset;
    let evaluation = EvaluationPolicy::default();
    let task = CheckDataTask { dataset, model: input("base"), sequence_length: 20, evaluation };
    let report = world.run(Task::CheckData(task)).report();
    assert_eq!((report.format.as_str(), report.rows, report.evaluation_rows), ("Chat", 62, 8));
    assert_eq!((report.duplicate_rows, report.leaked_rows), (1, 1));
    // `user:a0?<|end|>assistant:aaa<|end|>`: 8 + 1 + 10 + 3 + 1 tokens.
    assert_eq!((report.longest_row, report.over_long_rows, report.tokens), (23, 62, 62 * 20));
    assert_eq!(report.learned_tokens, 62);
    assert!(report.digest.starts_with("sha256:"));
}

#[test]
fn half_of_the_rows_of_an_epoch_is_half_of_its_steps() {
    let world = World::new();
    let mut task = world.train_task();
    task.method = lora();
    (task.training.steps, task.training.epochs) = (None, Some(0.5));
    // 60 rows of 23 tokens in batches of 400 are 4 steps.
    assert_eq!(world.trained(task).progress.steps, 2);
}
