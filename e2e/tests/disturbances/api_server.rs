//! No API server for a minute.
use std::{path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use lathe_e2e::{
    Session,
    machine::{self, Stopped},
    poll,
    serve::service,
    tune::{identity, job, past_step, prepare, saved, training_pod},
};
use tokio::time::{Instant, sleep_until};

use crate::{LONG, artifacts, begin, identities};

#[tokio::test]
async fn an_api_server_that_is_away_for_a_minute_stops_no_training() -> Result<()> {
    let session = begin("lathe-api-away").await?;
    session.run(away(&session)).await?;
    session.end().await
}

async fn away(session: &Session) -> Result<()> {
    prepare(session).await?;
    session.apply(&service("shop", &[])?).await?;
    session.wait("InferenceService", "shop", "Ready", "True").await?;
    session.apply(&job("long", LONG)?).await?;
    past_step(session, "long", 3).await?;
    let artifacts = artifacts(session).await?;
    let training = identity(&training_pod(session, "long").await?);
    let serving = identities(session, "lathe.dev/task=serve").await?;

    let stopped = Stopped::stop(machine::process("kube-apiserver")?)?;
    let a_minute = Instant::now() + Duration::from_secs(60);
    let before = reached(&artifacts)?;
    poll("steps without an API server", || async { Ok((reached(&artifacts)? > before + 3).then_some(())) })
        .await?;
    // The disturbance itself lasts so long.
    sleep_until(a_minute).await;
    drop(stopped);

    let job = session.wait("FineTuneJob", "long", "Succeeded", "True").await?;
    ensure!(job["status"]["attempt"] == 1, "{:#}", job["status"]);
    ensure!(job["status"]["restarts"].is_null(), "{:#}", job["status"]);
    let trained = identities(session, "lathe.dev/task=train").await?;
    ensure!(trained == [training.clone()], "pods of the training: {trained:?}, at first {training:?}");
    ensure!(identities(session, "lathe.dev/task=serve").await? == serving, "the service's pod changed");
    session.wait("InferenceService", "shop", "Ready", "True").await.map(drop)
}

fn reached(artifacts: &Path) -> Result<i64> {
    Ok(saved(artifacts)?.context("no training has begun")?.reached)
}
