//! What rounding the weights to 8 and 4 bits does to the answers of a model that was trained.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use lathe_engine::files::{ModelConfig, ModelWeights, Tokenizer};
use lathe_engine::plan::{AdapterBudget, Precision, ServeRequest, plan_serving};
use lathe_engine::{Generator, Model, Sampling};

const PROMPTS: [&str; 4] =
    ["How much is the red lamp?", "The weather in", "Once upon a time", "Who made the table?"];
const TOKENS: usize = 48;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart/volumes/quickstart/model")
}

/// The likeliest token after each text, and its log-probability, by the model of the quick-start.
fn next(precision: Precision, texts: &[Vec<u32>]) -> Vec<(u32, f64)> {
    let config = ModelConfig::read(&folder()).unwrap();
    let request = ServeRequest {
        weights: precision,
        context: 128,
        max_sequences: 64,
        max_batch_tokens: 256,
        cache_tokens: None,
        adapters: AdapterBudget { slots: 0, max_rank: 8, targets: Default::default() },
        threads: 2,
        memory_limit: None,
    };
    let plan = plan_serving(&config.shape, &request).unwrap();
    let model = Model::load(&config.shape, precision, &ModelWeights::open(&folder()).unwrap(), 2).unwrap();
    let mut generator = Generator::new(model, &plan).unwrap();
    for (id, text) in texts.iter().enumerate() {
        let greedy = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
        generator.add_sequence(id as u64, text, None, greedy, 1).unwrap();
    }
    let mut found = vec![(0, 0.0); texts.len()];
    while !generator.idle() {
        for emitted in generator.step().unwrap() {
            found[emitted.sequence as usize] = (emitted.token, f64::from(emitted.log_prob));
        }
    }
    found
}

#[test]
fn few_bits_change_little() {
    let config = ModelConfig::read(&folder()).unwrap();
    let tokenizer = Tokenizer::read(&folder(), config.shape.vocab).unwrap();
    let mut texts: Vec<_> =
        PROMPTS.iter().map(|prompt| tokenizer.encode(prompt, false).unwrap().ids).collect();
    let mut after = Vec::new();
    let mut exact = Vec::new();
    for _ in 0..TOKENS {
        let found = next(Precision::F32, &texts);
        after.extend(texts.iter().cloned());
        for (text, (token, _)) in texts.iter_mut().zip(&found) {
            text.push(*token);
        }
        exact.extend(found);
    }
    let mean = |all: &[(u32, f64)]| all.iter().map(|(_, p)| p).sum::<f64>() / all.len() as f64;
    for (precision, least, apart) in [(Precision::Int8, 0.98, 0.01), (Precision::Int4, 0.93, 0.05)] {
        let found = next(precision, &after);
        let same = found.iter().zip(&exact).filter(|(a, b)| a.0 == b.0).count() as f64 / exact.len() as f64;
        println!(
            "{precision:?}: {same:.3} of the tokens, {:.4} instead of {:.4}",
            mean(&found),
            mean(&exact)
        );
        assert!(same >= least, "{precision:?}: only {same} of the likeliest tokens are those of f32");
        assert!((mean(&found) - mean(&exact)).abs() < apart);
    }
}
