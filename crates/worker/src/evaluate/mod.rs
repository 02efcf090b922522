//! A model's scores on held-out rows, without changing it.
pub mod measure;
pub mod tells;

use lathe_contract::{EvaluateReport, EvaluateTask, Metric, ModelInput, Outcome, Phase, Score};
use lathe_engine::{Adapter, Hyper, Model, Schedule, Trainer};
use lathe_plan::{LoraSpec, Target, TrainMethod, TrainRequest, plan_training};

use crate::base::{Base, memory_limit, stored_precision};
use crate::context::Context;
use crate::data::{Files, encode_held};
use crate::failure::{Done, Halt};
use crate::train::artefact::read_lora;
use measure::Exam;

/// Measures a base, or a base with an adapter.
///
/// # Errors
/// The files cannot be read or do not fit together, or there is nothing to measure with.
pub fn run(context: &Context, task: &EvaluateTask) -> Done<Outcome> {
    context.status.phase(Phase::Fetching, "fetching model and rows");
    let base = Base::fetch(context, &task.base)?;
    let adapter = task.adapter.as_ref().map(|adapter| fetch_adapter(context, adapter, &base)).transpose()?;
    let files = Files::fetch(context, &task.dataset)?;
    context.status.phase(Phase::Loading, "reading rows and weights");
    let sequence_length = usize::try_from(task.sequence_length).unwrap_or_default();
    // Without an evaluation file or a share, every row is one to measure with.
    let rows = files.read(&task.dataset)?;
    let held =
        encode_held(context, rows.held.as_ref().unwrap_or(&rows.train), &base.encoder(sequence_length))?;
    let exam = Exam::new(&held, &task.metrics);
    if exam.size().rows == 0 {
        let next = "set `dataset.evaluation` to rows with answers";
        return Err(Halt::user("EmptyDataset", "there is no row to measure with", next));
    }
    let weights = base.weights()?;
    let model = base.load(&weights, stored_precision(&weights))?;
    context.status.phase(Phase::EvaluatingBefore, "measuring");
    let (answers, model) = exam.answers(context, &base, model, adapter.as_ref())?;
    let perplexity = if task.metrics.contains(&Metric::Perplexity) {
        let mut scorer = scorer(&base, model, adapter.as_ref(), sequence_length)?;
        exam.perplexity(context, |rows| scorer.log_probs(rows))?
    } else {
        None
    };
    let measured = exam.measured(perplexity, answers);
    let score =
        |(metric, value): &(Metric, f64)| Score { metric: *metric, before: None, after: Some(*value) };
    let scores = measured.values.iter().map(score).collect();
    Ok(Outcome::Evaluated(EvaluateReport { scores, measured: exam.size() }))
}

fn fetch_adapter(context: &Context, input: &ModelInput, base: &Base) -> Done<Adapter> {
    let what = format!("adapter `{}`", input.name);
    let (fetched, _) = context.fetch_model(&what, input)?;
    read_lora(&fetched.dir, &base.config.shape, &base.weights_digest).map_err(|halt| halt.of(&what))
}

/// A trainer that only looks: the smallest one that can hold the adapter.
fn scorer(base: &Base, model: Model, adapter: Option<&Adapter>, sequence_length: usize) -> Done<Trainer> {
    let smallest = LoraSpec { rank: 1, alpha: 1.0, dropout: 0.0, targets: [Target::Q].into() };
    let request = TrainRequest {
        method: TrainMethod::Lora(adapter.map_or(smallest, |adapter| adapter.spec().clone())),
        weights: model.precision(),
        max_row_tokens: sequence_length,
        batch_tokens: sequence_length,
        micro_batch_tokens: None,
        recompute: Some(true),
        optimizer_state: None,
        threads: model.threads(),
        memory_limit: memory_limit(),
    };
    let plan = plan_training(&base.config.shape, &request).map_err(lathe_engine::Error::from)?;
    let idle = Hyper {
        learning_rate: 0.0,
        schedule: Schedule::Constant,
        warmup_steps: 0,
        total_steps: 1,
        weight_decay: 0.0,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        max_grad_norm: None,
        seed: 0,
    };
    let mut trainer = Trainer::new(model, &plan, idle)?;
    if let Some(adapter) = adapter {
        trainer.set_adapter(adapter)?;
    }
    Ok(trainer)
}
