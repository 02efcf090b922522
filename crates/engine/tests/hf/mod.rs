//! Reading of the fixtures of `fixtures/make_hf.py`.
#![allow(dead_code)] // each test binary uses a part

use std::fs;
use std::path::PathBuf;

use lathe_engine::files::{ModelConfig, ModelWeights, SafetensorsFile, StoredDtype};
use lathe_engine::plan::{ModelShape, Precision, TrainMethod, TrainRequest, plan_training};
use lathe_engine::{Hyper, Model, Row, Schedule, Trainer};
use serde_json::Value;

/// The model whose adapter is a fixture.
pub const BASE: &str = "llama-gqa";

pub fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf").join(name)
}

pub fn json(name: &str, file: &str) -> Value {
    serde_json::from_slice(&fs::read(folder(name).join(file)).unwrap()).unwrap()
}

pub fn numbers(value: &Value, field: &str) -> Vec<f64> {
    serde_json::from_value(value[field].clone()).unwrap()
}

/// The rows of `training.json`.
pub fn rows(training: &Value) -> Vec<Row> {
    let tokens: Vec<Vec<u32>> = serde_json::from_value(training["rows"].clone()).unwrap();
    let weights: Vec<Vec<f32>> = serde_json::from_value(training["weights"].clone()).unwrap();
    tokens.into_iter().zip(weights).map(|(tokens, weights)| Row { tokens, weights }).collect()
}

pub fn load(name: &str, precision: Precision) -> (Model, ModelShape) {
    let shape = ModelConfig::read(&folder(name)).unwrap().shape;
    let weights = ModelWeights::open(&folder(name)).unwrap();
    (Model::load(&shape, precision, &weights, 1).unwrap(), shape)
}

/// The hyper-parameters of `make_hf.py`.
pub fn hyper(steps: u64) -> Hyper {
    Hyper {
        learning_rate: 0.003,
        schedule: Schedule::Constant,
        warmup_steps: 0,
        total_steps: steps.max(1),
        weight_decay: 0.1,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        max_grad_norm: None,
        seed: 3,
    }
}

pub fn training(model: Model, method: TrainMethod, steps: u64) -> Trainer {
    let request = TrainRequest {
        method,
        weights: model.precision(),
        max_row_tokens: 64,
        batch_tokens: 512,
        micro_batch_tokens: None,
        recompute: None,
        threads: 1,
        memory_limit: None,
    };
    let plan = plan_training(model.shape(), &request).unwrap();
    Trainer::new(model, &plan, hyper(steps)).unwrap()
}

pub fn full_training(model: Model, steps: u64) -> Trainer {
    training(model, TrainMethod::Full, steps)
}

/// `expected.safetensors` of a model.
pub struct Expected(SafetensorsFile);

impl Expected {
    pub fn read(name: &str) -> Self {
        Expected(SafetensorsFile::open(&folder(name).join("expected.safetensors")).unwrap())
    }

    pub fn tokens(&self, sequence: usize) -> Vec<u32> {
        let bytes = self.0.get(&format!("tokens.{sequence}")).unwrap().bytes;
        bytes
            .chunks_exact(8)
            .map(|b| u32::try_from(i64::from_le_bytes(b.try_into().unwrap())).unwrap())
            .collect()
    }

    /// Rows of logits, one for each position.
    pub fn logits(&self, name: &str, vocab: usize) -> Vec<Vec<f64>> {
        let tensor = self.0.get(name).unwrap();
        let values: Vec<f64> = match tensor.dtype {
            StoredDtype::F64 => {
                tensor.bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
            }
            StoredDtype::F32 => tensor
                .bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
                .collect(),
            _ => tensor
                .bytes
                .chunks_exact(2)
                .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f64())
                .collect(),
        };
        values.chunks_exact(vocab).map(<[f64]>::to_vec).collect()
    }
}

pub fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - most).exp()).sum();
    logits.iter().map(|logit| logit - most - sum.ln()).collect()
}
