//! A service's pods are evicted, as a drain of their node does it: one at a time, and every question is answered meanwhile.
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use futures::future::try_join;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, Config, api::EvictParams};
use lathe_e2e::{
    Session, poll,
    serve::{ask, service},
    tune::prepare,
};

use crate::{begin, identities};

const REPLICAS: usize = 2;

#[tokio::test]
async fn evictions_take_one_replica_at_a_time_and_no_answer() -> Result<()> {
    let session = begin("lathe-drained").await?;
    session.run(drained(&session)).await?;
    session.end().await
}

async fn drained(session: &Session) -> Result<()> {
    prepare(session).await?;
    let mut shop = service("shop", &[])?;
    shop["spec"]["replicas"] = REPLICAS.into();
    // Room for a third, as one goes and another comes.
    shop["spec"]["pod"]["cpu"] = "200m".into();
    session.apply(&shop).await?;
    all_ready(session).await?;

    let over = AtomicBool::new(false);
    let evictions = async {
        let ended = evict_all(session).await;
        over.store(true, Ordering::Relaxed);
        ended
    };
    let ((), answers) = try_join(evictions, keep_asking(session, &over)).await?;
    ensure!(answers > REPLICAS, "only {answers} questions were asked meanwhile");
    Ok(())
}

/// Evicts every pod that there is, the next one as soon as that is allowed, and waits for those that take their places.
async fn evict_all(session: &Session) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(impatient().await?, &session.namespace);
    let before = replicas(session).await?;
    let [first, second] = before.as_slice() else { bail!("not {REPLICAS} replicas: {before:?}") };
    ensure!(evict(&pods, first).await?, "no replica may be taken away, though all are ready");
    ensure!(!evict(&pods, second).await?, "the last ready replica may be taken away");
    poll("the second eviction", || async { Ok(evict(&pods, second).await?.then_some(())) }).await?;
    poll("other pods", || async {
        let now = replicas(session).await?;
        Ok((now.len() == REPLICAS && !now.iter().any(|name| before.contains(name))).then_some(()))
    })
    .await?;
    all_ready(session).await
}

/// A client that is told "not now" at once, instead of asking again by itself.
async fn impatient() -> Result<Client> {
    let mut config = Config::infer().await?;
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}

/// False where the PodDisruptionBudget does not allow it now.
async fn evict(pods: &Api<Pod>, name: &str) -> Result<bool> {
    match pods.evict(name, &EvictParams::default()).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 429 => Ok(false),
        Err(error) => Err(error).context(format!("cannot evict {name}")),
    }
}

/// Asks one question after the other, each on a connection of its own, until it is over. Returns how many were answered.
async fn keep_asking(session: &Session, over: &AtomicBool) -> Result<usize> {
    let mut answers = 0;
    while !over.load(Ordering::Relaxed) {
        ask(session, "shop", "shop", "How much is the red lamp?")
            .await
            .with_context(|| format!("after {answers} answers"))?;
        answers += 1;
    }
    Ok(answers)
}

async fn all_ready(session: &Session) -> Result<()> {
    let ready = |object: &serde_json::Value| object["status"]["readyReplicas"] == REPLICAS;
    session.until("InferenceService", "shop", "not all replicas are ready", ready).await.map(drop)
}

async fn replicas(session: &Session) -> Result<Vec<String>> {
    Ok(identities(session, "lathe.dev/name=shop").await?.into_iter().map(|pod| pod.0).collect())
}
