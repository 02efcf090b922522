//! Logs, and traces where a collector is named (OTLP over HTTP, protobuf).
use std::io::IsTerminal as _;

use anyhow::Context as _;
use lathe_telemetry::{SdkTracer, Traces};
use tracing::{Metadata, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer, filter::filter_fn, fmt, layer::SubscriberExt as _, registry::LookupSpan,
    util::SubscriberInitExt as _,
};

use crate::options::LogFormat;

/// Name of this program in traces.
const SERVICE: &str = "lathe-operator";

/// Starts logging to standard error and, where `traces` names their URL at a collector, sending traces, which are to be ended with the program.
///
/// # Errors
/// The filter or the collector's address is malformed, or logging was started before.
pub fn start(format: LogFormat, traces: Option<&str>) -> anyhow::Result<Option<Traces>> {
    let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new("info"))?;
    let log = fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
    let log = match format {
        LogFormat::Text => log.boxed(),
        LogFormat::Json => log.json().boxed(),
    };
    let traces = traces.map(|url| Traces::start(SERVICE, url)).transpose()?;
    tracing_subscriber::registry()
        .with(log.with_filter(filter))
        .with(traces.as_ref().map(|traces| layer(traces.tracer())))
        .try_init()
        .context("logging was started twice")?;
    Ok(traces)
}

/// Traces of our own spans alone: those of the HTTP client would speak of the sending itself.
fn layer<S>(tracer: SdkTracer) -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let own = |metadata: &Metadata<'_>| metadata.is_span() && metadata.target().starts_with("lathe_operator");
    tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_location(false)
        .with_threads(false)
        .with_filter(filter_fn(own))
}

#[cfg(test)]
mod tests {
    use axum::{Router, body::Bytes, http::HeaderMap, routing::post};
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_collector_receives_our_spans_and_no_others() {
        let (sender, mut received) = mpsc::unbounded_channel();
        let take = move |headers: HeaderMap, body: Bytes| async move {
            let _ = sender.send((headers["content-type"].clone(), body));
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/v1/traces", post(take));
        tokio::spawn(async move { axum::serve(listener, router).await });

        let traces = Traces::start(SERVICE, &format!("http://{address}/v1/traces")).unwrap();
        tracing::subscriber::with_default(
            tracing_subscriber::registry().with(layer(traces.tracer())),
            || {
                let span = crate::runtime::span("Model", Some("ns"), "small");
                span.record("outcome", "ReadFailed");
                drop(span);
                drop(tracing::info_span!(target: "hyper", "foreign"));
            },
        );
        traces.end().await;
        let (kind, body) = received.recv().await.unwrap();
        assert_eq!(kind, "application/x-protobuf");
        let text = String::from_utf8_lossy(&body);
        for part in ["reconcile", "Model", "ns", "small", "outcome", "ReadFailed", SERVICE] {
            assert!(text.contains(part), "{part} is not in {text:?}");
        }
        assert!(!text.contains("foreign"));
    }
}
