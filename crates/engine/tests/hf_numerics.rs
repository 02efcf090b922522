//! Tiny fully random models against transformers and PyTorch: logits, embeddings, PEFT adapters.
#![allow(clippy::unwrap_used)]

mod hf;

use hf::{BASE, Expected, folder, hyper, json, load, log_softmax, numbers, rms, trainer};
use lathe_engine::files::{ModelWeights, read_adapter};
use lathe_engine::plan::{AdapterBudget, Precision, ServeRequest, Target, TrainMethod, plan_serving};
use lathe_engine::{AdapterId, Generator, Model, Row, Sampling};
use rstest::rstest;

/// Log-probabilities of every token after a prefix, for a few prefixes, by us and from logits in a fixture.
fn log_probabilities(name: &str, precision: Precision, logits: &str) -> (Vec<f64>, Vec<f64>, f64) {
    let (model, _) = load(name, precision);
    let vocab = model.shape().vocab;
    let mut trainer = trainer(model, TrainMethod::Full, hyper(&json(BASE, "training-full.json")));
    let expected = Expected::read(name);
    let (mut ours, mut theirs, mut largest) = (Vec::new(), Vec::new(), 0.0_f64);
    for (sequence, prefixes) in [(0, vec![1, 2, 3, 4, 5]), (1, vec![1, 16, 17, 33, 47, 60])] {
        let tokens = expected.tokens(sequence);
        let logits = expected.rows(&format!("{logits}.{sequence}"), vocab);
        for prefix in prefixes {
            let at = |last: u32| {
                let tokens: Vec<u32> = tokens[..prefix].iter().copied().chain([last]).collect();
                Row { weights: vec![1.0; tokens.len()], tokens }
            };
            let rows: Vec<Row> = (0..vocab as u32).map(at).collect();
            ours.extend(trainer.log_probs(&rows).unwrap().iter().map(|row| f64::from(row[prefix])));
            theirs.extend(log_softmax(&logits[prefix - 1]));
            largest = logits[prefix - 1].iter().fold(largest, |most, logit| most.max(logit.abs()));
        }
    }
    (ours, theirs, largest)
}

#[rstest]
fn logits_are_those_of_transformers(
    #[values("llama-gqa", "llama-tied", "qwen2", "mistral")] name: &str,
    #[values("logits", "logits_f64")] reference: &str,
) {
    let (ours, theirs, largest) = log_probabilities(name, Precision::F32, reference);
    for (at, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        assert!((ours - theirs).abs() <= 1e-4 * largest, "{name} {at}: {ours} instead of {theirs}");
    }
}

#[rstest]
fn bf16_is_as_close_to_the_truth_as_pytorch_is(
    #[values("llama-gqa", "llama-tied", "qwen2", "mistral")] name: &str,
) {
    let (ours, truth, _) = log_probabilities(name, Precision::BF16, "logits_f64");
    let (_, theirs, _) = log_probabilities(name, Precision::BF16, "logits_bf16");
    let (ours, theirs) = (rms(&ours, &truth), rms(&theirs, &truth));
    assert!(ours <= 1.25 * theirs, "{name}: our error is {ours:.2e}, PyTorch's {theirs:.2e}");
}

fn generator(model: Model) -> Generator {
    let request = ServeRequest {
        weights: Precision::F32,
        context: 64,
        max_sequences: 2,
        max_batch_tokens: 64,
        cache_tokens: None,
        adapters: AdapterBudget { slots: 1, max_rank: 4, targets: Target::ALL.into() },
        threads: 1,
        memory_limit: None,
    };
    let plan = plan_serving(model.shape(), &request).unwrap();
    Generator::new(model, &plan).unwrap()
}

fn embed(generator: &mut Generator, prompt: &[u32], adapter: Option<AdapterId>) -> Vec<f32> {
    generator.add_embedding(1, prompt, adapter).unwrap();
    while generator.step().unwrap().is_empty() && !generator.idle() {}
    generator.take_embedded().remove(0).vector
}

/// Each of the numbers within this of transformers', of vectors of length 1.
const CLOSE: f64 = 2e-6;

fn assert_embeds(ours: &[f32], state: &[f64]) {
    let norm = state.iter().map(|x| x * x).sum::<f64>().sqrt();
    assert_eq!(ours.len(), state.len());
    for (ours, theirs) in ours.iter().zip(state) {
        let theirs = theirs / norm;
        assert!((f64::from(*ours) - theirs).abs() < CLOSE, "{ours} instead of {theirs}");
    }
}

#[rstest]
fn embeddings_are_the_last_hidden_states_of_transformers(
    #[values("llama-gqa", "llama-tied", "qwen2", "mistral")] name: &str,
) {
    let (model, shape) = load(name, Precision::F32);
    let (mut generator, expected) = (generator(model), Expected::read(name));
    for (sequence, prefixes) in [(0, vec![1, 5]), (1, vec![16, 17, 33, 47, 60])] {
        let tokens = expected.tokens(sequence);
        let states = expected.rows(&format!("states.{sequence}"), shape.hidden);
        for prefix in prefixes {
            let ours = embed(&mut generator, &tokens[..prefix], None);
            assert_embeds(&ours, &states[prefix - 1]);
        }
    }
}

#[test]
fn an_adapter_of_peft_changes_an_embedding_as_peft_does() {
    let (model, shape) = load(BASE, Precision::F32);
    let name = format!("{BASE}-adapter");
    let (_, adapter) = read_adapter(&folder(&name), &shape).unwrap();
    let expected = json(&name, "expected.json");
    let prompt: Vec<u32> = serde_json::from_value(expected["prompt"].clone()).unwrap();
    let mut generator = generator(model);
    let id = generator.add_adapter(&adapter).unwrap();
    assert_embeds(&embed(&mut generator, &prompt, Some(id)), &numbers(&expected, "last_state"));
}

#[test]
fn an_adapter_of_peft_gives_the_tokens_that_peft_gives() {
    let (model, shape) = load(BASE, Precision::F32);
    let name = format!("{BASE}-adapter");
    let (config, adapter) = read_adapter(&folder(&name), &shape).unwrap();
    assert_eq!((config.lora.rank, config.base.as_deref()), (4, Some(BASE)));
    let expected = json(&name, "expected.json");
    let ids = |field: &str| -> Vec<u32> { serde_json::from_value(expected[field].clone()).unwrap() };
    let (prompt, greedy) = (ids("prompt"), ids("greedy"));
    let expected = numbers(&expected, "log_probs");

    // Whole rows, as training sees them.
    let mut trainer =
        trainer(model, TrainMethod::Lora(config.lora.clone()), hyper(&json(BASE, "training-full.json")));
    trainer.set_adapter(&adapter).unwrap();
    let tokens: Vec<u32> = prompt.iter().chain(&greedy).copied().collect();
    let row = Row { weights: vec![1.0; tokens.len()], tokens };
    let ours = trainer.log_probs(&[row]).unwrap().remove(0);
    for (ours, expected) in ours[prompt.len()..].iter().zip(&expected) {
        assert!((f64::from(*ours) - expected).abs() < 1e-3, "{ours} instead of {expected}");
    }

    // Token by token, as serving does.
    let mut generator = generator(trainer.into_model());
    let id = generator.add_adapter(&adapter).unwrap();
    let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
    generator.add_sequence(1, &prompt, Some(id), sampling, greedy.len()).unwrap();
    let mut tokens = Vec::new();
    while !generator.idle() {
        tokens.extend(generator.step().unwrap().into_iter().map(|emitted| (emitted.token, emitted.log_prob)));
    }
    assert_eq!(tokens.iter().map(|(token, _)| *token).collect::<Vec<_>>(), greedy);
    for ((_, ours), expected) in tokens.iter().zip(&expected) {
        assert!((f64::from(*ours) - expected).abs() < 1e-3, "{ours} instead of {expected}");
    }
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let (_, shape) = load("qwen2", Precision::F32);
    let error = read_adapter(&folder(&format!("{BASE}-adapter")), &shape).unwrap_err().to_string();
    assert!(error.contains("lora_") && error.contains("must have shape"), "{error}");
}

#[test]
fn the_weights_of_every_layout_are_complete() {
    for name in ["llama-gqa", "llama-tied", "qwen2", "mistral"] {
        let (_, shape) = load(name, Precision::F32);
        let weights = ModelWeights::open(&folder(name)).unwrap();
        let wanted: Vec<String> = shape.tensors().into_iter().map(|tensor| tensor.name).collect();
        assert_eq!(weights.names().count(), wanted.len(), "{name}");
    }
}
