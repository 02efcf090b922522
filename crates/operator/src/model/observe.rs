//! What is there: the inspection's Job and pods, the base of an adapter.
use jiff::Timestamp;
use kube::ResourceExt as _;
use lathe_api::{Model, names};

use super::Models;
use crate::{
    beside::Beside,
    job::{Owner, Run},
    runtime::lookup,
};

/// Everything that a plan is made from, beside the Model itself.
pub struct Observed {
    /// Now.
    pub now: Timestamp,
    /// The Job that reads the source.
    pub inspection: Run,
    /// What its pod needs beside it.
    pub beside: Beside,
    /// The Model of `adapterOf`.
    pub base: Option<Model>,
}

/// Reads the stores, and asks the node of a pod that does not start.
pub(super) async fn observe(models: &Models, model: &Model, now: Timestamp) -> Observed {
    let namespace = model.namespace().unwrap_or_default();
    let base = model.spec.adapter_of.as_ref().and_then(|of| lookup(&models.models, &namespace, &of.name));
    let (jobs, pods) = (models.jobs.state(), models.pods.state());
    let job = names::inspect_job(&model.name_any());
    let owner = Owner::of(model);
    let beside = Beside::of(&owner, &models.contracts, &models.policies);
    let mut inspection = Run::find(&owner, &job, &jobs, &pods);
    inspection.ask(&models.context.client, now).await;
    Observed { now, inspection, beside, base }
}
