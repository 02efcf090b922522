//! The Lathe gateway: the one front door for everything that a cluster serves.
//!
//! **The story of a request.** [`lathe_http`] takes its connection and [`http`] its head. A key says who asks ([`keys`]), and with that
//! the one namespace whose models can be meant; without a known key the story ends here. The body is read with bounds ([`body`]) and
//! looked at for four things: the model's name, the prompt's beginning, the prompt's length and the answer's limit. [`table`], which
//! [`discovery`] makes of what the cluster says, turns the name into a service and its ready pods. [`limits`] takes the request and
//! its estimated tokens from the key's minute. From here on an [`account`] is open, which whatever happens is closed and written
//! down. [`balance`] chooses the pod that has likely read this prompt's beginning before and has no more to do than its share.
//! [`forward`] asks it with a token of the gateway ([`tokens`]) in place of the client's key, and asks another pod where the first
//! shows that it will do nothing; once a byte of an answer is out, never again. [`relay`] passes the answer on frame by frame, takes
//! the worker's count of tokens out of it, and drops the pod's connection when the client drops its own.
//!
//! Nothing is kept of a request but its account's numbers.
#![cfg_attr(test, allow(clippy::unwrap_used))]
mod account;
mod balance;
mod body;
mod discovery;
mod error;
mod forward;
mod headers;
mod health;
mod http;
mod keys;
mod limits;
mod metrics;
mod options;
mod places;
mod relay;
mod table;
mod telemetry;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tokens;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser as _;
use kube::Client;
use lathe_contract::SERVE_PORT;
use lathe_http::{Bounds, serve};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use account::Books;
use balance::Balances;
use forward::Forwarder;
use health::Health;
use http::Gateway;
use keys::Auth;
use limits::Quotas;
use metrics::Metrics;
use options::{AuthMode, Options};

/// How long connections are still taken after SIGTERM, while other nodes learn that this replica is not ready.
const SETTLE: Duration = Duration::from_secs(5);
/// Connections beside those whose requests are answered: idle ones, and those that are told why they are not.
const MORE_CONNECTIONS: usize = 1024;
/// Probes and scrapes.
const ADMIN: Bounds = Bounds { connections: 256, idle: Duration::from_secs(15) };

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    // One provider for every TLS connection; an error only says that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    telemetry::start(options.log_format)?;
    let stop = stop_signal()?;
    let client =
        Client::try_default().await.context("no Kubernetes API: run inside a cluster, or set KUBECONFIG")?;
    run(&options, &client, SERVE_PORT, stop).await
}

/// Serves what is asked of workers, which listen at `port`, until `stop`, then answers what is open.
async fn run(options: &Options, client: &Client, port: u16, stop: CancellationToken) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::default());
    let health = Health::new(Arc::clone(&metrics));
    let quotas = Arc::new(Quotas::default());
    let tokens = tokens::follow(options.signing_key.clone())?;
    let auth = auth(options, &metrics, &quotas);
    let books =
        Arc::new(Books { balances: Balances::default(), quotas, metrics, usage_log: options.usage_log });
    let namespaces: Vec<String> = options.namespaces.iter().filter(|n| !n.is_empty()).cloned().collect();
    let table = discovery::follow(client, &namespaces, port, health.clone(), Arc::clone(&books));
    let gateway = Gateway::new(auth, table, Forwarder::new(tokens), books, options.places());

    let admin = bind(options.admin_listen).await?;
    let clients = bind(options.listen).await?;
    tracing::info!(listen = %options.listen, admin = %options.admin_listen, "started");
    // Open to the end: the last thing to be seen is what is being drained.
    tokio::spawn(serve(admin, health::router(health.clone()), ADMIN, CancellationToken::new()));
    let closing = CancellationToken::new();
    let bounds = Bounds {
        connections: options.max_in_flight as usize + MORE_CONNECTIONS,
        idle: Duration::from_secs(options.idle_seconds.into()),
    };
    let serving = tokio::spawn(serve(clients, http::router(gateway), bounds, closing.clone()));

    stop.cancelled().await;
    health.lacks("stopping", "answering what is open");
    let budget = Duration::from_secs(options.drain_seconds.into());
    let drained = async {
        tokio::time::sleep(SETTLE.min(budget / 3)).await;
        closing.cancel();
        serving.await.context("the HTTP server ended in a bug")
    };
    match tokio::time::timeout(budget, drained).await {
        Ok(ended) => ended?,
        Err(_) => tracing::warn!("answers that are still open are cut off"),
    }
    tracing::info!("stopped");
    Ok(())
}

fn auth(options: &Options, metrics: &Arc<Metrics>, quotas: &Arc<Quotas>) -> Auth {
    match options.auth {
        AuthMode::Keys => {
            Auth::Keys(keys::follow(options.keys_dir.clone(), Arc::clone(metrics), Arc::clone(quotas)))
        }
        AuthMode::None => {
            tracing::warn!(
                "--auth none: whoever reaches this gateway may use every model of every namespace"
            );
            Auth::Open
        }
    }
}

async fn bind(address: std::net::SocketAddr) -> anyhow::Result<TcpListener> {
    lathe_http::bind(address).await.with_context(|| format!("cannot listen on {address}; free the port"))
}

/// Cancelled by SIGTERM or Ctrl-C.
fn stop_signal() -> std::io::Result<CancellationToken> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let told = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: open answers are finished");
        told.cancel();
    });
    Ok(stop)
}
