//! /healthz, /readyz and /metrics.
use std::net::SocketAddr;

use axum::{Router, extract::State, http::StatusCode, routing::get};

use crate::{
    health::Health,
    runtime::{Stop, stopped},
};

/// Serves until `stop`.
pub async fn run(address: SocketAddr, health: Health, stop: Stop) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    axum::serve(listener, router(health)).with_graceful_shutdown(stopped(stop)).await
}

fn router(health: Health) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(health)
}

async fn ready(State(health): State<Health>) -> (StatusCode, String) {
    match health.missing() {
        None => (StatusCode::OK, "ok".to_owned()),
        Some(missing) => (StatusCode::SERVICE_UNAVAILABLE, missing),
    }
}

async fn metrics(
    State(health): State<Health>,
) -> Result<([(&'static str, &'static str); 1], String), StatusCode> {
    let text = health.metrics.text().map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(([("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")], text))
}
