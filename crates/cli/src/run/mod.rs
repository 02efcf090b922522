//! `lathe run`: what the operator does with a manifest, on this machine: the same plans, the same contracts, the same
//! worker. Each step below is one of the operator's, with a process in place of a pod and a folder in place of a volume.
mod budget;
mod order;
mod place;
mod serve;
mod show;
mod tune;
mod worker;

use std::collections::BTreeMap;
use std::path::PathBuf;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use lathe_api::{AcceleratorProfile, GROUP, Model, Runtime, conditions};
use lathe_contract::{InspectReport, InspectTask, ObjectRef, Outcome, Task};
use lathe_resolve::{Rejection, inference::Images, model, pod};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::failure::{Done, Problem};
use crate::manifest::{self, Manifests};
use crate::output::Output;
use crate::stop::Stop;
use place::Place;
use show::{Event, Show};
use worker::Workers;

/// Tune and serve what manifests describe, on this machine and without a cluster.
///
/// Reads the same manifests as `kubectl apply -f`, checks them as the API server would, and does with processes what the
/// operator does with pods: inspects each Model, checks each dataset, tunes, measures before and after, obeys gates, and
/// serves on localhost, without a key, whatever `spec.access` says. Objects of other kinds (PersistentVolumeClaims, Jobs ...) are skipped.
///
/// `pvc://CLAIM/PATH` is the file PATH below `volumes/CLAIM/` beside the manifest, or below the folder of
/// `--volume CLAIM=DIR`. Results and checkpoints go where the manifest says; without a destination to the claim
/// `lathe-artifacts`, so to `volumes/lathe-artifacts/`. Logs, contracts and downloads go to `.lathe/` beside the manifest.
/// Workers have this process's environment, with `spec.pod.env` over it; the rest of `spec.pod` is a cluster's matter.
///
/// Ctrl-C while tuning saves a checkpoint: the same command goes on from there. A job whose result is there already, from
/// the same inputs, is not tuned again. `spec.budget` holds for all runs of a job on this machine together.
#[derive(clap::Args, Debug, Default)]
#[command(verbatim_doc_comment, after_long_help = HELP)]
pub struct Args {
    /// A manifest, or a folder of them; may be given more than once.
    #[arg(short = 'f', long = "filename", value_name = "PATH", required = true, num_args = 1..)]
    pub filename: Vec<PathBuf>,
    /// The folder that stands for a PersistentVolumeClaim; may be given more than once.
    #[arg(long, value_name = "CLAIM=DIR", value_parser = place::pair)]
    pub volume: Vec<(String, PathBuf)>,
    /// The folder that stands for a Secret, with a file for each key; may be given more than once.
    #[arg(long, value_name = "SECRET=DIR", value_parser = place::pair)]
    pub secret: Vec<(String, PathBuf)>,
    /// Port of the first InferenceService on localhost, the next has the next port; 0 takes free ones.
    #[arg(long, default_value_t = 8080)]
    pub port: u16,
    /// End after tuning.
    #[arg(long)]
    pub no_serve: bool,
    /// Folder for logs, contracts and, without --cache, downloads [default: .lathe beside the manifest].
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Folder for downloads, which several runs may share [default: cache in the folder of --work].
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// The worker's program [default: lathe-worker beside lathe, else on PATH].
    #[arg(long, env = "LATHE_WORKER", value_name = "PATH")]
    pub worker: Option<PathBuf>,
    /// `json`: one event a line on standard output.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

const HELP: &str = "Examples:
  lathe run -f examples/quickstart/
  lathe run -f job.yaml --volume datasets=/data/support --no-serve
  HF_TOKEN=... lathe run -f model.yaml -f serve.yaml --port 9000

Next: ask the model with `lathe chat --url http://localhost:8080`, or put the same manifests
into a cluster with `kubectl apply -f` and watch them with `lathe status`.";

/// What a run has at hand, and what it has found so far.
struct Run {
    args: Args,
    place: Place,
    workers: Workers,
    show: Show,
    stop: Stop,
    profiles: Vec<AcceleratorProfile>,
    images: Images,
    models: BTreeMap<String, Model>,
}

/// Runs the command.
///
/// # Errors
/// The first thing that cannot be done.
pub async fn run(args: Args) -> Done<()> {
    let Manifests { models, jobs, services, profiles, foreign, folder } = manifest::read(&args.filename)?;
    let jobs = order::order(jobs, &models)?;
    let mut run = Run {
        place: Place::open(&args, &folder)?,
        workers: Workers::find(args.worker.as_deref())?,
        show: Show::new(args.output),
        stop: Stop::listen()?,
        profiles: known_profiles(profiles)?,
        images: Images { cpu: "lathe-worker".to_owned(), cuda: None },
        models: BTreeMap::new(),
        args,
    };
    for object in &foreign {
        run.skip(object, "no kind of Lathe");
    }
    // Adapters last: they ask for their base.
    let (adapters, bases): (Vec<_>, Vec<_>) = models.into_iter().partition(|m| m.spec.adapter_of.is_some());
    for model in bases.into_iter().chain(adapters) {
        run.inspect(model).await?;
    }
    for job in jobs {
        run.tune(&job).await?;
    }
    if run.args.no_serve {
        for service in &services {
            run.skip(&format!("InferenceService {}", name(&service.metadata)), "--no-serve");
        }
        return Ok(());
    }
    run.serve(&services).await
}

impl Run {
    fn skip(&self, object: &str, why: &str) {
        self.show.note(&format!("{object} is skipped: {why}"));
        self.show.event(&Event::Skipped { object, why });
    }

    /// Reads what a Model is, and keeps it.
    async fn inspect(&mut self, model: Model) -> Done<()> {
        let mut mounts = pod::Mounts::default();
        let object = reference("Model", &model.metadata, &model.spec);
        let what = worker::object_name(&object);
        let source = mounts.source(&model.spec.source, pod::Use::Read).map_err(|error| {
            let message = format!("{what}: `spec.source`: {error}. Next: correct it.");
            Problem::user("InvalidLocation", message)
        })?;
        let task = Task::Inspect(InspectTask { source, summary_of: None });
        let contract = self.workers.contract(object, &mounts, task);
        let mut running =
            self.workers.start(&self.place, &mut self.show, contract, model.spec.pod.as_ref(), None)?;
        let ended = self.workers.finish(&mut running, &mut self.show, &mut self.stop, |_| None).await;
        let Outcome::Inspected(report) = ended.map_err(|problem| problem.of(&what))? else {
            return Err(unexpected(&what));
        };
        let said = self.know(model, &report).inspect_err(|problem| {
            self.show.failed(&problem.reason, &problem.message);
        });
        let said = said.map_err(|problem| problem.of(&what))?;
        self.show.done(&said);
        Ok(())
    }

    /// Gives a Model the status that the operator would give it, and keeps it.
    fn know(&mut self, mut model: Model, report: &InspectReport) -> Done<String> {
        let mut status = model.status.take().unwrap_or_default();
        model::record(&mut status, report);
        let base = model.spec.adapter_of.as_ref().and_then(|of| self.models.get(&of.name));
        let said = model::judge(&model, &status, base).map_err(|unready| unready.why)?;
        let now = jiff::Timestamp::now();
        let ready = conditions::State::True;
        conditions::set(&mut status.conditions, conditions::READY, ready, "Inspected", &said, 0, now);
        model.status = Some(status);
        self.models.insert(name(&model.metadata), model);
        Ok(said)
    }

    /// A Model that an object needs.
    fn model(&self, name: &str) -> Done<&Model> {
        self.models.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.models.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let message = format!(
                "Model {name} is not there (there are: {known}). Next: add a manifest with it, or correct the name."
            );
            Rejection::new("ModelNotFound", message).into()
        })
    }
}

/// The catalogue, with what the manifests say over it. This machine's processor is the one device of a local run, so an
/// image of another runtime is of no use.
fn known_profiles(given: Vec<AcceleratorProfile>) -> Done<Vec<AcceleratorProfile>> {
    let catalogue = lathe_resolve::catalogue().map_err(|error| Problem::transient("InternalError", error))?;
    let mut all = given;
    for entry in catalogue {
        if !all.iter().any(|known| known.metadata.name == entry.profile.metadata.name) {
            all.push(entry.profile);
        }
    }
    for profile in all.iter_mut().filter(|profile| profile.spec.runtime != Runtime::CPU) {
        profile.spec.image = None;
    }
    Ok(all)
}

/// The object in contracts. Its UID is made of what it says, so that the same object is the same in every run.
fn reference(kind: &str, metadata: &ObjectMeta, spec: &impl Serialize) -> ObjectRef {
    let namespace = metadata.namespace.clone().unwrap_or_else(|| "local".to_owned());
    let name = name(metadata);
    // A spec that was read can be written.
    let spec = serde_json::to_string(spec).unwrap_or_default();
    let hash = hex::encode(Sha256::digest(format!("{GROUP}/{kind}/{namespace}/{name}/{spec}")));
    let part = |from: usize, to: usize| hash.get(from..to).unwrap_or_default();
    let uid = [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-");
    ObjectRef { kind: kind.to_owned(), namespace, name, uid }
}

fn name(metadata: &ObjectMeta) -> String {
    metadata.name.clone().unwrap_or_default()
}

fn unexpected(what: &str) -> Problem {
    let message = format!(
        "{what}: the worker's last words are not those of its task. Next: use lathe and lathe-worker of the same version."
    );
    Problem::user("WorkerFailed", message)
}
