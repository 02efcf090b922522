//! The port of probes and metrics.
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;

use crate::metrics::Metrics;

/// What must hold before this replica is ready, and what of it does not hold.
#[derive(Clone, Debug)]
pub struct Health {
    metrics: Arc<Metrics>,
    missing: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Health {
    /// Ready until something is said to be missing.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, missing: Arc::default() }
    }

    /// This part works.
    pub fn has(&self, part: &str) {
        self.lock().remove(part);
    }

    /// This part does not work, or not yet.
    pub fn lacks(&self, part: &str, why: &str) {
        self.lock().insert(part.to_owned(), why.to_owned());
    }

    /// Everything that is missing, a line each; `None`: ready.
    pub fn missing(&self) -> Option<String> {
        let missing = self.lock();
        let lines: Vec<String> = missing.iter().map(|(part, why)| format!("{part}: {why}\n")).collect();
        (!lines.is_empty()).then(|| lines.concat())
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// /healthz, /readyz and /metrics.
pub fn router(health: Health) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok"))
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

async fn metrics(State(health): State<Health>) -> Response {
    lathe_http::openmetrics(health.metrics.registry())
}
