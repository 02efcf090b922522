//! Where the time of a 0.5 B model (the shape of Qwen2.5-0.5B, random weights) goes:
//! `cargo run --release -p lathe-engine --example profile -- train|prefill|decode [tokens or batch] [threads] [f32|bf16|int8|int4]`.
//!
//! Prints time, GFLOP/s and GB/s by operation. `cargo xtask bench` measures whole processes.
#![allow(clippy::unwrap_used)] // A program for developers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use half::bf16;
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Profiler, Span};
use lathe_engine::files::{ModelWeights, TensorLayout, write_safetensors};
use lathe_engine::plan::{
    AdapterBudget, LoraSpec, ModelShape, Precision, RopeScaling, ServeRequest, Target, TrainMethod,
    TrainRequest, plan_serving, plan_training,
};
use lathe_engine::{Dtype, Generator, Hyper, Model, Row, Sampling, Schedule, Trainer};

fn shape() -> ModelShape {
    ModelShape {
        vocab: 151_936,
        hidden: 896,
        layers: 24,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        intermediate: 4864,
        max_position: 32_768,
        rope_theta: 1e6,
        rope_scaling: RopeScaling::None,
        rms_eps: 1e-6,
        qkv_bias: true,
        tie_embeddings: true,
    }
}

/// The weights as a file in the folder for temporary files, made once.
fn folder() -> PathBuf {
    let folder = std::env::temp_dir().join("lathe-profile-q05");
    let path = folder.join("model.safetensors");
    if !path.exists() {
        std::fs::create_dir_all(&folder).unwrap();
        let layout =
            |t: lathe_engine::plan::Tensor| TensorLayout { name: t.name, dtype: Dtype::BF16, shape: t.shape };
        let tensors: Vec<_> = shape().tensors().into_iter().map(layout).collect();
        write_safetensors(&path, &tensors, &BTreeMap::new(), |tensor| {
            let mut state = tensor.name.len() as u64;
            let value = |_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let uniform = (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5;
                bf16::from_f32(if tensor.shape.len() == 2 { 0.07 * uniform } else { 1.0 }).to_le_bytes()
            };
            Ok((0..tensor.shape.iter().product::<usize>()).flat_map(value).collect())
        })
        .unwrap();
    }
    folder
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default| args.get(at).map_or(default, |n| n.parse().unwrap());
    let what = args.first().map_or("decode", String::as_str);
    let threads = number(2, Model::default_threads());
    let precision = match args.get(3).map_or("bf16", String::as_str) {
        "f32" => Precision::F32,
        "int8" => Precision::Int8,
        "int4" => Precision::Int4,
        _ => Precision::BF16,
    };
    let folder = folder();
    let started = Instant::now();
    let (device, spans) = Profiler::new(Cpu::new(threads, Level::detect().unwrap()));
    let weights = ModelWeights::open(&folder).unwrap();
    let model = Model::load_on(Box::new(device), &shape(), precision, &weights).unwrap();
    println!(
        "{} threads, {}, {precision:?}; loaded in {:.3} s",
        threads,
        model.level().name(),
        started.elapsed().as_secs_f64()
    );
    match what {
        "train" => train(model, threads, number(1, 256), &spans),
        "prefill" => serve(model, threads, number(1, 512), 1, 1, &spans),
        _ => serve(model, threads, 128, number(1, 1) as u64, 33, &spans),
    }
}

fn train(model: Model, threads: usize, row: usize, spans: &Mutex<Vec<Span>>) {
    let targets = Target::ALL.into_iter().collect();
    let request = TrainRequest {
        method: TrainMethod::Lora(LoraSpec { rank: 16, alpha: 32.0, dropout: 0.0, targets }),
        weights: model.precision(),
        max_row_tokens: row,
        batch_tokens: 4 * row,
        micro_batch_tokens: None,
        recompute: None,
        threads,
        memory_limit: None,
    };
    let plan = plan_training(&shape(), &request).unwrap();
    let hyper = Hyper {
        learning_rate: 1e-4,
        schedule: Schedule::Cosine,
        warmup_steps: 0,
        total_steps: 10,
        weight_decay: 0.0,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        max_grad_norm: None,
        seed: 1,
    };
    let mut trainer = Trainer::new(model, &plan, hyper).unwrap();
    let tokens: Vec<u32> = (0..row as u32).map(|t| t * 37 % 151_936).collect();
    let rows = vec![Row { weights: vec![1.0; row], tokens }; 4];
    trainer.step(&rows).unwrap();
    spans.lock().unwrap().clear();
    let started = Instant::now();
    trainer.step(&rows).unwrap();
    report("LoRA training", 4 * row, started.elapsed(), spans);
}

fn serve(model: Model, threads: usize, prompt: usize, batch: u64, answer: usize, spans: &Mutex<Vec<Span>>) {
    let request = ServeRequest {
        weights: model.precision(),
        context: prompt + answer + 1,
        max_sequences: batch as usize,
        max_batch_tokens: prompt.max(512),
        cache_tokens: None,
        adapters: AdapterBudget { slots: 0, max_rank: 8, targets: Default::default() },
        threads,
        memory_limit: None,
    };
    let mut generator = Generator::new(model, &plan_serving(&shape(), &request).unwrap()).unwrap();
    let tokens: Vec<u32> = (0..prompt as u32).map(|t| t * 37 % 151_936).collect();
    let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
    let add = |generator: &mut Generator, from: u64| {
        for id in from..from + batch {
            // Other first tokens, so that no prompt's keys and values are taken from another's.
            let mut tokens = tokens.clone();
            tokens[0] = id as u32;
            generator.add_sequence(id, &tokens, None, sampling, answer).unwrap();
        }
    };
    add(&mut generator, 0);
    while !generator.idle() {
        generator.step().unwrap();
    }
    add(&mut generator, batch);
    spans.lock().unwrap().clear();
    let mut started = Instant::now();
    let (mut steps, mut done, mut waiting) = (0, 0, batch as usize);
    while !generator.idle() {
        let emitted = generator.step().unwrap().len();
        if answer > 1 && waiting > 0 {
            // Until all prompts are read: from then on it is decoding alone.
            waiting = waiting.saturating_sub(emitted);
            spans.lock().unwrap().clear();
            started = Instant::now();
        } else {
            (steps, done) = (steps + 1, done + emitted);
        }
    }
    let took = started.elapsed();
    let count = if answer == 1 { prompt } else { done };
    report(
        &format!("{} of batch {batch}, {steps} steps", if answer == 1 { "prefill" } else { "decode" }),
        count,
        took,
        spans,
    );
}

fn report(what: &str, tokens: usize, took: Duration, spans: &Mutex<Vec<Span>>) {
    println!(
        "{what}: {:.1} tokens/s ({tokens} in {:.3} s)",
        tokens as f64 / took.as_secs_f64(),
        took.as_secs_f64()
    );
    let mut sums: BTreeMap<String, (Duration, u64, u64, usize)> = BTreeMap::new();
    let mut all = Duration::ZERO;
    for span in spans.lock().unwrap().iter() {
        let sum = sums.entry(span.name.clone()).or_default();
        *sum = (sum.0 + span.took, sum.1 + span.flops, sum.2 + span.bytes, sum.3 + 1);
        all += span.took;
    }
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(_, sum)| std::cmp::Reverse(sum.0));
    println!("{:36} {:>7} {:>9} {:>6} {:>9} {:>7}", "operation", "count", "ms", "%", "GFLOP/s", "GB/s");
    for (name, (took, flops, bytes, count)) in sums {
        let seconds = took.as_secs_f64();
        let (ms, share) = (seconds * 1e3, 100.0 * seconds / all.as_secs_f64());
        let (flops, bytes) = (flops as f64 / seconds / 1e9, bytes as f64 / seconds / 1e9);
        println!("{name:36} {count:7} {ms:9.2} {share:6.1} {flops:9.1} {bytes:7.1}");
    }
    println!("outside of operations: {:.2} ms", (took.as_secs_f64() - all.as_secs_f64()) * 1e3);
}
