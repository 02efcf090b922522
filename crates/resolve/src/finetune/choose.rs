//! The profile that a job runs on, and what its pod then needs.
use lathe_api::{AcceleratorProfile, AcceleratorStrategy, FineTuneJobSpec};
use lathe_contract::{Precision as Stored, TrainMethod as Method};
use lathe_plan::{
    AdapterBudget, LoraSpec, ModelShape, PlanError, Precision, ServeRequest, Target, TrainMethod, TrainPlan,
    TrainRequest,
    estimate::{self, Estimate, Rates},
    plan_serving, plan_training,
};

use super::{TrainFacts, task::EPOCHS};
use crate::{
    Rejection,
    profiles::{candidates, image, price},
};

mod words;

pub use words::caveat;

/// Memory of the process beside what the plan lists: code, tokenizer, stacks.
const OVERHEAD: u64 = 256 << 20;
/// Memory for each token of the rows, which are held as long as training lasts: number and weight, and while they are made
/// their text.
const ROW_BYTES: u64 = 16;
/// Share of a pod's memory that the worker plans with.
const WORKER_SHARE: (u64, u64) = (9, 10);
/// Share of a device's memory that a plan may fill; the rest is the driver's.
const DEVICE_SHARE: f64 = 0.92;
/// Seconds of training that decide how many cores a job gets where the spec does not say.
const CORE_SECONDS: f64 = 1800.0;
/// Cores where neither the spec nor the number of rows says how many.
const UNCOUNTED_CORES: i32 = 4;
/// Rate of a core in floating-point operations a second, where its profile does not say.
const CORE_RATE: f64 = 50e9;
/// Cores beside a device.
const DEVICE_CORES: i64 = 4;
/// Memory beside a device, for files on their way.
const DEVICE_HOST_MEMORY: u64 = 8 << 30;
/// Answers that the worker writes at a time when it measures.
const EVALUATION_BATCH: usize = 16;

pub(super) struct Chosen<'a> {
    pub profile: &'a AcceleratorProfile,
    pub image: String,
    pub count: i32,
    pub plan: TrainPlan,
    pub cpu_millis: i64,
    pub memory: i64,
    pub status: lathe_api::PlanStatus,
}

/// A profile that holds the job.
struct Fit<'a> {
    profile: &'a AcceleratorProfile,
    image: String,
    count: i32,
    plan: TrainPlan,
    memory: u64,
    estimate: Option<Estimate>,
}

/// Why a profile was passed over.
enum Passed {
    Unknown,
    NoRuntime,
    /// Bytes needed by the least arrangement, and held.
    TooSmall(Box<words::TooSmall>),
    Count(String),
}

pub(super) fn choose<'a>(
    spec: &FineTuneJobSpec,
    facts: &TrainFacts<'a>,
    shape: &ModelShape,
    method: &Method,
) -> Result<Chosen<'a>, Rejection> {
    let (mut fits, mut passed) = (Vec::new(), Vec::new());
    for (name, profile) in candidates(&spec.accelerator.profiles, facts.profiles) {
        match consider(spec, facts, shape, method, profile)? {
            Ok(fit) => fits.push(fit),
            Err(why) => passed.push((name, why)),
        }
        if spec.accelerator.strategy == AcceleratorStrategy::InOrder && !fits.is_empty() {
            break;
        }
    }
    let best = |key: fn(&Estimate) -> f64| {
        move |a: &Fit<'_>, b: &Fit<'_>| {
            let value = |fit: &Fit<'_>| fit.estimate.as_ref().map_or(f64::INFINITY, key);
            value(a).total_cmp(&value(b))
        }
    };
    let chosen = match spec.accelerator.strategy {
        AcceleratorStrategy::InOrder => fits.into_iter().next(),
        // Without a price it costs "nothing", which says nothing: such profiles come last.
        AcceleratorStrategy::Cheapest => {
            fits.into_iter().min_by(best(|e| if e.cost > 0.0 { e.cost } else { f64::INFINITY }))
        }
        AcceleratorStrategy::Fastest => fits.into_iter().min_by(best(|e| e.seconds)),
    };
    let Some(fit) = chosen else { return Err(words::rejection(spec, facts, shape, &passed)) };
    priced(spec, fit.profile)?;
    Ok(complete(spec, facts, fit))
}

/// A limit on money needs a price.
fn priced(spec: &FineTuneJobSpec, profile: &AcceleratorProfile) -> Result<(), Rejection> {
    if spec.budget.as_ref().is_none_or(|b| b.max_cost.is_none()) || price(profile).is_some() {
        return Ok(());
    }
    let name = profile.metadata.name.as_deref().unwrap_or_default();
    let message = format!(
        "`budget.maxCost` cannot be kept: AcceleratorProfile {name} has no `price`. Next: set its `spec.price.perHour`, or use `budget.maxDuration`."
    );
    Err(Rejection::new("PriceUnknown", message))
}

fn consider<'a>(
    spec: &FineTuneJobSpec,
    facts: &TrainFacts<'_>,
    shape: &ModelShape,
    method: &Method,
    profile: Option<&'a AcceleratorProfile>,
) -> Result<Result<Fit<'a>, Passed>, Rejection> {
    let Some(profile) = profile else { return Ok(Err(Passed::Unknown)) };
    let Some(image) = image(profile, facts.images) else { return Ok(Err(Passed::NoRuntime)) };
    let cpu = profile.spec.resource == "cpu";
    let asked = spec.accelerator.count;
    let count = asked.unwrap_or_else(|| if cpu { cores(spec, facts, shape, profile) } else { 1 });
    if !cpu && count > 1 {
        let why =
            format!("{count} devices are asked for; training on more than one device is not supported yet");
        return Ok(Err(Passed::Count(why)));
    }
    let pod = spec.pod.as_ref();
    let cores = pod.and_then(|p| p.cpu.as_ref()).and_then(|c| c.value()).unwrap_or(if cpu {
        count.into()
    } else {
        DEVICE_CORES
    });
    let threads = usize::try_from(cores).unwrap_or(1).clamp(1, 4096);
    let asked_memory =
        pod.and_then(|p| p.memory.as_ref()).and_then(|m| m.value()).and_then(|m| u64::try_from(m).ok());
    let beside = beside(facts);
    let (limit, held) = if cpu {
        (asked_memory.map(|memory| plannable(memory, beside)), asked_memory)
    } else {
        let memory = profile.spec.memory.as_ref().and_then(|m| m.value()).unwrap_or(0);
        let share = (memory as f64 * DEVICE_SHARE) as u64;
        (Some(share), Some(share))
    };
    let request = request(spec, facts, method, threads, limit);
    let plan = match plan_training(shape, &request) {
        Ok(plan) => plan,
        Err(PlanError::DoesNotFit { needed, totals, .. }) => {
            let needed = if cpu { pod_memory(needed, beside) } else { needed };
            let too_small = words::TooSmall { needed, totals, held: held.unwrap_or(0), count, by_pod: cpu };
            return Ok(Err(Passed::TooSmall(Box::new(too_small))));
        }
        Err(error) => return Err(words::invalid(&error)),
    };
    let largest = plan.totals.total().max(measuring(spec, shape, &request));
    let memory = if cpu { pod_memory(largest, beside) } else { DEVICE_HOST_MEMORY.saturating_add(beside) };
    let estimate = estimated(spec, facts, shape, &request.method, &plan, profile, count);
    Ok(Ok(Fit { profile, image, count, plan, memory: asked_memory.unwrap_or(memory), estimate }))
}

/// As many cores as train in half an hour.
fn cores(
    spec: &FineTuneJobSpec,
    facts: &TrainFacts<'_>,
    shape: &ModelShape,
    profile: &AcceleratorProfile,
) -> i32 {
    let most = profile.spec.devices_per_node.max(1);
    let Some(tokens) = total_tokens(spec, facts) else { return most.min(UNCOUNTED_CORES) };
    let row = usize::try_from(spec.training.sequence_length).unwrap_or(0);
    // Full tuning is the upper bound of every method.
    let flops = estimate::training_flops_per_token(shape, &TrainMethod::Full, row, false) * tokens as f64;
    let rate =
        profile.spec.compute_bf16.as_ref().and_then(|r| r.value()).map(|r| r * 1e12).filter(|r| *r > 0.0);
    let cores = flops / (rate.unwrap_or(CORE_RATE) * estimate::COMPUTE_SHARE * CORE_SECONDS);
    (cores.ceil().min(f64::from(i32::MAX)) as i32).clamp(1, most)
}

fn request(
    spec: &FineTuneJobSpec,
    facts: &TrainFacts<'_>,
    method: &Method,
    threads: usize,
    memory_limit: Option<u64>,
) -> TrainRequest {
    let size = |value: i32| usize::try_from(value).unwrap_or(0);
    let (method, weights) = match method {
        Method::Full {} => (TrainMethod::Full, stored(facts)),
        Method::Lora(lora) => {
            let spec = LoraSpec {
                rank: size(lora.rank),
                alpha: lora.alpha as f32,
                dropout: lora.dropout as f32,
                targets: lora.targets.iter().filter_map(|name| Target::from_name(name)).collect(),
            };
            let weights = match lora.base_precision {
                Stored::Float32 => Precision::F32,
                Stored::BFloat16 => Precision::BF16,
                // The schema has no such base; the plan refuses it.
                Stored::Int8 => Precision::Int8,
                Stored::Int4 => Precision::Int4,
            };
            (TrainMethod::Lora(spec), weights)
        }
    };
    TrainRequest {
        method,
        weights,
        max_row_tokens: size(spec.training.sequence_length),
        batch_tokens: size(spec.training.batch_tokens),
        micro_batch_tokens: None,
        recompute: None,
        optimizer_state: None,
        threads,
        memory_limit,
    }
}

/// Full tuning holds the weights as they are stored.
fn stored(facts: &TrainFacts<'_>) -> Precision {
    let weights = facts.base.status.as_ref().map(|s| s.weights.as_slice()).unwrap_or_default();
    if weights.iter().any(|w| w.precision == "F32") { Precision::F32 } else { Precision::BF16 }
}

/// Bytes that the worker holds while it lets the model answer, before and after training; nothing of training is held then.
fn measuring(spec: &FineTuneJobSpec, shape: &ModelShape, request: &TrainRequest) -> u64 {
    let answers = spec.evaluation.metrics.iter().any(|m| *m != lathe_api::Metric::Perplexity);
    let held_out = spec.dataset.evaluation.is_some() || spec.dataset.holdout.is_some();
    if !answers || !held_out {
        return 0;
    }
    let lora = match &request.method {
        TrainMethod::Lora(lora) => Some(lora),
        TrainMethod::Full => None,
    };
    let adapters = lora.map_or_else(AdapterBudget::default, |lora| AdapterBudget {
        slots: 1,
        max_rank: lora.rank,
        targets: lora.targets.clone(),
    });
    let request = ServeRequest {
        weights: request.weights,
        context: request.max_row_tokens.saturating_mul(2).min(shape.max_position),
        max_sequences: EVALUATION_BATCH,
        max_batch_tokens: 512,
        cache_tokens: None,
        adapters,
        threads: request.threads,
        memory_limit: None,
    };
    plan_serving(shape, &request).map_or(0, |plan| plan.totals.total())
}

/// What the process holds beside the plan.
fn beside(facts: &TrainFacts<'_>) -> u64 {
    let tokens = facts.dataset.and_then(|dataset| dataset.tokens).unwrap_or(0);
    OVERHEAD.saturating_add(u64::try_from(tokens).unwrap_or(0).saturating_mul(ROW_BYTES))
}

/// Memory of a pod whose worker plans with `bytes` and holds some `beside`.
fn pod_memory(bytes: u64, beside: u64) -> u64 {
    bytes.saturating_add(beside) / WORKER_SHARE.0 * WORKER_SHARE.1
}

/// The reverse of [`pod_memory`].
fn plannable(memory: u64, beside: u64) -> u64 {
    (memory / WORKER_SHARE.1 * WORKER_SHARE.0).saturating_sub(beside)
}

/// Time and cost; `None` where the profile's rate or the number of tokens is not known. To compare profiles before the
/// rows are counted, any number of tokens will do.
fn estimated(
    spec: &FineTuneJobSpec,
    facts: &TrainFacts<'_>,
    shape: &ModelShape,
    method: &TrainMethod,
    plan: &TrainPlan,
    profile: &AcceleratorProfile,
    count: i32,
) -> Option<Estimate> {
    let rate = |text: &Option<lathe_api::Decimal>, scale: f64| {
        text.as_ref().and_then(|r| r.value()).map(|r| r * scale)
    };
    let rates = Rates {
        memory: 0,
        bandwidth: rate(&profile.spec.bandwidth, 1e9).unwrap_or(0.0),
        compute: rate(&profile.spec.compute_bf16, 1e12).filter(|c| *c > 0.0)?,
        price_per_hour: price(profile).unwrap_or(0.0),
    };
    let tokens = total_tokens(spec, facts).unwrap_or(1);
    let devices = u32::try_from(count).ok()?;
    let row = plan.max_row_tokens;
    Some(estimate::training(shape, method, row, plan.recompute, u64::try_from(tokens).ok()?, &rates, devices))
}

fn total_tokens(spec: &FineTuneJobSpec, facts: &TrainFacts<'_>) -> Option<i64> {
    let training = &spec.training;
    match (training.epochs, training.steps) {
        (None, Some(steps)) => Some(i64::from(steps).saturating_mul(training.batch_tokens.into())),
        (epochs, _) => Some(facts.dataset?.tokens?.saturating_mul(epochs.unwrap_or(EPOCHS).into())),
    }
}

fn complete<'a>(spec: &FineTuneJobSpec, facts: &TrainFacts<'_>, fit: Fit<'a>) -> Chosen<'a> {
    let cpu = fit.profile.spec.resource == "cpu";
    let cpu_millis = if cpu { i64::from(fit.count) * 1000 } else { DEVICE_CORES * 1000 };
    let known = total_tokens(spec, facts).is_some();
    let status = words::status(spec, &fit, cpu_millis, fit.estimate.filter(|_| known));
    let Fit { profile, image, count, plan, memory, estimate: _ } = fit;
    Chosen {
        profile,
        image,
        count,
        plan,
        cpu_millis,
        memory: i64::try_from(memory).unwrap_or(i64::MAX),
        status,
    }
}
