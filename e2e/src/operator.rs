//! The operator, as something that is killed, stopped and brought back.
use anyhow::{Context, Result};
use k8s_openapi::api::{apps::v1::Deployment, coordination::v1::Lease, core::v1::Pod};
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::json;

use crate::{RELEASE_NAMESPACE, Session, poll, tune::identity};

const NAME: &str = "lathe-operator";

/// Kills every replica with SIGKILL, without waiting for the next ones.
///
/// # Errors
/// The API server refuses.
pub async fn kill(session: &Session) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), RELEASE_NAMESPACE);
    let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    pods.delete_collection(&at_once, &selector()).await?;
    Ok(())
}

/// The pod that holds the Lease.
///
/// # Errors
/// The API server does not answer, or nobody holds it.
pub async fn leader(session: &Session) -> Result<String> {
    let leases: Api<Lease> = Api::namespaced(session.client.clone(), RELEASE_NAMESPACE);
    let spec = leases.get(NAME).await?.spec.unwrap_or_default();
    spec.holder_identity.filter(|holder| !holder.is_empty()).context("nobody holds the Lease")
}

/// Kills one replica with SIGKILL, without waiting for the next one.
///
/// # Errors
/// The API server refuses.
pub async fn kill_one(session: &Session, pod: &str) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), RELEASE_NAMESPACE);
    let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    pods.delete(pod, &at_once).await?;
    Ok(())
}

/// Its pods, as they must not change.
///
/// # Errors
/// The API server does not answer.
pub async fn pods(session: &Session) -> Result<Vec<(String, Option<String>, i32)>> {
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), RELEASE_NAMESPACE);
    Ok(pods.list(&selector()).await?.iter().map(identity).collect())
}

/// Waits until every replica is ready.
///
/// # Errors
/// They are not after some minutes.
pub async fn ready(session: &Session) -> Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(session.client.clone(), RELEASE_NAMESPACE);
    poll("the operator to be ready", || async {
        let found = deployments.get(NAME).await?;
        let status = found.status.unwrap_or_default();
        let wanted = found.spec.and_then(|spec| spec.replicas);
        let seen = status.observed_generation == found.metadata.generation;
        Ok((seen && status.ready_replicas == wanted && status.replicas == wanted).then_some(()))
    })
    .await
}

/// Scales it; waits until none is left, or all are ready.
///
/// # Errors
/// As [`ready`].
pub async fn scale(session: &Session, replicas: i32) -> Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(session.client.clone(), RELEASE_NAMESPACE);
    let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
    deployments.patch(NAME, &PatchParams::default(), &patch).await?;
    if replicas > 0 {
        return ready(session).await;
    }
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), RELEASE_NAMESPACE);
    poll("the operator to be gone", || async {
        Ok(pods.list(&selector()).await?.items.is_empty().then_some(()))
    })
    .await
}

fn selector() -> ListParams {
    ListParams::default().labels("app.kubernetes.io/name=lathe-operator")
}
