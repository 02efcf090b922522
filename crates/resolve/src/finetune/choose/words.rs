//! The choice in words: the plan for the status, or why nothing fits and what would.
use lathe_api::{FineTuneJobSpec, PlanLine, PlanStatus};
use lathe_contract::OptimizerState;
use lathe_plan::{ModelShape, PlanError, Totals, estimate::Estimate};

use super::{Fit, Passed, consider};
use crate::{
    Rejection,
    finetune::{TrainFacts, method_name, task},
    profiles::{count, quantity},
};

const OPTIMIZER_STATE: &str = "optimizerState";

/// What a plan costs of the result's quality, where it does: for whoever reads no list of choices.
pub fn caveat(plan: &PlanStatus) -> Option<&'static str> {
    let int8 = format!("{:?}", OptimizerState::Int8);
    let holds = plan.choices.iter().any(|choice| choice.name == OPTIMIZER_STATE && choice.value == int8);
    holds.then_some("the optimizer's moments are held in 8 bits, since in Float32 they do not fit")
}

/// Why a job does not fit one profile.
pub(super) struct TooSmall {
    /// Bytes of the least arrangement.
    pub needed: u64,
    pub totals: Totals,
    /// Bytes that are allowed.
    pub held: u64,
    pub count: i32,
    /// The limit is the pod's own `spec.pod.memory`.
    pub by_pod: bool,
}

pub(super) fn status(
    spec: &FineTuneJobSpec,
    fit: &Fit<'_>,
    cpu_millis: i64,
    estimate: Option<Estimate>,
) -> PlanStatus {
    let line = |name: &str, value: String| PlanLine { name: name.to_owned(), value };
    let Totals { weights, gradients, optimizer, activations, workspace, cache } = fit.plan.totals;
    let rows = [
        ("weights", weights),
        ("gradients", gradients),
        ("optimizer", optimizer),
        ("activations", activations),
        ("workspace", workspace + cache),
        ("total", fit.plan.totals.total()),
    ];
    let micro = fit.plan.micro_batch_tokens;
    let batch = usize::try_from(spec.training.batch_tokens).unwrap_or(micro);
    let own = spec.pod.as_ref();
    let cpu = own.and_then(|p| p.cpu.as_ref()).map_or_else(|| format!("{cpu_millis}m"), |c| c.0.clone());
    let memory = own.and_then(|p| p.memory.as_ref()).map_or_else(|| quantity(fit.memory), |m| m.0.clone());
    let mut choices = vec![
        line("microBatchTokens", micro.to_string()),
        line("accumulation", batch.div_ceil(micro.max(1)).to_string()),
        line("recompute", fit.plan.recompute.to_string()),
        line("weights", format!("{:?}", fit.plan.weights)),
        line(OPTIMIZER_STATE, format!("{:?}", task::optimizer_state(&fit.plan))),
        line("cpu", cpu),
        line("memory", memory),
    ];
    if spec.training.epochs.is_none() && spec.training.steps.is_none() {
        choices.push(line("epochs", task::EPOCHS.to_string()));
    }
    let price = fit.profile.spec.price.as_ref();
    PlanStatus {
        profile: fit.profile.metadata.name.clone(),
        count: Some(fit.count),
        memory: rows.map(|(name, bytes)| line(name, quantity(bytes))).to_vec(),
        choices,
        duration: estimate.and_then(|e| duration(e.seconds)),
        cost: estimate.zip(price).map(|(e, price)| format!("{:.2} {}", e.cost, price.currency)),
    }
}

/// In the form of the API's durations; `None` beyond what it can say.
fn duration(seconds: f64) -> Option<lathe_api::Duration> {
    if !(0.0..3.6e9).contains(&seconds) {
        return None;
    }
    let seconds = seconds.ceil() as i64;
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let text = match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, _) => format!("{minutes}m{rest}s"),
        _ => format!("{hours}h{minutes}m"),
    };
    Some(lathe_api::Duration(text))
}

pub(super) fn invalid(error: &PlanError) -> Rejection {
    Rejection::new("InvalidSettings", format!("{error}. Next: make a new FineTuneJob with such a value."))
}

/// One true cause for all profiles that were passed over, and the next step.
pub(super) fn rejection(
    spec: &FineTuneJobSpec,
    facts: &TrainFacts<'_>,
    shape: &ModelShape,
    passed: &[(String, Passed)],
) -> Rejection {
    if passed.is_empty() {
        let next = "Next: make one, or restart the operator, which applies its catalogue.";
        return Rejection::new("ProfileNotFound", format!("there is no AcceleratorProfile. {next}"));
    }
    let too_small = passed.iter().filter_map(|(name, why)| match why {
        Passed::TooSmall(too_small) => Some((name, too_small)),
        _ => None,
    });
    if let Some((name, largest)) = too_small.max_by_key(|(_, too_small)| too_small.held) {
        return does_not_fit(spec, facts, shape, name, largest);
    }
    let why = |passed: &Passed| match passed {
        Passed::Unknown => "there is no such AcceleratorProfile".to_owned(),
        Passed::NoRuntime => "there is no worker for its runtime yet, and it names no `image`".to_owned(),
        Passed::Count(why) => why.clone(),
        Passed::TooSmall(_) => String::new(),
    };
    let list: Vec<String> = passed.iter().map(|(name, reason)| format!("{name}: {}", why(reason))).collect();
    let list = list.join("; ");
    if passed.iter().any(|(_, why)| matches!(why, Passed::Count(_))) {
        let next = "Next: leave `spec.accelerator.count` out, or set it to 1, in a new FineTuneJob.";
        return Rejection::new("CountUnsupported", format!("{list}. {next}"));
    }
    if passed.iter().any(|(_, why)| matches!(why, Passed::NoRuntime)) {
        let next = "Next: add the profile `cpu` to `spec.accelerator.profiles`, or set the profile's `spec.image` to a worker built for it.";
        return Rejection::new("RuntimeUnavailable", format!("{list}. {next}"));
    }
    let next = "Next: `kubectl get acceleratorprofiles` lists them; correct `spec.accelerator.profiles`.";
    Rejection::new("ProfileNotFound", format!("{list}. {next}"))
}

fn does_not_fit(
    spec: &FineTuneJobSpec,
    facts: &TrainFacts<'_>,
    shape: &ModelShape,
    name: &str,
    largest: &TooSmall,
) -> Rejection {
    let TooSmall { needed, totals, held, count: devices, by_pod } = *largest;
    let held = if by_pod {
        format!("`spec.pod.memory` allows {}", quantity(held))
    } else {
        format!("the largest allowed is {devices} x {name} with {} to use", quantity(held))
    };
    let process = if by_pod { ", and the process itself" } else { "" };
    let message = format!(
        "{} of {} parameters with rows of {} tokens needs at least {} ({totals}{process}); {held}. Next: {}.",
        method_name(spec),
        count(shape.parameters()),
        spec.training.sequence_length,
        quantity(needed),
        next_step(spec, facts, shape),
    );
    Rejection::new("DoesNotFit", message)
}

/// Something that was tried and fits, or the general advice.
fn next_step(spec: &FineTuneJobSpec, facts: &TrainFacts<'_>, shape: &ModelShape) -> String {
    let mut open = spec.clone();
    if let Some(pod) = &mut open.pod {
        pod.memory = None;
    }
    let fits = |spec: &FineTuneJobSpec, profile| {
        let method = task::method(spec).ok()?;
        consider(spec, facts, shape, &method, Some(profile)).ok()?.ok()
    };
    if spec.trainable.full.is_some() {
        let mut lora = open.clone();
        lora.trainable = lathe_api::Trainable::default();
        let named = |name: &Option<String>| {
            let allowed = &spec.accelerator.profiles;
            allowed.is_empty() || name.as_ref().is_some_and(|name| allowed.contains(name))
        };
        let found = facts.profiles.iter().filter(|p| named(&p.metadata.name)).find_map(|p| fits(&lora, p));
        if let Some(fit) = found {
            let bytes = quantity(fit.plan.totals.total());
            return format!("make a new FineTuneJob with `trainable.lora`, which needs {bytes}");
        }
    }
    if let Some(fit) = crate::profiles::by_price(facts.profiles).into_iter().find_map(|p| fits(&open, p)) {
        let profile = fit.profile.metadata.name.as_deref().unwrap_or_default();
        let allowed = &spec.accelerator.profiles;
        if !allowed.is_empty() && !allowed.iter().any(|name| name == profile) {
            return format!("add {profile} to `spec.accelerator.profiles`, where it fits");
        }
        return format!(
            "set `spec.pod.memory` to {} in a new FineTuneJob, or leave it out",
            quantity(fit.memory)
        );
    }
    "lower `training.sequenceLength`, or take a smaller model".to_owned()
}
