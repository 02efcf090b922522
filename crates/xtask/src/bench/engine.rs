//! Training and serving: tokens a second through the real worker, and its memory beside the plan's.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lathe_plan::{
    AdapterBudget, LoraSpec, Precision, SERVE_BATCH_TOKENS, SPARE_ADAPTERS, SPARE_RANK, ServeRequest, Target,
    TrainMethod, TrainRequest, plan_serving, plan_training,
};
use serde::Serialize;
use serde_json::{Value, json};

use super::ask::{self, stream};
use super::models::{self, Model};
use super::process::{Memory, Watched};
use super::stats::{Figure, number};
use super::worker::{Worker, empty_folder};

/// Tokens of a training row, and of a prompt that is only read.
pub const ROW: usize = 512;
/// Rows of a training step.
pub const STEP_ROWS: usize = 2;
/// Rank of the adapters that are trained, and their scale.
pub const RANK: usize = 16;
/// Tokens of a prompt that an answer follows.
pub const PROMPT: usize = 128;
/// Sequences that are decoded at the same time, at most.
pub const SEQUENCES: usize = 8;
const STEPS: Duration = Duration::from_secs(1800);

/// How often, and how long.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Steps before anything is measured.
    pub warm_up: i64,
    /// Stretches of training that are measured.
    pub stretches: i64,
    /// Steps of each.
    pub steps: i64,
    /// Prompts that are read, answers that are generated.
    pub runs: usize,
    /// Tokens of an answer.
    pub answer: usize,
}

/// What was measured of one use of one model.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The model.
    pub model: &'static str,
    /// What was done with it.
    pub what: &'static str,
    /// How its matrices are held.
    pub precision: Precision,
    /// Tokens a second.
    pub rate: Figure,
    /// Cores that the process kept busy meanwhile.
    pub cores: f64,
    /// Tokens a second if it had had all cores for itself: by the processor time that it used.
    pub by_processor: f64,
}

/// The memory of one process.
#[derive(Clone, Debug, Serialize)]
pub struct Held {
    /// The model.
    pub model: &'static str,
    /// What was done with it.
    pub what: &'static str,
    /// How its matrices are held.
    pub precision: Precision,
    /// In bytes, as the plan says.
    pub planned: u64,
    /// In bytes, pages of the process alone.
    pub own: u64,
    /// In bytes, with pages of mapped files.
    pub resident: u64,
}

/// Where things lie.
pub struct Bench {
    /// The worker.
    pub program: PathBuf,
    /// For files that nobody needs later.
    pub scratch: PathBuf,
}

/// LoRA on all seven linear layers of each block.
pub fn lora() -> TrainMethod {
    let targets = Target::ALL.into_iter().collect();
    TrainMethod::Lora(LoraSpec { rank: RANK, alpha: 2.0 * RANK as f32, dropout: 0.0, targets })
}

impl Bench {
    /// Trains, and ends the worker once enough is measured.
    ///
    /// # Errors
    /// The worker fails; the text has its last words.
    pub fn train(
        &self,
        model: &Model,
        method: &TrainMethod,
        precision: Precision,
        effort: Effort,
    ) -> Result<(Row, Held)> {
        let folder = empty_folder(&self.scratch, "train")?;
        models::corpus(&folder.join("rows.jsonl"))?;
        let request = TrainRequest {
            method: method.clone(),
            weights: precision,
            max_row_tokens: ROW,
            batch_tokens: ROW * STEP_ROWS,
            micro_batch_tokens: Some(ROW * STEP_ROWS),
            recompute: None,
            optimizer_state: None,
            threads: threads(),
            memory_limit: None,
        };
        let planned = plan_training(&model.shape, &request)?.totals.total();
        let Effort { warm_up, stretches, steps, .. } = effort;
        // Some more, so that the last one that counts is not the end.
        let task = train_task(method, precision, (STEP_ROWS, ROW), warm_up + stretches * steps + 1000);
        let mut worker = Worker::start(&self.program, &folder, model, "train", &task)?;
        let report = format!("http://{}/v1/report", worker.address("controlAddr")?);
        let mut usage = None;
        let mut last: Option<(i64, Instant)> = None;
        let mut rates = Vec::new();
        for stretch in 0..=stretches {
            let now = worker.steps(&report, warm_up + stretch * steps, STEPS)?;
            usage.get_or_insert_with(|| Usage::begin(&worker.process));
            if let Some(last) = last {
                rates.push((now.0 - last.0) as f64 / (now.1 - last.1).as_secs_f64());
            }
            last = Some(now);
        }
        let cores = usage.map_or(0.0, |usage| usage.cores(&worker.process));
        let memory = worker.process.memory();
        worker.process.end()?;
        let what = if *method == TrainMethod::Full { "full training" } else { "LoRA training" };
        let rate = Figure::of(rates).context("nothing was measured")?;
        let row = Row::new(model, what, precision, (rate, cores));
        Ok((row, held(model, what, precision, planned, memory)))
    }

    /// Serves: reads prompts, and answers one and several at a time.
    ///
    /// # Errors
    /// The worker fails or refuses a request.
    pub fn serve(&self, model: &Model, precision: Precision, effort: Effort) -> Result<(Vec<Row>, Held)> {
        let folder = empty_folder(&self.scratch, "serve")?;
        let context = model.shape.max_position.min(2 * ROW);
        let request = ServeRequest {
            weights: precision,
            context,
            max_sequences: SEQUENCES,
            max_batch_tokens: SERVE_BATCH_TOKENS,
            cache_tokens: Some(context * SEQUENCES),
            adapters: AdapterBudget {
                slots: SPARE_ADAPTERS,
                max_rank: SPARE_RANK,
                targets: Target::ALL.into_iter().collect(),
            },
            threads: threads(),
            memory_limit: None,
        };
        let planned = plan_serving(&model.shape, &request)?.totals.total();
        let started = Instant::now();
        let mut worker = Worker::start(
            &self.program,
            &folder,
            model,
            "serve",
            &serve_task(precision, context, SEQUENCES, context * SEQUENCES),
        )?;
        let ready = worker.ready(started)?;
        let address = worker.address("serveAddr")?;
        let process = &worker.process;

        let length = ROW.min(context - 1);
        let prompt = |tokens: usize, number: usize| prompt(model.shape.vocab, tokens, number);
        let reading = measured(process, effort.runs, |run| {
            let answer = stream(&address, &[prompt(length, run)], 1)?;
            Ok(answer.first().and_then(|answer| Some(length as f64 / answer.pieces.first()?)))
        })?;
        let decoding = |sequences: usize| {
            measured(process, effort.runs, |run| {
                let prompts: Vec<_> =
                    (0..sequences).map(|i| prompt(PROMPT, 100 + run * SEQUENCES + i)).collect();
                Ok(ask::decode_rate(&stream(&address, &prompts, effort.answer)?))
            })
        };
        let (one, eight) = (decoding(1)?, decoding(SEQUENCES)?);
        let memory = worker.process.memory();
        worker.process.end()?;
        let row = |what, measured| Row::new(model, what, precision, measured);
        let ready = Figure::of(vec![ready]).context("one figure")?;
        let rows = vec![
            row("prefill", reading),
            row("decode, batch 1", one),
            row("decode, batch 8", eight),
            row(START, (ready, 0.0)),
        ];
        Ok((rows, held(model, "serving", precision, planned, memory)))
    }
}

impl Row {
    fn new(model: &Model, what: &'static str, precision: Precision, (rate, cores): (Figure, f64)) -> Self {
        let by_processor = rate.median * threads() as f64 / cores;
        Self { model: model.name, what, precision, rate, cores, by_processor }
    }

    /// In one line.
    pub fn words(&self) -> String {
        let Self { what, rate, by_processor, .. } = self;
        if *what == START {
            return format!("{what} {} s", rate.shown());
        }
        format!("{what} {} tokens/s, by processor time {}", rate.shown(), number(*by_processor))
    }
}

/// The row whose figure is seconds, not tokens a second.
pub const START: &str = "start to ready";

/// One run that does not count, then `runs` that do; also the cores that were busy in these.
fn measured(
    process: &Watched,
    runs: usize,
    mut run: impl FnMut(usize) -> Result<Option<f64>>,
) -> Result<(Figure, f64)> {
    run(runs)?;
    let usage = Usage::begin(process);
    let rates = (0..runs).map(&mut run).collect::<Result<Vec<_>>>()?;
    let cores = usage.cores(process);
    let figure = Figure::of(rates.into_iter().flatten().collect()).context("nothing was measured")?;
    Ok((figure, cores))
}

/// Processor time from an instant on.
struct Usage {
    seconds: f64,
    begun: Instant,
}

impl Usage {
    fn begin(process: &Watched) -> Self {
        Self { seconds: process.processor_seconds(), begun: Instant::now() }
    }

    fn cores(&self, process: &Watched) -> f64 {
        (process.processor_seconds() - self.seconds) / self.begun.elapsed().as_secs_f64()
    }
}

fn held(model: &Model, what: &'static str, precision: Precision, planned: u64, memory: Memory) -> Held {
    Held { model: model.name, what, precision, planned, own: memory.own, resident: memory.resident }
}

/// Cores that this process may use.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Tokens that differ from prompt to prompt, so that nothing can be reused.
pub fn prompt(vocab: usize, tokens: usize, number: usize) -> Vec<u32> {
    (0..tokens).map(|at| 5 + ((at * 31 + number * 977 + at * number) % (vocab - 5)) as u32).collect()
}

fn stored(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "Float32",
        Precision::BF16 => "BFloat16",
        Precision::Int8 => "Int8",
        Precision::Int4 => "Int4",
    }
}

/// The contract's task: steps of so many rows of so many tokens.
pub fn train_task(
    method: &TrainMethod,
    precision: Precision,
    (rows, length): (usize, usize),
    steps: i64,
) -> Value {
    let at = |name: &str| json!({"uri": format!("pvc://work/{name}")});
    let method = match method {
        TrainMethod::Full => json!({"full": {}}),
        TrainMethod::Lora(lora) => json!({"lora": {
            "rank": lora.rank, "alpha": lora.alpha as i64, "dropout": 0.0,
            "targets": lora.targets.iter().map(|target| target.name()).collect::<Vec<_>>(),
            "basePrecision": stored(precision),
        }}),
    };
    json!({
        "attempt": 1,
        "base": {"name": "bench", "source": {"uri": "pvc://model/"}},
        "dataset": {"train": at("rows.jsonl"), "format": "Text"},
        "method": method,
        "training": {
            "steps": steps, "learningRate": 1e-4, "schedule": "Constant", "warmup": 0.0,
            "batchTokens": rows * length, "microBatchTokens": rows * length, "sequenceLength": length,
            "weightDecay": 0.0, "maxGradNorm": 1.0, "seed": 1,
        },
        "checkpoint": {"intervalSeconds": 86_400, "keep": 1, "destination": at("checkpoints")},
        "evaluation": {"metrics": []},
        "output": {"modelName": "bench-out", "destination": at("out")},
    })
}

/// The contract's task.
pub fn serve_task(precision: Precision, context: usize, sequences: usize, cache_tokens: usize) -> Value {
    json!({
        "modelId": "bench",
        "model": {"name": "bench", "source": {"uri": "pvc://model/"}},
        "weights": stored(precision), "contextLength": context, "maxSequences": sequences,
        "maxWaiting": sequences, "cacheTokens": cache_tokens, "direct": true, "drainSeconds": 5,
        // What the plan beside it counts: the spare ones alone.
        "adapterRoom": {"slots": 0, "rank": SPARE_RANK},
    })
}
