//! Adapters of a running service: added and taken away without a restart, refused where they do not belong.
use std::{ffi::OsStr, fs};

use anyhow::{Context, Result, ensure};
use kube::api::{Patch, PatchParams};
use lathe_e2e::{
    Session, condition, install, machine,
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

    // One whose files say that they were made for other weights: only a worker finds that, and the others answer on.
    forge(session, &first["spec"]["source"]).await?;
    let uri = json!({"uri": "pvc://lathe-artifacts/forged"});
    session.apply(&adapter("forged", &uri, "shop-base")).await?;
    session.wait("Model", "forged", "Ready", "True").await?;
    set(session, &["second", "forged"]).await?;
    for type_ in ["RolledOut", "Ready"] {
        let cause = session.reason("InferenceService", "shop", type_, "False", "AdapterFailed").await?;
        let words = ["adapter forged cannot be loaded", "it was made for a base with the weights", "Next: "];
        ensure!(words.iter().all(|words| cause.contains(words)), "{type_}: {cause}");
    }
    ensure!(ask(session, "shop", "second", QUESTION).await? == answer, "what ran before does not go on");

    set(session, &["second"]).await?;
    served(session, &["shop", "second"]).await?;
    session.wait("InferenceService", "shop", "Ready", "True").await?;
    ensure!(identities(session).await? == before, "the pod was restarted or replaced");
    Ok(())
}

/// Copies an adapter to `forged`, with another digest of the weights that it was made for.
async fn forge(session: &Session, source: &Value) -> Result<()> {
    let volume = machine::folder(session, "lathe-artifacts").await?;
    let from = source["uri"].as_str().and_then(|uri| uri.strip_prefix("pvc://lathe-artifacts/"));
    let (from, to) = (volume.join(from.context("not on the volume")?), volume.join("forged"));
    fs::create_dir(&to)?;
    // Without the list of digests, which would tell on it before.
    let listed = |name: &OsStr| name == "lathe-manifest.json";
    for entry in fs::read_dir(&from)?.filter(|entry| entry.as_ref().is_ok_and(|e| !listed(&e.file_name()))) {
        let entry = entry?;
        let mut bytes = fs::read(entry.path())?;
        let key = b"\"lathe.base_weights\":\"sha256:";
        if let Some(at) = bytes.windows(key.len()).position(|window| window == key) {
            bytes[at + key.len()..][..64].fill(b'0');
        }
        fs::write(to.join(entry.file_name()), bytes)?;
    }
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
