//! Jobs that end while no operator runs: nothing of them is lost.
use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt as _, api::DeleteParams};
use lathe_e2e::{
    Session, events, operator, poll,
    tune::{job, prepare, training_pod},
};
use serde_json::json;

use crate::{LONG, begin, completed, is_complete};

/// Jobs with the number of their epochs: two that are equal would be one training.
const JOBS: [(&str, i64); 2] = [("heard", LONG), ("unheard", LONG + 1)];

#[tokio::test]
async fn jobs_that_end_while_the_operator_is_down_are_not_lost() -> Result<()> {
    let session = begin("lathe-operator-down").await?;
    let ended = session.run(down(&session)).await;
    // The next test needs it, however this one ended.
    operator::scale(&session, 2).await?;
    ended?;
    session.end().await
}

async fn down(session: &Session) -> Result<()> {
    prepare(session).await?;
    for (name, epochs) in JOBS {
        let mut job = job(name, epochs)?;
        // Both at once on a machine of two cores.
        job["spec"]["pod"] = json!({"cpu": "600m"});
        session.apply(&job).await?;
    }
    let mut trained = Vec::new();
    for (name, _) in JOBS {
        trained.push(training_pod(session, name).await?.name_any());
    }
    operator::scale(session, 0).await?;
    let mut left = Vec::new();
    for (name, _) in JOBS {
        ensure!(!is_complete(session, &format!("{name}-1")).await?, "{name} ended before the operator went");
        left.push(object(session, name).await?);
    }
    for (name, _) in JOBS {
        completed(session, &format!("{name}-1")).await?;
    }
    ensure!(operator::pods(session).await?.is_empty(), "an operator runs");
    for ((name, _), before) in JOBS.iter().zip(&left) {
        let now = object(session, name).await?;
        ensure!(now == *before, "{name} changed while no operator ran: {before:#}\n{now:#}");
        ensure!(now["status"]["completionTime"].is_null(), "{name} is said to be over: {now:#}");
    }
    // The last words of one go with its pod; they stand beside the artefact too.
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
    pods.delete(&trained[1], &DeleteParams::default()).await?;
    poll("the pod to be gone", || async { Ok(pods.get_opt(&trained[1]).await?.is_none().then_some(())) })
        .await?;

    operator::scale(session, 2).await?;
    for (name, _) in JOBS {
        let job = session.wait("FineTuneJob", name, "Succeeded", "True").await?;
        let status = &job["status"];
        ensure!(status["scores"].as_array().map_or(0, Vec::len) == 1, "the scores are lost: {status:#}");
        ensure!(status["attempt"] == 1 && status["restarts"].is_null(), "trained again: {status:#}");
        ensure!(status["progress"]["step"] == status["progress"]["steps"], "{status:#}");
        let model = session.wait("Model", &format!("{name}-model"), "Ready", "True").await?;
        ensure!(model["status"]["scores"] == status["scores"], "{:#}", model["status"]);
    }
    // Only where the words were gone did a pod repeat them, once; and nobody trained a second time.
    let made = events::made_by_jobs(session).await?;
    let count = |job: &str| made.get(job).map_or(0, |made| made.pods.len());
    let counts = ["heard-1", "heard-summary", "unheard-1", "unheard-summary"].map(count);
    ensure!(counts == [1, 0, 1, 1], "pods that the Jobs have made: {made:#?}");
    Ok(())
}

async fn object(session: &Session, name: &str) -> Result<serde_json::Value> {
    let jobs = session.api("lathe.dev/v1alpha1", "FineTuneJob").await?;
    Ok(serde_json::to_value(jobs.get(name).await?)?)
}
