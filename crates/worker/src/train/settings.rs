//! A training task's settings: checked numbers, and the identity of what decides the result.
use lathe_contract::{
    OptimizerState as StoredState, Precision as Stored, Schedule as Course, TrainMethod as Method, TrainTask,
};
use lathe_engine::{Hyper, Schedule};
use lathe_plan::{LoraSpec, ModelShape, OptimizerState, Precision, Target, TrainMethod, TrainRequest};

use super::order::Extent;
use crate::base::memory_limit;
use crate::failure::{Done, Halt};

/// Numbers of the contract in the types of the engine.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What is trained.
    pub method: TrainMethod,
    /// How the weights are held; none = as they are stored.
    pub precision: Option<Precision>,
    /// Tokens of a row, at most.
    pub sequence_length: usize,
    /// Tokens of a step, at most.
    pub batch_tokens: usize,
    /// How long.
    pub extent: Extent,
    /// Of the rows' order and the adapter.
    pub seed: u64,
    micro_batch_tokens: usize,
    optimizer_state: OptimizerState,
}

impl Settings {
    /// Checks the task's numbers.
    ///
    /// # Errors
    /// `InvalidSettings` with the field.
    pub fn of(task: &TrainTask) -> Done<Self> {
        let training = &task.training;
        let extent = match (training.epochs, training.steps) {
            (Some(epochs), None) if epochs > 0.0 && epochs.is_finite() => Extent::Epochs(epochs),
            (None, Some(steps)) if steps > 0 => Extent::Steps(steps as u64),
            _ => {
                return Err(invalid("exactly one of `epochs` and `steps` must be set, to a positive number"));
            }
        };
        let positive = |field: &str, value: i64| match usize::try_from(value) {
            Ok(value) if value > 0 => Ok(value),
            _ => Err(invalid(&format!("`{field}` must be positive (found {value})"))),
        };
        let (method, precision) = match &task.method {
            Method::Full {} => (TrainMethod::Full, None),
            Method::Lora(lora) => {
                let target = |name: &String| {
                    Target::from_name(name).ok_or_else(|| {
                        let all = Target::ALL.map(Target::name).join(", ");
                        invalid(&format!("`targets` must be of {all} (found {name})"))
                    })
                };
                let spec = LoraSpec {
                    rank: positive("rank", lora.rank.into())?,
                    alpha: lora.alpha as f32,
                    dropout: lora.dropout as f32,
                    targets: lora.targets.iter().map(target).collect::<Done<_>>()?,
                };
                let precision = match lora.base_precision {
                    Stored::Float32 => Precision::F32,
                    Stored::BFloat16 => Precision::BF16,
                    Stored::Int8 | Stored::Int4 => {
                        return Err(invalid("`basePrecision` must be Float32 or BFloat16"));
                    }
                };
                (TrainMethod::Lora(spec), Some(precision))
            }
        };
        if !(training.learning_rate.is_finite() && training.learning_rate > 0.0) {
            return Err(invalid("`learningRate` must be positive"));
        }
        Ok(Settings {
            method,
            precision,
            sequence_length: positive("sequenceLength", training.sequence_length)?,
            batch_tokens: positive("batchTokens", training.batch_tokens)?,
            extent,
            seed: training.seed as u64,
            micro_batch_tokens: positive("microBatchTokens", training.micro_batch_tokens)?,
            optimizer_state: match training.optimizer_state {
                StoredState::Float32 => OptimizerState::F32,
                StoredState::Int8 => OptimizerState::Int8,
            },
        })
    }

    /// What to plan for.
    pub fn request(&self, precision: Precision, threads: usize) -> TrainRequest {
        TrainRequest {
            method: self.method.clone(),
            weights: precision,
            max_row_tokens: self.sequence_length,
            batch_tokens: self.batch_tokens,
            micro_batch_tokens: Some(self.micro_batch_tokens),
            recompute: None,
            // It decides the result: what was planned is what is done.
            optimizer_state: Some(self.optimizer_state),
            threads,
            memory_limit: memory_limit(),
        }
    }

    /// Refuses rows longer than the model's context.
    ///
    /// # Errors
    /// `InvalidSettings`.
    pub fn fits(&self, shape: &ModelShape) -> Done<()> {
        if self.sequence_length <= shape.max_position && self.sequence_length >= 2 {
            return Ok(());
        }
        let (most, found) = (shape.max_position, self.sequence_length);
        Err(invalid(&format!("`sequenceLength` must be 2 to {most}, the model's context (found {found})")))
    }
}

fn invalid(cause: &str) -> Halt {
    Halt::user("InvalidSettings", cause, "correct `spec.training` or `spec.trainable`")
}

/// The optimizer's settings for a run of `steps` steps.
pub fn hyper(task: &TrainTask, steps: u64) -> Hyper {
    let training = &task.training;
    Hyper {
        learning_rate: training.learning_rate,
        schedule: match training.schedule {
            Course::Constant => Schedule::Constant,
            Course::Linear => Schedule::Linear,
            Course::Cosine => Schedule::Cosine,
        },
        warmup_steps: (training.warmup.clamp(0.0, 1.0) * steps as f64).ceil() as u64,
        total_steps: steps,
        weight_decay: training.weight_decay,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        max_grad_norm: Some(training.max_grad_norm).filter(|norm| *norm > 0.0),
        seed: training.seed as u64,
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn task() -> Value {
        let place = json!({"uri": "pvc://data/x"});
        json!({
            "attempt": 1,
            "base": {"name": "b", "source": place},
            "dataset": {"train": place, "holdout": 0.1, "format": "Auto"},
            "method": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj"], "basePrecision": "BFloat16"}},
            "training": {"epochs": 2.0, "learningRate": 1e-3, "schedule": "Cosine", "warmup": 0.1, "batchTokens": 64,
                "microBatchTokens": 64, "sequenceLength": 32, "weightDecay": 0.0, "maxGradNorm": 1.0, "seed": 1},
            "checkpoint": {"intervalSeconds": 60, "keep": 2, "destination": place},
            "evaluation": {"metrics": ["Perplexity"], "gates": []},
            "output": {"modelName": "m", "destination": place},
        })
    }

    fn changed(pointer: &str, value: Value) -> TrainTask {
        let mut task = task();
        *task.pointer_mut(pointer).expect("a field") = value;
        serde_json::from_value(task).unwrap()
    }

    #[rstest]
    #[case::nothing_said(json!(null), OptimizerState::F32)]
    #[case::f32(json!("Float32"), OptimizerState::F32)]
    #[case::int8(json!("Int8"), OptimizerState::Int8)]
    fn moments_are_held_as_planned(#[case] value: Value, #[case] expected: OptimizerState) {
        let mut task = task();
        if !value.is_null() {
            task["training"]["optimizerState"] = value;
        }
        let task = serde_json::from_value(task).unwrap();
        let Ok(settings) = Settings::of(&task) else { panic!("refused") };
        assert_eq!(settings.request(Precision::BF16, 1).optimizer_state, Some(expected));
    }

    #[rstest]
    #[case("/training/epochs", json!(0.0), "`epochs`")]
    #[case("/training/batchTokens", json!(0), "`batchTokens`")]
    #[case("/training/learningRate", json!(0.0), "`learningRate`")]
    #[case("/method/lora/targets", json!(["c_attn"]), "c_attn")]
    #[case("/method/lora/rank", json!(-1), "`rank`")]
    fn numbers_out_of_bounds_are_named(#[case] pointer: &str, #[case] value: Value, #[case] says: &str) {
        let Err(Halt::Failed(trouble)) = Settings::of(&changed(pointer, value)) else { panic!("accepted") };
        assert_eq!(trouble.reason, "InvalidSettings");
        assert!(trouble.cause.contains(says), "{}", trouble.cause);
    }
}
