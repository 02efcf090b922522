//! Spans on their way to a collector: OTLP over HTTP, protobuf, by our own HTTP client.
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    ExporterBuildError, Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tokio::runtime::Handle;

/// A collector that is slower than this gets nothing of a batch.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why no traces can be sent.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The endpoint is no URL of a collector.
    #[error(
        "the endpoint of traces must be the URL of a collector, such as http://collector:4318 (found {endpoint}): {why}"
    )]
    Endpoint {
        /// As it was given, without a user's name and password.
        endpoint: String,
        /// What is wrong with it.
        why: String,
    },
    /// No client.
    #[error("no HTTP client for traces")]
    Client(#[from] reqwest::Error),
}

/// Sends spans in batches, from a thread of its own. How many of them is said by the conventional variables `OTEL_TRACES_SAMPLER` and
/// `OTEL_TRACES_SAMPLER_ARG`; without them everything whose parent was sampled, or that has none.
#[derive(Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
    program: &'static str,
}

impl Traces {
    /// Of `program`, to the collector's `url` of traces: `http://host:4318/v1/traces`. Must be called on the runtime that sends.
    ///
    /// # Errors
    /// `url` is none.
    pub fn start(program: &'static str, url: &str) -> Result<Self, TracesError> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Collector::new()?)
            .with_endpoint(url)
            .with_protocol(Protocol::HttpBinary)
            .build()
            .map_err(|error: ExporterBuildError| refused(url, &error.to_string()))?;
        let resource = Resource::builder().with_service_name(program).build();
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        Ok(Self { provider, program })
    }

    /// Makes spans.
    pub fn tracer(&self) -> SdkTracer {
        self.provider.tracer(self.program)
    }

    /// Sends what was not sent yet.
    pub async fn end(self) {
        let provider = self.provider;
        let sent = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(PATIENCE)).await;
        if let Ok(Err(error)) = sent {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

/// What is wrong with `url`, without its user's name and password: errors are logged.
fn refused(url: &str, why: &str) -> TracesError {
    let host = url.rsplit_once('@').map_or(url, |(_, host)| host);
    let user = &url[..url.len() - host.len()];
    let why = if user.is_empty() { why.to_owned() } else { why.replace(user, "") };
    TracesError::Endpoint { endpoint: host.to_owned(), why }
}

/// Our own HTTP client. The exporter asks for it from a thread of its own, the client needs the runtime's.
#[derive(Debug)]
struct Collector {
    client: reqwest::Client,
    runtime: Handle,
    away: AtomicBool,
}

impl Collector {
    fn new() -> Result<Self, reqwest::Error> {
        // An error only says that there is a provider of TLS already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().timeout(PATIENCE).build()?;
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
        // The URL may have a password in it.
        let sent = sending.await?.map_err(reqwest::Error::without_url);
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
    use super::*;

    #[tokio::test]
    async fn what_is_no_url_is_refused_by_name() {
        let said = Traces::start("lathe-test", "not a url").unwrap_err().to_string();
        assert!(said.contains("(found not a url)") && said.contains("http://collector:4318"), "{said}");
        let said = Traces::start("lathe-test", "http://me:secret@not a host").unwrap_err().to_string();
        assert!(said.contains("(found not a host)") && !said.contains("secret"), "{said}");
    }
}
