//! Reading of the fixtures of `fixtures/make_hf.py`.
#![allow(dead_code)] // each test binary uses a part

use std::fs;
use std::path::PathBuf;

use lathe_engine::files::{ModelConfig, ModelWeights, SafetensorsFile, StoredDtype};
use lathe_engine::plan::{LoraSpec, ModelShape, Precision, Target, TrainMethod, TrainRequest, plan_training};
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

/// The rows of `training-METHOD.json`.
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

/// The settings of `training-METHOD.json`.
pub fn hyper(training: &Value) -> Hyper {
    let real = |name: &str| training[name].as_f64().unwrap();
    let count = |name: &str| training[name].as_u64().unwrap();
    Hyper {
        learning_rate: real("learning_rate"),
        schedule: match training["schedule"].as_str().unwrap() {
            "cosine" => Schedule::Cosine,
            _ => Schedule::Linear,
        },
        warmup_steps: count("warmup_steps"),
        total_steps: count("total_steps"),
        weight_decay: real("weight_decay"),
        beta1: real("beta1"),
        beta2: real("beta2"),
        epsilon: real("epsilon"),
        max_grad_norm: Some(real("max_grad_norm")),
        seed: 3,
    }
}

/// The adapter that the script trains; its `B` is not zero at the start.
pub fn lora() -> LoraSpec {
    LoraSpec { rank: 4, alpha: 6.0, dropout: 0.0, targets: Target::ALL.into_iter().collect() }
}

pub fn trainer(model: Model, method: TrainMethod, hyper: Hyper) -> Trainer {
    let request = TrainRequest {
        method,
        weights: model.precision(),
        max_row_tokens: 64,
        batch_tokens: 512,
        micro_batch_tokens: None,
        recompute: None,
        optimizer_state: None,
        threads: 1,
        memory_limit: None,
    };
    let plan = plan_training(model.shape(), &request).unwrap();
    Trainer::new(model, &plan, hyper).unwrap()
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

    /// Rows of `width` numbers, one for each position.
    pub fn rows(&self, name: &str, width: usize) -> Vec<Vec<f64>> {
        let tensor = self.0.get(name).unwrap();
        wide(tensor.dtype, tensor.bytes).chunks_exact(width).map(<[f64]>::to_vec).collect()
    }
}

/// The elements of F64, F32 or BF16 bytes.
pub fn wide(dtype: StoredDtype, bytes: &[u8]) -> Vec<f64> {
    match dtype {
        StoredDtype::F64 => {
            bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
        }
        StoredDtype::F32 => {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect()
        }
        StoredDtype::BF16 => {
            bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect()
        }
        other => panic!("fixtures have no {other:?}"),
    }
}

/// The root of the mean square of what two lists differ by.
pub fn rms(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    (a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>() / a.len() as f64).sqrt()
}

pub fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - most).exp()).sum();
    logits.iter().map(|logit| logit - most - sum.ln()).collect()
}
