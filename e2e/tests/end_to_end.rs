//! The main job on a real node, and what may happen to it on the way.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use lathe_e2e::{Session, condition, install, poll, quickstart};
use serde_json::{Value, json};

async fn begin(name: &str) -> Result<Session> {
    install(&[])?;
    Session::begin(name).await
}

/// The quick-start's objects of these kinds.
async fn apply(session: &Session, kinds: &[&str]) -> Result<()> {
    for object in quickstart()? {
        if kinds.is_empty() || kinds.contains(&object["kind"].as_str().unwrap_or_default()) {
            session.apply(&object).await?;
        }
    }
    Ok(())
}

/// Streams one chat completion from the Service of an InferenceService and returns the text.
async fn ask(session: &Session, url: &str, model: &str, question: &str) -> Result<String> {
    let host = url.trim_start_matches("http://").split([':', '/', '.']).next().unwrap_or_default().to_owned();
    let services: Api<k8s_openapi::api::core::v1::Service> =
        Api::namespaced(session.client.clone(), &session.namespace);
    let address = services.get(&host).await?.spec.and_then(|s| s.cluster_ip).context("no address")?;
    let body = json!({"model": model, "stream": true, "temperature": 0, "max_tokens": 64,
        "messages": [{"role": "user", "content": question}]});
    let response = reqwest::Client::new()
        .post(format!("http://{address}:8080/v1/chat/completions"))
        .json(&body)
        .send()
        .await?;
    let status = response.status();
    let text = response.text().await?;
    ensure!(status.is_success(), "{status}: {text}");
    ensure!(text.trim_end().ends_with("data: [DONE]"), "the stream does not end with [DONE]: {text}");
    let events = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    events
        .map(|data| {
            let event: Value = serde_json::from_str(data)?;
            Ok(event["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned())
        })
        .collect()
}

fn score(object: &Value, metric: &str, which: &str) -> f64 {
    let scores = object["status"]["scores"].as_array().cloned().unwrap_or_default();
    let found = scores.iter().find(|s| s["metric"] == metric).and_then(|s| s[which].as_str()?.parse().ok());
    found.unwrap_or(f64::NAN)
}

#[tokio::test]
async fn a_model_is_tuned_served_and_asked() -> Result<()> {
    let session = begin("lathe-main-job").await?;
    session
        .run(async {
            apply(&session, &[]).await?;
            let job = session.wait("FineTuneJob", "support-tone", "Succeeded", "True").await?;
            ensure!(
                score(&job, "ROUGEL", "after") > score(&job, "ROUGEL", "before") + 0.2,
                "no gain: {:#}",
                job["status"]["scores"]
            );
            let model = session.wait("Model", "shop-support", "Ready", "True").await?;
            ensure!(model["spec"]["derivedFrom"]["job"] == "support-tone", "lineage: {:#}", model["spec"]);
            ensure!(
                model["metadata"]["ownerReferences"].is_null(),
                "deleting the job would delete the model"
            );
            let service = session.wait("InferenceService", "shop", "Ready", "True").await?;
            let url = service["status"]["url"].as_str().context("no url")?;
            let question = "How much is the red lamp?";
            let plain = ask(&session, url, "shop", question).await?;
            let tuned = ask(&session, url, "shop-support", question).await?;
            ensure!(
                tuned.starts_with("Thank you for asking!") && !plain.starts_with("Thank you"),
                "{plain:?} {tuned:?}"
            );
            settled(&session).await
        })
        .await?;
    session.end().await
}

/// A second reconcile of a settled object writes nothing; applying the same manifests again changes nothing.
async fn settled(session: &Session) -> Result<()> {
    let versions = || async {
        let mut all = Vec::new();
        for (api_version, kind) in [
            ("lathe.dev/v1alpha1", "FineTuneJob"),
            ("lathe.dev/v1alpha1", "Model"),
            ("batch/v1", "Job"),
            ("apps/v1", "Deployment"),
            ("v1", "ConfigMap"),
        ] {
            for object in session.api(api_version, kind).await?.list(&ListParams::default()).await? {
                all.push((kind, object.name_any(), object.resource_version(), object.metadata.generation));
            }
        }
        anyhow::Ok(all)
    };
    let before = versions().await?;
    apply(session, &[]).await?;
    restart_operator(session).await?;
    let after = versions().await?;
    ensure!(before == after, "changed by a restart and a second apply:\n{before:#?}\n{after:#?}");
    Ok(())
}

async fn restart_operator(session: &Session) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), "lathe-system");
    let selector = ListParams::default().labels("app.kubernetes.io/name=lathe-operator");
    pods.delete_collection(
        &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() },
        &selector,
    )
    .await?;
    let deployments: Api<Deployment> = Api::namespaced(session.client.clone(), "lathe-system");
    poll("the operator to be back", || async {
        let status = deployments.get("lathe-operator").await?.status.unwrap_or_default();
        Ok((status.ready_replicas == status.replicas && status.ready_replicas > Some(0)).then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_killed_worker_resumes() -> Result<()> {
    let session = begin("lathe-killed-worker").await?;
    session
        .run(async {
            apply(&session, &["PersistentVolumeClaim", "Job", "Model"]).await?;
            session.apply(&long_job("30s")).await?;
            let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
            let pod = training_pod(&session).await?;
            past_step(&session, 3).await?;
            pods.delete(&pod, &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() })
                .await?;
            let job = session.wait("FineTuneJob", "long", "Succeeded", "True").await?;
            ensure!(job["status"]["restarts"]["count"].as_i64() >= Some(1), "restarts: {:#}", job["status"]);
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
            apply(&session, &["PersistentVolumeClaim", "Job", "Model"]).await?;
            session.apply(&long_job("5m")).await?;
            past_step(&session, 3).await?;
            let jobs = session.api("lathe.dev/v1alpha1", "FineTuneJob").await?;
            let suspend = |value: bool| Patch::Merge(json!({"spec": {"suspend": value}}));
            jobs.patch("long", &PatchParams::default(), &suspend(true)).await?;
            let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
            poll("the pods to be gone", || async {
                Ok(pods
                    .list(&ListParams::default().labels("lathe.dev/task=train"))
                    .await?
                    .items
                    .is_empty()
                    .then_some(()))
            })
            .await?;
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
async fn bad_input_is_named_in_status() -> Result<()> {
    let session = begin("lathe-bad-input").await?;
    session
        .run(async {
            apply(&session, &["PersistentVolumeClaim", "Job", "Model"]).await?;
            let mut missing = long_job("5m");
            missing["metadata"]["name"] = "no-model".into();
            missing["spec"]["baseModelRef"]["name"] = "nobody".into();
            session.apply(&missing).await?;
            let job = session.wait("FineTuneJob", "no-model", "Planned", "False").await?;
            ensure!(condition(&job, "Planned").unwrap()["reason"] == "ModelNotFound", "{:#}", job["status"]);
            let mut absent = long_job("5m");
            absent["metadata"]["name"] = "no-data".into();
            absent["spec"]["dataset"]["train"]["uri"] = "pvc://quickstart/data/nothing.jsonl".into();
            session.apply(&absent).await?;
            let job = session.wait("FineTuneJob", "no-data", "DatasetValid", "False").await?;
            let cause = condition(&job, "DatasetValid").unwrap()["message"].as_str().unwrap_or_default().to_owned();
            ensure!(cause.contains("nothing.jsonl"), "{cause}");
            session.wait("FineTuneJob", "no-data", "Stalled", "True").await?;
            let lost = json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": "lost"},
                "spec": {"source": {"uri": "pvc://quickstart/nowhere"}}});
            session.apply(&lost).await?;
            session.wait("Model", "lost", "Ready", "False").await?;
            session.wait("Model", "lost", "Stalled", "True").await?;
            Ok(())
        })
        .await?;
    session.end().await
}

/// The quick-start's job under another name, long enough to be disturbed.
fn long_job(checkpoint_interval: &str) -> Value {
    let mut job = quickstart().unwrap().into_iter().find(|o| o["kind"] == "FineTuneJob").unwrap();
    job["metadata"]["name"] = "long".into();
    job["spec"]["training"]["epochs"] = 12.into();
    job["spec"]["checkpoint"] = json!({"interval": checkpoint_interval, "keep": 2});
    job["spec"]["evaluation"] = json!({"metrics": ["Perplexity"]});
    job["spec"]["output"]["modelName"] = "long-model".into();
    job
}

async fn training_pod(session: &Session) -> Result<String> {
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
    poll("a training pod", || async {
        let found = pods.list(&ListParams::default().labels("lathe.dev/task=train")).await?;
        let running = found
            .items
            .into_iter()
            .find(|p| p.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running"));
        Ok(running.map(|pod| pod.name_any()))
    })
    .await
}

async fn past_step(session: &Session, step: i64) -> Result<()> {
    let jobs = session.api("lathe.dev/v1alpha1", "FineTuneJob").await?;
    poll("the first steps", || async {
        let job = serde_json::to_value(jobs.get("long").await?)?;
        let stalled = condition(&job, "Stalled").is_some_and(|c| c["status"] == "True");
        ensure!(!stalled, "the job is stalled: {:#}", job["status"]);
        Ok((job["status"]["progress"]["step"].as_i64() >= Some(step)).then_some(()))
    })
    .await
}
