//! What the cluster's own controllers have told of a namespace: it outlives the objects.
use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use k8s_openapi::api::core::v1::Event;
use kube::{Api, api::ListParams};

use crate::Session;

/// What was under a Job's name.
#[derive(Debug, Default)]
pub struct Made {
    /// Jobs of that name.
    pub uids: BTreeSet<String>,
    /// Pods that they have made.
    pub pods: BTreeSet<String>,
}

/// Every Job that ever made a pod, by its name.
///
/// # Errors
/// The API server does not answer.
pub async fn made_by_jobs(session: &Session) -> Result<BTreeMap<String, Made>> {
    let events: Api<Event> = Api::namespaced(session.client.clone(), &session.namespace);
    let of_jobs = ListParams::default().fields("involvedObject.kind=Job,reason=SuccessfulCreate");
    let mut all: BTreeMap<String, Made> = BTreeMap::new();
    for event in events.list(&of_jobs).await? {
        let (job, said) = (event.involved_object, event.message.unwrap_or_default());
        let made = all.entry(job.name.unwrap_or_default()).or_default();
        made.uids.extend(job.uid);
        made.pods.extend(said.strip_prefix("Created pod: ").map(str::to_owned));
    }
    Ok(all)
}
