//! What a Model is, and whether it can be used.
use lathe_api::{Model, ModelStatus, ShapeStatus, WeightStatus, conditions};
use lathe_contract::InspectReport;

use crate::{Rejection, count, quantity};

/// Bytes of `sha256:` and 64 digits: what is longer or shorter is none.
const DIGEST: usize = 71;

/// Why a Model cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unready {
    /// The cause and the next step.
    pub why: Rejection,
    /// Only a person can help; false: something that is under way may.
    pub stalled: bool,
}

/// Writes what an inspection found into the status, within the bounds of its schema.
pub fn record(status: &mut ModelStatus, report: &InspectReport) {
    let adapter = report.shape.hidden == 0;
    let positive = |value: i64| u64::try_from(value).unwrap_or(0);
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let bytes = report.weights.iter().map(|w| positive(w.bytes)).fold(0, u64::saturating_add);
    status.architecture = Some(text(&report.architecture).unwrap_or_else(|| "unknown".to_owned()));
    status.parameters = Some(count(positive(report.parameters)));
    status.context_length = Some(report.context_length.clamp(0, 1 << 30)).filter(|_| !adapter);
    status.size = Some(quantity(bytes));
    let digest = |found: &str| (found.len() == DIGEST).then(|| found.to_owned());
    status.digest = digest(&report.digest);
    status.weights_digest = digest(&report.weights_digest);
    status.fingerprint = digest(&report.fingerprint);
    status.license = text(&report.license);
    status.license_needs_acceptance = report.license_needs_acceptance;
    let mut weights: Vec<WeightStatus> = Vec::new();
    for w in report.weights.iter().take(8) {
        // A map by precision in the schema: a name that comes twice would be refused.
        if !weights.iter().any(|known| known.precision == w.precision) {
            let precision = w.precision.chars().take(64).collect();
            weights.push(WeightStatus { precision, bytes: w.bytes.clamp(0, (1 << 53) - 1) });
        }
    }
    status.weights = weights;
    status.rank = i32::try_from(report.rank).ok().filter(|rank| adapter && (1..=65536).contains(rank));
    status.shape = (!adapter).then(|| {
        let s = &report.shape;
        ShapeStatus {
            vocab: s.vocab.clamp(0, 1 << 24),
            hidden: s.hidden.clamp(0, 1 << 20),
            layers: s.layers.clamp(0, 1 << 16),
            heads: s.heads.clamp(0, 1 << 16),
            kv_heads: s.kv_heads.clamp(0, 1 << 16),
            head_dim: s.head_dim.clamp(0, 1 << 16),
            intermediate: s.intermediate.clamp(0, 1 << 22),
            tie_embeddings: s.tie_embeddings,
            qkv_bias: s.qkv_bias,
        }
    });
}

/// Whether an inspected Model can be used: a sentence on what it is. `base` is the Model of `spec.adapterOf`.
///
/// # Errors
/// The first check that has something to say: [`Unready`].
pub fn judge(model: &Model, status: &ModelStatus, base: Option<&Model>) -> Result<String, Unready> {
    let checks = [license, kind, adapter_base, gates];
    if let Some(unready) = checks.iter().find_map(|check| check(model, status, base)) {
        return Err(unready);
    }
    let word = |text: &Option<String>| text.clone().unwrap_or_default();
    let (architecture, parameters) = (word(&status.architecture), word(&status.parameters));
    Ok(format!("{architecture} with {parameters} parameters in {}", word(&status.size)))
}

/// True where the Model's summary condition holds.
#[must_use]
pub fn is_ready(model: &Model) -> bool {
    model.status.as_ref().is_some_and(|status| conditions::is_true(&status.conditions, conditions::READY))
}

fn unready(reason: &'static str, message: String, stalled: bool) -> Option<Unready> {
    Some(Unready { why: Rejection::new(reason, message), stalled })
}

fn license(model: &Model, status: &ModelStatus, _: Option<&Model>) -> Option<Unready> {
    if !status.license_needs_acceptance {
        return None;
    }
    let named = status.license.as_deref().unwrap_or_default();
    let accepted = model.spec.license.as_ref().map(|l| l.accept.as_str());
    if accepted == Some(named) {
        return None;
    }
    let found = accepted.map_or(String::new(), |other| format!(" (found {other})"));
    let next = format!("Next: read it, then set `spec.license.accept` to {named}{found}.");
    let message = format!("the files name the licence {named}, which asks for acceptance. {next}");
    unready("LicenseNotAccepted", message, true)
}

fn kind(model: &Model, status: &ModelStatus, _: Option<&Model>) -> Option<Unready> {
    let is_adapter = status.shape.is_none();
    match (&model.spec.adapter_of, is_adapter) {
        (None, true) => {
            let next = "Next: make a new Model with `spec.adapterOf.name` set to its base.";
            let message = format!("the files are a LoRA adapter, and no base is named. {next}");
            unready("AdapterBaseMissing", message, true)
        }
        (Some(of), false) => {
            let next = "Next: make a new Model without `spec.adapterOf`.";
            let message =
                format!("`spec.adapterOf` names {}, but the files are whole weights. {next}", of.name);
            unready("NotAnAdapter", message, true)
        }
        _ => None,
    }
}

fn adapter_base(model: &Model, _: &ModelStatus, base: Option<&Model>) -> Option<Unready> {
    let name = &model.spec.adapter_of.as_ref()?.name;
    match base {
        None => {
            let next = format!("Next: make Model {name}, or a new Model with another `spec.adapterOf`.");
            unready("BaseNotFound", format!("its base, Model {name}, is not there. {next}"), false)
        }
        Some(base) if base.spec.adapter_of.is_some() => {
            let next = "Next: make a new Model whose `spec.adapterOf` is no adapter.";
            let message = format!("its base, Model {name}, is an adapter itself. {next}");
            unready("AdapterBaseUnsupported", message, true)
        }
        Some(base) if !is_ready(base) => {
            let next = format!("Next: `kubectl describe model {name}` says why.");
            unready("BaseNotReady", format!("its base, Model {name}, is not ready. {next}"), false)
        }
        Some(_) => None,
    }
}

/// A job's result that is not as good as the job asked for: nothing uses it by accident.
fn gates(model: &Model, _: &ModelStatus, _: Option<&Model>) -> Option<Unready> {
    let from = model.spec.derived_from.as_ref().filter(|from| !from.failed_gates.is_empty())?;
    let next =
        "Next: tune again; to use it all the same, remove `spec.derivedFrom.failedGates` from this Model.";
    let message =
        format!("it failed the gates of FineTuneJob {}: {}. {next}", from.job, from.failed_gates.join("; "));
    unready("GateFailed", message, true)
}
