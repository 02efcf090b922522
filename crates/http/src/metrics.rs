//! Numbers for Prometheus.
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use prometheus_client::registry::Registry;

const KIND: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All of a registry in the OpenMetrics text format.
#[must_use]
pub fn openmetrics(registry: &Registry) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, registry) {
        Ok(()) => ([(header::CONTENT_TYPE, KIND)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
