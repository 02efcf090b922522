//! What a job has used of its budget, over all its runs on this machine: as the operator counts pods.
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lathe_api::FineTuneJob;
use lathe_resolve::finetune::{self, Training};
use serde::{Deserialize, Serialize};

use crate::failure::{Done, Problem};

/// How often it is written down, for a run that is killed.
const WRITE: Duration = Duration::from_secs(5);

/// A job's use, from the start of this run on.
#[derive(Debug)]
pub struct Spent<'a> {
    job: &'a FineTuneJob,
    training: &'a Training,
    file: PathBuf,
    before: i64,
    begun: Instant,
    written: Instant,
}

/// What lies between two runs. Another dataset, model or setting is another job.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Note {
    inputs: Option<String>,
    device_seconds: i64,
}

impl<'a> Spent<'a> {
    /// What earlier runs of the same job have left in `file`.
    pub fn open(file: PathBuf, job: &'a FineTuneJob, training: &'a Training, now: Instant) -> Self {
        let note = std::fs::read(&file).ok().and_then(|text| serde_json::from_slice::<Note>(&text).ok());
        let before = note.filter(|note| note.inputs == training.inputs_hash).map_or(0, |n| n.device_seconds);
        Self { job, training, file, before, begun: now, written: now }
    }

    /// Why the job must stop, where its budget is spent.
    pub fn over(&self, now: Instant) -> Option<String> {
        let used = self.device_seconds(now);
        let cost = finetune::cost(used, &self.training.profile);
        finetune::over(self.job.spec.budget.as_ref(), used, cost.as_ref(), self.training.count.into())
    }

    /// Writes it down, now and then.
    ///
    /// # Errors
    /// A failed write.
    pub fn tick(&mut self, now: Instant) -> Done<()> {
        if now.duration_since(self.written) < WRITE { Ok(()) } else { self.keep(now) }
    }

    /// Writes it down.
    ///
    /// # Errors
    /// A failed write.
    pub fn keep(&mut self, now: Instant) -> Done<()> {
        self.written = now;
        let note =
            Note { inputs: self.training.inputs_hash.clone(), device_seconds: self.device_seconds(now) };
        let text = serde_json::to_vec(&note).unwrap_or_default();
        std::fs::write(&self.file, text).map_err(|error| Problem::io("write", &self.file, &error))
    }

    fn device_seconds(&self, now: Instant) -> i64 {
        let seconds = i64::try_from(now.duration_since(self.begun).as_secs()).unwrap_or(i64::MAX);
        self.before.saturating_add(seconds.saturating_mul(self.training.count.max(1).into()))
    }
}
