//! The API's types to the contract's and the plan's.
use lathe_api::{Decimal, Metric, Model, Schedule, ScoreStatus};
use lathe_contract as contract;
use lathe_plan::{ModelShape, RopeScaling};

/// The shape that plans are made from; `None` for an adapter and before inspection.
#[must_use]
pub fn shape_of(model: &Model) -> Option<ModelShape> {
    let status = model.status.as_ref()?;
    let shape = status.shape.as_ref()?;
    let size = |value: i64| usize::try_from(value).ok().filter(|v| *v > 0);
    Some(ModelShape {
        vocab: size(shape.vocab)?,
        hidden: size(shape.hidden)?,
        layers: size(shape.layers)?,
        heads: size(shape.heads)?,
        kv_heads: size(shape.kv_heads)?,
        head_dim: size(shape.head_dim)?,
        intermediate: size(shape.intermediate)?,
        max_position: size(status.context_length.unwrap_or(0))?,
        qkv_bias: shape.qkv_bias,
        tie_embeddings: shape.tie_embeddings,
        // Frequencies, windows and epsilons change no buffer; the worker reads its own from config.json.
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        sliding_window: None,
        rms_eps: 1e-5,
    })
}

/// The digest that a reader of this model must find: the one its owner pinned, or the one that was inspected.
#[must_use]
pub fn digest_of(model: &Model) -> Option<String> {
    let inspected = model.status.as_ref().and_then(|s| s.digest.clone());
    model.spec.source.digest.clone().or(inspected).filter(|d| !d.is_empty())
}

/// What the inspection knows of files on a volume, beside their digest.
#[must_use]
pub fn inspected(model: &Model) -> Option<contract::Inspected> {
    let status = model.status.as_ref()?;
    let (fingerprint, weights_digest) = (status.fingerprint.clone()?, status.weights_digest.clone()?);
    // It was taken of the files that have this digest.
    let same = status.digest.is_some() && status.digest == digest_of(model);
    same.then_some(contract::Inspected { fingerprint, weights_digest })
}

/// A metric of the API as the contract writes it.
#[must_use]
pub fn to_metric(metric: Metric) -> contract::Metric {
    match metric {
        Metric::Perplexity => contract::Metric::Perplexity,
        Metric::BLEU => contract::Metric::BLEU,
        Metric::ROUGE1 => contract::Metric::ROUGE1,
        Metric::ROUGE2 => contract::Metric::ROUGE2,
        Metric::ROUGEL => contract::Metric::ROUGEL,
    }
}

/// A measurement as the API writes it; what is no finite number above zero is left out.
#[must_use]
pub fn to_score(score: &contract::Score) -> Option<ScoreStatus> {
    let metric = match score.metric {
        contract::Metric::Perplexity => Metric::Perplexity,
        contract::Metric::BLEU => Metric::BLEU,
        contract::Metric::ROUGE1 => Metric::ROUGE1,
        contract::Metric::ROUGE2 => Metric::ROUGE2,
        contract::Metric::ROUGEL => Metric::ROUGEL,
    };
    let number =
        |value: Option<f64>| value.filter(|v| (0.0..1e11).contains(v)).map(|v| Decimal(format!("{v:.4}")));
    let (before, after) = (number(score.before), number(score.after));
    (before.is_some() || after.is_some()).then_some(ScoreStatus { metric, before, after })
}

/// A schedule of the API as the contract writes it.
#[must_use]
pub fn to_schedule(schedule: Schedule) -> contract::Schedule {
    match schedule {
        Schedule::Constant => contract::Schedule::Constant,
        Schedule::Linear => contract::Schedule::Linear,
        Schedule::Cosine => contract::Schedule::Cosine,
    }
}
