//! The objects of an inspection.
use std::collections::BTreeSet;

use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::ResourceExt as _;
use lathe_api::{Model, names};
use lathe_contract::{InspectTask, SourceRef, Task};
use lathe_resolve::pod::{self, Mounts, PodRequest};

use super::KIND;
use crate::{
    context::Context,
    error::Error,
    job::{self, JobRequest, Objects, Owner},
};

/// Half a core: a model on a volume is hashed as a whole.
const CPU_MILLIS: i64 = 500;
/// Headers and the tokenizer; files are read in pieces.
const MEMORY: i64 = 512 << 20;
/// Small files alone.
const CACHE: i64 = 1 << 30;
/// An inspection holds nothing that would have to be saved.
const GRACE_SECONDS: i64 = 5;

/// The Job and what its pod needs.
pub fn inspection(
    model: &Model,
    context: &Context,
    one_node: &BTreeSet<String>,
    (mounts, source): &(Mounts, SourceRef),
) -> Result<Objects, Error> {
    let task = Task::Inspect(InspectTask { source: source.clone(), summary_of: None });
    let owner = Owner::of(model);
    let name = names::inspect_job(&model.name_any());
    let labels = pod::labels(KIND, &model.name_any(), Some(pod::task_name(&task)));
    let mut mounts = mounts.clone();
    mounts.on_one_node(one_node);
    let contract = owner.contract(&context.trust, mounts.contract(CACHE), task);
    let checksum = pod::checksum(&contract).map_err(|source| Error::Build { what: "contract", source })?;
    let template = pod::template(&PodRequest {
        labels: labels.clone(),
        image: &context.config.images.cpu,
        pull_policy: context.config.pull_policy.as_deref(),
        task: &contract.task,
        contract: &names::contract(&name),
        checksum: &checksum,
        mounts: &mounts,
        cpu_millis: CPU_MILLIS,
        least_cpu_millis: CPU_MILLIS,
        memory: MEMORY,
        cache: CACHE,
        placement: None,
        overrides: model.spec.pod.as_ref(),
        grace_seconds: GRACE_SECONDS,
        restart_policy: "Never",
    });
    let policy = policy(model, context)?;
    let request =
        JobRequest { name, owner, labels, annotations: Default::default(), template, suspended: false };
    Objects::new(request, KIND, &contract, policy)
}

/// Who may talk to its pod.
pub fn policy(model: &Model, context: &Context) -> Result<NetworkPolicy, Error> {
    let name = names::inspect_job(&model.name_any());
    job::policy(&Owner::of(model), name, KIND, context.config.control_peers())
}
