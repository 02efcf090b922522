//! The spec's fields as the contract writes them, every default filled in.
use lathe_api::{BasePrecision, DatasetFormat, Decimal, FineTuneJobSpec};
use lathe_contract as contract;
use lathe_contract::{
    CheckpointPolicy, DatasetInput, EvaluationPolicy, LoraSettings, OptimizerState, Precision, SourceRef,
    TrainMethod, TrainingSettings,
};
use lathe_plan::{Target, TrainPlan};

use super::located;
use crate::{
    Rejection,
    pod::{Mounts, Use},
    to_metric, to_schedule,
};

/// Passes where neither `epochs` nor `steps` is set.
pub(super) const EPOCHS: i32 = 3;

/// What is changed, with `AllLinear` resolved.
pub(super) fn method(spec: &FineTuneJobSpec) -> Result<TrainMethod, Rejection> {
    let Some(lora) = &spec.trainable.lora else { return Ok(TrainMethod::Full {}) };
    let mut targets = Vec::new();
    for name in &lora.targets {
        if name == "AllLinear" {
            targets = Target::ALL.map(|target| target.name().to_owned()).to_vec();
            break;
        }
        if Target::from_name(name).is_none() {
            let all = Target::ALL.map(Target::name).join(", ");
            let message = format!(
                "`trainable.lora.targets` must be AllLinear or of {all} (found {name}). Next: make a new FineTuneJob with such targets."
            );
            return Err(Rejection::new("UnknownTarget", message));
        }
        targets.push(name.clone());
    }
    Ok(TrainMethod::Lora(LoraSettings {
        rank: lora.rank,
        alpha: lora.alpha,
        dropout: number("trainable.lora.dropout", &lora.dropout)?,
        targets,
        base_precision: match lora.base_precision {
            BasePrecision::BFloat16 => Precision::BFloat16,
            BasePrecision::Float32 => Precision::Float32,
        },
    }))
}

pub(super) fn settings(spec: &FineTuneJobSpec, plan: &TrainPlan) -> Result<TrainingSettings, Rejection> {
    let training = &spec.training;
    let epochs = match (training.epochs, training.steps) {
        (None, Some(_)) => None,
        (epochs, _) => Some(f64::from(epochs.unwrap_or(EPOCHS))),
    };
    Ok(TrainingSettings {
        epochs,
        steps: training.steps.map(i64::from).filter(|_| epochs.is_none()),
        learning_rate: number("training.learningRate", &training.learning_rate)?,
        schedule: to_schedule(training.schedule),
        warmup: number("training.warmup", &training.warmup)?,
        batch_tokens: training.batch_tokens.into(),
        micro_batch_tokens: i64::try_from(plan.micro_batch_tokens).unwrap_or(i64::MAX),
        optimizer_state: optimizer_state(plan),
        sequence_length: training.sequence_length.into(),
        weight_decay: number("training.weightDecay", &training.weight_decay)?,
        max_grad_norm: number("training.maxGradNorm", &training.max_grad_norm)?,
        seed: training.seed,
    })
}

/// As the contract and the status name it.
pub(super) fn optimizer_state(plan: &TrainPlan) -> OptimizerState {
    match plan.optimizer_state {
        lathe_plan::OptimizerState::F32 => OptimizerState::Float32,
        lathe_plan::OptimizerState::Int8 => OptimizerState::Int8,
    }
}

pub(super) fn dataset(mounts: &mut Mounts, spec: &FineTuneJobSpec) -> Result<DatasetInput, Rejection> {
    let dataset = &spec.dataset;
    let evaluation = dataset.evaluation.as_ref();
    let holdout = dataset.holdout.as_ref();
    Ok(DatasetInput {
        train: located(mounts, &dataset.train, "dataset.train", Use::Read)?,
        evaluation: evaluation.map(|l| located(mounts, l, "dataset.evaluation", Use::Read)).transpose()?,
        holdout: holdout.map(|share| number("dataset.holdout", share)).transpose()?,
        format: match dataset.format {
            DatasetFormat::Auto => contract::DatasetFormat::Auto,
            DatasetFormat::Chat => contract::DatasetFormat::Chat,
            DatasetFormat::PromptCompletion => contract::DatasetFormat::PromptCompletion,
            DatasetFormat::Text => contract::DatasetFormat::Text,
        },
    })
}

pub(super) fn checkpoint(
    spec: &FineTuneJobSpec,
    destination: SourceRef,
) -> Result<CheckpointPolicy, Rejection> {
    let interval = &spec.checkpoint.interval;
    let Some(interval_seconds) = interval.seconds() else {
        let message = format!("`checkpoint.interval` must be a duration such as 5m (found {interval})");
        return Err(Rejection::new("InvalidSettings", message));
    };
    Ok(CheckpointPolicy { interval_seconds, keep: spec.checkpoint.keep, destination })
}

pub(super) fn evaluation(spec: &FineTuneJobSpec) -> Result<EvaluationPolicy, Rejection> {
    let bound = |value: &Option<Decimal>| value.as_ref().map(|v| number("evaluation.gates", v)).transpose();
    let gate = |gate: &lathe_api::Gate| {
        Ok(contract::Gate {
            metric: to_metric(gate.metric),
            at_least: bound(&gate.at_least)?,
            at_most: bound(&gate.at_most)?,
            min_improvement: bound(&gate.min_improvement)?,
        })
    };
    let gates = spec.evaluation.gates.iter().map(gate).collect::<Result<_, Rejection>>()?;
    Ok(EvaluationPolicy { metrics: spec.evaluation.metrics.iter().copied().map(to_metric).collect(), gates })
}

/// The schema has checked the text; what came around it is told.
fn number(field: &str, text: &Decimal) -> Result<f64, Rejection> {
    text.value().ok_or_else(|| {
        Rejection::new("InvalidSettings", format!("`{field}` must be a number (found {text})"))
    })
}
