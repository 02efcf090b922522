//! An InferenceService to the task of its pods, with every choice that the spec leaves open.
mod choose;
mod cost;

use lathe_api::{
    AcceleratorProfile, Access, InferenceServiceSpec, Model, PlanStatus, PodOverrides, ServingSpec,
    WeightPrecision,
};
use lathe_contract::{
    AdapterRoom, CONTRACT_VERSION, Contract, ModelInput, ObjectRef, Precision, ServeTask, ServedAdapter,
    SourceRef, Task, Trust,
};
use serde::Serialize;

use crate::{
    Rejection, digest_of, inspected,
    pod::{self, Mounts, Use},
    profiles::least_cpu,
    shape_of,
};
use choose::Chosen;
pub use choose::Images;
pub use cost::{cost_per_hour, cost_per_million_tokens, devices_per_hour};

/// Seconds for answers in flight after SIGTERM.
pub const DRAIN_SECONDS: i64 = 60;
/// Seconds that a worker needs beside them, to load nothing and say its last words.
const GRACE_MARGIN: i64 = 15;
/// Longest context that is taken where the spec names none.
const DEFAULT_CONTEXT: i64 = 8192;
/// Adapters are given room for in groups of so many, so that the next one needs no other pod.
const SLOT_GROUP: i32 = 4;
/// Raised where running workers must not stay as an earlier Lathe made them (a hole in their security): every one of them is then
/// replaced at the next upgrade. Nothing else that Lathe makes of a spec replaces a worker.
const TEMPLATE_REVISION: u32 = 1;

/// What is known when a service is planned.
#[derive(Clone, Debug)]
pub struct ServeFacts<'a> {
    /// The service.
    pub object: ObjectRef,
    /// Whose tokens its workers believe.
    pub trust: Trust,
    /// The Model of `modelRef`, inspected.
    pub base: &'a Model,
    /// The Models of `adapterRefs`, in their order.
    pub adapters: &'a [&'a Model],
    /// Every profile there is.
    pub profiles: &'a [AcceleratorProfile],
    /// Worker images.
    pub images: &'a Images,
    /// Adapters that the running pods have room for; `None`: there are none.
    pub room: Option<AdapterRoom>,
    /// Profile that running pods are on; `None`: none run. Where the spec names none they stay there.
    pub profile: Option<&'a str>,
}

/// How a service is carried out.
#[derive(Clone, Debug)]
pub struct Serving {
    /// What the pods are told.
    pub contract: Contract,
    /// What they mount.
    pub mounts: Mounts,
    /// For the status.
    pub plan: PlanStatus,
    /// Where they run.
    pub profile: AcceleratorProfile,
    /// Devices of a pod; cores where the profile is a processor.
    pub count: i32,
    /// Image of the worker.
    pub image: String,
    /// Processor time of a pod, in thousandths of a core, at most.
    pub cpu_millis: i64,
    /// Processor time that a node must have free.
    pub least_cpu_millis: i64,
    /// Memory of a pod, in bytes.
    pub memory: i64,
    /// Room for downloads, in bytes.
    pub cache: i64,
    /// Seconds between SIGTERM and SIGKILL.
    pub grace_seconds: i64,
    /// Adapters that the pods have room for.
    pub room: AdapterRoom,
    /// Hash of all that needs a new pod when it changes: what users wrote, and whom workers believe. Neither adapters, which are
    /// set over the control port, nor anything that another version of Lathe would make of the same spec.
    pub checksum: String,
}

/// Plans a service.
///
/// # Errors
/// A [`Rejection`] where the models do not belong together, or nothing that is allowed can hold them.
pub fn serving(spec: &InferenceServiceSpec, facts: &ServeFacts<'_>) -> Result<Serving, Rejection> {
    check_models(spec, facts)?;
    let mut mounts = Mounts::default();
    let base_name = name_of(facts.base);
    let base = input(&mut mounts, facts.base)?;
    let adapters = facts
        .adapters
        .iter()
        .map(|&model| {
            Ok(ServedAdapter { model_id: name_of(model).to_owned(), model: input(&mut mounts, model)? })
        })
        .collect::<Result<Vec<_>, Rejection>>()?;
    let Some(shape) = shape_of(facts.base) else {
        return Err(not_inspected(base_name));
    };
    let room = room(facts.adapters, facts.room);
    let context = context_length(spec, facts.base)?;
    let chosen = choose::choose(spec, facts, &shape, context, room)?;
    let Chosen { profile, image, count, plan, cpu_millis, memory, status } = chosen;
    let task = ServeTask {
        model_id: facts.object.name.clone(),
        model: base,
        adapters,
        adapter_room: room,
        weights: match spec.serving.weights {
            WeightPrecision::BFloat16 => Precision::BFloat16,
            WeightPrecision::Float32 => Precision::Float32,
            WeightPrecision::Int8 => Precision::Int8,
            WeightPrecision::Int4 => Precision::Int4,
        },
        context_length: plan.context as i64,
        max_sequences: spec.serving.max_sequences,
        // A few rounds of answers: who would wait longer is told so at once.
        max_waiting: spec.serving.max_sequences.saturating_mul(4),
        cache_tokens: (plan.cache_blocks * lathe_plan::BLOCK) as i64,
        direct: spec.access == Access::Direct,
        drain_seconds: DRAIN_SECONDS,
    };
    let cache = downloads(facts);
    let checksum = checksum(&Revision {
        template: TEMPLATE_REVISION,
        trust: &facts.trust,
        model: &task.model.source,
        claims: mounts.claims().collect(),
        secrets: mounts.secrets().collect(),
        room,
        serving: &spec.serving,
        profile: profile.metadata.name.as_deref(),
        image: profile.spec.image.as_deref(),
        count: spec.accelerator.count,
        access: Some(spec.access).filter(|access| *access != Access::Direct),
        pod: spec.pod.as_ref(),
    });
    let contract = Contract {
        version: CONTRACT_VERSION,
        object: facts.object.clone(),
        trust: facts.trust.clone(),
        mounts: mounts.contract(cache),
        task: Task::Serve(task),
    };
    Ok(Serving {
        checksum,
        contract,
        mounts,
        plan: status,
        profile: profile.clone(),
        count,
        image,
        cpu_millis,
        least_cpu_millis: least_cpu(&profile.spec, spec.accelerator.count, cpu_millis),
        memory,
        cache,
        grace_seconds: DRAIN_SECONDS + GRACE_MARGIN,
        room,
    })
}

/// Ids under which a service answers: its own name for the base, and each adapter's name.
#[must_use]
pub fn model_ids(service: &str, spec: &InferenceServiceSpec) -> Vec<String> {
    let adapters = spec.adapter_refs.iter().map(|adapter| adapter.name.clone());
    std::iter::once(service.to_owned()).chain(adapters).collect()
}

fn check_models(spec: &InferenceServiceSpec, facts: &ServeFacts<'_>) -> Result<(), Rejection> {
    let base = name_of(facts.base);
    if let Some(of) = &facts.base.spec.adapter_of {
        let message = format!(
            "Model {base} is an adapter of {of}. Next: set `spec.modelRef.name` to {of} and name {base} in `spec.adapterRefs`.",
            of = of.name
        );
        return Err(Rejection::new("ModelIsAdapter", message));
    }
    for model in facts.adapters {
        let name = name_of(model);
        let of = model.spec.adapter_of.as_ref().map(|of| of.name.as_str());
        if of != Some(spec.model_ref.name.as_str()) {
            let is = of.map_or("no adapter".to_owned(), |of| format!("an adapter of {of}"));
            let message = format!(
                "Model {name} is {is}; this service's base is {base}. Next: remove {name} from `spec.adapterRefs`, or serve its own base."
            );
            return Err(Rejection::new("AdapterBaseMismatch", message));
        }
        if name == facts.object.name {
            let message = format!(
                "the service and its adapter would both answer to `{name}`. Next: give the service another name."
            );
            return Err(Rejection::new("ModelIdConflict", message));
        }
    }
    Ok(())
}

fn not_inspected(model: &str) -> Rejection {
    Rejection::new(
        "ModelNotReady",
        format!("Model {model} has not been inspected yet. Next: `kubectl describe model {model}` says why."),
    )
}

fn name_of(model: &Model) -> &str {
    model.metadata.name.as_deref().unwrap_or_default()
}

/// The Model as a pod reads it, pinned to what was inspected: files that changed since are not served under its name.
fn input(mounts: &mut Mounts, model: &Model) -> Result<ModelInput, Rejection> {
    let name = name_of(model).to_owned();
    let mut source = mounts.source(&model.spec.source, Use::Read).map_err(|error| {
        Rejection::new("InvalidLocation", format!("Model {name}: {error}. Next: make a new Model."))
    })?;
    source.digest = digest_of(model);
    Ok(ModelInput { name, source, inspected: inspected(model) })
}

/// Room for adapters: what running pods have, while that is enough.
fn room(adapters: &[&Model], running: Option<AdapterRoom>) -> AdapterRoom {
    let count = i32::try_from(adapters.len()).unwrap_or(i32::MAX - SLOT_GROUP);
    let rank = |model: &&Model| model.status.as_ref().and_then(|status| status.rank);
    let rank = adapters.iter().filter_map(rank).max().unwrap_or(0);
    let running = running.unwrap_or(AdapterRoom { slots: 0, rank: 0 });
    let slots = if running.slots >= count && running.slots > 0 {
        running.slots
    } else {
        (count + SLOT_GROUP - 1).max(SLOT_GROUP) / SLOT_GROUP * SLOT_GROUP
    };
    let spare = i32::try_from(lathe_plan::SPARE_RANK).unwrap_or(i32::MAX);
    AdapterRoom { slots, rank: rank.max(running.rank).max(spare) }
}

fn context_length(spec: &InferenceServiceSpec, base: &Model) -> Result<i64, Rejection> {
    let own = base.status.as_ref().and_then(|status| status.context_length).unwrap_or_default();
    match spec.serving.context_length.map(i64::from) {
        None => Ok(own.min(DEFAULT_CONTEXT)),
        Some(asked) if asked <= own => Ok(asked),
        Some(asked) => {
            let message = format!(
                "`serving.contextLength` is {asked}; Model {} was made for at most {own} tokens. Next: lower it to {own}, or remove it.",
                name_of(base)
            );
            Err(Rejection::new("ContextTooLong", message))
        }
    }
}

/// Bytes of all files that are not on a mounted volume, with room for adapters that are added later.
fn downloads(facts: &ServeFacts<'_>) -> i64 {
    const LEAST: i64 = 1 << 30;
    let fetched = |model: &&Model| !model.spec.source.uri.starts_with("pvc://");
    let bytes = |model: &Model| {
        let weights = model.status.as_ref().map(|status| status.weights.as_slice()).unwrap_or_default();
        weights.iter().map(|w| w.bytes.max(0)).fold(0_i64, i64::saturating_add)
    };
    let all = std::iter::once(facts.base).chain(facts.adapters.iter().copied());
    let total = all.filter(fetched).map(bytes).fold(0, i64::saturating_add);
    // A tenth for the tokenizer and for files that are fetched again.
    total.saturating_add(total / 10).saturating_add(LEAST)
}

/// What makes new pods when it changes. Each field is what somebody wrote, as it was written: what Lathe computes from it (memory,
/// cores, a cache's size) may come out otherwise in another version, and is no reason to replace a worker that works.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Revision<'a> {
    template: u32,
    trust: &'a Trust,
    model: &'a SourceRef,
    claims: Vec<&'a str>,
    secrets: Vec<&'a str>,
    room: AdapterRoom,
    serving: &'a ServingSpec,
    profile: Option<&'a str>,
    /// The profile's own.
    image: Option<&'a str>,
    count: Option<i32>,
    /// `None` for Direct, which every service was before there was a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    access: Option<Access>,
    pod: Option<&'a PodOverrides>,
}

fn checksum(revision: &Revision<'_>) -> String {
    // Only a number that is not finite cannot be written, and there is none.
    pod::checksum(revision).unwrap_or_default()
}

#[cfg(test)]
mod tests;
