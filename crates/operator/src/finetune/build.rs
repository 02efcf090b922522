//! The objects of a job.
use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::{
        core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec, VolumeResourceRequirements},
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};
use kube::ResourceExt as _;
use lathe_api::{FineTuneJob, names};
use lathe_contract::{InspectTask, TRAIN_GRACE_SECONDS, Task};
use lathe_resolve::{
    finetune::{self, Checking, Training},
    pod::{self, Mounts, Placement, PodRequest, Use},
};

use super::{KIND, plan::is_queued};
use crate::{
    context::{ArtifactVolume, Context},
    error::Error,
    job::{self, JobRequest, Objects, Owner},
};

/// Annotation of an attempt's Job: its profile.
pub const PROFILE: &str = "lathe.dev/profile";
/// Annotation of an attempt's Job: hash of everything that decides the result.
pub const INPUTS: &str = "lathe.dev/inputs-hash";
/// Label by which Kueue queues a Job.
pub const QUEUE: &str = "kueue.x-k8s.io/queue-name";

/// Value of the label `lathe.dev/kind` of the artefact volume.
const ARTIFACTS: &str = "artifacts";

/// Pods that hold nothing that would have to be saved.
const SHORT_GRACE_SECONDS: i64 = 5;
/// A check reads rows and a tokenizer.
const CHECK_MILLIS: i64 = 500;
const CHECK_MEMORY: i64 = 1 << 30;
/// A summary is a few kilobytes.
const SUMMARY_MILLIS: i64 = 100;
const SUMMARY_MEMORY: i64 = 256 << 20;
const SUMMARY_CACHE: i64 = 1 << 30;

/// What differs between the Jobs of an object.
struct Needs<'a> {
    name: String,
    task: Task,
    mounts: &'a Mounts,
    image: &'a str,
    cpu_millis: i64,
    least_cpu_millis: i64,
    memory: i64,
    cache: i64,
    placement: Option<Placement<'a>>,
    grace_seconds: i64,
    /// The user's words on pods hold for the training alone where they speak of its size.
    sized_by_user: bool,
    annotations: BTreeMap<String, String>,
    queued: bool,
}

/// The check of the dataset, with its contract.
pub fn check(
    job: &FineTuneJob,
    context: &Context,
    one_node: &BTreeSet<String>,
    checking: &Checking,
) -> Result<Objects, Error> {
    let needs = Needs {
        name: names::check_job(&job.name_any()),
        task: Task::CheckData(checking.task.clone()),
        mounts: &checking.mounts,
        image: &context.config.images.cpu,
        cpu_millis: CHECK_MILLIS,
        least_cpu_millis: CHECK_MILLIS,
        memory: CHECK_MEMORY,
        cache: checking.cache,
        placement: None,
        grace_seconds: SHORT_GRACE_SECONDS,
        sized_by_user: false,
        annotations: BTreeMap::new(),
        queued: false,
    };
    objects(job, context, one_node, needs)
}

/// An attempt, with its contract.
pub fn train(
    job: &FineTuneJob,
    context: &Context,
    one_node: &BTreeSet<String>,
    attempt: i32,
    training: &Training,
) -> Result<Objects, Error> {
    let profile = training.profile.metadata.name.clone().unwrap_or_default();
    let mut annotations = BTreeMap::from([(PROFILE.to_owned(), profile)]);
    annotations.extend(training.inputs_hash.clone().map(|hash| (INPUTS.to_owned(), hash)));
    let needs = Needs {
        name: names::train_job(&job.name_any(), attempt),
        task: Task::Train(Box::new(training.task.clone())),
        mounts: &training.mounts,
        image: &training.image,
        cpu_millis: training.cpu_millis,
        least_cpu_millis: training.least_cpu_millis,
        memory: training.memory,
        cache: training.cache,
        placement: Some(Placement {
            profile: &training.profile.spec,
            count: training.count,
            capacity: job.spec.accelerator.capacity_type,
        }),
        grace_seconds: TRAIN_GRACE_SECONDS.into(),
        sized_by_user: true,
        annotations,
        queued: is_queued(job),
    };
    objects(job, context, one_node, needs)
}

/// The pod that repeats lost last words from the report beside the artefact, with its contract.
pub fn summary(job: &FineTuneJob, context: &Context, one_node: &BTreeSet<String>) -> Result<Objects, Error> {
    let mut mounts = Mounts::default();
    let location = finetune::output_folder(&job.spec);
    // The location was mounted by the training before.
    let source = mounts
        .source(&location, Use::Read)
        .map_err(|error| Error::Build { what: "contract", source: serde::ser::Error::custom(error) })?;
    let needs = Needs {
        name: names::summary_job(&job.name_any()),
        task: Task::Inspect(InspectTask { source, summary_of: job.uid() }),
        mounts: &mounts,
        image: &context.config.images.cpu,
        cpu_millis: SUMMARY_MILLIS,
        least_cpu_millis: SUMMARY_MILLIS,
        memory: SUMMARY_MEMORY,
        cache: SUMMARY_CACHE,
        placement: None,
        grace_seconds: SHORT_GRACE_SECONDS,
        sized_by_user: false,
        annotations: BTreeMap::new(),
        queued: false,
    };
    objects(job, context, one_node, needs)
}

fn objects(
    job: &FineTuneJob,
    context: &Context,
    one_node: &BTreeSet<String>,
    needs: Needs<'_>,
) -> Result<Objects, Error> {
    let mut mounts = needs.mounts.clone();
    mounts.on_one_node(one_node);
    let owner = Owner::of(job);
    let mut labels = pod::labels(KIND, &job.name_any(), Some(pod::task_name(&needs.task)));
    let contract = owner.contract(&context.trust, needs.mounts.contract(needs.cache), needs.task);
    let checksum = pod::checksum(&contract).map_err(|source| Error::Build { what: "contract", source })?;
    let mut overrides = job.spec.pod.clone();
    if let Some(pod) = overrides.as_mut().filter(|_| !needs.sized_by_user) {
        (pod.cpu, pod.memory) = (None, None);
    }
    let template = pod::template(&PodRequest {
        labels: labels.clone(),
        image: needs.image,
        pull_policy: context.config.pull_policy.as_deref(),
        task: &contract.task,
        contract: &names::contract(&needs.name),
        checksum: &checksum,
        mounts: &mounts,
        cpu_millis: needs.cpu_millis,
        least_cpu_millis: needs.least_cpu_millis,
        memory: needs.memory,
        cache: needs.cache,
        placement: needs.placement,
        overrides: overrides.as_ref(),
        grace_seconds: needs.grace_seconds,
        restart_policy: "Never",
    });
    if needs.queued {
        let queue = job.labels().get(QUEUE).cloned();
        labels.extend(queue.map(|queue| (QUEUE.to_owned(), queue)));
    }
    let policy = policy(job, context)?;
    let request = JobRequest {
        name: needs.name,
        owner,
        labels,
        annotations: needs.annotations,
        template,
        suspended: needs.queued,
    };
    Objects::new(request, KIND, &contract, policy)
}

/// Who may talk to the pods of all its Jobs.
pub fn policy(job: &FineTuneJob, context: &Context) -> Result<NetworkPolicy, Error> {
    let name = format!("{}-tune", job.name_any());
    job::policy(&Owner::of(job), name, KIND, context.config.control_peers())
}

/// A claim that is there was made for artefacts, or somebody said so by the label.
pub fn is_for_artifacts(there: &PersistentVolumeClaim) -> bool {
    there.labels().get(names::LABEL_KIND).is_some_and(|kind| kind == ARTIFACTS)
}

/// The artefact volume of the job's namespace. It belongs to nobody, so that results outlive every job.
pub fn claim(job: &FineTuneJob, volume: &ArtifactVolume) -> PersistentVolumeClaim {
    let requests = BTreeMap::from([("storage".to_owned(), Quantity(volume.size.clone()))]);
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(names::ARTIFACTS_CLAIM.to_owned()),
            namespace: job.namespace(),
            labels: Some(BTreeMap::from([
                ("app.kubernetes.io/managed-by".to_owned(), "lathe".to_owned()),
                (names::LABEL_KIND.to_owned(), ARTIFACTS.to_owned()),
            ])),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec![volume.access_mode.clone()]),
            storage_class_name: volume.storage_class.clone(),
            resources: Some(VolumeResourceRequirements { requests: Some(requests), limits: None }),
            ..PersistentVolumeClaimSpec::default()
        }),
        status: None,
    }
}
