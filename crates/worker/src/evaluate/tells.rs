//! Whether held-out rows can tell what is asked of them; found out before hours are spent on it.
use lathe_contract::{DatasetInput, EvaluationPolicy, Metric};

use crate::failure::{Done, Halt};

/// What there is to measure with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldOut {
    /// A row with an answer whose probability can be measured.
    pub rows: bool,
    /// A question whose answer can be compared.
    pub questions: bool,
}

/// Refuses gates, and metrics of rows that were asked to be held out, that `held` cannot tell. Without such rows nothing is
/// measured, which only a gate minds: the schema's default asks for a metric in every job.
///
/// # Errors
/// `InvalidSettings` with the field, what is allowed and the next step.
pub fn can_be_told(policy: &EvaluationPolicy, dataset: &DatasetInput, held: HeldOut) -> Done<()> {
    for gate in &policy.gates {
        let metric = gate.metric.as_str();
        if !policy.metrics.contains(&gate.metric) {
            let cause = format!("`evaluation.gates`: {metric} must be one of `evaluation.metrics`");
            return Err(refused(cause, "name it there too, or leave out its gate"));
        }
        told(gate.metric, "evaluation.gates", dataset, held)?;
    }
    if is_asked(dataset) {
        policy.metrics.iter().try_for_each(|&metric| told(metric, "evaluation.metrics", dataset, held))?;
    }
    Ok(())
}

fn told(metric: Metric, field: &str, dataset: &DatasetInput, held: HeldOut) -> Done<()> {
    let (tells, needs) = match metric {
        Metric::Perplexity => (held.rows, "with something to learn within `training.sequenceLength`"),
        _ => (
            held.questions,
            "with prompt and answer (Chat, PromptCompletion) within `training.sequenceLength`",
        ),
    };
    if tells {
        return Ok(());
    }
    let metric = metric.as_str();
    let cause =
        format!("`{field}`: {metric} must have held-out rows {needs}; there is none in {}", part(dataset));
    let next = if held.rows {
        "leave out that metric, or hold out such rows"
    } else {
        "set `dataset.evaluation` to a file with such rows, or in its place `dataset.holdout`, where `dataset.train` has at least two different ones"
    };
    Err(refused(cause, next))
}

fn is_asked(dataset: &DatasetInput) -> bool {
    dataset.evaluation.is_some() || dataset.holdout.is_some_and(|share| share > 0.0)
}

/// Where held-out rows come from.
fn part(dataset: &DatasetInput) -> String {
    match (&dataset.evaluation, dataset.holdout) {
        (Some(_), _) => "`dataset.evaluation`".to_owned(),
        (None, Some(share)) => format!("{share} of `dataset.train` (`dataset.holdout`)"),
        (None, None) => "this dataset (neither `dataset.evaluation` nor `dataset.holdout` is set)".to_owned(),
    }
}

fn refused(cause: String, next: &str) -> Halt {
    Halt::user("InvalidSettings", cause, next)
}
