//! The first allowed profile that can hold a service, and what a pod then needs.
use std::collections::BTreeSet;

use lathe_api::{AcceleratorProfile, InferenceServiceSpec, PlanLine, PlanStatus, WeightPrecision};
use lathe_contract::AdapterRoom;
use lathe_plan::{
    AdapterBudget, ModelShape, PlanError, Precision, SERVE_BATCH_TOKENS, SPARE_ADAPTERS, ServePlan,
    ServeRequest, Target, Totals, plan_serving,
};

use super::{ServeFacts, cost_per_hour};
use crate::{
    Rejection,
    profiles::{candidates, image, quantity},
};

/// Worker images by runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    /// For processors.
    pub cpu: String,
    /// For NVIDIA devices; `None` until one is set up.
    pub cuda: Option<String>,
}

/// Memory of the process beside what the plan lists: code, tokenizer, connections, stacks.
const OVERHEAD: u64 = 192 << 20;
/// The rate of one sequence that decides how many cores a service gets, in tokens a second.
const DECODE_RATE: f64 = 10.0;
/// Bytes per second that a core reads, where its profile does not say.
const CORE_BANDWIDTH: f64 = 8e9;
/// Full contexts that the cache of a processor holds: memory there is asked for, not given.
const CPU_CONTEXTS: usize = 4;
/// Share of a device's memory that a plan may fill; the rest is the driver's.
const DEVICE_SHARE: f64 = 0.92;
/// Cores beside each device.
const CORES_PER_DEVICE: i64 = 4;
/// Memory beside the devices, for files on their way.
const DEVICE_HOST_MEMORY: u64 = 8 << 30;

/// A profile that holds the service.
pub(super) struct Chosen<'a> {
    pub profile: &'a AcceleratorProfile,
    pub image: String,
    pub count: i32,
    pub plan: ServePlan,
    pub cpu_millis: i64,
    pub memory: i64,
    pub status: PlanStatus,
}

/// Why a profile was passed over.
enum Passed {
    Unknown,
    NoRuntime,
    TooSmall(String),
}

pub(super) fn choose<'a>(
    spec: &InferenceServiceSpec,
    facts: &ServeFacts<'a>,
    shape: &ModelShape,
    context: i64,
    room: AdapterRoom,
) -> Result<Chosen<'a>, Rejection> {
    let mut passed = Vec::new();
    let mut candidates = candidates(&spec.accelerator.profiles, facts.profiles);
    if spec.accelerator.profiles.is_empty() {
        // A cheaper one that an upgrade brings is for services that come after it.
        candidates.sort_by_key(|(name, _)| Some(name.as_str()) != facts.profile);
    }
    for (name, profile) in candidates {
        let Some(profile) = profile else {
            passed.push((name, Passed::Unknown));
            continue;
        };
        let Some(image) = image(profile, facts.images) else {
            passed.push((name, Passed::NoRuntime));
            continue;
        };
        match fit(spec, shape, context, room, profile)? {
            Ok((plan, count)) => return Ok(chosen(spec, profile, image, count, plan, room)),
            Err(why) => passed.push((name, Passed::TooSmall(why))),
        }
    }
    Err(rejection(&passed))
}

/// A plan within the profile's memory, and the devices it takes; or why there is none.
fn fit(
    spec: &InferenceServiceSpec,
    shape: &ModelShape,
    context: i64,
    room: AdapterRoom,
    profile: &AcceleratorProfile,
) -> Result<Result<(ServePlan, i32), String>, Rejection> {
    let cpu = profile.spec.resource == "cpu";
    let most = profile.spec.devices_per_node.max(1);
    let asked = spec.accelerator.count;
    if let Some(count) = asked.filter(|&count| count > most) {
        return Ok(Err(format!("{count} devices are asked for, a node has {most}; plans stop at one node")));
    }
    let mut request = request(spec, context, room)?;
    if cpu {
        let count = asked.unwrap_or_else(|| cores(shape, request.weights, profile));
        request.threads = threads(spec, count);
        let own = spec.pod.as_ref().and_then(|pod| pod.memory.as_ref()).and_then(|memory| memory.value());
        match own {
            Some(bytes) => request.memory_limit = Some(without_overhead(u64::try_from(bytes).unwrap_or(0))),
            None => {
                request.cache_tokens =
                    Some(request.context.saturating_mul(request.max_sequences.min(CPU_CONTEXTS)))
            }
        }
        return Ok(match plan_serving(shape, &request) {
            Ok(plan) => Ok((plan, count)),
            Err(PlanError::DoesNotFit { needed, totals, .. }) => Err(format!(
                "it needs {} ({totals}), `spec.pod.memory` allows {}",
                quantity(with_overhead(needed)),
                spec.pod
                    .as_ref()
                    .and_then(|pod| pod.memory.as_ref())
                    .map_or(String::new(), ToString::to_string)
            )),
            Err(error) => return Err(invalid(&error)),
        });
    }
    let memory = profile.spec.memory.as_ref().and_then(|memory| memory.value()).unwrap_or(0);
    let share = (memory as f64 * DEVICE_SHARE) as u64;
    let counts = asked.map_or(1..=most, |count| count..=count);
    let mut least = None;
    for count in counts {
        request.memory_limit = Some(share.saturating_mul(u64::try_from(count).unwrap_or(1)));
        match plan_serving(shape, &request) {
            Ok(plan) => return Ok(Ok((plan, count))),
            Err(PlanError::DoesNotFit { needed, totals, .. }) => least = Some((needed, totals)),
            Err(error) => return Err(invalid(&error)),
        }
    }
    let (needed, totals) = least.unwrap_or((0, Totals::default()));
    let held = quantity(share.saturating_mul(u64::try_from(asked.unwrap_or(most)).unwrap_or(1)));
    Ok(Err(format!("it needs {} ({totals}), the largest allowed holds {held}", quantity(needed))))
}

fn request(spec: &InferenceServiceSpec, context: i64, room: AdapterRoom) -> Result<ServeRequest, Rejection> {
    let size = |value: i64| usize::try_from(value).unwrap_or(0);
    let max_sequences = size(spec.serving.max_sequences.into());
    Ok(ServeRequest {
        weights: match spec.serving.weights {
            WeightPrecision::BFloat16 => Precision::BF16,
            WeightPrecision::Float32 => Precision::F32,
            WeightPrecision::Int8 => Precision::Int8,
            WeightPrecision::Int4 => Precision::Int4,
        },
        context: size(context),
        max_sequences,
        max_batch_tokens: SERVE_BATCH_TOKENS.max(max_sequences),
        cache_tokens: None,
        adapters: AdapterBudget {
            slots: size(room.slots.into()) + SPARE_ADAPTERS,
            max_rank: size(room.rank.into()),
            targets: BTreeSet::from(Target::ALL),
        },
        threads: 1,
        memory_limit: None,
    })
}

/// As many cores as read all weights ten times a second.
fn cores(shape: &ModelShape, weights: Precision, profile: &AcceleratorProfile) -> i32 {
    let bytes = shape.parameters() as f64 * weights.bytes_per_weight();
    let own = profile.spec.bandwidth.as_ref().and_then(|rate| rate.value()).map(|gigabytes| gigabytes * 1e9);
    let core =
        own.filter(|rate| *rate > 0.0).unwrap_or(CORE_BANDWIDTH) * lathe_plan::estimate::BANDWIDTH_SHARE;
    let cores = (bytes * DECODE_RATE / core).ceil();
    (cores.min(f64::from(i32::MAX)) as i32).clamp(1, profile.spec.devices_per_node.max(1))
}

fn threads(spec: &InferenceServiceSpec, count: i32) -> usize {
    let own = spec.pod.as_ref().and_then(|pod| pod.cpu.as_ref()).and_then(|cpu| cpu.value());
    usize::try_from(own.unwrap_or(count.into())).unwrap_or(1).clamp(1, 1 << 12)
}

fn chosen<'a>(
    spec: &InferenceServiceSpec,
    profile: &'a AcceleratorProfile,
    image: String,
    count: i32,
    plan: ServePlan,
    room: AdapterRoom,
) -> Chosen<'a> {
    let total = plan.totals.total();
    let (cpu_millis, memory) = if profile.spec.resource == "cpu" {
        (i64::from(count) * 1000, with_overhead(total))
    } else {
        (i64::from(count) * CORES_PER_DEVICE * 1000, DEVICE_HOST_MEMORY.saturating_add(OVERHEAD))
    };
    let memory = i64::try_from(memory).unwrap_or(i64::MAX);
    let Totals { weights, cache, workspace, activations, gradients: _, optimizer: _ } = plan.totals;
    let line = |name: &str, value: String| PlanLine { name: name.to_owned(), value };
    let rows =
        [("weights", weights), ("cache", cache), ("workspace", workspace + activations), ("total", total)];
    // What the user says of the pod is what it gets.
    let own = |quantity: Option<&lathe_api::Quantity>| quantity.map(|q| q.0.clone());
    let cpu = own(spec.pod.as_ref().and_then(|pod| pod.cpu.as_ref()));
    let pod_memory = own(spec.pod.as_ref().and_then(|pod| pod.memory.as_ref()));
    let status = PlanStatus {
        profile: profile.metadata.name.clone(),
        count: Some(count),
        memory: rows.map(|(name, bytes)| line(name, quantity(bytes))).to_vec(),
        choices: vec![
            line("contextLength", plan.context.to_string()),
            line("maxSequences", plan.max_sequences.to_string()),
            line("cacheTokens", (plan.cache_blocks * lathe_plan::BLOCK).to_string()),
            line("adapterSlots", room.slots.to_string()),
            line("adapterRank", room.rank.to_string()),
            line("podCpu", cpu.unwrap_or(format!("{cpu_millis}m"))),
            line("podMemory", pod_memory.unwrap_or(quantity(u64::try_from(memory).unwrap_or(0)))),
        ],
        duration: None,
        cost: cost_per_hour(profile, count, spec.pod.as_ref(), 1)
            .map(|(cost, currency)| format!("{cost:.2} {currency} an hour for each replica")),
    };
    Chosen { profile, image, count, plan, cpu_millis, memory, status }
}

/// The plan's bytes, a twentieth for what allocators waste, and the process itself.
fn with_overhead(bytes: u64) -> u64 {
    bytes.saturating_add(bytes / 20).saturating_add(OVERHEAD)
}

fn without_overhead(bytes: u64) -> u64 {
    bytes.saturating_sub(OVERHEAD) / 21 * 20
}

fn invalid(error: &PlanError) -> Rejection {
    Rejection::new("InvalidSettings", format!("{error}. Next: correct `spec.serving`."))
}

fn rejection(passed: &[(String, Passed)]) -> Rejection {
    if passed.is_empty() {
        let next = "Next: make one, or restart the operator, which applies its catalogue.";
        return Rejection::new("ProfileNotFound", format!("there is no AcceleratorProfile. {next}"));
    }
    let why = |passed: &Passed| match passed {
        Passed::Unknown => "there is no such AcceleratorProfile".to_owned(),
        Passed::NoRuntime => "there is no worker for its runtime yet, and it names no `image`".to_owned(),
        Passed::TooSmall(why) => why.clone(),
    };
    let list: Vec<String> = passed.iter().map(|(name, reason)| format!("{name}: {}", why(reason))).collect();
    let list = list.join("; ");
    if passed.iter().any(|(_, reason)| matches!(reason, Passed::TooSmall(_))) {
        let next =
            "Next: lower `serving.contextLength` or `serving.maxSequences`, or allow a larger profile.";
        return Rejection::new("DoesNotFit", format!("{list}. {next}"));
    }
    if passed.iter().any(|(_, reason)| matches!(reason, Passed::NoRuntime)) {
        let next = "Next: allow the profile `cpu`, or set the profile's `image` to a worker built for it.";
        return Rejection::new("RuntimeUnavailable", format!("{list}. {next}"));
    }
    let next = "Next: `kubectl get acceleratorprofiles` lists them; correct `spec.accelerator.profiles`.";
    Rejection::new("ProfileNotFound", format!("{list}. {next}"))
}
