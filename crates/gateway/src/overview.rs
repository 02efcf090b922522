//! What a caller may see of the cluster: the services whose models it may use, and the jobs that make some. Pure.
use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use lathe_api::conditions::{self, READY};
use lathe_api::{DecisionStatus, InferenceService, ProgressStatus, ScoreStatus};
use serde::Serialize;

use crate::discovery::Cluster;
use crate::jobs::{self, Job};
use crate::keys::Caller;
use crate::table::{Model, Table};

/// Services that are told, by name.
const MOST_SERVICES: usize = 100;

/// Everything that is shown but losses.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    /// The key's name.
    key: String,
    /// The namespace that is told of; `null`: all of them.
    namespace: Option<String>,
    services: Vec<ServiceView>,
    /// Services beyond those.
    more_services: usize,
    /// The newest first.
    jobs: Vec<JobView>,
    /// Jobs beyond those.
    more_jobs: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceView {
    namespace: String,
    name: String,
    /// Those alone that the caller may use.
    models: Vec<ModelView>,
    replicas: i32,
    ready_replicas: i32,
    /// Tokens a second, and requests that wait.
    throughput: Option<ThroughputView>,
    ready: Option<Summary>,
    /// The newest first.
    decisions: Vec<DecisionStatus>,
}

#[derive(Debug, Serialize)]
struct ModelView {
    id: String,
    answers: bool,
}

#[derive(Debug, Serialize)]
struct ThroughputView {
    prompt: f64,
    generation: f64,
    waiting: i64,
}

/// A condition, in short.
#[derive(Debug, Serialize)]
struct Summary {
    status: String,
    reason: String,
    /// Empty for a caller from whom anything of the namespace is kept.
    message: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct JobView {
    namespace: String,
    name: String,
    /// The Model that it begins with; `null` for a caller from whom anything of the namespace is kept.
    base: Option<String>,
    /// The Model that it makes.
    output: String,
    succeeded: Option<Summary>,
    progress: Option<ProgressStatus>,
    scores: Vec<ScoreStatus>,
}

/// A job's losses.
#[derive(Debug, Serialize)]
pub struct Losses {
    /// Steps and losses in nats a token, in the order of steps.
    points: Vec<(i64, f64)>,
}

/// What this caller may see.
pub fn of(caller: &Caller, table: &Table, cluster: &Cluster) -> Overview {
    let mut by_service: BTreeMap<(&str, &str), Vec<&Model>> = BTreeMap::new();
    for model in caller.models(table) {
        let service = (model.service.namespace.as_str(), model.service.name.as_str());
        by_service.entry(service).or_default().push(model);
    }
    let more_services = by_service.len().saturating_sub(MOST_SERVICES);
    let shown = by_service.into_iter().take(MOST_SERVICES);
    let services = shown.filter_map(|((namespace, name), models)| {
        cluster.services.look(namespace, name, |object| ServiceView::of(caller, object, &models))
    });
    let mut jobs = cluster.jobs.list(caller.namespace());
    jobs.retain(|job| caller.may_name(&job.namespace, &job.output));
    jobs.sort_by(|a, b| b.created.cmp(&a.created).then_with(|| a.name.cmp(&b.name)));
    Overview {
        key: caller.key.to_string(),
        namespace: caller.namespace().map(str::to_owned),
        services: services.collect(),
        more_services,
        more_jobs: jobs.len().saturating_sub(jobs::MOST),
        jobs: jobs.iter().take(jobs::MOST).map(|job| JobView::of(caller, job)).collect(),
    }
}

/// The losses of a job; `None`: there is none of this name that the caller may see.
pub fn losses(caller: &Caller, cluster: &Cluster, namespace: &str, name: &str) -> Option<Losses> {
    let job = cluster.jobs.get(namespace, name)?;
    caller.may_name(&job.namespace, &job.output).then(|| Losses { points: job.losses.clone() })
}

/// Text that may name anything of a namespace, for those alone from whom nothing of it is kept.
fn told(caller: &Caller, text: &str) -> String {
    if caller.sees_all() { text.to_owned() } else { String::new() }
}

impl ServiceView {
    fn of(caller: &Caller, object: &InferenceService, models: &[&Model]) -> Self {
        let status = object.status.clone().unwrap_or_default();
        let throughput = status.throughput.as_ref().map(|flows| ThroughputView {
            prompt: flows.prompt.parse().unwrap_or_default(),
            generation: flows.generation.parse().unwrap_or_default(),
            waiting: flows.waiting,
        });
        // The status has them in the order of time.
        let decisions = status
            .decisions
            .iter()
            .rev()
            .map(|decision| DecisionStatus { message: told(caller, &decision.message), ..decision.clone() });
        Self {
            namespace: object.metadata.namespace.clone().unwrap_or_default(),
            name: object.metadata.name.clone().unwrap_or_default(),
            models: models
                .iter()
                .map(|model| ModelView { id: model.id(), answers: model.is_offered() })
                .collect(),
            replicas: status.replicas,
            ready_replicas: status.ready_replicas,
            throughput,
            ready: conditions::find(&status.conditions, READY).map(|c| Summary::of(caller, c)),
            decisions: decisions.collect(),
        }
    }
}

impl Summary {
    fn of(caller: &Caller, condition: &Condition) -> Self {
        let Condition { status, reason, message, .. } = condition.clone();
        Self { status, reason, message: told(caller, &message) }
    }
}

impl JobView {
    fn of(caller: &Caller, job: &Job) -> Self {
        Self {
            namespace: job.namespace.clone(),
            name: job.name.clone(),
            base: caller.sees_all().then(|| job.base.clone()),
            output: job.output.clone(),
            succeeded: job.succeeded.as_ref().map(|c| Summary::of(caller, c)),
            progress: job.progress.clone(),
            scores: job.scores.clone(),
        }
    }
}
