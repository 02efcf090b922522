//! What is there: Models, profiles, the Jobs and pods of this object, what its worker says.
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{Api, ResourceExt as _, api::ListParams, runtime::reflector::Store};
use lathe_api::{AcceleratorProfile, FineTuneJob, Model, names};
use lathe_contract::Report;

use super::{FineTuneJobs, rivals};
use crate::{
    beside::Beside,
    devices::Capacity,
    error::Error,
    job::{Owner, Run, State},
    pods::UNSCHEDULABLE,
    runtime::{Guard, lookup, readable},
};

/// Everything that a plan is made from, beside the job itself.
#[derive(Default)]
pub struct Observed {
    /// Now.
    pub now: Timestamp,
    /// The Model of `baseModelRef`.
    pub base: Option<Model>,
    /// The Model that has the name of the output.
    pub output: Option<Model>,
    /// Other jobs that name the same output.
    pub rivals: Vec<FineTuneJob>,
    /// Every profile.
    pub profiles: Vec<AcceleratorProfile>,
    /// The check of the dataset.
    pub check: Run,
    /// The newest attempt.
    pub attempt: Option<Attempt>,
    /// The pod that repeats lost last words.
    pub summary: Run,
    /// What the pods of those Jobs need beside them.
    pub beside: Beside,
    /// What the worker says of its work.
    pub report: Option<Report>,
    /// How many devices there are and are free, where the pod waits for one.
    pub capacity: Option<Capacity>,
}

/// A Job of the training.
pub struct Attempt {
    /// Counts from 1.
    pub number: i32,
    /// The Job and its pods.
    pub run: Run,
}

/// Reads the stores, and asks the worker where one works.
pub(super) async fn observe(
    jobs: &FineTuneJobs,
    job: &FineTuneJob,
    now: Timestamp,
) -> Result<Observed, Error> {
    let (namespace, name) = (job.namespace().unwrap_or_default(), job.name_any());
    let owner = Owner::of(job);
    let ours: Vec<Arc<Job>> = jobs.jobs.state().into_iter().filter(|j| owner.controls(&**j)).collect();
    let pods: Vec<Arc<Pod>> = jobs.pods.state();
    let run = |name: &str| Run::find(&owner, name, &ours, &pods);
    let newest =
        ours.iter().filter_map(|j| Some((attempt_number(&name, j)?, j))).max_by_key(|(number, _)| *number);
    let mut attempt = newest.map(|(number, j)| Attempt { number, run: Run::of(j.clone(), &pods) });
    let status = job.status.as_ref();
    let recorded = status.and_then(|s| s.attempt).unwrap_or(0);
    let ended = status.is_some_and(|s| s.completion_time.is_some());
    if !ended && recorded > attempt.as_ref().map_or(0, |a| a.number) {
        // The status is newer than what the watch of Jobs has brought: a second Job must not be made for one that is there.
        let live = live(jobs, &owner, &names::train_job(&name, recorded)).await?;
        attempt = live.map(|j| Attempt { number: recorded, run: Run::of(Arc::new(j), &pods) }).or(attempt);
    }
    let mut observed = Observed {
        now,
        base: lookup(&jobs.models, &namespace, &job.spec.base_model_ref.name),
        output: lookup(&jobs.models, &namespace, &job.spec.output.model_name),
        rivals: rivals::of(job, jobs.tunes.state().iter().filter_map(|guard| guard.0.as_ref().ok())),
        profiles: readable(&jobs.profiles),
        check: run(&names::check_job(&name)),
        summary: run(&names::summary_job(&name)),
        attempt,
        beside: Beside::of(&owner, &jobs.contracts, &jobs.policies),
        report: None,
        capacity: None,
    };
    if !ended {
        let attempt = observed.attempt.as_mut().map(|attempt| &mut attempt.run);
        for run in [&mut observed.check, &mut observed.summary].into_iter().chain(attempt) {
            run.ask(&jobs.context.client, now).await;
        }
        ask(jobs, job, &mut observed).await;
    }
    Ok(observed)
}

/// What is not in a store: the worker's report, and the devices of the cluster.
async fn ask(jobs: &FineTuneJobs, job: &FineTuneJob, observed: &mut Observed) {
    let Some(attempt) = &observed.attempt else { return };
    match attempt.run.state() {
        State::Running => {
            let ip = attempt.run.working().and_then(|pod| pod.status.as_ref()).and_then(|s| s.pod_ip.clone());
            let (Some(ip), Some(uid)) = (ip, job.uid()) else { return };
            match jobs.context.channel.report(&ip, &uid).await {
                Ok(report) => observed.report = Some(report),
                // It may be starting or ending; the next round asks again.
                Err(error) => tracing::debug!(job = job.name_any(), %error, "the worker did not answer"),
            }
        }
        State::Waiting(Some(trouble)) if trouble.reason == UNSCHEDULABLE => {
            let wanted = attempt.run.annotation(super::build::PROFILE);
            let profile = observed.profiles.iter().find(|p| p.metadata.name.as_deref() == wanted);
            if let Some(profile) = profile.filter(|p| p.spec.resource != "cpu") {
                let (namespace, of) =
                    (job.namespace().unwrap_or_default(), job.spec.accelerator.capacity_type);
                observed.capacity = jobs.context.capacity(profile, of, &namespace, observed.now).await;
            }
        }
        _ => {}
    }
}

async fn live(jobs: &FineTuneJobs, owner: &Owner, name: &str) -> Result<Option<Job>, Error> {
    let api: Api<Job> = Api::namespaced(jobs.context.client.clone(), &owner.namespace);
    let found = api
        .get_opt(name)
        .await
        .map_err(|source| Error::Read { what: "the attempt's Job", source: source.into() })?;
    Ok(found.filter(|job| owner.controls(job) && job.metadata.deletion_timestamp.is_none()))
}

/// The other jobs that name the same output, as the API server has them now.
pub(super) async fn rivals(jobs: &FineTuneJobs, job: &FineTuneJob) -> Result<Vec<FineTuneJob>, Error> {
    let namespace = job.namespace().unwrap_or_default();
    let api: Api<Guard<FineTuneJob>> = Api::namespaced(jobs.context.client.clone(), &namespace);
    let all = api
        .list(&ListParams::default())
        .await
        .map_err(|source| Error::Read { what: "FineTuneJobs of the same output", source: source.into() })?;
    Ok(rivals::of(job, all.iter().filter_map(|guard| guard.0.as_ref().ok())))
}

/// `<job>-<n>` of a training Job; a Job that is on its way out does not count.
fn attempt_number(name: &str, job: &Job) -> Option<i32> {
    let trains = job.labels().get(names::LABEL_TASK).is_some_and(|task| task == "train");
    if !trains || job.metadata.deletion_timestamp.is_some() {
        return None;
    }
    job.name_any().strip_prefix(name)?.strip_prefix('-')?.parse().ok()
}

/// Jobs that read or make a Model.
pub(super) fn woken_by_model(
    model: &Guard<Model>,
    jobs: &Store<Guard<FineTuneJob>>,
) -> Vec<(String, String)> {
    let (namespace, name) = (model.namespace(), model.name_any());
    woken(jobs, |job| {
        job.namespace() == namespace
            && (job.spec.base_model_ref.name == name || job.spec.output.model_name == name)
    })
}

/// Jobs that have no pod yet: a profile that comes or changes may hold them.
pub(super) fn woken_by_profile(
    _: &Guard<AcceleratorProfile>,
    jobs: &Store<Guard<FineTuneJob>>,
) -> Vec<(String, String)> {
    woken(jobs, |job| {
        job.status.as_ref().is_none_or(|s| s.start_time.is_none() && s.completion_time.is_none())
    })
}

fn woken(
    jobs: &Store<Guard<FineTuneJob>>,
    concerned: impl Fn(&FineTuneJob) -> bool,
) -> Vec<(String, String)> {
    let state = jobs.state();
    let readable = state.iter().filter_map(|guard| guard.0.as_ref().ok());
    readable
        .filter(|job| concerned(job))
        .map(|job| (job.namespace().unwrap_or_default(), job.name_any()))
        .collect()
}
