//! What happens to pods, operator, API server and namespace while a job trains, and what must not come of it.
mod api_server;
mod drained;
mod leader_killed;
mod namespace;
mod operator_down;
mod operator_killed;
mod suspended;
mod worker_killed;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use k8s_openapi::api::batch::v1::Job;
use kube::Api;
use lathe_e2e::{
    Session, condition, install, machine, poll,
    tune::{digest, identity, job, pods},
};
use serde_json::json;
use tokio::sync::OnceCell;

/// Epochs of a job that is disturbed: some twenty seconds on two fast cores, so that it still trains when a disturbance that the
/// test asks for at a step has gone through the operator.
const LONG: i64 = 24;

async fn begin(name: &str) -> Result<Session> {
    install(&[])?;
    Session::begin(name).await
}

/// The digest of what the job `LONG` makes where nobody disturbs it. Names and namespaces are no part of it, so that one run
/// is enough for all tests.
async fn undisturbed(session: &Session) -> Result<String> {
    static DIGEST: OnceCell<String> = OnceCell::const_new();
    let run = async || {
        session.apply(&job("calm", LONG)?).await?;
        let calm = session.wait("FineTuneJob", "calm", "Succeeded", "True").await?;
        ensure!(calm["status"]["restarts"].is_null(), "it was disturbed: {:#}", calm["status"]);
        digest(session, "calm-model").await
    };
    DIGEST.get_or_try_init(run).await.cloned()
}

/// The volume that a training without a destination writes to.
async fn artifacts(session: &Session) -> Result<PathBuf> {
    machine::folder(session, "lathe-artifacts").await
}

/// True once a Job is complete.
async fn is_complete(session: &Session, name: &str) -> Result<bool> {
    let jobs: Api<Job> = Api::namespaced(session.client.clone(), &session.namespace);
    let object = json!({"status": jobs.get(name).await?.status});
    let is = |type_: &str| condition(&object, type_).is_some_and(|c| c["status"] == "True");
    ensure!(!is("Failed"), "Job {name} failed: {object:#}");
    Ok(is("Complete"))
}

/// Waits until a Job is complete.
async fn completed(session: &Session, name: &str) -> Result<()> {
    poll(&format!("Job {name} to be complete"), || async {
        Ok(is_complete(session, name).await?.then_some(()))
    })
    .await
}

async fn identities(session: &Session, labels: &str) -> Result<Vec<(String, Option<String>, i32)>> {
    Ok(pods(session, labels).await?.iter().map(identity).collect())
}
