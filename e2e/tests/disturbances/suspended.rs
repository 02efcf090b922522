//! A job that is held back: its pods go, its state stays, and it goes on where it stood.
use anyhow::{Result, ensure};
use kube::{
    ResourceExt as _,
    api::{Patch, PatchParams},
};
use lathe_e2e::{
    Session, poll,
    tune::{digest, job, log, past_step, pods, prepare, saved, training_pod},
};
use serde_json::json;

use crate::{LONG, artifacts, begin, undisturbed};

#[tokio::test]
async fn a_suspended_job_goes_on_where_it_stood_and_makes_the_same_bytes() -> Result<()> {
    let session = begin("lathe-suspend").await?;
    session.run(suspended(&session)).await?;
    session.end().await
}

async fn suspended(session: &Session) -> Result<()> {
    prepare(session).await?;
    let mut long = job("long", LONG)?;
    // So that SIGTERM alone can have saved what is there.
    long["spec"]["checkpoint"] = json!({"interval": "1h"});
    session.apply(&long).await?;
    let first = training_pod(session, "long").await?;
    past_step(session, "long", 3).await?;
    let jobs = session.api("lathe.dev/v1alpha1", "FineTuneJob").await?;
    let suspend = |value: bool| Patch::Merge(json!({"spec": {"suspend": value}}));
    jobs.patch("long", &PatchParams::default(), &suspend(true)).await?;
    poll("the pods to be gone", || async {
        Ok(pods(session, "lathe.dev/task=train").await?.is_empty().then_some(()))
    })
    .await?;
    let held = session.reason("FineTuneJob", "long", "Training", "False", "Suspended").await?;
    ensure!(held == "no pod runs; the last checkpoint is kept", "{held}");
    let headline = session.reason("FineTuneJob", "long", "Succeeded", "Unknown", "Suspended").await?;
    ensure!(headline == "`spec.suspend` is true. Next: set it to false.", "{headline}");

    let artifacts = artifacts(session).await?;
    let at = saved(&artifacts)?.filter(|saved| saved.reached >= 3 && saved.checkpoints == [saved.reached]);
    let Some(at) = at else {
        anyhow::bail!("not saved at the step where it stood: {:?}", saved(&artifacts)?);
    };

    jobs.patch("long", &PatchParams::default(), &suspend(false)).await?;
    let second = training_pod(session, "long").await?;
    ensure!(second.uid() != first.uid(), "the first pod is still there");
    let job = session.wait("FineTuneJob", "long", "Succeeded", "True").await?;
    let said = log(session, &second.name_any()).await?;
    let words = format!("going on from a checkpoint step={}\n", at.reached);
    ensure!(said.contains(&words), "it does not go on at step {}: {said}", at.reached);
    let restarts = &job["status"]["restarts"];
    ensure!(*restarts == json!({"count": 1, "lostSteps": 0}), "{restarts:#}");

    let (disturbed, calm) = (digest(session, "long-model").await?, undisturbed(session).await?);
    ensure!(disturbed == calm, "disturbed {disturbed}, undisturbed {calm}");
    Ok(())
}
