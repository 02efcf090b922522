//! What users give by mistake and what their cluster runs out of: each is named in status with what to do next, nothing
//! half-written lies under a final name, no pod is tried for ever, and what was put right goes on by itself.
//!
//! Only what needs a cluster is here; docs/failures.md says where the rest is tested.
mod files;
mod jobs;
mod models;
mod runs_out;

use std::path::Path;

use anyhow::{Result, ensure};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{Api, ResourceExt as _, api::ListParams};
use lathe_e2e::{Session, condition, install, machine, poll, tune::prepare};
use serde_json::Value;

/// An object that cannot work, and what its status must say.
struct Bad {
    object: Value,
    /// Conditions that all have the reason and the message, with their status.
    conditions: &'static [(&'static str, &'static str)],
    reason: &'static str,
    /// A `*` stands for what may differ from run to run.
    message: &'static str,
}

#[tokio::test]
async fn every_mistake_is_named_with_the_next_step() -> Result<()> {
    install(&[])?;
    let session = Session::begin("lathe-bad-input").await?;
    session.run(mistakes(&session)).await?;
    session.end().await
}

async fn mistakes(session: &Session) -> Result<()> {
    prepare(session).await?;
    let folder = machine::folder(session, "quickstart").await?;
    files::write_all(&folder)?;
    let all: Vec<Bad> = models::bad().into_iter().chain(jobs::bad()?).collect();
    session.apply(&models::poisoned()).await?;
    for bad in &all {
        session.apply(&bad.object).await?;
    }
    told(session, &all).await?;
    no_pod_is_tried_for_ever(session).await?;
    let artifacts = machine::folder(session, "lathe-artifacts").await?;
    nothing_half_written(&artifacts)?;
    // The next step helps: with the row put right the job goes on, without a new object.
    files::put_row_right(&folder)?;
    let job = session.wait("FineTuneJob", "row", "DatasetValid", "True").await?;
    let said = condition(&job, "DatasetValid").and_then(|c| c["message"].as_str().map(str::to_owned));
    ensure!(fits(&said.clone().unwrap_or_default(), jobs::PUT_RIGHT), "{said:?}");
    session.wait("FineTuneJob", "row", "Succeeded", "True").await?;
    Ok(())
}

/// Waits until each object's status says what it must; where that does not come, tells of all that say something else.
async fn told(session: &Session, all: &[Bad]) -> Result<()> {
    let wrong = async || {
        let mut wrong = Vec::new();
        for bad in all {
            wrong.extend(bad.wrong(session).await?);
        }
        anyhow::Ok(wrong)
    };
    let waited = poll("every mistake to be named", || async { Ok(wrong().await?.is_empty().then_some(())) });
    match waited.await {
        Ok(()) => Ok(()),
        Err(error) => Err(error.context(wrong().await?.join("\n"))),
    }
}

impl Bad {
    /// What its status does not say, or says otherwise.
    async fn wrong(&self, session: &Session) -> Result<Vec<String>> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (kind, name) = (text(&self.object["kind"]), text(&self.object["metadata"]["name"]));
        let api = session.api("lathe.dev/v1alpha1", &kind).await?;
        let object = serde_json::to_value(api.get(&name).await?)?;
        let is = |said: &Value, status: &str| {
            let same = said["status"] == status && said["reason"] == self.reason;
            same && said["message"].as_str().is_some_and(|said| fits(said, self.message))
        };
        let wrong = self.conditions.iter().filter_map(|(type_, status)| {
            let said = condition(&object, type_).cloned().unwrap_or_default();
            let wanted = format!("{status} {}: {}", self.reason, self.message);
            (!is(&said, status)).then(|| format!("{kind} {name} {type_}: {said:#}\n  wanted: {wanted}"))
        });
        Ok(wrong.collect())
    }
}

/// True where `text` is the pattern, whatever stands for its asterisks.
fn fits(text: &str, pattern: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return text == pattern };
    let Some(text) = text.strip_prefix(head) else { return false };
    (0..=text.len()).any(|at| text.get(at..).is_some_and(|tail| fits(tail, rest)))
}

/// A user's error fails its Job with the first pod, and no container is started again in its pod.
async fn no_pod_is_tried_for_ever(session: &Session) -> Result<()> {
    let jobs: Api<Job> = Api::namespaced(session.client.clone(), &session.namespace);
    let mut failed = 0;
    for job in jobs.list(&ListParams::default()).await? {
        let (name, status) = (job.name_any(), job.status.unwrap_or_default());
        let conditions = status.conditions.clone().unwrap_or_default();
        let Some(end) = conditions.iter().find(|c| c.type_ == "Failed") else { continue };
        failed += 1;
        ensure!(status.failed == Some(1), "Job {name}: {status:?}");
        ensure!(end.reason.as_deref() == Some("PodFailurePolicy"), "Job {name}: {end:?}");
    }
    ensure!(failed > 0, "no Job has failed");
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
    for pod in pods.list(&ListParams::default()).await? {
        let restarts = lathe_e2e::tune::identity(&pod).2;
        ensure!(restarts == 0, "pod {} was restarted {restarts} times", pod.name_any());
    }
    Ok(())
}

/// No checkpoint and no artefact lies below a volume, whole or not.
fn nothing_half_written(volume: &Path) -> Result<()> {
    let left = machine::files(volume)?;
    let final_ = |file: &&String| file.contains("/step-") || file.contains("safetensors");
    let half: Vec<_> = left.iter().filter(final_).collect();
    ensure!(half.is_empty(), "under a final name: {half:?} of {left:?}");
    Ok(())
}

/// Objects are merged, everything else is replaced.
fn merged(mut object: Value, change: &Value) -> Value {
    json_patch::merge(&mut object, change);
    object
}
