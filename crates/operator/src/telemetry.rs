//! Logs, and traces where a collector is named (OTLP over HTTP, protobuf).
use std::{
    io::IsTerminal as _,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use async_trait::async_trait;
use bytes::Bytes;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tokio::runtime::Handle;
use tracing::{Metadata, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer, filter::filter_fn, fmt, layer::SubscriberExt as _, registry::LookupSpan,
    util::SubscriberInitExt as _,
};

use crate::options::LogFormat;

/// Name of this program in traces.
const SERVICE: &str = "lathe-operator";
/// A collector that is slower than this gets nothing of a batch.
const PATIENCE: Duration = Duration::from_secs(5);

/// What must be flushed at the end.
pub struct Telemetry(Option<SdkTracerProvider>);

/// Starts logging to standard error and, where `collector` names one, sending traces.
///
/// # Errors
/// The filter or the collector's address is malformed, or logging was started before.
pub fn start(format: LogFormat, collector: Option<&str>) -> anyhow::Result<Telemetry> {
    let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new("info"))?;
    let log = fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
    let log = match format {
        LogFormat::Text => log.boxed(),
        LogFormat::Json => log.json().boxed(),
    };
    let provider = collector.map(provider).transpose()?;
    tracing_subscriber::registry()
        .with(log.with_filter(filter))
        .with(provider.as_ref().map(layer))
        .try_init()
        .context("logging was started twice")?;
    Ok(Telemetry(provider))
}

impl Telemetry {
    /// Sends what was not sent yet.
    pub async fn end(self) {
        let Some(provider) = self.0 else { return };
        let sent = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(PATIENCE)).await;
        if let Ok(Err(error)) = sent {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

/// Traces of our own spans alone: those of the HTTP client would speak of the sending itself.
fn layer<S>(provider: &SdkTracerProvider) -> impl Layer<S> + use<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let own = |metadata: &Metadata<'_>| metadata.is_span() && metadata.target().starts_with("lathe_operator");
    tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(SERVICE))
        .with_location(false)
        .with_threads(false)
        .with_filter(filter_fn(own))
}

/// `collector`: `http://host:4318`, as `OTEL_EXPORTER_OTLP_ENDPOINT` has it; the path of traces is added.
fn provider(collector: &str) -> anyhow::Result<SdkTracerProvider> {
    let endpoint = format!("{}/v1/traces", collector.trim_end_matches('/'));
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Collector::new()?)
        .with_endpoint(&endpoint)
        .with_protocol(Protocol::HttpBinary)
        .build()
        .with_context(|| format!("--otlp-endpoint must be the URL of a collector (found {collector})"))?;
    let resource = Resource::builder().with_service_name(SERVICE).build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}

/// Our own HTTP client. The exporter asks for it from a thread of its own, the client needs the runtime's.
#[derive(Debug)]
struct Collector {
    client: reqwest::Client,
    runtime: Handle,
    away: AtomicBool,
}

impl Collector {
    fn new() -> anyhow::Result<Self> {
        let client = reqwest::Client::builder().timeout(PATIENCE).build().context("no HTTP client")?;
        Ok(Self { client, runtime: Handle::current(), away: AtomicBool::new(false) })
    }
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (client, request) = (self.client.clone(), reqwest::Request::try_from(request)?);
        let sending = self.runtime.spawn(async move {
            let answer = client.execute(request).await?.error_for_status()?;
            let status = answer.status();
            Ok::<_, reqwest::Error>((status, answer.bytes().await?))
        });
        let sent = sending.await?;
        // Told once, not with every batch.
        if self.away.swap(sent.is_err(), Ordering::Relaxed) != sent.is_err() {
            match &sent {
                Ok(_) => tracing::info!("traces are sent again"),
                Err(error) => tracing::warn!(%error, "traces cannot be sent"),
            }
        }
        let (status, body) = sent?;
        Ok(Response::builder().status(status).body(body)?)
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, http::HeaderMap, routing::post};
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_collector_receives_our_spans_and_no_others() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (sender, mut received) = mpsc::unbounded_channel();
        let take = move |headers: HeaderMap, body: Bytes| async move {
            let _ = sender.send((headers["content-type"].clone(), body));
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/v1/traces", post(take));
        tokio::spawn(async move { axum::serve(listener, router).await });

        let provider = provider(&format!("http://{address}/")).unwrap();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer(&provider)), || {
            let span = crate::runtime::span("Model", Some("ns"), "small");
            span.record("outcome", "ReadFailed");
            drop(span);
            drop(tracing::info_span!(target: "hyper", "foreign"));
        });
        Telemetry(Some(provider)).end().await;
        let (kind, body) = received.recv().await.unwrap();
        assert_eq!(kind, "application/x-protobuf");
        let text = String::from_utf8_lossy(&body);
        for part in ["reconcile", "Model", "ns", "small", "outcome", "ReadFailed", SERVICE] {
            assert!(text.contains(part), "{part} is not in {text:?}");
        }
        assert!(!text.contains("foreign"));
    }
}
