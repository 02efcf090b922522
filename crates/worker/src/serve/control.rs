//! What `serve` adds to the control port: `PUT /v1/adapters`.
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::put;
use axum::{Json, Router};
use lathe_contract::{DesiredAdapters, Scope};

use super::error::ApiError;
use super::http::Front;

const MAX_BODY: usize = 1 << 20;

/// The routes, for [`crate::control::router`].
pub fn routes(front: Arc<Front>) -> Router {
    Router::new().route("/v1/adapters", put(set)).layer(DefaultBodyLimit::max(MAX_BODY)).with_state(front)
}

/// Takes the set that is wanted and says where each adapter stands; the report says it later.
async fn set(State(front): State<Arc<Front>>, headers: HeaderMap, body: Bytes) -> Response {
    if let Err(refusal) = front.control.check(&headers, Scope::Adapters) {
        return refusal.into_response();
    }
    let Some(app) = front.app.get() else {
        return ApiError::unavailable("model_not_ready", "The base model is being loaded; ask again.")
            .into_response();
    };
    let wanted: DesiredAdapters = match serde_json::from_slice(&body) {
        Ok(wanted) => wanted,
        Err(error) => {
            return ApiError::invalid(
                Some("invalid_json"),
                format!("The body is not what it must be: {error}."),
            )
            .into_response();
        }
    };
    match app.adapters.set(&wanted.adapters) {
        Ok(status) => (StatusCode::ACCEPTED, Json(status)).into_response(),
        Err(problem) => ApiError::invalid(Some("invalid_value"), problem).into_response(),
    }
}
