//! Adapters of a running service: added and taken away without a restart, refused where they do not belong.
use anyhow::{Context, Result, ensure};
use kube::api::{Patch, PatchParams};
use lathe_e2e::{
    Session, condition, install,
    serve::{ask, post, service},
    tune::{identity, job, pods, prepare},
};
use serde_json::{Value, json};

const QUESTION: &str = "How much is the red lamp?";

#[tokio::test]
async fn adapters_come_and_go_while_the_service_answers() -> Result<()> {
    install(&[])?;
    let session = Session::begin("lathe-adapters").await?;
    session.run(come_and_go(&session)).await?;
    session.end().await
}

async fn come_and_go(session: &Session) -> Result<()> {
    prepare(session).await?;
    session.apply(&job("first", 1)?).await?;
    session.apply(&service("shop", &["first-model"])?).await?;
    let first = session.wait("Model", "first-model", "Ready", "True").await?;
    let ready = session.wait("InferenceService", "shop", "Ready", "True").await?;
    ensure!(ready["status"]["modelIds"] == json!(["shop", "first-model"]), "{:#}", ready["status"]);
    let answer = ask(session, "shop", "first-model", QUESTION).await?;
    let before = identities(session).await?;

    // The same files under another name, on a volume that the pods mount already.
    session.apply(&adapter("second", &first["spec"]["source"], "shop-base")).await?;
    session.wait("Model", "second", "Ready", "True").await?;
    set(session, &["first-model", "second"]).await?;
    served(session, &["shop", "first-model", "second"]).await?;
    ensure!(ask(session, "shop", "second", QUESTION).await? == answer, "the same adapter answers otherwise");

    set(session, &["second"]).await?;
    served(session, &["shop", "second"]).await?;
    let body = json!({"model": "first-model", "messages": [{"role": "user", "content": QUESTION}]});
    let (status, text) = post(session, "shop", &body).await?;
    ensure!(status == 404 && text.contains("model_not_found"), "{status}: {text}");

    // An adapter of another base: named, and nothing that answers is disturbed.
    let base = json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": "other-base"},
        "spec": {"source": {"uri": "pvc://quickstart/model"}}});
    session.apply(&base).await?;
    session.apply(&adapter("stranger", &first["spec"]["source"], "other-base")).await?;
    session.wait("Model", "stranger", "Ready", "True").await?;
    set(session, &["second", "stranger"]).await?;
    let cause = session.reason("InferenceService", "shop", "Stalled", "True", "AdapterBaseMismatch").await?;
    ensure!(cause.contains("stranger is an adapter of other-base") && cause.contains("Next: "), "{cause}");
    ensure!(ask(session, "shop", "second", QUESTION).await? == answer, "what ran before does not go on");

    set(session, &["second"]).await?;
    served(session, &["shop", "second"]).await?;
    session.wait("InferenceService", "shop", "Ready", "True").await?;
    ensure!(identities(session).await? == before, "the pod was restarted or replaced");
    Ok(())
}

fn adapter(name: &str, source: &Value, base: &str) -> Value {
    json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": name},
        "spec": {"source": source, "adapterOf": {"name": base}}})
}

/// Sets the service's adapters.
async fn set(session: &Session, adapters: &[&str]) -> Result<()> {
    let services = session.api("lathe.dev/v1alpha1", "InferenceService").await?;
    let refs: Vec<Value> = adapters.iter().map(|name| json!({"name": name})).collect();
    let patch = Patch::Merge(json!({"spec": {"adapterRefs": refs}}));
    services.patch("shop", &PatchParams::default(), &patch).await.context("cannot set the adapters")?;
    Ok(())
}

/// Waits until the service answers to these ids, and says so.
async fn served(session: &Session, ids: &[&str]) -> Result<()> {
    let there = |object: &Value| {
        let done = condition(object, "RolledOut").is_some_and(|c| c["status"] == "True");
        done && object["status"]["modelIds"] == json!(ids)
    };
    session.until("InferenceService", "shop", &format!("not answering to {ids:?}"), there).await.map(drop)
}

async fn identities(session: &Session) -> Result<Vec<(String, Option<String>, i32)>> {
    Ok(pods(session, "lathe.dev/task=serve").await?.iter().map(identity).collect())
}
