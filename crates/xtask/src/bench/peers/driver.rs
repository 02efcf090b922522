//! A peer's process, `driver/main.py`: asked on stdin, answers in its log.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lathe_plan::Precision;
use serde_json::Value;

use super::super::engine::threads;
use super::super::models::Model;
use super::super::process::Watched;
use super::Ground;
use super::contestant::Contestant;
use super::task::{Task, Unit};
use crate::paths;

/// For one piece of work, the files that it needs and the first compilation of it included.
const PATIENCE: Duration = Duration::from_secs(300);

/// The process.
pub struct Driver {
    process: Watched,
    started: Instant,
    imports: f64,
    /// Lines until now: the first of the imports, then one for each piece of work.
    answered: usize,
    asked: usize,
}

impl Driver {
    /// Starts it; what is asked meanwhile waits.
    ///
    /// # Errors
    /// It does not start, or its packages cannot be imported; the text has its last words.
    pub fn start(ground: &Ground, peer: Contestant, model: &Model, precision: Precision) -> Result<Self> {
        let precision = match precision {
            Precision::BF16 if !ground.bf16 && matches!(peer, Contestant::Torch | Contestant::Compiled) => {
                "f32"
            }
            Precision::F32 => "f32",
            Precision::BF16 => "bf16",
            Precision::Int8 => "int8",
            Precision::Int4 => "int4",
        };
        let mut command = Command::new(ground.python.interpreter());
        command
            .arg(paths::repository().join("crates/xtask/src/bench/peers/driver/main.py"))
            .arg(peer.key())
            .arg(&model.folder)
            .args([precision, &threads().to_string()])
            .envs([("TRANSFORMERS_OFFLINE", "1"), ("TRANSFORMERS_VERBOSITY", "error")])
            // A pool of compilers would import torch once more in each of its processes.
            .envs([("PYTHONDONTWRITEBYTECODE", "1"), ("TORCHINDUCTOR_COMPILE_THREADS", "1")]);
        let started = Instant::now();
        let log = ground.scratch.join(format!("{}.log", peer.key()));
        let mut driver = Self {
            process: Watched::start_listening(&mut command, &log)?,
            started,
            imports: 0.0,
            answered: 0,
            asked: 1,
        };
        driver.imports =
            driver.answer()?["imports"].as_f64().context("the driver does not tell its imports")?;
        Ok(driver)
    }

    /// Does the work once.
    ///
    /// # Errors
    /// It fails; the text has the peer's words.
    pub fn measure(&mut self, task: &Task) -> Result<Vec<(Unit, f64)>> {
        self.process.tell(&serde_json::to_string(task)?)?;
        self.asked += 1;
        let answer = self.answer()?;
        let Some(rate) = answer["rate"].as_f64() else { bail!("{}", answer["error"]) };
        Ok(match task {
            Task::First => {
                vec![(Unit::Seconds, self.started.elapsed().as_secs_f64()), (Unit::Imports, self.imports)]
            }
            Task::Train { .. } => {
                vec![(Unit::Rate, rate), (Unit::Bytes, self.process.memory().resident as f64)]
            }
            _ => vec![(Unit::Rate, rate)],
        })
    }

    /// Whether everything that was asked is answered.
    pub fn answers(&self) -> bool {
        self.answered == self.asked
    }

    /// The next line of JSON among other things that its packages say.
    fn answer(&mut self) -> Result<Value> {
        let (log, answered) = (self.process.log(), self.answered);
        let answer = self.process.wait_for("an answer", PATIENCE, || {
            answers(&std::fs::read_to_string(&log).ok()?).nth(answered)
        })?;
        self.answered += 1;
        Ok(answer)
    }
}

fn answers(said: &str) -> impl Iterator<Item = Value> {
    // What has no line's end yet is not whole.
    let whole = said.rfind('\n').map_or("", |end| &said[..end]);
    whole.lines().filter_map(|line| serde_json::from_str(line).ok()).filter(Value::is_object)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn answers_are_found_among_other_words_once_they_are_whole() {
        let said = "warning: x\n{\"imports\": 1.5}\n17\n{\"rate\": 2.0}\n{\"rate\": 3";
        assert_eq!(answers(said).collect::<Vec<_>>(), [json!({"imports": 1.5}), json!({"rate": 2.0})]);
        assert_eq!(answers("{\"rate\": 3").count(), 0);
    }
}
