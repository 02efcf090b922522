//! Replicas that follow token throughput on a real node, with nothing else installed: from zero by one request that is held, up
//! under load, back to one, to zero, and no request lost on the way.
mod scaling {
    pub mod measured;
}

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lathe_e2e::{
    Session, condition,
    gateway::{Gateway, question, with_gateway},
    load::{Clients, Load},
    poll,
    serve::{answered, behind_gateway, until_replicas},
    tune,
};
use serde_json::{Value, json};

#[tokio::test]
async fn replicas_follow_what_flows_and_no_request_is_lost() -> Result<()> {
    with_gateway("scaling", story).await
}

async fn story(session: &Session, gateway: &Gateway, key: &str) -> Result<()> {
    tune::prepare(session).await?;
    session.apply(&shop()?).await?;

    // Nobody asks for anything: it goes to sleep, which is no trouble, and not what a user did.
    session.reason("InferenceService", "shop", "Ready", "True", "ScaledToZero").await?;
    until_replicas(session, "shop", 0).await?;

    // One request wakes it, is held meanwhile, and answered; a stream says that it waits.
    let questions = [question("shop", false), question("shop", true)];
    let (plain, stream) =
        tokio::try_join!(gateway.ask(&questions[0], Some(key)), gateway.ask(&questions[1], Some(key)))?;
    ensure!(plain.0 == 200 && plain.1.contains("euros"), "{plain:?}");
    ensure!(stream.0 == 200 && stream.1.trim_end().ends_with("data: [DONE]"), "{stream:?}");
    ensure!(stream.1.starts_with(": "), "a client that waits is told so: {stream:?}");
    decided(session, "RequestHeld").await?;
    let object = session.wait("InferenceService", "shop", "Ready", "True").await?;
    let scaling = condition(&object, "ScalingActive").context("no ScalingActive")?;
    ensure!(scaling["status"] == "True", "{scaling:#}");

    // Far more than one takes: a second and a third are asked for, and used.
    let load = Load::start(many(), gateway, key);
    until_replicas(session, "shop", 3).await?;
    let used = poll("all three replicas to have answered", || async {
        let answered = answered(session).await?;
        Ok((answered.values().filter(|count| **count > 0.0).count() == 3).then_some(answered))
    })
    .await?;
    let answers = load.all_answered().await?;
    println!("{answers} requests through three replicas: {used:?}");

    // Back to one while somebody asks now and then, and to zero when nobody does.
    let load = Load::start(one(), gateway, key);
    until_replicas(session, "shop", 1).await?;
    load.all_answered().await?;
    session.reason("InferenceService", "shop", "Ready", "True", "ScaledToZero").await?;
    until_replicas(session, "shop", 0).await
}

#[tokio::test]
#[ignore = "a measurement, not a test: cargo xtask bench scaling"]
async fn how_fast_replicas_follow() -> Result<()> {
    with_gateway("scaling-bench", async |session, gateway, key| {
        tune::prepare(session).await?;
        session.apply(&shop()?).await?;
        scaling::measured::all(session, gateway, key).await
    })
    .await
}

/// Clients that ask again and again: more than two replicas have sequences for.
fn many() -> Clients {
    Clients { number: 64, tokens: 200, pause: Duration::ZERO, models: vec!["shop".to_owned()] }
}

/// One that asks now and then: too often for sleep, and no more than one replica can do.
fn one() -> Clients {
    Clients { number: 1, tokens: 8, pause: Duration::from_secs(4), ..many() }
}

fn shop() -> Result<Value> {
    let mut shop = behind_gateway("shop", &[])?;
    shop["spec"]["autoscaling"] =
        json!({"minReplicas": 0, "maxReplicas": 3, "scaleDownAfter": "15s", "scaleToZeroAfter": "20s"});
    Ok(shop)
}

/// The status tells a decision for this reason, with its numbers.
async fn decided(session: &Session, reason: &str) -> Result<()> {
    let among = |object: &Value| {
        object["status"]["decisions"]
            .as_array()
            .is_some_and(|all| all.iter().any(|one| one["reason"] == reason))
    };
    session.until("InferenceService", "shop", &format!("no decision for {reason}"), among).await.map(drop)
}
