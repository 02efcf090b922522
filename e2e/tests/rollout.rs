//! A changed spec is tried on a share of the users of a real service under load: one candidate that holds its gates and stays, one
//! that does not and goes; and no request is lost on either way.
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use lathe_api::names;
use lathe_e2e::{
    Session, condition,
    gateway::{Gateway, with_gateway},
    load::{Clients, Load},
    poll,
    serve::behind_gateway,
    tune,
};
use serde_json::{Value, json};

#[tokio::test]
async fn a_candidate_that_holds_its_gates_stays_and_one_that_does_not_goes() -> Result<()> {
    with_gateway("rollout", story).await
}

async fn story(session: &Session, gateway: &Gateway, key: &str) -> Result<()> {
    tune::prepare(session).await?;
    let good =
        json!([{"metric": "ErrorRate", "atMost": "0.05"}, {"metric": "TokensPerSecond", "atLeast": "0.1"}]);
    session.apply(&shop(16, &good)?).await?;
    session.wait("InferenceService", "shop", "Ready", "True").await?;
    let first = stable(session).await?;

    let load = Load::start(clients(), gateway, key);
    session.apply(&shop(8, &good)?).await?;
    let doing = session.reason("InferenceService", "shop", "RolledOut", "False", "Canary").await?;
    ensure!(doing.contains("50 % of the users"), "{doing}");
    let message = session.reason("InferenceService", "shop", "RolledOut", "True", "RolledOut").await?;
    ensure!(message.contains("has held every gate") && message.contains("TokensPerSecond is"), "{message}");
    let second = stable(session).await?;
    ensure!(second != first, "{second} is what it was");
    until_gone(session).await?;
    let answers = load.all_answered().await?;
    println!("promoted after {answers} answers: {message}");

    // Nobody is so fast: the candidate goes, and what there was answers on.
    let load = Load::start(clients(), gateway, key);
    session.apply(&shop(4, &json!([{"metric": "TokensPerSecond", "atLeast": "1000000"}]))?).await?;
    let message = session.reason("InferenceService", "shop", "RolledOut", "False", "GateFailed").await?;
    ensure!(message.contains("and must be at least 1000000"), "{message}");
    let object = session.wait("InferenceService", "shop", "Ready", "True").await?;
    let stalled = condition(&object, "Stalled").context("no Stalled")?;
    ensure!(stalled["status"] == "True" && stalled["reason"] == "GateFailed", "{stalled:#}");
    ensure!(stable(session).await? == second, "the stable revision changed");
    until_gone(session).await?;
    println!("failed: {message}");

    // Taken back, all is well.
    session.apply(&shop(8, &good)?).await?;
    session.reason("InferenceService", "shop", "RolledOut", "True", "RolledOut").await?;
    ensure!(stable(session).await? == second, "the stable revision changed");
    let answers = load.all_answered().await?;
    println!("{answers} requests answered");
    Ok(())
}

/// The service, of which a changed spec is tried on half of the users.
fn shop(sequences: u32, gates: &Value) -> Result<Value> {
    let mut shop = behind_gateway("shop", &[])?;
    let spec = &mut shop["spec"];
    spec["serving"]["maxSequences"] = sequences.into();
    spec["rollout"] =
        json!({"strategy": "Canary", "steps": [{"percent": 50, "after": "20s"}], "gates": gates});
    Ok(shop)
}

/// A light load of many users, so that either revision has some.
fn clients() -> Clients {
    Clients { number: 16, tokens: 8, pause: Duration::from_millis(500), models: vec!["shop".to_owned()] }
}

/// The revision that the service's own replicas are of.
async fn stable(session: &Session) -> Result<Value> {
    let is = |object: &Value| object["status"]["revisions"]["stable"].is_string();
    let object = session.until("InferenceService", "shop", "no stable revision is told", is).await?;
    Ok(object["status"]["revisions"]["stable"].clone())
}

/// Waits until the candidate is gone.
async fn until_gone(session: &Session) -> Result<()> {
    let api: Api<Deployment> = Api::namespaced(session.client.clone(), &session.namespace);
    poll("the candidate's Deployment to be gone", || async {
        Ok(api.get_opt(&names::candidate("shop")).await?.is_none().then_some(()))
    })
    .await
}
