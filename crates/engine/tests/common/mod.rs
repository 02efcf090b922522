//! Small random models, and the same decoder written naively in f64.
#![allow(dead_code)] // Each test file uses a part.

pub mod device;
pub mod reference;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use half::bf16;
use lathe_engine::files::{TensorLayout, write_safetensors};
use lathe_engine::plan::{
    LoraSpec, ModelShape, Precision, RopeScaling, Target, TrainMethod, TrainRequest, plan_training,
};
use lathe_engine::{Dtype, Hyper, Model, Row, Schedule, TensorView, Trainer, WeightSource};

/// Deterministic noise in -1..1.
pub fn noise(key: u64, i: u64) -> f64 {
    let mut x = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i.wrapping_mul(0xd134_2543_de82_ef95);
    for _ in 0..3 {
        x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    }
    (x >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

/// Llama: untied head, stretched rope, grouped heads; widths that are no multiple of 16.
pub fn llama() -> ModelShape {
    ModelShape {
        vocab: 43,
        hidden: 36,
        layers: 2,
        heads: 6,
        kv_heads: 2,
        head_dim: 10,
        intermediate: 50,
        max_position: 64,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 32,
        },
        rms_eps: 1e-5,
        sliding_window: None,
        qkv_bias: false,
        tie_embeddings: false,
    }
}

/// Qwen2: biases, tied head.
pub fn qwen() -> ModelShape {
    ModelShape {
        vocab: 40,
        hidden: 32,
        layers: 2,
        heads: 4,
        kv_heads: 1,
        head_dim: 8,
        intermediate: 48,
        rope_scaling: RopeScaling::None,
        rope_theta: 1e6,
        rms_eps: 1e-6,
        qkv_bias: true,
        tie_embeddings: true,
        ..llama()
    }
}

/// Mistral: a window that is shorter than most rows.
pub fn mistral() -> ModelShape {
    ModelShape { rope_scaling: RopeScaling::None, sliding_window: Some(7), ..llama() }
}

/// Weights far from their usual beginnings, so that every gradient is felt.
pub struct Noise(pub ModelShape);

impl Noise {
    pub fn values(&self, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
        let tensors = self.0.tensors();
        let (number, tensor) = tensors.iter().enumerate().find(|(_, t)| t.name == name)?;
        let len: usize = tensor.shape.iter().product();
        let norm = name.contains("norm");
        let value = |i| noise(number as u64 + 1, i as u64);
        let values = (0..len).map(|i| (if norm { 1.0 + 0.3 * value(i) } else { 0.25 * value(i) }) as f32);
        Some((tensor.shape.clone(), values.collect()))
    }
}

impl WeightSource for Noise {
    fn tensor(&self, name: &str) -> lathe_engine::Result<TensorView<'_>> {
        let missing = || lathe_engine::Error::MissingTensor { name: name.to_owned() };
        let (shape, values) = self.values(name).ok_or_else(missing)?;
        let data = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Ok(TensorView { dtype: Dtype::F32, shape, data: Cow::Owned(data), in_place: None })
    }
}

/// The noise model as a file; all tensors of `dtype`.
pub fn written(path: &Path, shape: &ModelShape, dtype: Dtype) {
    let layout = |t: lathe_engine::plan::Tensor| TensorLayout { name: t.name, dtype, shape: t.shape };
    let tensors: Vec<_> = shape.tensors().into_iter().map(layout).collect();
    write_safetensors(path, &tensors, &BTreeMap::new(), |tensor| {
        let (_, values) = Noise(shape.clone()).values(&tensor.name).unwrap();
        Ok(match dtype {
            Dtype::F32 => values.into_iter().flat_map(f32::to_le_bytes).collect(),
            _ => values.into_iter().flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        })
    })
    .unwrap();
}

pub fn model(shape: &ModelShape, precision: Precision, threads: usize) -> Model {
    Model::load(shape, precision, &Noise(shape.clone()), threads).unwrap()
}

/// Ragged rows; the first third of each is a prompt.
pub fn rows(shape: &ModelShape, lengths: &[usize]) -> Vec<Row> {
    let row = |(i, &len): (usize, &usize)| Row {
        tokens: (0..len)
            .map(|t| ((noise(77 + i as u64, t as u64) + 1.0) / 2.0 * shape.vocab as f64) as u32)
            .collect(),
        weights: (0..len).map(|t| if t < len / 3 { 0.0 } else { 1.0 + (t % 3) as f32 * 0.5 }).collect(),
    };
    lengths.iter().enumerate().map(row).collect()
}

pub fn hyper() -> Hyper {
    Hyper {
        learning_rate: 1e-2,
        schedule: Schedule::Cosine,
        warmup_steps: 2,
        total_steps: 20,
        weight_decay: 0.1,
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        max_grad_norm: Some(1.0),
        seed: 5,
    }
}

pub fn lora(dropout: f32) -> TrainMethod {
    let targets = BTreeSet::from(Target::ALL);
    TrainMethod::Lora(LoraSpec { rank: 5, alpha: 7.0, dropout, targets })
}

pub fn request(method: &TrainMethod, weights: Precision) -> TrainRequest {
    TrainRequest {
        method: method.clone(),
        weights,
        max_row_tokens: 40,
        batch_tokens: 256,
        micro_batch_tokens: None,
        recompute: None,
        optimizer_state: None,
        threads: 1,
        memory_limit: None,
    }
}

pub fn trainer_of(shape: &ModelShape, request: &TrainRequest, hyper: Hyper) -> Trainer {
    let plan = plan_training(shape, request).unwrap();
    Trainer::new(model(shape, request.weights, request.threads), &plan, hyper).unwrap()
}

/// Lengths of ragged rows, all together longer than a few pages.
pub const LENGTHS: [usize; 6] = [21, 5, 9, 33, 17, 2];

/// A trainer after some steps on rows of these lengths, and its state.
pub fn trained(
    shape: &ModelShape,
    request: &TrainRequest,
    lengths: &[usize],
    steps: usize,
) -> (Trainer, Vec<u8>) {
    let mut trainer = trainer_of(shape, request, hyper());
    let rows = rows(shape, lengths);
    for _ in 0..steps {
        trainer.step(&rows).unwrap();
    }
    let state = state(&mut trainer);
    (trainer, state)
}

pub fn state(trainer: &mut Trainer) -> Vec<u8> {
    let mut bytes = Vec::new();
    trainer.save_state(&mut bytes).unwrap();
    bytes
}

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Tensors by name.
pub struct Tensors(pub std::collections::HashMap<String, lathe_engine::NamedTensor>);

impl WeightSource for Tensors {
    fn tensor(&self, name: &str) -> lathe_engine::Result<TensorView<'_>> {
        let missing = || lathe_engine::Error::MissingTensor { name: name.to_owned() };
        let tensor = self.0.get(name).ok_or_else(missing)?;
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        Ok(TensorView { dtype, shape, data: Cow::Borrowed(&tensor.data), in_place: None })
    }
}
