//! The Lathe operator: reconciles Models, FineTuneJobs and InferenceServices, and applies the profile catalogue.
#![cfg_attr(test, allow(clippy::unwrap_used))]
mod apply;
mod beside;
mod channel;
mod claims;
mod cleanup;
mod context;
mod costs;
mod curves;
mod devices;
mod distress;
mod drift;
mod error;
mod finetune;
mod health;
mod inference;
mod job;
mod keys;
mod lease;
mod memory;
mod metrics;
mod model;
mod mounting;
mod options;
mod pods;
mod profiles;
#[cfg(test)]
mod recorded;
mod runtime;
mod scaling;
mod server;
mod telemetry;
#[cfg(test)]
mod testing;
mod unplaced;

use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser as _;
use futures::future::BoxFuture;
use kube::Client;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use context::{Context, Scope};
use health::Health;
use options::Options;
use runtime::{Stop, stopped};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    if cleanup::asked() {
        return cleanup::run().await;
    }
    let options = Options::parse();
    // One provider for every TLS connection; an error only says that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let traces = telemetry::start(options.log_format, options.collector.url().as_deref())?;
    let done = run(&options).await;
    if let Some(traces) = traces {
        traces.end().await;
    }
    done
}

async fn run(options: &Options) -> anyhow::Result<()> {
    let client =
        Client::try_default().await.context("no Kubernetes API: run inside a cluster, or set KUBECONFIG")?;
    let health = Health::new(Arc::default());
    let stop = stop_signal()?;
    let server = tokio::spawn(server::run(options.listen, health.clone(), stop.clone()));
    let version = client.apiserver_version().await.context("the Kubernetes API does not answer")?;
    tracing::info!(kubernetes = %version.git_version, "started");
    health.has("api");
    health.lacks("kinds", "not looked at yet");
    tokio::spawn(health::watch_kinds(client.clone(), health.clone(), stop.clone()));
    let work = work(options, client, &health, stop);
    tokio::pin!(work);
    tokio::select! {
        done = &mut work => done?,
        ended = server => {
            ended.context("the HTTP server ended in a bug")?.context("cannot serve HTTP")?;
            // It ends well only when all stops: what is under way is finished, and the lease given back.
            work.await?;
        }
    }
    tracing::info!("stopped");
    Ok(())
}

/// Works while this replica is the leader. Losing the lease ends the process: another replica may already be working.
async fn work(options: &Options, client: Client, health: &Health, stop: Stop) -> anyhow::Result<()> {
    if !options.leader_elect {
        return lead(options, client, health, stop).await;
    }
    let (namespace, identity) = (&options.release_namespace, options.identity());
    let mut lease = lease::Lease::new(client.clone(), namespace, identity, health.clone());
    tokio::select! {
        () = lease.acquire() => {}
        () = stopped(stop.clone()) => return Ok(()),
    }
    tracing::info!("holds the lease");
    tokio::select! {
        done = lead(options, client, health, stop) => done?,
        () = lease.keep() => anyhow::bail!("the lease is lost"),
    }
    lease.release().await;
    Ok(())
}

/// Everything that only one replica does.
async fn lead(options: &Options, client: Client, health: &Health, stop: Stop) -> anyhow::Result<()> {
    let keys = keys::ensure(&client, &options.release_namespace).await?;
    let channel = channel::Channel::new(keys.signer)?;
    let context = Context::new(client, options.config(), channel, keys.trust, health.clone());
    let context = Arc::new(context);
    health.metrics.lead();
    let catalogue = async {
        // Profiles belong to the whole cluster: an operator of some namespaces only reads them.
        if context.config.namespaces.is_empty() {
            profiles::apply(&context.client, stop.clone()).await;
        }
    };
    let scopes = context.config.scopes();
    let controllers = scopes.iter().flat_map(|scope| controllers(&context, scope, &stop)).collect::<Vec<_>>();
    futures::join!(
        catalogue,
        futures::future::join_all(controllers),
        scaling::gateways::listen(context.clone(), stop.clone()),
    );
    Ok(())
}

/// The controllers of one scope; each ends when `stop` says so and its rounds are finished.
fn controllers(context: &Arc<Context>, scope: &Scope, stop: &Stop) -> Vec<BoxFuture<'static, ()>> {
    vec![
        model::controller(context, scope, stop),
        finetune::controller(context, scope, stop),
        inference::controller(context, scope, stop.clone()),
    ]
}

/// True after SIGTERM or Ctrl-C.
fn stop_signal() -> std::io::Result<Stop> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: rounds under way are finished");
        // An error means that nobody listens any more.
        let _ = sender.send(true);
    });
    Ok(receiver)
}
