//! What happens to pods, operator, API server and namespace while a job trains, and what must not come of it.
use std::{path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use lathe_e2e::{
    Session, condition, install, machine, operator, poll,
    serve::service,
    tune::{identity, job, past_step, pods, prepare, training_pod},
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};

/// Epochs of a job that is disturbed: some time on two cores.
const LONG: i64 = 8;

async fn begin(name: &str) -> Result<Session> {
    install(&[])?;
    Session::begin(name).await
}

#[tokio::test]
async fn a_killed_worker_resumes() -> Result<()> {
    let session = begin("lathe-killed-worker").await?;
    session
        .run(async {
            prepare(&session).await?;
            let mut long = job("long", LONG)?;
            long["spec"]["checkpoint"] = json!({"interval": "5s"});
            session.apply(&long).await?;
            let pod = training_pod(&session, "long").await?.name_any();
            checkpointed(&session, "long").await?;
            let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
            pods.delete(&pod, &at_once()).await?;
            let job = session.wait("FineTuneJob", "long", "Succeeded", "True").await?;
            let restarts = &job["status"]["restarts"];
            ensure!(restarts["count"].as_i64() >= Some(1), "restarts: {:#}", job["status"]);
            // It went on from the checkpoint: what it had done before it was not done again.
            let (steps, lost) = (&job["status"]["progress"]["steps"], &restarts["lostSteps"]);
            ensure!(lost.as_i64() < steps.as_i64(), "lost {lost} of {steps} steps");
            Ok(())
        })
        .await?;
    session.end().await
}

#[tokio::test]
async fn a_suspended_job_goes_on_where_it_stood() -> Result<()> {
    let session = begin("lathe-suspend").await?;
    session
        .run(async {
            prepare(&session).await?;
            session.apply(&job("long", LONG)?).await?;
            past_step(&session, "long", 3).await?;
            let jobs = session.api("lathe.dev/v1alpha1", "FineTuneJob").await?;
            let suspend = |value: bool| Patch::Merge(json!({"spec": {"suspend": value}}));
            jobs.patch("long", &PatchParams::default(), &suspend(true)).await?;
            poll("the pods to be gone", || async {
                Ok(pods(&session, "lathe.dev/task=train").await?.is_empty().then_some(()))
            })
            .await?;
            session.reason("FineTuneJob", "long", "Training", "False", "Suspended").await?;
            jobs.patch("long", &PatchParams::default(), &suspend(false)).await?;
            let job = session.wait("FineTuneJob", "long", "Succeeded", "True").await?;
            // SIGTERM saved the state, so nothing was done twice.
            ensure!(
                job["status"]["restarts"]["lostSteps"].as_i64().unwrap_or(0) == 0,
                "{:#}",
                job["status"]["restarts"]
            );
            Ok(())
        })
        .await?;
    session.end().await
}

#[tokio::test]
async fn killing_the_operator_at_any_moment_changes_nothing_for_the_pods() -> Result<()> {
    let session = begin("lathe-killed-operator").await?;
    session
        .run(async {
            prepare(&session).await?;
            session.apply(&service("shop", &[])?).await?;
            session.apply(&job("calm", 4)?).await?;
            let calm = session.wait("FineTuneJob", "calm", "Succeeded", "True").await?;
            session.wait("InferenceService", "shop", "Ready", "True").await?;
            let serving = identities(&session, "lathe.dev/task=serve").await?;

            session.apply(&job("rough", 4)?).await?;
            operator::kill(&session).await?;
            made(&session, "lathe.dev/name=rough,lathe.dev/task=check-data").await?;
            operator::kill(&session).await?;
            made(&session, "lathe.dev/name=rough,lathe.dev/task=train").await?;
            operator::kill(&session).await?;
            let training = identity(&training_pod(&session, "rough").await?);
            completed(&session, "rough-1").await?;
            operator::kill(&session).await?;
            let rough = session.wait("FineTuneJob", "rough", "Succeeded", "True").await?;

            ensure!(
                identities(&session, "lathe.dev/task=serve").await? == serving,
                "the service's pod changed"
            );
            let trained = identities(&session, "lathe.dev/task=train,lathe.dev/name=rough").await?;
            ensure!(
                trained == [training.clone()],
                "pods of the training: {trained:?}, at first {training:?}"
            );
            ensure!(told(&rough) == told(&calm), "{:#}\n{:#}", told(&rough), told(&calm));
            let digest = async |name: &str| -> Result<Value> {
                let model = session.wait("Model", name, "Ready", "True").await?;
                Ok(model["spec"]["source"]["digest"].clone())
            };
            let (rough, calm) = (digest("rough-model").await?, digest("calm-model").await?);
            ensure!(rough == calm && rough.is_string(), "the results differ: {rough} {calm}");
            Ok(())
        })
        .await?;
    session.end().await
}

/// What a status says of a result, without names, times and speed.
fn told(job: &Value) -> Value {
    let status = &job["status"];
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    let conditions: Vec<Value> =
        conditions.iter().map(|c| json!([c["type"], c["status"], c["reason"]])).collect();
    json!({
        "conditions": conditions, "scores": status["scores"], "attempt": status["attempt"],
        "restarts": status["restarts"], "step": status["progress"]["step"], "loss": status["progress"]["loss"],
    })
}

#[tokio::test]
async fn a_job_that_ends_while_the_operator_is_down_is_not_lost() -> Result<()> {
    let session = begin("lathe-operator-down").await?;
    let ended = session
        .run(async {
            prepare(&session).await?;
            session.apply(&job("alone", 2)?).await?;
            let pod = training_pod(&session, "alone").await?.name_any();
            operator::scale(&session, 0).await?;
            completed(&session, "alone-1").await?;
            // The worker's last words go with its pod; they stand beside the artefact too.
            let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
            pods.delete(&pod, &at_once()).await?;
            poll("the pod to be gone", || async { Ok(pods.get_opt(&pod).await?.is_none().then_some(())) })
                .await?;
            operator::scale(&session, 2).await?;
            let job = session.wait("FineTuneJob", "alone", "Succeeded", "True").await?;
            let scores = job["status"]["scores"].as_array().map_or(0, Vec::len);
            ensure!(scores == 1, "the scores are lost: {:#}", job["status"]);
            ensure!(job["status"]["attempt"] == 1, "it was trained again: {:#}", job["status"]);
            let model = session.wait("Model", "alone-model", "Ready", "True").await?;
            ensure!(model["status"]["scores"] == job["status"]["scores"], "{:#}", model["status"]);
            Ok(())
        })
        .await;
    if ended.is_err() {
        // The next test needs it.
        operator::scale(&session, 2).await?;
    }
    ended?;
    session.end().await
}

/// Goes on with a stopped process when it is dropped.
struct Stopped(u32);

impl Stopped {
    fn stop(name: &str) -> Result<Self> {
        let pid = machine::process(name)?;
        machine::signal(pid, "STOP")?;
        Ok(Self(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Err(error) = machine::signal(self.0, "CONT") {
            eprintln!("the process stays stopped: {error:#}");
        }
    }
}

#[tokio::test]
async fn an_api_server_that_is_away_for_a_minute_stops_no_training() -> Result<()> {
    let session = begin("lathe-api-away").await?;
    session
        .run(async {
            prepare(&session).await?;
            session.apply(&service("shop", &[])?).await?;
            session.wait("InferenceService", "shop", "Ready", "True").await?;
            session.apply(&job("long", LONG * 2)?).await?;
            past_step(&session, "long", 3).await?;
            let artifacts = machine::folder(&session, "lathe-artifacts").await?;
            let training = identity(&training_pod(&session, "long").await?);
            let serving = identities(&session, "lathe.dev/task=serve").await?;

            let stopped = Stopped::stop("kube-apiserver")?;
            let a_minute = Instant::now() + Duration::from_secs(60);
            let before = reached(&artifacts)?;
            poll("steps without an API server", || async {
                Ok((reached(&artifacts)? > before + 3).then_some(()))
            })
            .await?;
            // The disturbance itself lasts so long.
            sleep_until(a_minute).await;
            drop(stopped);

            let job = session.wait("FineTuneJob", "long", "Succeeded", "True").await?;
            ensure!(job["status"]["attempt"] == 1, "{:#}", job["status"]);
            ensure!(job["status"]["restarts"].is_null(), "{:#}", job["status"]);
            let trained = identities(&session, "lathe.dev/task=train").await?;
            ensure!(
                trained == [training.clone()],
                "pods of the training: {trained:?}, at first {training:?}"
            );
            ensure!(
                identities(&session, "lathe.dev/task=serve").await? == serving,
                "the service's pod changed"
            );
            session.wait("InferenceService", "shop", "Ready", "True").await?;
            Ok(())
        })
        .await?;
    session.end().await
}

/// The highest step that the one run below the volume has noted.
fn reached(artifacts: &Path) -> Result<i64> {
    let files = machine::files(artifacts)?;
    let note = files.iter().find(|file| file.ends_with("/progress.json")).context("no run has begun")?;
    let text = std::fs::read_to_string(artifacts.join(note))?;
    let first: Value = serde_json::from_str(text.lines().next().unwrap_or_default())?;
    first["reached"].as_i64().context("no step is noted")
}

#[tokio::test]
async fn a_namespace_that_goes_while_a_job_trains_leaves_nothing_and_holds_up_nobody() -> Result<()> {
    let session = begin("lathe-doomed").await?;
    session
        .run(async {
            prepare(&session).await?;
            session.apply(&service("shop", &[])?).await?;
            session.apply(&job("long", LONG)?).await?;
            session.wait("InferenceService", "shop", "Ready", "True").await?;
            past_step(&session, "long", 1).await
        })
        .await?;
    let operators = operator::pods(&session).await?;
    session.run(session.end()).await?;
    let other = Session::begin("lathe-spared").await?;
    other
        .run(async {
            prepare(&other).await?;
            other.wait("Model", "shop-base", "Ready", "True").await?;
            let after = operator::pods(&other).await?;
            ensure!(after == operators, "the operator was restarted: {operators:?}, then {after:?}");
            Ok(())
        })
        .await?;
    other.end().await
}

/// Without a grace period: SIGKILL.
fn at_once() -> DeleteParams {
    DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }
}

/// Waits until the job's last checkpoint is told.
async fn checkpointed(session: &Session, name: &str) -> Result<()> {
    let there = |job: &Value| job["status"]["progress"]["lastCheckpoint"]["step"].as_i64() >= Some(1);
    session.until("FineTuneJob", name, "no checkpoint", there).await.map(drop)
}

/// Waits until a Job with these labels is there.
async fn made(session: &Session, labels: &str) -> Result<()> {
    let jobs: Api<Job> = Api::namespaced(session.client.clone(), &session.namespace);
    poll(&format!("a Job with {labels}"), || async {
        let found = jobs.list(&ListParams::default().labels(labels)).await?;
        Ok((!found.items.is_empty()).then_some(()))
    })
    .await
}

/// Waits until a Job is complete.
async fn completed(session: &Session, name: &str) -> Result<()> {
    let jobs: Api<Job> = Api::namespaced(session.client.clone(), &session.namespace);
    poll(&format!("Job {name} to be complete"), || async {
        let object = json!({"status": jobs.get(name).await?.status});
        let is = |type_: &str| condition(&object, type_).is_some_and(|c| c["status"] == "True");
        ensure!(!is("Failed"), "Job {name} failed: {object:#}");
        Ok(is("Complete").then_some(()))
    })
    .await
}

async fn identities(session: &Session, labels: &str) -> Result<Vec<(String, Option<String>, i32)>> {
    Ok(pods(session, labels).await?.iter().map(identity).collect())
}
