//! The quick-start's objects, and jobs made of them that last long enough to be disturbed.
use std::path::Path;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt,
    api::{ListParams, LogParams},
};
use serde_json::{Value, json};

use crate::{Session, condition, machine, poll, quickstart};

/// Applies the quick-start's objects of these kinds.
///
/// # Errors
/// The API server refuses one.
pub async fn apply(session: &Session, kinds: &[&str]) -> Result<()> {
    for object in quickstart()? {
        if kinds.contains(&object["kind"].as_str().unwrap_or_default()) {
            session.apply(&object).await?;
        }
    }
    Ok(())
}

/// Applies what a job needs: the claim, the Job that fills it, the base Model.
///
/// # Errors
/// As [`apply`].
pub async fn prepare(session: &Session) -> Result<()> {
    apply(session, &["PersistentVolumeClaim", "Job", "Model"]).await
}

/// The quick-start's job under another name, with `<name>-model` as its output, measured by perplexity alone.
///
/// # Errors
/// The quick-start cannot be read.
pub fn job(name: &str, epochs: i64) -> Result<Value> {
    let all = quickstart()?;
    let found = all.into_iter().find(|object| object["kind"] == "FineTuneJob");
    let mut job = found.context("the quick-start has no FineTuneJob")?;
    job["metadata"]["name"] = name.into();
    job["spec"]["training"]["epochs"] = epochs.into();
    job["spec"]["evaluation"] = json!({"metrics": ["Perplexity"]});
    job["spec"]["output"]["modelName"] = format!("{name}-model").into();
    Ok(job)
}

/// Waits until the job has done this many steps.
///
/// # Errors
/// It is stalled, or does not come so far.
pub async fn past_step(session: &Session, job: &str, step: i64) -> Result<()> {
    let jobs = session.api("lathe.dev/v1alpha1", "FineTuneJob").await?;
    poll(&format!("step {step} of {job}"), || async {
        let object = serde_json::to_value(jobs.get(job).await?)?;
        let stalled = condition(&object, "Stalled").is_some_and(|c| c["status"] == "True");
        ensure!(!stalled, "the job is stalled: {:#}", object["status"]);
        Ok((object["status"]["progress"]["step"].as_i64() >= Some(step)).then_some(()))
    })
    .await
}

/// Waits for the pod of a job's training that runs.
///
/// # Errors
/// There is none after some minutes.
pub async fn training_pod(session: &Session, job: &str) -> Result<Pod> {
    poll(&format!("a training pod of {job}"), || async {
        let found = pods(session, &format!("lathe.dev/task=train,lathe.dev/name={job}")).await?;
        Ok(found.into_iter().find(|p| p.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running")))
    })
    .await
}

/// The pods with these labels.
///
/// # Errors
/// The API server does not answer.
pub async fn pods(session: &Session, labels: &str) -> Result<Vec<Pod>> {
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
    Ok(pods.list(&ListParams::default().labels(labels)).await?.items)
}

/// What a pod has said so far.
///
/// # Errors
/// The API server has no log of it.
pub async fn log(session: &Session, pod: &str) -> Result<String> {
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
    pods.logs(pod, &LogParams::default()).await.with_context(|| format!("no log of {pod}"))
}

/// The digest of a Model that a job has made, once it is ready.
///
/// # Errors
/// It does not become ready.
pub async fn digest(session: &Session, model: &str) -> Result<String> {
    let model = session.wait("Model", model, "Ready", "True").await?;
    let digest = model["spec"]["source"]["digest"].as_str().context("a job's Model without a digest")?;
    Ok(digest.to_owned())
}

/// What a training has written on its volume.
#[derive(Debug)]
pub struct Saved {
    /// The highest step that it has noted.
    pub reached: i64,
    /// Steps of the checkpoints that are whole, ascending.
    pub checkpoints: Vec<i64>,
}

/// What the one training below the volume `artifacts` has written; none before it has begun.
///
/// # Errors
/// There are several, or what is written is not understood.
pub fn saved(artifacts: &Path) -> Result<Option<Saved>> {
    let files = machine::files(artifacts)?;
    let notes: Vec<&String> = files.iter().filter(|file| file.ends_with("/progress.json")).collect();
    ensure!(notes.len() < 2, "several trainings: {notes:?}");
    let Some(note) = notes.first() else { return Ok(None) };
    let text = std::fs::read_to_string(artifacts.join(note))?;
    let first: Value = serde_json::from_str(text.lines().next().unwrap_or_default())?;
    let reached = first["reached"].as_i64().context("no step is noted")?;
    // `step-<n>.<whoever wrote it>`
    let name = |file: &String| Some(file.strip_suffix("/manifest")?.rsplit_once("/step-")?.1.to_owned());
    let step = |file: &String| name(file)?.split_once('.')?.0.parse().ok();
    let mut checkpoints: Vec<i64> = files.iter().filter_map(step).collect();
    checkpoints.sort_unstable();
    Ok(Some(Saved { reached, checkpoints }))
}

/// A pod as it must not change: its name, UID and restarts.
#[must_use]
pub fn identity(pod: &Pod) -> (String, Option<String>, i32) {
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    (pod.name_any(), pod.uid(), statuses.map(|status| status.restart_count).sum())
}
