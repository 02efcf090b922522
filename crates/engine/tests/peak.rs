//! A process holds what its plan says: the peak of its resident memory over a grid of shape, method, precision, batch and
//! length. Each point is a process of its own, from a model's file to a checkpoint and back, so that no point hides
//! behind what another one had. Mapped weights count where a plan counts them: one copy of each.
#![allow(clippy::unwrap_used)]

mod common;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{hyper, llama, lora, noise, qwen, written};
use lathe_engine::files::SafetensorsFile;
use lathe_engine::plan::{
    AdapterBudget, Buffer, ModelShape, OptimizerState, Precision, ServeRequest, Target, TrainMethod,
    TrainRequest, plan_serving, plan_training,
};
use lathe_engine::{Dtype, Generator, Model, Row, Sampling, Trainer};

/// Names the folder of models, and the point that this process is.
const FOLDER: &str = "LATHE_TEST_MODELS";
const POINT: &str = "LATHE_TEST_POINT";

/// What a process has beside its plan: lists, names, stacks, the allocator's own.
const BESIDE: f64 = 2e6;

/// Most weights in blocks, head apart from the embedding.
fn deep() -> ModelShape {
    ModelShape {
        vocab: 4000,
        hidden: 256,
        intermediate: 704,
        layers: 8,
        heads: 8,
        kv_heads: 4,
        head_dim: 32,
        max_position: 1024,
        ..llama()
    }
}

/// Most weights in one tied table.
fn wide() -> ModelShape {
    ModelShape {
        vocab: 40_000,
        hidden: 192,
        intermediate: 512,
        layers: 3,
        heads: 6,
        kv_heads: 2,
        head_dim: 32,
        max_position: 1024,
        ..qwen()
    }
}

struct Point {
    shape: ModelShape,
    precision: Precision,
    /// Of the file.
    stored: Dtype,
    /// Tokens of a row or a context, and of a batch.
    length: usize,
    batch: usize,
    work: Work,
}

enum Work {
    Train { method: TrainMethod, recompute: bool, state: OptimizerState },
    Serve,
}

fn grid() -> Vec<Point> {
    let train = |method, recompute, state| Work::Train { method, recompute, state };
    let full = |recompute| train(TrainMethod::Full, recompute, OptimizerState::F32);
    let few_bits = || train(TrainMethod::Full, true, OptimizerState::Int8);
    let adapter = |recompute| train(lora(0.1), recompute, OptimizerState::F32);
    let mut points = Vec::new();
    for (shape, [length, batch]) in [(deep(), [128, 512]), (wide(), [256, 256])] {
        for (precision, stored) in
            [(Precision::F32, Dtype::F32), (Precision::F32, Dtype::BF16), (Precision::BF16, Dtype::BF16)]
        {
            let point = |work| Point { shape: shape.clone(), precision, stored, length, batch, work };
            points.extend([full(false), adapter(false), Work::Serve].map(point));
        }
    }
    for (length, batch, work) in [
        (32, 1024, adapter(false)),
        (1024, 1024, adapter(true)),
        (512, 512, full(true)),
        (128, 128, few_bits()),
        (1024, 64, Work::Serve),
    ] {
        points.push(Point {
            shape: deep(),
            precision: Precision::BF16,
            stored: Dtype::BF16,
            length,
            batch,
            work,
        });
    }
    for precision in [Precision::Int8, Precision::Int4] {
        points.push(Point {
            shape: deep(),
            precision,
            stored: Dtype::BF16,
            length: 128,
            batch: 256,
            work: Work::Serve,
        });
    }
    let (precision, stored) = (Precision::F32, Dtype::BF16);
    points.push(Point { shape: wide(), precision, stored, length: 256, batch: 256, work: few_bits() });
    // Hardly more than the weights, so that a second copy of them while they are read would be the peak.
    let (precision, stored) = (Precision::F32, Dtype::BF16);
    points.push(Point { shape: wide(), precision, stored, length: 32, batch: 16, work: Work::Serve });
    points
}

fn file(folder: &Path, point: &Point) -> PathBuf {
    folder.join(format!("{}-{:?}.safetensors", point.shape.vocab, point.stored))
}

/// Tokens from all over the vocabulary.
fn tokens(shape: &ModelShape, key: u64, len: usize) -> Vec<u32> {
    (0..len as u64).map(|i| ((noise(key, i) + 1.0) / 2.0 * shape.vocab as f64) as u32).collect()
}

/// Bytes of a plan.
#[derive(Clone, Copy)]
struct Planned {
    most: u64,
    /// Without the cache and the room for adapters, whose pages come as they are filled.
    least: u64,
}

/// Does a point's work.
fn work(point: &Point, path: &Path) -> Planned {
    let Point { shape, precision, length, batch, .. } = point;
    let load = || Model::load(shape, *precision, &SafetensorsFile::open(path).unwrap(), 2).unwrap();
    match &point.work {
        Work::Train { method, recompute, state } => {
            let request = TrainRequest {
                method: method.clone(),
                weights: *precision,
                max_row_tokens: *length,
                batch_tokens: *batch,
                micro_batch_tokens: Some(*batch),
                recompute: Some(*recompute),
                optimizer_state: Some(*state),
                threads: 2,
                memory_limit: None,
            };
            let plan = plan_training(shape, &request).unwrap();
            let mut trainer = Trainer::new(load(), &plan, hyper()).unwrap();
            let row = |key| Row { tokens: tokens(shape, key as u64, *length), weights: vec![1.0; *length] };
            let rows: Vec<Row> = (0..batch / length).map(row).collect();
            trainer.step(&rows).unwrap();
            let state = path.with_extension(format!("{}.state", std::process::id()));
            trainer.save_state(&mut BufWriter::new(File::create(&state).unwrap())).unwrap();
            trainer.load_state(&mut BufReader::new(File::open(&state).unwrap())).unwrap();
            fs::remove_file(&state).unwrap();
            Planned { most: plan.totals.total(), least: plan.totals.total() }
        }
        Work::Serve => {
            let sequences = (batch / 16).clamp(1, 16);
            let request = ServeRequest {
                weights: *precision,
                context: *length,
                max_sequences: sequences,
                max_batch_tokens: *batch,
                cache_tokens: None,
                adapters: AdapterBudget { slots: 2, max_rank: 8, targets: Target::ALL.into() },
                threads: 2,
                memory_limit: None,
            };
            let plan = plan_serving(shape, &request).unwrap();
            let mut generator = Generator::new(load(), &plan).unwrap();
            for id in 0..sequences as u64 {
                let sampling = Sampling { temperature: 0.7, top_p: 0.9, top_k: 0, seed: id };
                generator
                    .add_sequence(id, &tokens(shape, id, 64.min(length - 4)), None, sampling, 4)
                    .unwrap();
            }
            while !generator.idle() {
                generator.step().unwrap();
            }
            let filled = |name: &str| name.starts_with("cache.") || name.starts_with("adapter.");
            let filled: u64 = plan.buffers.iter().filter(|b| filled(&b.name)).map(Buffer::bytes).sum();
            Planned { most: plan.totals.total(), least: plan.totals.total() - filled }
        }
    }
}

/// Bytes of a line of this process's status: `VmRSS` now, `VmHWM` at its peak.
fn resident(line: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let value = status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':')).unwrap();
    value.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// The point that the environment names, else the first: its plan, and the peak of this process beyond what it had before.
#[test]
fn a_point_holds_what_its_plan_says() {
    let own = tempfile::tempdir().unwrap();
    let folder = std::env::var_os(FOLDER).map_or(own.path().to_owned(), PathBuf::from);
    let number: usize = std::env::var(POINT).map_or(0, |number| number.parse().unwrap());
    let point = grid().swap_remove(number);
    let path = file(&folder, &point);
    if !path.exists() {
        written(&path, &point.shape, point.stored);
    }
    // Code is there before what counts begins.
    let small = |work| Point {
        shape: llama(),
        precision: Precision::F32,
        stored: Dtype::F32,
        length: 32,
        batch: 64,
        work,
    };
    for work_of in
        [Work::Train { method: lora(0.1), recompute: true, state: OptimizerState::F32 }, Work::Serve]
    {
        let point = small(work_of);
        let path = own.path().join("small.safetensors");
        written(&path, &point.shape, point.stored);
        work(&point, &path);
    }
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = resident("VmRSS");
    let planned = work(&point, &path);
    let peak = resident("VmHWM") - before;
    let line = describe(&point, planned.most, peak);
    println!("{line}");
    assert!((peak as f64) < 1.05 * planned.most as f64 + BESIDE, "{line}");
    assert!(peak as f64 > 0.95 * planned.least as f64 - BESIDE, "{line}");
}

fn describe(point: &Point, planned: u64, peak: u64) -> String {
    let Point { shape, precision, stored, length, batch, work } = point;
    let what = match work {
        Work::Train { method, recompute, state } => {
            let method = if *method == TrainMethod::Full { "full" } else { "LoRA" };
            format!("{method}, moments {state:?}, computed again: {recompute}")
        }
        Work::Serve => "serving".to_owned(),
    };
    let [planned, peak] = [planned, peak].map(|bytes| bytes as f64 / 1e6);
    format!(
        "vocabulary {}, {precision:?} of {stored:?}, {length} of {batch} tokens, {what}: planned {planned:.1} MB, peak {peak:.1} MB, {:.3}",
        shape.vocab,
        peak / planned
    )
}

#[test]
fn a_process_holds_what_its_plan_says() {
    let folder = tempfile::tempdir().unwrap();
    let mut failed = String::new();
    for number in 0..grid().len() {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "a_point_holds_what_its_plan_says", "--nocapture"]);
        let ended = child.env(FOLDER, folder.path()).env(POINT, number.to_string()).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stdout);
        let line = said.lines().find(|line| line.contains("planned")).unwrap_or(&said);
        println!("{line}");
        if !ended.status.success() || !said.contains("1 passed") {
            writeln!(failed, "{line}\n{}", String::from_utf8_lossy(&ended.stderr)).unwrap();
        }
    }
    assert!(failed.is_empty(), "{failed}");
}
