//! The log on standard error, and the usage log on standard output.
use std::io::IsTerminal as _;

use anyhow::Context as _;
use tracing::Subscriber;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, fmt};

use crate::options::LogFormat;

/// Target of the events that are lines of the usage log.
const USAGE: &str = "usage";

/// Starts logging.
///
/// # Errors
/// The filter is malformed, or logging was started before.
pub fn start(format: LogFormat) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new("info"))?;
    let log = fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
    let log = match format {
        LogFormat::Text => log.boxed(),
        LogFormat::Json => log.json().boxed(),
    };
    let log = log.with_filter(filter).with_filter(filter_fn(|metadata| metadata.target() != USAGE));
    tracing_subscriber::registry()
        .with(log)
        .with(usage(std::io::stdout))
        .try_init()
        .context("logging was started twice")
}

/// One flat object of JSON a line, whatever the log's filter says.
pub fn usage<S, W>(writer: W) -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_level(false)
        .with_writer(writer)
        .with_filter(filter_fn(|metadata| metadata.target() == USAGE))
}
