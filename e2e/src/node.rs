//! Where a cluster has no nodes: what a node, and the worker on it, would have said.
use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
};
use lathe_contract::{Outcome, Summary, exit};
use serde_json::json;

use crate::{Session, poll};

/// Ends the pod of a Job that has none that ended, with these last words; returns its name.
///
/// # Errors
/// The Job makes no pod.
pub async fn end(session: &Session, job: &str, outcome: Outcome) -> Result<String> {
    let name = waiting(session, job).await?;
    let code = match &outcome {
        Outcome::Stopped { .. } => exit::STOPPED,
        Outcome::Failed(failure) if failure.user_error => exit::USER,
        Outcome::Failed(_) => exit::TRANSIENT,
        _ => exit::SUCCESS,
    };
    let well = code == exit::SUCCESS;
    let words = String::from_utf8(Summary { outcome }.to_bytes())?;
    let ended = json!({
        "exitCode": code, "reason": if well { "Completed" } else { "Error" }, "message": words,
        "startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:00:01Z",
    });
    let status = json!({"status": {
        "phase": if well { "Succeeded" } else { "Failed" },
        "startTime": "2026-01-01T00:00:00Z",
        // What the scheduler has said before holds no more.
        "conditions": [{"type": "PodScheduled", "status": "True"}],
        "containerStatuses": [{
            "name": "worker", "image": "worker", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": ended},
        }],
    }});
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
    let told = pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await;
    told.with_context(|| format!("pod {name}"))?;
    Ok(name)
}

/// Waits for a pod of the Job that has not ended and is not going away.
///
/// # Errors
/// There is none after some minutes.
pub async fn waiting(session: &Session, job: &str) -> Result<String> {
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
    let of_job = ListParams::default().labels(&format!("batch.kubernetes.io/job-name={job}"));
    poll(&format!("a pod of Job {job}"), || async {
        let pending = |pod: &Pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            phase == Some("Pending") && pod.metadata.deletion_timestamp.is_none()
        };
        Ok(pods.list(&of_job).await?.into_iter().find(pending).map(|pod| pod.name_any()))
    })
    .await
}
