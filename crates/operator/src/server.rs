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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::{
        body::{Body, to_bytes},
        http::Request,
    };
    use tower::ServiceExt as _;

    use super::*;

    async fn get(health: &Health, path: &str) -> (u16, String) {
        let request = Request::get(path).body(Body::empty()).expect("a request");
        let answer = router(health.clone()).oneshot(request).await.expect("an answer");
        let code = answer.status().as_u16();
        let bytes = to_bytes(answer.into_body(), 1 << 20).await.expect("a body");
        (code, String::from_utf8(bytes.to_vec()).expect("text"))
    }

    #[tokio::test]
    async fn probes_tell_alive_from_ready_and_say_what_is_missing() {
        let health = Health::new(Arc::default());
        assert_eq!(get(&health, "/healthz").await, (200, "ok".to_owned()));
        let (code, missing) = get(&health, "/readyz").await;
        assert!(code == 503 && missing.starts_with("api: "), "{code} {missing}");
        health.has("api");
        assert_eq!(get(&health, "/readyz").await, (200, "ok".to_owned()));
        let (code, text) = get(&health, "/metrics").await;
        assert!(code == 200 && text.ends_with("# EOF\n"), "{code} {text}");
        assert_eq!(get(&health, "/nothing").await.0, 404);
    }
}
