//! Lathe's worker, asked for the same as the peers are.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lathe_plan::{Precision, TrainMethod};

use super::super::ask::{self, stream};
use super::super::engine::{lora, prompt, serve_task, train_task};
use super::super::models::{self, Model};
use super::super::worker::{Worker, empty_folder, inspected};
use super::Ground;
use super::task::{Task, Unit};

const PATIENCE: Duration = Duration::from_secs(600);
/// Sequences at the same time, at most, and the longest of them.
const SEQUENCES: usize = 32;
const CONTEXT: usize = 8192 + 64;

/// A worker that serves or trains.
pub struct Ours {
    worker: Worker,
    started: Instant,
    vocab: usize,
    address: Option<String>,
    /// Prompts until now: none of them comes twice.
    asked: usize,
}

impl Ours {
    /// Starts it.
    ///
    /// # Errors
    /// It ends before it is ready; the text has its last words.
    pub fn start(ground: &Ground, model: &Model, precision: Precision, task: &Task) -> Result<Self> {
        let folder = empty_folder(&ground.scratch, if task.alone() { "alone" } else { "serve" })?;
        let program: &PathBuf = &ground.worker;
        let (name, contract) = if let Task::Train { full, rows, length, .. } = task {
            models::corpus(&folder.join("rows.jsonl"))?;
            let method = if *full { TrainMethod::Full } else { lora() };
            // Some more steps than are measured: it is ended before.
            ("train", train_task(&method, precision, (*rows, *length), 1000))
        } else {
            let mut task = serve_task(precision, CONTEXT, SEQUENCES, 2 * CONTEXT);
            task["model"]["inspected"] =
                inspected(program, &empty_folder(&ground.scratch, "inspect")?, model)?;
            ("serve", task)
        };
        let started = Instant::now();
        let worker = Worker::start(program, &folder, model, name, &contract)?;
        Ok(Self { worker, started, vocab: model.shape.vocab, address: None, asked: 0 })
    }

    /// Does the work once.
    ///
    /// # Errors
    /// The worker fails or refuses.
    pub fn measure(&mut self, task: &Task) -> Result<Vec<(Unit, f64)>> {
        match *task {
            Task::Prefill { tokens } => {
                let answers = stream(&self.ready()?, &self.prompts(1, tokens), 1)?;
                let first = answers.first().and_then(|answer| answer.pieces.first());
                Ok(vec![(Unit::Rate, tokens as f64 / first.context("no answer")?)])
            }
            Task::Decode { batch, context, tokens } => {
                let answers = stream(&self.ready()?, &self.prompts(batch, context), tokens)?;
                let rate = ask::decode_rate(&answers).context("the answers did not overlap")?;
                Ok(vec![(Unit::Rate, rate)])
            }
            Task::First => {
                let prompts = self.prompts(1, 16);
                let address = self.worker.address("serveAddr")?;
                let first = || stream(&address, &prompts, 1).ok();
                self.worker.process.wait_for("the first token", PATIENCE, first)?;
                Ok(vec![(Unit::Seconds, self.started.elapsed().as_secs_f64())])
            }
            Task::Train { steps, .. } => {
                let report = format!("http://{}/v1/report", self.worker.address("controlAddr")?);
                let begin = self.worker.steps(&report, 1, PATIENCE)?;
                let end = self.worker.steps(&report, 1 + steps as i64, PATIENCE)?;
                let rate = (end.0 - begin.0) as f64 / (end.1 - begin.1).as_secs_f64();
                let memory = self.worker.process.memory().resident as f64;
                Ok(vec![(Unit::Rate, rate), (Unit::Bytes, memory)])
            }
        }
    }

    fn ready(&mut self) -> Result<String> {
        if let Some(address) = &self.address {
            return Ok(address.clone());
        }
        self.worker.ready(self.started)?;
        let address = self.worker.address("serveAddr")?;
        Ok(self.address.insert(address).clone())
    }

    fn prompts(&mut self, count: usize, tokens: usize) -> Vec<Vec<u32>> {
        self.asked += count;
        (self.asked - count..self.asked).map(|number| prompt(self.vocab, tokens, number)).collect()
    }
}
