//! Hashes of what decides a result, the same wherever they are made.
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::TrainTask;

/// What decides a result. Where the files lie, how a step is cut into passes and how often it is saved changes no bit, so
/// it is no part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Of the trained weights: base, rows, method and numbers.
    pub run: String,
    /// Of the whole job: that, and what is measured. Gates judge it later and change nothing of it.
    pub inputs: String,
}

impl Identity {
    /// The identity of a task over files of these digests.
    #[must_use]
    pub fn of(task: &TrainTask, base_digest: &str, dataset_digest: &str) -> Self {
        // What is new in a task must be put on one side or the other.
        let TrainTask {
            attempt: _,
            inputs: _,
            base: _,
            dataset,
            method,
            training,
            checkpoint: _,
            evaluation,
            output: _,
        } = task;
        let mut training = training.clone();
        training.micro_batch_tokens = 0;
        let rows = (dataset.format, dataset.holdout, dataset_digest);
        let run = hash(&(1, base_digest, rows, method, &training));
        let inputs = hash(&(&run, &evaluation.metrics));
        Identity { run, inputs }
    }
}

/// 32 hexadecimal digits. A number that is not finite is written as null.
fn hash(value: &impl Serialize) -> String {
    let json = serde_json::to_vec(value).unwrap_or_default();
    hex::encode(Sha256::digest(json)).chars().take(32).collect()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn task(pointer: &str, value: Value) -> TrainTask {
        let place = json!({"uri": "pvc://data/x"});
        let mut task = json!({
            "attempt": 1,
            "base": {"name": "b", "source": place},
            "dataset": {"train": place, "holdout": 0.1, "format": "Auto"},
            "method": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj"], "basePrecision": "BFloat16"}},
            "training": {"epochs": 2.0, "learningRate": 1e-3, "schedule": "Cosine", "warmup": 0.1, "batchTokens": 64,
                "microBatchTokens": 64, "sequenceLength": 32, "weightDecay": 0.0, "maxGradNorm": 1.0, "seed": 1},
            "checkpoint": {"intervalSeconds": 60, "keep": 2, "destination": place},
            "evaluation": {"metrics": ["Perplexity"], "gates": []},
            "output": {"modelName": "m", "destination": place},
        });
        let (of, field) = pointer.rsplit_once('/').expect("a pointer");
        task.pointer_mut(of).expect("an object")[field] = value;
        serde_json::from_value(task).expect("a task")
    }

    #[rstest]
    #[case::seed("/training/seed", json!(2), false, false)]
    #[case::rank("/method/lora/rank", json!(8), false, false)]
    #[case::holdout("/dataset/holdout", json!(0.2), false, false)]
    #[case::gates("/evaluation/gates", json!([{"metric": "BLEU", "atLeast": 1.0}]), true, true)]
    #[case::metrics("/evaluation/metrics", json!(["BLEU"]), true, false)]
    #[case::passes_of_a_step("/training/microBatchTokens", json!(32), true, true)]
    #[case::f32_moments_as_if_there_were_no_others("/training/optimizerState", json!("Float32"), true, true)]
    #[case::moments("/training/optimizerState", json!("Int8"), false, false)]
    #[case::attempt("/attempt", json!(2), true, true)]
    #[case::place("/base/source/uri", json!("pvc://data/y"), true, true)]
    #[case::interval("/checkpoint/intervalSeconds", json!(1), true, true)]
    fn what_decides_the_result_is_the_identity(
        #[case] pointer: &str,
        #[case] value: Value,
        #[case] same_run: bool,
        #[case] same_inputs: bool,
    ) {
        let plain = task("/attempt", json!(1));
        let first = Identity::of(&plain, "base", "rows");
        let other = Identity::of(&task(pointer, value), "base", "rows");
        assert_eq!((other.run == first.run, other.inputs == first.inputs), (same_run, same_inputs));
        assert_ne!(Identity::of(&plain, "base", "others").run, first.run);
        assert_ne!(Identity::of(&plain, "another", "rows").run, first.run);
        assert_eq!((first.run.len(), first.inputs.len()), (32, 32));
    }
}
