//! A worker's process is killed as it trains, and the pod after it is evicted: each next one goes on from what was saved.
use std::path::Path;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt as _, api::EvictParams};
use lathe_e2e::{
    Session,
    machine::{self, Stopped},
    poll,
    tune::{Saved, digest, job, log, prepare, saved, training_pod},
};
use serde_json::{Value, json};

use crate::{LONG, artifacts, begin, undisturbed};

#[tokio::test]
async fn a_killed_worker_goes_on_from_its_checkpoint_and_makes_the_same_bytes() -> Result<()> {
    let session = begin("lathe-killed-worker").await?;
    session.run(killed_and_evicted(&session)).await?;
    session.end().await
}

async fn killed_and_evicted(session: &Session) -> Result<()> {
    prepare(session).await?;
    let mut long = job("long", LONG)?;
    long["spec"]["checkpoint"] = json!({"interval": "3s"});
    session.apply(&long).await?;
    let first = training_pod(session, "long").await?;
    let artifacts = artifacts(session).await?;

    let (stopped, at) = between_checkpoints(&first, &artifacts).await?;
    stopped.kill()?;
    let checkpoint = *at.checkpoints.last().context("no checkpoint")?;
    let killed = ended(session, &first.name_any()).await?;
    ensure!(killed == 137, "the first pod ended by itself, with exit code {killed}");
    let said = log(session, &first.name_any()).await?;
    ensure!(
        said.contains("phase=Training") && !said.contains("phase=EvaluatingAfter"),
        "killed, but not as it trained: {said}"
    );

    // The next one does again what came after the checkpoint, and nothing else.
    let second = pod_after(session, &first).await?;
    resumes(session, &second, checkpoint).await?;
    let lost = at.reached - checkpoint;
    let restarts = |count: i64| json!({"count": count, "lostSteps": lost});
    let told = |count| move |job: &Value| job["status"]["restarts"] == restarts(count);
    session.until("FineTuneJob", "long", &format!("not {lost} lost steps"), told(1)).await?;

    // With a word before: nothing more is lost.
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
    pods.evict(&second.name_any(), &EvictParams::default()).await?;
    let third = pod_after(session, &second).await?;
    let job = session.wait("FineTuneJob", "long", "Succeeded", "True").await?;
    ensure!(job["status"]["restarts"] == restarts(2), "{:#}", job["status"]["restarts"]);
    ensure!(job["status"]["attempt"] == 1, "{:#}", job["status"]);
    let said = log(session, &third.name_any()).await?;
    ensure!(said.contains("going on from a checkpoint"), "the third began anew: {said}");

    let (disturbed, calm) = (digest(session, "long-model").await?, undisturbed(session).await?);
    ensure!(disturbed == calm, "disturbed {disturbed}, undisturbed {calm}");
    Ok(())
}

/// Waits for another pod than this one to train: of one that has just ended it is still said that it runs.
async fn pod_after(session: &Session, ended: &Pod) -> Result<Pod> {
    poll("the next pod", || async {
        let found = training_pod(session, "long").await?;
        Ok((found.uid() != ended.uid()).then_some(found))
    })
    .await
}

/// Stops the worker where it has a checkpoint and steps after it, so that some are lost for certain.
async fn between_checkpoints(pod: &Pod, artifacts: &Path) -> Result<(Stopped, Saved)> {
    let worker = machine::worker(pod)?;
    let between = |saved: &Saved| saved.checkpoints.last().is_some_and(|step| saved.reached > *step);
    poll("steps after a checkpoint", || async {
        if !saved(artifacts)?.is_some_and(|saved| between(&saved)) {
            return Ok(None);
        }
        // What was read is true only of a worker that stands still.
        let stopped = Stopped::stop(worker)?;
        Ok(saved(artifacts)?.filter(between).map(|saved| (stopped, saved)))
    })
    .await
}

/// Waits for the end of a pod's container; returns its exit code.
async fn ended(session: &Session, pod: &str) -> Result<i32> {
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
    poll(&format!("the end of {pod}"), || async {
        let statuses = pods.get(pod).await?.status.and_then(|status| status.container_statuses);
        let state = statuses.and_then(|all| all.into_iter().next()?.state);
        Ok(state.and_then(|state| state.terminated).map(|end| end.exit_code))
    })
    .await
}

/// Waits until the pod has said that it goes on at this step.
async fn resumes(session: &Session, pod: &Pod, step: i64) -> Result<()> {
    let name = pod.name_any();
    poll(&format!("{name} to train"), || async {
        let said = log(session, &name).await?;
        if !said.contains("phase=Training") {
            return Ok(None);
        }
        let words = format!("going on from a checkpoint step={step}\n");
        ensure!(said.contains(&words), "it does not go on at step {step}: {said}");
        ensure!(!said.contains("measuring the base"), "the base was measured again: {said}");
        Ok(Some(()))
    })
    .await
}
