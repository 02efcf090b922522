//! A FineTuneJob to the tasks of its pods, with every choice that the spec leaves open.
mod budget;
mod choose;
mod gates;
mod result;
mod task;

use lathe_api::{AcceleratorProfile, FineTuneJobSpec, Location, Model, PlanStatus, names};
use lathe_contract::{CheckDataTask, Identity, ModelInput, TrainTask};

use crate::{
    Rejection, digest_of,
    inference::Images,
    inspected,
    pod::{Mounts, Use},
    profiles::least_cpu,
    shape_of,
};
pub use budget::{cost, over};
pub use choose::caveat;
pub use gates::failed_gates;
pub use result::{Trained, model};

/// Largest file of rows that is fetched into a pod; a larger one is read in place, from a volume.
pub const DATASET_BYTES: i64 = 16 << 30;

/// What is known when a job is planned.
#[derive(Clone, Debug)]
pub struct TrainFacts<'a> {
    /// Name of the job: its checkpoints lie in a folder of that name.
    pub name: &'a str,
    /// Number of the attempt, from 1.
    pub attempt: i32,
    /// The Model of `baseModelRef`, inspected.
    pub base: &'a Model,
    /// Every profile there is.
    pub profiles: &'a [AcceleratorProfile],
    /// Worker images.
    pub images: &'a Images,
    /// What the check of the dataset found; `None` before it.
    pub dataset: Option<Dataset<'a>>,
}

/// What the check of a dataset found.
#[derive(Clone, Copy, Debug)]
pub struct Dataset<'a> {
    /// Tokens of the training rows; `None`: not known any more.
    pub tokens: Option<i64>,
    /// Digest of its files.
    pub digest: &'a str,
}

/// How a job is carried out.
#[derive(Clone, Debug)]
pub struct Training {
    /// What the pod is told.
    pub task: TrainTask,
    /// What it mounts.
    pub mounts: Mounts,
    /// For the status.
    pub plan: PlanStatus,
    /// Where it runs.
    pub profile: AcceleratorProfile,
    /// Devices; cores where the profile is a processor.
    pub count: i32,
    /// Image of the worker.
    pub image: String,
    /// Processor time, in thousandths of a core, at most.
    pub cpu_millis: i64,
    /// Processor time that a node must have free.
    pub least_cpu_millis: i64,
    /// Memory of the pod, in bytes.
    pub memory: i64,
    /// Room for downloads, in bytes.
    pub cache: i64,
    /// Hash of everything that decides the result; `None` until the dataset's digest is known.
    pub inputs_hash: Option<String>,
}

/// How a job's dataset is checked, before an accelerator is asked for.
#[derive(Clone, Debug)]
pub struct Checking {
    /// What the pod is told.
    pub task: CheckDataTask,
    /// What it mounts.
    pub mounts: Mounts,
    /// Room for downloads, in bytes.
    pub cache: i64,
}

/// Plans the training.
///
/// # Errors
/// A [`Rejection`] where the spec asks for what cannot be, or nothing that is allowed can hold it.
pub fn training(spec: &FineTuneJobSpec, facts: &TrainFacts<'_>) -> Result<Training, Rejection> {
    let mut mounts = Mounts::default();
    let base = base(&mut mounts, facts.base)?;
    let Some(shape) = shape_of(facts.base) else { return Err(not_inspected(facts.base)) };
    let method = task::method(spec)?;
    let chosen = choose::choose(spec, facts, &shape, &method)?;
    let checkpoints = spec.checkpoint.destination.clone();
    let checkpoints = checkpoints.unwrap_or_else(|| artifacts(&format!("checkpoints/{}", facts.name)));
    let task = TrainTask {
        attempt: facts.attempt,
        inputs: None,
        base,
        dataset: task::dataset(&mut mounts, spec)?,
        method,
        training: task::settings(spec, &chosen.plan)?,
        checkpoint: task::checkpoint(
            spec,
            located(&mut mounts, &checkpoints, "checkpoint.destination", Use::Write)?,
        )?,
        evaluation: task::evaluation(spec)?,
        output: lathe_contract::OutputTarget {
            model_name: spec.output.model_name.clone(),
            destination: located(&mut mounts, &destination(spec), "output.destination", Use::Write)?,
        },
    };
    // A number may lose its last bit on its way through JSON: as the worker reads it, it counts.
    let read = serde_json::to_vec(&task).and_then(|json| serde_json::from_slice::<TrainTask>(&json)).ok();
    let known = facts.dataset.zip(read.as_ref());
    let inputs = |base: &str| known.map(|(dataset, task)| Identity::of(task, base, dataset.digest).inputs);
    // Without a digest it is known by its address here; the worker knows it by its files.
    let pinned = digest_of(facts.base).and_then(|digest| inputs(&digest));
    let inputs_hash = pinned.clone().or_else(|| inputs(&facts.base.spec.source.uri));
    let task = TrainTask { inputs: pinned, ..task };
    Ok(Training {
        cache: downloads(spec, facts.base).saturating_add(made(spec, facts.base, &chosen.plan)),
        task,
        mounts,
        plan: chosen.status,
        profile: chosen.profile.clone(),
        count: chosen.count,
        image: chosen.image,
        cpu_millis: chosen.cpu_millis,
        least_cpu_millis: least_cpu(&chosen.profile.spec, spec.accelerator.count, chosen.cpu_millis),
        memory: chosen.memory,
        inputs_hash,
    })
}

/// Plans the check of the dataset.
///
/// # Errors
/// A [`Rejection`] where a location cannot be mounted, or a number is none.
pub fn checking(spec: &FineTuneJobSpec, model: &Model) -> Result<Checking, Rejection> {
    let mut mounts = Mounts::default();
    let task = CheckDataTask {
        model: base(&mut mounts, model)?,
        dataset: task::dataset(&mut mounts, spec)?,
        sequence_length: spec.training.sequence_length.into(),
        evaluation: task::evaluation(spec)?,
    };
    // The tokenizer and the rows; a model on a volume is read where it lies.
    Ok(Checking { task, mounts, cache: downloads(spec, model) })
}

/// `supervised/lora`: what is learned, and what is changed.
#[must_use]
pub fn method_name(spec: &FineTuneJobSpec) -> String {
    let changed = if spec.trainable.full.is_some() { "full" } else { "lora" };
    format!("supervised/{changed}")
}

/// True where the job needs the artefact volume of its namespace.
#[must_use]
pub fn needs_artifacts(spec: &FineTuneJobSpec) -> bool {
    spec.output.destination.is_none() || spec.checkpoint.destination.is_none()
}

/// Folder of the job's artefacts and their records: `<destination>/<modelName>`.
#[must_use]
pub fn output_folder(spec: &FineTuneJobSpec) -> Location {
    let destination = destination(spec);
    let uri = format!("{}/{}", destination.uri.trim_end_matches('/'), spec.output.model_name);
    Location { uri, ..destination }
}

fn destination(spec: &FineTuneJobSpec) -> Location {
    spec.output.destination.clone().unwrap_or_else(|| artifacts("models"))
}

fn artifacts(path: &str) -> Location {
    let uri = format!("pvc://{}/{path}", names::ARTIFACTS_CLAIM);
    Location { uri, revision: None, secret_ref: None, digest: None }
}

/// The base Model as a pod reads it, pinned to what was inspected.
fn base(mounts: &mut Mounts, model: &Model) -> Result<ModelInput, Rejection> {
    let name = model.metadata.name.clone().unwrap_or_default();
    if let Some(of) = &model.spec.adapter_of {
        let message = format!(
            "Model {name} is an adapter of {of}; tuning on top of an adapter is not supported yet. Next: make a new FineTuneJob with `baseModelRef.name: {of}`.",
            of = of.name
        );
        return Err(Rejection::new("AdapterBaseUnsupported", message));
    }
    let mut source = located(mounts, &model.spec.source, "source", Use::Read)?;
    source.digest = digest_of(model);
    Ok(ModelInput { name, source, inspected: inspected(model) })
}

fn located(
    mounts: &mut Mounts,
    location: &Location,
    field: &str,
    used: Use,
) -> Result<lathe_contract::SourceRef, Rejection> {
    mounts.source(location, used).map_err(|error| {
        Rejection::new("InvalidLocation", format!("`{field}`: {error}. Next: correct it in a new object."))
    })
}

fn not_inspected(model: &Model) -> Rejection {
    let name = model.metadata.name.as_deref().unwrap_or_default();
    let message =
        format!("Model {name} has no known shape yet. Next: `kubectl describe model {name}` says why.");
    Rejection::new("ModelNotReady", message)
}

/// Bytes of what is fetched.
fn downloads(spec: &FineTuneJobSpec, base: &Model) -> i64 {
    const LEAST: i64 = 1 << 30;
    let fetched = if on_volume(&base.spec.source) { 0 } else { weights(base) };
    fetched.saturating_add(fetched / 10).saturating_add(rows(spec)).saturating_add(LEAST)
}

/// Bytes of the result before it is sent away; one that stays on a volume is written there. Weights that are tuned as a
/// whole are as wide as they were, and a gradient is as wide as what it changes, or wider.
fn made(spec: &FineTuneJobSpec, base: &Model, plan: &lathe_plan::TrainPlan) -> i64 {
    if on_volume(&destination(spec)) {
        return 0;
    }
    let adapter = || i64::try_from(plan.totals.gradients).unwrap_or(i64::MAX);
    if spec.trainable.full.is_some() { weights(base) } else { adapter() }
}

fn weights(model: &Model) -> i64 {
    let weights = model.status.as_ref().map(|status| status.weights.as_slice()).unwrap_or_default();
    weights.iter().map(|w| w.bytes.max(0)).fold(0_i64, i64::saturating_add)
}

fn on_volume(location: &Location) -> bool {
    location.uri.starts_with("pvc://")
}

/// Bytes of the rows that are fetched, at most: nobody knows their size before they are looked at.
fn rows(spec: &FineTuneJobSpec) -> i64 {
    let files = [Some(&spec.dataset.train), spec.dataset.evaluation.as_ref()];
    let fetched = files.into_iter().flatten().filter(|file| !on_volume(file)).count();
    i64::try_from(fetched).unwrap_or(0) * DATASET_BYTES
}

#[cfg(test)]
mod tests;
