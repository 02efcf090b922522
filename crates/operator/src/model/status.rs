//! What is said: the facts of the inspection, and one true cause with the next step.
use lathe_api::{
    Model, ModelStatus, ShapeStatus, WeightStatus,
    conditions::{self, READY, RECONCILING, STALLED, State},
};
use lathe_contract::InspectReport;
use lathe_resolve::{count, quantity};

use super::{
    observe::Observed,
    plan::{Plan, View, is_ready},
};
use crate::pods::Trouble;

/// The sentence of `Ready`.
struct Verdict {
    ready: State,
    reason: String,
    message: String,
    /// Only a person can help.
    stalled: bool,
}

/// The whole status. `refused`: what the API server said where it took a write of this round not at all.
pub fn status(model: &Model, observed: &Observed, plan: &Plan, refused: Option<&str>) -> ModelStatus {
    let mut fresh = model.status.clone().unwrap_or_default();
    if let View::Found(report) = &plan.view {
        record(&mut fresh, report);
    }
    let verdict = match refused {
        Some(words) => Verdict {
            ready: State::False,
            reason: "WriteRefused".to_owned(),
            message: format!("{words}. Next: have that allowed; it is tried again."),
            stalled: true,
        },
        None => verdict(model, &fresh, observed, plan),
    };
    let generation = model.metadata.generation.unwrap_or(0);
    fresh.observed_generation = generation;
    let ready = verdict.ready == State::True;
    let mut set = |type_, state, reason: &str, message: &str| {
        conditions::set(&mut fresh.conditions, type_, state, reason, message, generation, observed.now);
    };
    set(READY, verdict.ready, &verdict.reason, &verdict.message);
    set(RECONCILING, State::from(!ready && !verdict.stalled), &verdict.reason, &verdict.message);
    set(STALLED, State::from(verdict.stalled), &verdict.reason, &verdict.message);
    fresh
}

fn record(status: &mut ModelStatus, report: &InspectReport) {
    let adapter = report.shape.hidden == 0;
    let positive = |value: i64| u64::try_from(value).unwrap_or(0);
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let bytes = report.weights.iter().map(|w| positive(w.bytes)).fold(0, u64::saturating_add);
    status.architecture = Some(text(&report.architecture).unwrap_or_else(|| "unknown".to_owned()));
    status.parameters = Some(count(positive(report.parameters)));
    status.context_length = Some(report.context_length.clamp(0, 1 << 30)).filter(|_| !adapter);
    status.size = Some(quantity(bytes));
    status.digest = text(&report.digest);
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

fn verdict(model: &Model, fresh: &ModelStatus, observed: &Observed, plan: &Plan) -> Verdict {
    let unread = |reason: &str, message: String, stalled| Verdict {
        ready: if stalled { State::False } else { State::Unknown },
        reason: reason.to_owned(),
        message,
        stalled,
    };
    match &plan.view {
        View::Inspecting(None) => {
            unread("Inspecting", "a pod reads the headers of the source".to_owned(), false)
        }
        View::Inspecting(Some(Trouble { reason, message, stalled })) => {
            unread(reason, message.clone(), *stalled)
        }
        View::Failed(Trouble { reason, message, .. }) => unread(reason, message.clone(), true),
        View::Found(_) | View::Known => judge(model, fresh, observed),
    }
}

/// The first check that has something to say decides.
fn judge(model: &Model, fresh: &ModelStatus, observed: &Observed) -> Verdict {
    let checks = [license, adapter, base];
    if let Some(trouble) = checks.iter().find_map(|check| check(model, fresh, observed)) {
        let Trouble { reason, message, stalled } = trouble;
        return Verdict { ready: State::False, reason, message, stalled };
    }
    let architecture = fresh.architecture.as_deref().unwrap_or_default();
    let parameters = fresh.parameters.as_deref().unwrap_or_default();
    let size = fresh.size.as_deref().unwrap_or_default();
    let message = format!("{architecture} with {parameters} parameters in {size}");
    Verdict { ready: State::True, reason: "Inspected".to_owned(), message, stalled: false }
}

fn trouble(reason: &str, message: String, stalled: bool) -> Option<Trouble> {
    Some(Trouble { reason: reason.to_owned(), message, stalled })
}

fn license(model: &Model, fresh: &ModelStatus, _: &Observed) -> Option<Trouble> {
    if !fresh.license_needs_acceptance {
        return None;
    }
    let named = fresh.license.as_deref().unwrap_or_default();
    let accepted = model.spec.license.as_ref().map(|l| l.accept.as_str());
    if accepted == Some(named) {
        return None;
    }
    let found = accepted.map_or(String::new(), |other| format!(" (found {other})"));
    let next = format!("Next: read it, then set `spec.license.accept` to {named}{found}.");
    trouble(
        "LicenseNotAccepted",
        format!("the files name the licence {named}, which asks for acceptance. {next}"),
        true,
    )
}

fn adapter(model: &Model, fresh: &ModelStatus, _: &Observed) -> Option<Trouble> {
    let is_adapter = fresh.shape.is_none();
    match (&model.spec.adapter_of, is_adapter) {
        (None, true) => {
            let next = "Next: make a new Model with `spec.adapterOf.name` set to its base.";
            trouble(
                "AdapterBaseMissing",
                format!("the files are a LoRA adapter, and no base is named. {next}"),
                true,
            )
        }
        (Some(of), false) => {
            let next = "Next: make a new Model without `spec.adapterOf`.";
            let message =
                format!("`spec.adapterOf` names {}, but the files are whole weights. {next}", of.name);
            trouble("NotAnAdapter", message, true)
        }
        _ => None,
    }
}

fn base(model: &Model, _: &ModelStatus, observed: &Observed) -> Option<Trouble> {
    let name = &model.spec.adapter_of.as_ref()?.name;
    match &observed.base {
        None => {
            let next = format!("Next: make Model {name}, or a new Model with another `spec.adapterOf`.");
            trouble("BaseNotFound", format!("its base, Model {name}, is not there. {next}"), false)
        }
        Some(base) if base.spec.adapter_of.is_some() => {
            let next = "Next: make a new Model whose `spec.adapterOf` is no adapter.";
            trouble(
                "AdapterBaseUnsupported",
                format!("its base, Model {name}, is an adapter itself. {next}"),
                true,
            )
        }
        Some(base) if !is_ready(base) => {
            let next = format!("Next: `kubectl describe model {name}` says why.");
            trouble("BaseNotReady", format!("its base, Model {name}, is not ready. {next}"), false)
        }
        Some(_) => None,
    }
}
