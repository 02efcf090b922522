//! How the operator's leader hands over the losses of jobs: on the port of probes, with a token that the operator signed.
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::put;
use lathe_contract::{CURVES_PATH, JobCurves, MAX_CURVES_BYTES, Scope};

use super::Jobs;
use crate::error::ApiError;
use crate::operator_key::OperatorKey;

/// [`CURVES_PATH`].
pub fn router(jobs: Jobs, operator: Arc<OperatorKey>) -> Router {
    Router::new()
        .route(CURVES_PATH, put(take))
        .layer(DefaultBodyLimit::max(MAX_CURVES_BYTES))
        .with_state((jobs, operator))
}

async fn take(
    State((jobs, operator)): State<(Jobs, Arc<OperatorKey>)>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    operator.admit(&headers, Scope::Curves)?;
    let told =
        JobCurves::parse(&body).map_err(|error| ApiError::invalid("invalid_curves", error.to_string()))?;
    // A curve of a job that is not known is dropped, and told once.
    if !jobs.are_listed() {
        return Err(ApiError::unavailable(
            "jobs_unknown",
            "The gateway does not know yet which jobs there are.",
        ));
    }
    told.curves.into_iter().for_each(|curve| jobs.plot(curve));
    Ok(StatusCode::NO_CONTENT)
}
