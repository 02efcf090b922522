//! Ten thousand requests through the gateway, on two nodes, while all that moves in a day moves in minutes: replicas come and go, a
//! rolling update, a candidate that is tried and stays, other adapters, a drained node, a killed worker, a gateway that is rolled over
//! and one that is killed.
use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
};
use lathe_e2e::{
    RELEASE_NAMESPACE, Session, condition,
    gateway::{Gateway, with_gateway},
    kubectl,
    load::{Clients, Load, Tally},
    machine, poll, quickstart,
    serve::{answered, behind_gateway, until_replicas},
    tune,
};
use serde_json::{Value, json};

const REQUESTS: u64 = 10_000;
/// More than two replicas have sequences for: they ask for three.
const CLIENTS: usize = 64;
const REPLICAS: i64 = 3;

#[tokio::test]
async fn ten_thousand_requests_are_answered_once_whatever_moves() -> Result<()> {
    with_gateway("front-door", story).await
}

async fn story(session: &Session, gateway: &Gateway, key: &str) -> Result<()> {
    for_both_nodes(session).await?;
    tune::apply(session, &["Job", "Model"]).await?;
    session.apply(&tune::job("first", 1)?).await?;
    let first = session.wait("Model", "first-model", "Ready", "True").await?;
    losses(session, gateway, key).await?;
    session.apply(&shop()?).await?;
    session.wait("InferenceService", "shop", "Ready", "True").await?;
    let load = Load::start(clients(CLIENTS, Duration::ZERO), gateway, key);

    step("three replicas", &load, until_replicas(session, "shop", REPLICAS)).await?;
    // Nobody is gone yet, so what replicas did can be told: each request once.
    let done: f64 = answered(session).await?.values().sum();
    let known = load.tally().answered + load.open() as u64;
    ensure!(done <= known as f64, "replicas gave {done} answers to {known} requests");
    step("rolling update", &load, rolled(session, &json!({"serving": {"maxSequences": 12}}))).await?;
    step("a candidate", &load, tried(session)).await?;
    step("other adapters", &load, other_adapters(session, &load, &first["spec"]["source"])).await?;
    step("a drained node", &load, drained(session)).await?;
    step("a gateway rolled over", &load, gateway_rolled()).await?;
    // Handed over anew, though the job is long over.
    losses(session, gateway, key).await?;
    let before = load.tally();
    ensure!(before.broken.is_empty(), "streams broke off, though nobody was killed: {:#?}", before.broken);
    step("a killed worker", &load, killed(session)).await?;
    step("the rest", &load, until_answered(&load, REQUESTS)).await?;
    let tally = whole(load.stop().await?)?;
    // Those whose worker was killed under them.
    ensure!(tally.broken.len() <= CLIENTS, "{} streams broke off", tally.broken.len());

    let load = Load::start(clients(1, Duration::from_secs(4)), gateway, key);
    step("one replica", &load, until_replicas(session, "shop", 1)).await?;
    whole(load.stop().await?)?;
    gateway_killed(session, key).await
}

/// The quick-start's volume, as one that pods of all nodes may mount.
async fn for_both_nodes(session: &Session) -> Result<()> {
    for mut object in quickstart()?.into_iter().filter(|object| object["kind"] == "PersistentVolumeClaim") {
        object["spec"]["accessModes"] = json!(["ReadWriteMany"]);
        session.apply(&object).await?;
    }
    Ok(())
}

/// Says how long a part took, and how many were answered meanwhile; nothing may be lost in it.
async fn step(name: &str, load: &Load, part: impl Future<Output = Result<()>>) -> Result<()> {
    let (began, before) = (tokio::time::Instant::now(), load.tally().answered);
    part.await.with_context(|| name.to_owned())?;
    let tally = whole(load.tally()).with_context(|| name.to_owned())?;
    let answered = tally.answered - before;
    println!(
        "{name}: {answered} answers in {:.0} s; {} broken",
        began.elapsed().as_secs_f64(),
        tally.broken.len()
    );
    Ok(())
}

fn whole(tally: Tally) -> Result<Tally> {
    ensure!(tally.lost.is_empty(), "{} lost of {}: {:#?}", tally.lost.len(), tally.answered, tally.lost);
    Ok(tally)
}

fn clients(number: usize, pause: Duration) -> Clients {
    Clients { number, tokens: 32, pause, models: vec!["shop".to_owned()] }
}

fn shop() -> Result<Value> {
    let mut shop = behind_gateway("shop", &["first-model"])?;
    shop["spec"]["autoscaling"] = json!({"minReplicas": 1, "maxReplicas": REPLICAS, "scaleDownAfter": "20s"});
    Ok(shop)
}

/// Changes the service, and waits until all replicas are as it says.
async fn rolled(session: &Session, spec: &Value) -> Result<()> {
    change(session, spec).await?;
    let done = |object: &Value| condition(object, "RolledOut").is_some_and(|c| c["status"] == "True");
    session.until("InferenceService", "shop", "not rolled out", done).await.map(drop)
}

/// Tries a changed spec on half of the users, of whom none notices, and keeps it.
async fn tried(session: &Session) -> Result<()> {
    let gates =
        json!([{"metric": "ErrorRate", "atMost": "0"}, {"metric": "TokensPerSecond", "atLeast": "0.1"}]);
    let steps = json!([{"percent": 50, "after": "15s"}]);
    let rollout = json!({"strategy": "Canary", "steps": steps, "gates": gates});
    rolled(session, &json!({"serving": {"maxSequences": 10}, "rollout": rollout})).await?;
    let message = session.reason("InferenceService", "shop", "RolledOut", "True", "RolledOut").await?;
    ensure!(message.contains("has held every gate"), "{message}");
    Ok(())
}

async fn change(session: &Session, spec: &Value) -> Result<()> {
    let services = session.api("lathe.dev/v1alpha1", "InferenceService").await?;
    services.patch("shop", &PatchParams::default(), &Patch::Merge(json!({"spec": spec}))).await?;
    Ok(())
}

/// A second adapter comes and is asked, and the first goes when nobody asks it any more.
async fn other_adapters(session: &Session, load: &Load, source: &Value) -> Result<()> {
    load.ask_for(&["shop", "first-model"]).await?;
    let second = json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": "second"},
        "spec": {"source": source, "adapterOf": {"name": "shop-base"}}});
    session.apply(&second).await?;
    session.wait("Model", "second", "Ready", "True").await?;
    rolled(session, &json!({"adapterRefs": [{"name": "first-model"}, {"name": "second"}]})).await?;
    load.ask_for(&["shop", "second"]).await?;
    rolled(session, &json!({"adapterRefs": [{"name": "second"}]})).await
}

/// All pods of one node go elsewhere, as the budgets of each allow, and the node takes part again.
async fn drained(session: &Session) -> Result<()> {
    let pods = replicas(session).await?;
    let mut nodes = BTreeMap::<String, usize>::new();
    for node in pods.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.clone()) {
        *nodes.entry(node).or_default() += 1;
    }
    ensure!(nodes.len() == 2, "replicas are not on two nodes: {nodes:?}");
    let (node, _) = nodes.into_iter().min_by_key(|(_, pods)| *pods).context("no node")?;
    let args = ["drain", &node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=5m"];
    let args = args.map(str::to_owned);
    tokio::task::spawn_blocking(move || kubectl(&args.each_ref().map(String::as_str))).await??;
    let left = replicas(session).await?;
    let left: Vec<_> = left
        .iter()
        .filter(|pod| pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(&node))
        .collect();
    ensure!(
        left.is_empty(),
        "replicas are left on {node}: {:?}",
        left.iter().map(|pod| pod.name_any()).collect::<Vec<_>>()
    );
    kubectl(&["uncordon", &node])?;
    until_replicas(session, "shop", REPLICAS).await
}

async fn gateway_rolled() -> Result<()> {
    tokio::task::spawn_blocking(|| {
        kubectl(&["rollout", "restart", "deployment/lathe-gateway", "--namespace", RELEASE_NAMESPACE])?;
        kubectl(&[
            "rollout",
            "status",
            "deployment/lathe-gateway",
            "--namespace",
            RELEASE_NAMESPACE,
            "--timeout=5m",
        ])
    })
    .await??;
    Ok(())
}

/// The page has the losses of the job that was over before anybody asked for them.
async fn losses(session: &Session, gateway: &Gateway, key: &str) -> Result<()> {
    let path = format!("/lathe/v1/jobs/{}/first/losses", session.namespace);
    poll("the losses of the job", || async {
        let (_, told) = gateway.get(&path, Some(key)).await?;
        Ok(told["points"].as_array().is_some_and(|points| points.len() > 1).then_some(()))
    })
    .await
}

/// A worker dies in the middle of its answers.
async fn killed(session: &Session) -> Result<()> {
    let pods = replicas(session).await?;
    let victim =
        pods.iter().find(|pod| tune::identity(pod).2 == 0).context("no replica that never restarted")?;
    let name = victim.name_any();
    machine::signal(machine::worker(victim)?, "KILL")?;
    poll("the killed worker to come back", || async {
        let now = replicas(session).await?;
        let restarted =
            now.iter().find(|pod| pod.name_any() == name).is_some_and(|pod| tune::identity(pod).2 == 1);
        Ok(restarted.then_some(()))
    })
    .await?;
    until_replicas(session, "shop", REPLICAS).await
}

async fn until_answered(load: &Load, wanted: u64) -> Result<()> {
    poll("all requests", || async { Ok((load.tally().answered >= wanted).then_some(())) }).await
}

/// One of two gateways dies: its own clients notice, and nobody else.
async fn gateway_killed(session: &Session, key: &str) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), RELEASE_NAMESPACE);
    let pods = pods.list(&ListParams::default().labels("app.kubernetes.io/name=lathe-gateway")).await?.items;
    ensure!(pods.len() == 2, "{} gateways", pods.len());
    let of = |pod: &Pod| {
        let ip = pod.status.as_ref().and_then(|status| status.pod_ip.clone()).context("no address")?;
        Ok::<_, anyhow::Error>(Load::start(
            clients(4, Duration::ZERO),
            &Gateway::at(format!("{ip}:8080")),
            key,
        ))
    };
    let (theirs, others) = (of(&pods[0])?, of(&pods[1])?);
    until_answered(&theirs, 20).await?;
    machine::signal(machine::worker(&pods[0])?, "KILL")?;
    let before = others.tally().answered;
    until_answered(&others, before + 20).await?;
    let (theirs, others) = (theirs.stop().await?, whole(others.stop().await?)?);
    ensure!(!theirs.lost.is_empty(), "nobody noticed that the gateway was killed");
    ensure!(others.broken.is_empty(), "{:#?}", others.broken);
    Ok(())
}

async fn replicas(session: &Session) -> Result<Vec<Pod>> {
    tune::pods(session, "lathe.dev/task=serve").await
}
