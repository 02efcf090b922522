//! How long each part of a wake and of a step takes, by the clock of whoever asks and looks every [`LOOK`].
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::Api;
use lathe_api::names;
use lathe_e2e::{
    Session,
    gateway::{Gateway, question},
    load::Load,
    serve::until_replicas,
    tune,
};

const LOOK: Duration = Duration::from_millis(10);
/// Longer than any of it takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// Names of parts, and the seconds of each.
#[derive(Default)]
struct Parts(Vec<(&'static str, Vec<f64>)>);

impl Parts {
    fn add(&mut self, part: &'static str, took: Duration) {
        println!("{part}: {:.2} s", took.as_secs_f64());
        let seconds = took.as_secs_f64();
        match self.0.iter_mut().find(|(known, _)| *known == part) {
            Some((_, all)) => all.push(seconds),
            None => self.0.push((part, vec![seconds])),
        }
    }
}

/// Measures as often as `LATHE_ROUNDS` says, and writes the seconds into the file `LATHE_FIGURES`.
pub async fn all(session: &Session, gateway: &Gateway, key: &str) -> Result<()> {
    let rounds: u32 = std::env::var("LATHE_ROUNDS").context("LATHE_ROUNDS is not set")?.parse()?;
    let file = std::env::var("LATHE_FIGURES").context("LATHE_FIGURES is not set")?;
    let mut parts = Parts::default();
    for _ in 0..rounds {
        session.reason("InferenceService", "shop", "Ready", "True", "ScaledToZero").await?;
        until_replicas(session, "shop", 0).await?;
        wake(session, gateway, key, &mut parts).await?;
        until_replicas(session, "shop", 1).await?;
        step(session, gateway, key, &mut parts).await?;
    }
    Ok(std::fs::write(file, serde_json::to_vec(&parts.0)?)?)
}

/// One request to a service that sleeps.
async fn wake(session: &Session, gateway: &Gateway, key: &str, parts: &mut Parts) -> Result<()> {
    let began = Instant::now();
    let asked = async {
        let body = question("shop", true);
        gateway.first_token(&body, key).await.map(|()| began.elapsed())
    };
    let replica = async {
        let made = until(|| async { Ok(pod(session).await?.map(|_| ())) }).await?;
        let runs = until(|| async { Ok(pod(session).await?.filter(container_runs).map(|_| ())) }).await?;
        let ready = until(|| async { Ok(pod(session).await?.filter(is_ready).map(|_| ())) }).await?;
        Ok([made, runs, ready].map(|at| at.duration_since(began)))
    };
    let (first, [made, runs, ready]) = tokio::try_join!(asked, replica)?;
    parts.add("a request at zero: held until its first token", first);
    parts.add("of which: until a pod is there", made);
    parts.add("of which: the container's start", runs.saturating_sub(made));
    parts.add("of which: the worker, until it is ready", ready.saturating_sub(runs));
    parts.add("of which: until the gateway has its first token", first.saturating_sub(ready));
    Ok(())
}

/// Three times what one replica can do, from one second to the next.
async fn step(session: &Session, gateway: &Gateway, key: &str, parts: &mut Parts) -> Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(session.client.clone(), &session.namespace);
    let began = Instant::now();
    let load = Load::start(crate::many(), gateway, key);
    let decided = until(|| async {
        let replicas = deployments.get(&names::serve("shop")).await?.spec.and_then(|spec| spec.replicas);
        Ok(replicas.filter(|replicas| *replicas > 1).map(drop))
    })
    .await?;
    parts.add("a step of load: until more replicas are asked for", decided.duration_since(began));
    until_replicas(session, "shop", 3).await?;
    parts.add("a step of load: until three replicas are ready", began.elapsed());
    ensure!(load.all_answered().await? > 0, "nobody was answered");
    Ok(())
}

/// When it was there.
async fn until<F: Future<Output = Result<Option<()>>>>(mut there: impl FnMut() -> F) -> Result<Instant> {
    let began = Instant::now();
    while there().await?.is_none() {
        ensure!(began.elapsed() < PATIENCE, "waited {} s in vain", PATIENCE.as_secs());
        tokio::time::sleep(LOOK).await;
    }
    Ok(Instant::now())
}

/// The newest replica that is not going.
async fn pod(session: &Session) -> Result<Option<Pod>> {
    let pods = tune::pods(session, "lathe.dev/task=serve").await?;
    let stays = pods.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
    Ok(stays.max_by_key(|pod| pod.metadata.creation_timestamp.clone()))
}

fn container_runs(pod: &Pod) -> bool {
    let containers = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    containers.filter_map(|container| container.state.as_ref()).any(|state| state.running.is_some())
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}
