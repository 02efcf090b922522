//! The Lathe gateway: the one front door for everything that a cluster serves.
//!
//! **The story of a request.** [`lathe_http`] takes its connection and [`http`] its head. A key says who asks ([`keys`]), and with that
//! the one namespace whose models can be meant; without a known key the story ends here. It gets a place ([`places`]), of which each
//! key has its share, and is taken from the key's minute ([`limits`]). The body is read with bounds, and looked at ([`body`]) for five
//! things: the model's name, the prompt's beginning, the prompt's length, the answer's limit and whether it is a stream. [`table`],
//! which [`discovery`] makes of what the cluster says, turns the name into a service and its ready pods. [`limits`] takes its estimated
//! tokens as well, of the key's minute and of its month. From here on an [`account`] is open, which whatever happens is closed and
//! written down. [`balance`] chooses the pod that has likely read this prompt's beginning before and has no more to do than its
//! share. [`forward`] asks it with a token of the gateway ([`tokens`]) in place of the client's key, and asks another pod where the
//! first shows that it will do nothing ([`upstream`] keeps the connections); once a byte of an answer is out, never again. Where no pod
//! is ready, since the service sleeps or its last one is being replaced, [`hold`] keeps the request until one is. [`relay`] passes the
//! answer on frame by frame, takes the worker's count of tokens out of it, and drops the pod's connection when the client drops its own.
//!
//! [`flow`] adds up what flows and what waits, second by second, for the operator ([`operator_key`]), which makes more or fewer pods
//! of it.
//!
//! Nothing is kept of a request but its account's numbers. What keys used is exchanged with the gateway's other replicas ([`exchange`])
//! and outlives this process, in a ConfigMap.
//!
//! Beside that story, at `/`: a [`page`] for people, which asks for a key as every client does and shows what it may see
//! ([`overview`], [`jobs`]).
#![cfg_attr(test, allow(clippy::unwrap_used))]
mod account;
mod balance;
mod body;
mod bucket;
mod canary;
mod counts;
mod discovery;
mod error;
mod exchange;
mod files;
mod flow;
mod forward;
mod headers;
mod health;
mod hold;
mod http;
mod jobs;
mod keys;
mod ledger;
mod limits;
mod looks;
mod metrics;
mod month;
mod operator_key;
mod options;
mod overview;
mod page;
mod places;
mod relay;
mod table;
mod tasks;
mod telemetry;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tokens;
mod upstream;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser as _;
use kube::Client;
use lathe_contract::SERVE_PORT;
use lathe_http::{Bounds, serve, serve_by};
use lathe_telemetry::{SdkTracer, Traces};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use account::Books;
use balance::Balances;
use exchange::Exchange;
use flow::Flows;
use forward::Forwarder;
use health::Health;
use hold::Holds;
use hold::answer::Asker;
use http::Gateway;
use keys::Auth;
use limits::Quotas;
use metrics::Metrics;
use options::{AuthMode, Options};
use tasks::Tasks;
use upstream::Upstream;

/// How long connections are still taken after SIGTERM, while other nodes learn that this replica is not ready.
const SETTLE: Duration = Duration::from_secs(5);
/// Before open answers are cut off, those who still wait for a replica are told.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Connections beside those whose requests are answered: idle ones, and those that are told why they are not.
const MORE_CONNECTIONS: usize = 1024;
/// Probes, scrapes and the operator.
const ADMIN: Bounds = Bounds { connections: 256, idle: Duration::from_secs(15) };

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    lathe_http::allow_open_files();
    // One provider for every TLS connection; an error only says that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let metrics = Arc::new(Metrics::default());
    let usage_log = telemetry::start(options.log_format, metrics.usage_lines_lost.clone())?;
    let traces = options.collector.url().map(|url| Traces::start("lathe-gateway", &url)).transpose()?;
    let stop = Stop::on_signals()?;
    let client =
        Client::try_default().await.context("no Kubernetes API: run inside a cluster, or set KUBECONFIG")?;
    let tracer = traces.as_ref().map(Traces::tracer);
    let ended = run(&options, Around { client, port: SERVE_PORT, metrics, tracer, stop }).await;
    if let Some(traces) = traces {
        traces.end().await;
    }
    usage_log.finish();
    ended
}

/// What the program stands in.
struct Around {
    client: Client,
    /// Of all workers.
    port: u16,
    metrics: Arc<Metrics>,
    /// Where a collector is named.
    tracer: Option<SdkTracer>,
    stop: Stop,
}

/// Serves until it is stopped, then answers what is open.
async fn run(options: &Options, around: Around) -> anyhow::Result<()> {
    let Around { client, port, metrics, tracer, stop } = around;
    let mut tasks = Tasks::new();
    let health = Health::new(Arc::clone(&metrics));
    let quotas = Arc::new(Quotas::default());
    let tokens = tokens::follow(&mut tasks, options.signing_key.clone())?;
    let auth = auth(&mut tasks, options, &metrics, &quotas);
    let operator = operator_key::follow(&mut tasks, options.operator_key.clone());
    let exchange = Arc::new(Exchange::new(client.clone(), Arc::clone(&quotas), Arc::clone(&metrics)));
    exchange::follow(&mut tasks, Arc::clone(&exchange), health.clone());
    let (balances, flows, usage_log) = (Balances::default(), Flows::default(), options.usage_log);
    let books = Arc::new(Books { balances, quotas, flows, metrics: Arc::clone(&metrics), usage_log });
    let namespaces: Vec<String> = options.namespaces.iter().filter(|n| !n.is_empty()).cloned().collect();
    let cluster =
        discovery::follow(&mut tasks, &client, &namespaces, port, health.clone(), Arc::clone(&books));
    let holds = Holds::new(options.holds(), cluster.table.clone(), metrics);
    hold::follow(&mut tasks, Arc::clone(&holds));
    flow::follow(&mut tasks, Arc::clone(&books), Arc::clone(&holds), cluster.table.clone());
    let probes = health::router(health.clone());
    let probes = probes
        .merge(flow::poll::router(Arc::clone(&books), Arc::clone(&holds), Arc::clone(&operator)))
        .merge(jobs::handed::router(cluster.jobs.clone(), operator));
    let upstream = Upstream::default();
    upstream::follow(&mut tasks, upstream.clone());
    let asker = Asker::new(Forwarder::new(upstream, tokens), Arc::clone(&holds));
    let gateway = Gateway::new(auth, cluster, asker, books, options.places(), tracer);

    let admin = bind(options.admin_listen).await?;
    let clients = bind(options.listen).await?;
    tracing::info!(listen = %options.listen, admin = %options.admin_listen, "started");
    // Open to the end: the last thing to be seen is what is being drained.
    let open_to_the_end = serve(admin, probes, ADMIN, CancellationToken::new());
    tasks.spawn(async move {
        open_to_the_end.await;
        "the port of probes"
    });
    let closing = CancellationToken::new();
    let bounds = Bounds {
        connections: options.max_in_flight as usize + MORE_CONNECTIONS,
        idle: Duration::from_secs(options.idle_seconds.into()),
    };
    let draining = CancellationToken::new();
    let service = http::service(gateway, draining.clone());
    let mut serving = tokio::spawn(serve_by(clients, service, bounds, closing.clone()));

    let bug = tokio::select! {
        () = stop.asked.cancelled() => None,
        lost = tasks::lost(&mut tasks) => Some(lost),
        ended = &mut serving => anyhow::bail!("the port of clients is no longer served: {ended:?}"),
    };
    if let Some(bug) = &bug {
        tracing::error!("stopping: {bug:#}");
    }
    health.lacks("stopping", "answering what is open");
    draining.cancel();
    let budget = Duration::from_secs(options.drain_seconds.into());
    let drained = async {
        tokio::time::sleep(SETTLE.min(budget / 3)).await;
        closing.cancel();
        serving.await.context("the HTTP server ended in a bug")
    };
    let last_words = async {
        tokio::time::sleep(budget - LAST_WORDS.min(budget / 4)).await;
        holds.close();
        std::future::pending().await
    };
    let ended = tokio::select! {
        biased;
        () = stop.abort.cancelled() => None,
        () = last_words => None,
        ended = tokio::time::timeout(budget, drained) => ended.ok(),
    };
    match ended {
        Some(ended) => ended?,
        None => tracing::warn!("answers that are still open are cut off"),
    }
    exchange.round().await;
    tracing::info!("stopped");
    bug.map_or(Ok(()), Err)
}

fn auth(tasks: &mut Tasks, options: &Options, metrics: &Arc<Metrics>, quotas: &Arc<Quotas>) -> Auth {
    match options.auth {
        AuthMode::Keys => {
            Auth::Keys(keys::follow(tasks, options.keys_dir.clone(), Arc::clone(metrics), Arc::clone(quotas)))
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

/// How the program is told to end.
#[derive(Clone, Default)]
struct Stop {
    /// What is open may end.
    asked: CancellationToken,
    /// What is open is cut off.
    abort: CancellationToken,
}

impl Stop {
    /// Asked by SIGTERM or Ctrl-C, aborted by a second one.
    fn on_signals() -> std::io::Result<Self> {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = Self::default();
        let told = stop.clone();
        tokio::spawn(async move {
            for (token, what) in
                [(told.asked, "stopping: open answers are finished"), (told.abort, "stopping at once")]
            {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                tracing::info!("{what}");
                token.cancel();
            }
        });
        Ok(stop)
    }
}
