//! Where the time of a 0.5 B model (the shape of Qwen2.5-0.5B, random weights) goes:
//! `cargo run --release -p lathe-engine --example profile -- train|full|prefill|decode [tokens or batch] [threads] [f32|bf16|int8|int4]
//! [--limits read,f32,bf16,int8] [--trace FILE]`.
//!
//! Prints time, GFLOP/s and GB/s by operation, with limits (in 1e9 a second) the share of the limit that binds it, and writes
//! a trace. `cargo xtask bench --profile` measures the limits and runs all of it.
#![allow(clippy::unwrap_used)] // A program for developers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use half::bf16;
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Element, Profiler, Span, Work};
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
        sliding_window: None,
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
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let mut option = |name: &str| {
        let at = args.iter().position(|arg| arg == name)?;
        args.remove(at);
        Some(args.remove(at))
    };
    let wanted = Wanted {
        trace: option("--trace").map(PathBuf::from),
        limits: option("--limits").map(|text| Limits::parse(&text)),
        level: Level::detect().unwrap(),
    };
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
        "train" => {
            let targets = Target::ALL.into_iter().collect();
            let lora = LoraSpec { rank: 16, alpha: 32.0, dropout: 0.0, targets };
            train(model, TrainMethod::Lora(lora), threads, number(1, 256), &spans, &wanted);
        }
        "full" => train(model, TrainMethod::Full, threads, number(1, 256), &spans, &wanted),
        "prefill" => serve(model, threads, number(1, 512), 1, 1, &spans, &wanted),
        _ => serve(model, threads, 128, number(1, 1) as u64, 33, &spans, &wanted),
    }
}

fn train(
    model: Model,
    method: TrainMethod,
    threads: usize,
    row: usize,
    spans: &Mutex<Vec<Span>>,
    wanted: &Wanted,
) {
    let what = if method == TrainMethod::Full { "full training" } else { "LoRA training" };
    let request = TrainRequest {
        method,
        weights: model.precision(),
        max_row_tokens: row,
        batch_tokens: 4 * row,
        micro_batch_tokens: None,
        recompute: None,
        optimizer_state: None,
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
    report(what, 4 * row, started.elapsed(), spans, wanted);
}

fn serve(
    model: Model,
    threads: usize,
    prompt: usize,
    batch: u64,
    answer: usize,
    spans: &Mutex<Vec<Span>>,
    wanted: &Wanted,
) {
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
        wanted,
    );
}

/// What this machine can do at most, in 1e9 a second: bytes read, and operations on f32, bf16 and bytes.
#[derive(Clone, Copy)]
struct Limits([f64; 4]);

impl Limits {
    /// From `read,f32,bf16,int8`.
    fn parse(text: &str) -> Limits {
        let all: Vec<f64> = text.split(',').map(|limit| limit.parse().unwrap()).collect();
        Limits(all.try_into().unwrap())
    }

    /// The least seconds that the work takes.
    fn least(self, work: Work, level: Level) -> f64 {
        let Limits([read, f32, bf16, int8]) = self;
        let rate = match work.element {
            Some(Element::BF16) if level.rounds_to_bf16() => bf16,
            Some(Element::Int8 | Element::Int4) => int8,
            _ => f32,
        };
        (work.flops as f64 / rate / 1e9).max(work.bytes as f64 / read / 1e9)
    }
}

/// Where the trace goes, and what shares are shares of.
struct Wanted {
    trace: Option<PathBuf>,
    limits: Option<Limits>,
    level: Level,
}

fn report(what: &str, tokens: usize, took: Duration, spans: &Mutex<Vec<Span>>, wanted: &Wanted) {
    println!(
        "{what}: {:.1} tokens/s ({tokens} in {:.3} s)",
        tokens as f64 / took.as_secs_f64(),
        took.as_secs_f64()
    );
    let spans = spans.lock().unwrap();
    let mut sums: BTreeMap<&str, (Duration, Work, f64, usize)> = BTreeMap::new();
    let mut all = Duration::ZERO;
    for Span { name, took, work, .. } in spans.iter() {
        let (time, sum, least, count) = sums.entry(name).or_default();
        *time += *took;
        (sum.flops, sum.bytes, *count) = (sum.flops + work.flops, sum.bytes + work.bytes, *count + 1);
        *least += wanted.limits.map_or(0.0, |limits| limits.least(*work, wanted.level));
        all += *took;
    }
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(_, sum)| std::cmp::Reverse(sum.0));
    println!(
        "{:36} {:>7} {:>9} {:>6} {:>9} {:>7} {:>9}",
        "operation", "count", "ms", "%", "GFLOP/s", "GB/s", "of limit"
    );
    for (name, (took, work, least, count)) in sums {
        let seconds = took.as_secs_f64();
        let (ms, share) = (seconds * 1e3, 100.0 * seconds / all.as_secs_f64());
        let (flops, bytes) = (work.flops as f64 / seconds / 1e9, work.bytes as f64 / seconds / 1e9);
        let of = if least > 0.0 { format!("{:.0} %", 100.0 * least / seconds) } else { "-".to_owned() };
        println!("{name:36} {count:7} {ms:9.2} {share:6.1} {flops:9.1} {bytes:7.1} {of:>9}");
    }
    println!("outside of operations: {:.2} ms", (took.as_secs_f64() - all.as_secs_f64()) * 1e3);
    if let Some(path) = &wanted.trace {
        std::fs::write(path, trace(&spans)).unwrap();
        println!("trace for https://ui.perfetto.dev: {}", path.display());
    }
}

/// Chrome's trace event format, which Perfetto opens: times in microseconds.
fn trace(spans: &[Span]) -> String {
    let event = |span: &Span| {
        let (start, took) = (span.start.as_secs_f64() * 1e6, span.took.as_secs_f64() * 1e6);
        let Work { flops, bytes, .. } = span.work;
        format!(
            r#"{{"name":"{}","ph":"X","pid":1,"tid":1,"ts":{start:.1},"dur":{took:.1},"args":{{"flops":{flops},"bytes":{bytes}}}}}"#,
            span.name
        )
    };
    format!("[{}]\n", spans.iter().map(event).collect::<Vec<_>>().join(",\n"))
}
