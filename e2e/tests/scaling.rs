//! Replicas that follow token throughput on a real node, with nothing else installed: from zero by one request that is held, up
//! under load, back to one, to zero, and no request lost on the way.
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lathe_e2e::{
    Session, condition,
    gateway::{Gateway, forget_keys, key, question},
    install,
    load::{Clients, Load, Tally},
    poll,
    serve::{answered, service},
    tune,
};
use serde_json::{Value, json};

#[tokio::test]
async fn replicas_follow_what_flows_and_no_request_is_lost() -> Result<()> {
    install(&[])?;
    let session = Session::begin("lathe-scaling").await?;
    session.run(story(&session)).await?;
    forget_keys(&session.client).await?;
    session.end().await?;
    // Without the flag the gateway goes with the upgrade.
    install(&[])
}

async fn story(session: &Session) -> Result<()> {
    // Before the gateway: one that runs hears of a key within a minute only.
    let key = key(&session.client, "scaling", &session.namespace).await?;
    install(&["--set", "gateway.enabled=true"])?;
    tune::prepare(session).await?;
    session.apply(&shop()?).await?;
    let gateway = Gateway::find(&session.client).await?;

    // Nobody asks for anything: it goes to sleep, which is no trouble, and not what a user did.
    session.reason("InferenceService", "shop", "Ready", "True", "ScaledToZero").await?;
    until_replicas(session, 0).await?;

    // One request wakes it, is held meanwhile, and answered; a stream says that it waits.
    let questions = [question("shop", false), question("shop", true)];
    let (plain, stream) =
        tokio::try_join!(gateway.ask(&questions[0], Some(&key)), gateway.ask(&questions[1], Some(&key)))?;
    ensure!(plain.0 == 200 && plain.1.contains("euros"), "{plain:?}");
    ensure!(stream.0 == 200 && stream.1.trim_end().ends_with("data: [DONE]"), "{stream:?}");
    ensure!(stream.1.starts_with(": "), "a client that waits is told so: {stream:?}");
    decided(session, "RequestHeld").await?;
    let object = session.wait("InferenceService", "shop", "Ready", "True").await?;
    let scaling = condition(&object, "ScalingActive").context("no ScalingActive")?;
    ensure!(scaling["status"] == "True", "{scaling:#}");

    // Far more than one takes: a second and a third are asked for, and used.
    let load = Load::start(many(), &gateway, &key);
    until_replicas(session, 3).await?;
    let used = poll("all three replicas to have answered", || async {
        let answered = answered(session).await?;
        Ok((answered.values().filter(|count| **count > 0.0).count() == 3).then_some(answered))
    })
    .await?;
    let answers = all_answered(load).await?;
    println!("{answers} requests through three replicas: {used:?}");

    // Back to one while somebody asks now and then, and to zero when nobody does.
    let load = Load::start(one(), &gateway, &key);
    until_replicas(session, 1).await?;
    all_answered(load).await?;
    session.reason("InferenceService", "shop", "Ready", "True", "ScaledToZero").await?;
    until_replicas(session, 0).await
}

/// Clients that ask again and again: more than two replicas have sequences for.
fn many() -> Clients {
    Clients { number: 64, tokens: 200, pause: Duration::ZERO, models: vec!["shop".to_owned()] }
}

/// One that asks now and then: too often for sleep, and no more than one replica can do.
fn one() -> Clients {
    Clients { number: 1, tokens: 8, pause: Duration::from_secs(4), ..many() }
}

/// How many answers there were when the load has ended and nothing was lost.
async fn all_answered(load: Load) -> Result<u64> {
    let Tally { answered, broken, lost, .. } = load.stop().await?;
    ensure!(
        answered > 0 && broken.is_empty() && lost.is_empty(),
        "{answered} answers; {broken:#?} {lost:#?}"
    );
    Ok(answered)
}

/// The quick-start's service, on a quarter of a core each.
fn shop() -> Result<Value> {
    let mut shop = service("shop", &[])?;
    let spec = &mut shop["spec"];
    spec["access"] = "GatewayOnly".into();
    spec["pod"] = json!({"cpu": "250m"});
    spec["autoscaling"] =
        json!({"minReplicas": 0, "maxReplicas": 3, "scaleDownAfter": "15s", "scaleToZeroAfter": "20s"});
    Ok(shop)
}

/// Waits until there are so many replicas, and all of them ready.
async fn until_replicas(session: &Session, wanted: i64) -> Result<()> {
    let what = format!("there are not {wanted} ready replicas");
    let count = |object: &Value, field: &str| object["status"][field].as_i64().unwrap_or(0);
    let there =
        |object: &Value| count(object, "replicas") == wanted && count(object, "readyReplicas") == wanted;
    session.until("InferenceService", "shop", &what, there).await.map(drop)
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
