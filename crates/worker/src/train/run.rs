//! The steps themselves: take a batch, step, tell, save now and then, stop when asked.
use std::io::BufReader;
use std::time::{Duration, Instant};

use lathe_contract::{Phase, TrainProgress, TrainTask};
use lathe_engine::{Row, Trainer};
use serde::Serialize;

use super::checkpoint::{Position, Store};
use super::order::Order;
use super::progress::{Counters, Speed, after_step, progress};
use crate::context::Context;
use crate::failure::{Done, Halt};

/// Note beside the checkpoints: how far this run has come.
const COUNTERS: &str = "progress";
/// How often it is written.
const NOTE_EVERY: Duration = Duration::from_secs(1);

/// A training run from where it stands to its end.
pub struct Run<'a> {
    /// Where progress is told and the stop is heard.
    pub context: &'a Context,
    /// What was asked.
    pub task: &'a TrainTask,
    /// Where state is kept.
    pub store: &'a Store,
    /// The trainer, with fresh weights.
    pub trainer: Trainer,
    /// All rows.
    pub rows: &'a [Row],
    /// Their order.
    pub order: Order,
    /// Steps in all.
    pub steps: u64,
}

impl Run<'_> {
    /// Resumes where a checkpoint says, and trains until the last step is done and saved.
    ///
    /// # Errors
    /// `NonFiniteLoss`, `MalformedModel` where the base's own loss is none, `DiskFull`, `CheckpointsTaken`, or [`Halt::Stopped`] with everything saved.
    pub fn to_the_end(&mut self) -> Done<TrainProgress> {
        let (mut position, mut saved) = self.resume()?;
        let mut counters = Counters::after(self.store.noted(COUNTERS), position.step);
        note(self.store, COUNTERS, &counters);
        self.order.skip(position.step);
        let mut told = progress(&position, self.steps, counters, &saved);
        let begin = format!("step {} of {}", position.step, self.steps);
        self.context.status.update(|report| report.progress = Some(told.clone()));
        self.context.status.phase(Phase::Training, begin);

        let interval = Duration::from_secs(self.task.checkpoint.interval_seconds.max(0) as u64);
        let mut speed = Speed::begin(Instant::now());
        let (mut saved_at, mut noted_at) = (Instant::now(), Instant::now());
        loop {
            let stopping = self.context.stop.is_cancelled();
            let ended = position.step >= self.steps;
            if position.step > saved.0 && (stopping || ended || saved_at.elapsed() >= interval) {
                let begun = Instant::now();
                saved = self.save(&position, counters)?;
                (told.checkpoint_step, told.checkpoint_digest) = (saved.0 as i64, saved.1.clone());
                self.context.status.update(|report| report.progress = Some(told.clone()));
                speed.pause(begun.elapsed());
                saved_at = Instant::now();
            }
            if ended {
                return Ok(told);
            }
            if stopping {
                return Err(Halt::Stopped);
            }
            let tokens = match self.step(&mut position) {
                // What was done before it is saved above.
                Err(Halt::Stopped) => continue,
                stepped => stepped?,
            };
            speed.step(Instant::now(), tokens);
            counters.reached = counters.reached.max(position.step);
            after_step(&mut told, &position, &speed);
            self.context.status.update(|report| {
                report.message = format!("step {} of {}", told.step, told.steps);
                report.progress = Some(told.clone());
            });
            if noted_at.elapsed() >= NOTE_EVERY {
                self.count(counters)?;
                noted_at = Instant::now();
            }
        }
    }

    /// One step; returns its tokens.
    fn step(&mut self, position: &mut Position) -> Done<u64> {
        let batch: Vec<Row> = self.order.next_batch().into_iter().map(|row| self.rows[row].clone()).collect();
        let stats = self
            .trainer
            .step_unless(&batch, &|| self.context.stop.is_cancelled())
            .map_err(|error| self.of_the_base(&error).unwrap_or_else(|| error.into()))?;
        position.step = stats.step;
        position.tokens += stats.tokens;
        position.loss = stats.loss;
        position.curve.add(stats.step, stats.loss);
        Ok(stats.tokens)
    }

    /// Before the first update the loss is the base's own: no learning rate has a part in it.
    fn of_the_base(&self, error: &lathe_engine::Error) -> Option<Halt> {
        let lathe_engine::Error::NotFinite { step: 1, loss, .. } = error else { return None };
        let name = &self.task.base.name;
        let cause = format!(
            "base model `{name}`: its loss is {loss} before the first update: its weights hold NaN or infinity"
        );
        (!loss.is_finite()).then(|| Halt::user("MalformedModel", cause, "replace the model's files"))
    }

    /// Where the newest usable checkpoint stands, its state taken up; else the beginning.
    fn resume(&mut self) -> Done<(Position, (u64, String))> {
        let found = self.store.resume(|found, state| {
            if let Some(level) = self.trainer.load_state(&mut BufReader::with_capacity(1 << 20, state))? {
                let note = "its last bits differ from those of a run that stayed on one kind of processor";
                tracing::warn!(level, "the checkpoint was written with other instructions: {note}");
            }
            if self.trainer.steps_done() == found.position.step {
                return Ok(());
            }
            Err(Halt::user(
                "CheckpointUnusable",
                "its state is of another step than its manifest",
                "remove it",
            ))
        })?;
        match found {
            Some(found) => {
                tracing::info!(step = found.position.step, "going on from a checkpoint");
                let saved = (found.position.step, found.digest);
                Ok((found.position, saved))
            }
            // A state that was taken up and then not believed must not stay.
            None if self.trainer.steps_done() > 0 => Err(Halt::user(
                "CheckpointUnusable",
                "a checkpoint's state is of another step than its manifest, or could be read only in part",
                "remove the checkpoints",
            )),
            None => Ok((Position::default(), (0, String::new()))),
        }
    }

    /// Notes how far this run has come. Ends a worker after whom another one has begun.
    fn count(&self, counters: Counters) -> Done<()> {
        self.store.is_ours().map_err(|halt| halt.of("`checkpoint.destination`"))?;
        note(self.store, COUNTERS, &counters);
        Ok(())
    }

    /// Writes a checkpoint; returns its step and digest.
    fn save(&mut self, position: &Position, counters: Counters) -> Done<(u64, String)> {
        // Before the checkpoint bears its name: who is killed in between has come this far.
        self.count(counters)?;
        let trainer = &mut self.trainer;
        let written = self.store.write(position, |to| trainer.save_state(to));
        let digest = written.map_err(|halt| halt.of("`checkpoint.destination`"))?;
        tracing::info!(step = position.step, "checkpoint written");
        Ok((position.step, digest))
    }
}

/// Keeps a note if it can: losing one costs a repeated measurement or an inexact count, no result.
pub fn note(store: &Store, name: &str, value: &impl Serialize) {
    if let Err(Halt::Failed(trouble)) = store.note(name, value) {
        tracing::warn!("the note `{name}` was not kept: {}", trouble.cause);
    }
}
