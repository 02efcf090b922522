//! What `serve` adds to the control port: `PUT /v1/adapters`.
use std::sync::Arc;

use axum::body::to_bytes;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::put;
use axum::{Json, Router};
use lathe_contract::{DesiredAdapters, Scope};

use super::error::ApiError;
use super::http::Front;

const MAX_BODY: usize = 1 << 20;

/// The routes, for [`crate::control::router`].
pub fn routes(front: Arc<Front>) -> Router {
    Router::new().route("/v1/adapters", put(set)).with_state(front)
}

/// Takes the set that is wanted and says where each adapter stands; the report says it later.
/// Nothing of the body is read before the token is known to be good.
async fn set(State(front): State<Arc<Front>>, request: Request) -> Response {
    if let Err(refusal) = front.control.check(request.headers(), Scope::Adapters) {
        return refusal.into_response();
    }
    let Ok(body) = to_bytes(request.into_body(), MAX_BODY).await else {
        let what = format!("The body must come whole and have at most {MAX_BODY} bytes.");
        return ApiError::invalid(Some("invalid_body"), what).into_response();
    };
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
