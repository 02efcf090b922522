//! Every replica of the operator is killed: as soon as an object is there that it made, and in between.
use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use kube::{ResourceExt as _, api::ListParams};
use lathe_e2e::{
    Session, events, operator, poll,
    serve::service,
    tune::{apply, digest, identity, job, past_step, training_pod},
};
use serde_json::{Value, json};

use crate::{begin, completed, identities};

/// Epochs: it takes longer than a killed operator's Lease lasts, so that the next one sees the training too.
const EPOCHS: i64 = 40;
/// Kinds of what the operator makes, and of what comes of that.
const KINDS: [(&str, &str); 9] = [
    ("batch/v1", "Job"),
    ("apps/v1", "Deployment"),
    ("apps/v1", "ReplicaSet"),
    ("v1", "ConfigMap"),
    ("v1", "Service"),
    ("v1", "PersistentVolumeClaim"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("policy/v1", "PodDisruptionBudget"),
    ("lathe.dev/v1alpha1", "Model"),
];

#[tokio::test]
async fn killing_the_operator_at_any_moment_changes_nothing_for_the_pods() -> Result<()> {
    let session = begin("lathe-killed-operator").await?;
    session.run(at_any_moment(&session)).await?;
    session.end().await
}

async fn at_any_moment(session: &Session) -> Result<()> {
    apply(session, &["PersistentVolumeClaim", "Job"]).await?;
    // A model that is looked at before its files are there is looked at again, which is no fault.
    completed(session, "quickstart-data").await?;
    apply(session, &["Model"]).await?;
    session.apply(&service("shop", &[])?).await?;
    session.wait("InferenceService", "shop", "Ready", "True").await?;
    session.apply(&job("rough", EPOCHS)?).await?;
    operator::kill(session).await?;
    for name in ["rough-check-data", "rough-1"] {
        made(session, "batch/v1", "Job", name).await?;
        operator::kill(session).await?;
    }
    let serving = identities(session, "lathe.dev/task=serve").await?;
    let training = identity(&training_pod(session, "rough").await?);
    // Told by an operator that has taken over.
    past_step(session, "rough", 1).await?;
    let before = objects(session, "").await?;
    operator::kill(session).await?;
    completed(session, "rough-1").await?;
    operator::kill(session).await?;
    made(session, "lathe.dev/v1alpha1", "Model", "rough-model").await?;
    operator::kill(session).await?;
    let rough = session.wait("FineTuneJob", "rough", "Succeeded", "True").await?;
    let disturbed = digest(session, "rough-model").await?;

    let mut late = service("late", &[])?;
    late["spec"]["pod"]["cpu"] = "200m".into();
    session.apply(&late).await?;
    made(session, "apps/v1", "Deployment", "late-serve").await?;
    operator::kill(session).await?;
    session.wait("InferenceService", "late", "Ready", "True").await?;

    // What was there stayed as it was: pods and their restarts, objects and their generations.
    let now = identities(session, "lathe.dev/task=serve,lathe.dev/name=shop").await?;
    ensure!(now == serving, "the service's pod changed: {serving:?}, then {now:?}");
    let trained = identities(session, "lathe.dev/task=train,lathe.dev/name=rough").await?;
    ensure!(trained == [training.clone()], "pods of the training: {trained:?}, at first {training:?}");
    let after = objects(session, "").await?;
    let changed: Vec<_> = before.iter().filter(|(name, was)| after.get(*name) != Some(was)).collect();
    ensure!(changed.is_empty(), "gone or changed: {changed:#?}\nnow: {after:#?}");
    // Nothing was made twice.
    for (name, made) in events::made_by_jobs(session).await? {
        ensure!(made.uids.len() == 1 && made.pods.len() == 1, "Job {name}: {made:#?}");
    }
    let generations = |all: &BTreeMap<String, Is>| all.values().map(|is| is.1).collect::<Vec<_>>();
    let (shop, late) = (objects(session, "shop-serve").await?, objects(session, "late-serve").await?);
    ensure!(
        shop.len() == late.len() && generations(&shop) == generations(&late),
        "a service whose operator was killed differs from one whose was not: {shop:#?}\n{late:#?}"
    );

    // The same job with nobody killed ends in the same state.
    session.apply(&job("calm", EPOCHS)?).await?;
    let calm = session.wait("FineTuneJob", "calm", "Succeeded", "True").await?;
    ensure!(told(&rough) == told(&calm), "{:#}\n{:#}", told(&rough), told(&calm));
    let calm = digest(session, "calm-model").await?;
    ensure!(disturbed == calm, "the results differ: {disturbed} {calm}");
    Ok(())
}

/// Waits until an object is there.
async fn made(session: &Session, api_version: &str, kind: &str, name: &str) -> Result<()> {
    let api = session.api(api_version, kind).await?;
    poll(&format!("{kind} {name}"), || async { Ok(api.get_metadata_opt(name).await?.map(drop)) }).await
}

/// An object that must not be changed or made again: its UID, and its generation where its kind has one.
type Is = (Option<String>, Option<i64>);

/// Objects whose names begin so, by kind and name, but for those of short work, which go when it is done.
async fn objects(session: &Session, prefix: &str) -> Result<BTreeMap<String, Is>> {
    let mut all = BTreeMap::new();
    for (api_version, kind) in KINDS {
        for object in session.api(api_version, kind).await?.list(&ListParams::default()).await? {
            let task = object.labels().get("lathe.dev/task").map(String::as_str);
            let name = object.name_any();
            if name.starts_with(prefix) && !matches!(task, Some("inspect" | "check-data")) {
                all.insert(format!("{kind} {name}"), (object.uid(), object.metadata.generation));
            }
        }
    }
    ensure!(!all.is_empty(), "there is nothing");
    Ok(all)
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
