//! How the operator's leader hands over the losses of jobs: on the port of probes, with a token that the operator signed.
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::routing::put;
use lathe_contract::{CURVES_PATH, JobCurves, MAX_CURVES_BYTES, Scope};
use lathe_http::read_body;

use super::Jobs;
use crate::error::ApiError;
use crate::operator_key::OperatorKey;

/// [`CURVES_PATH`].
pub fn router(jobs: Jobs, operator: Arc<OperatorKey>) -> Router {
    Router::new().route(CURVES_PATH, put(take)).with_state((jobs, operator))
}

async fn take(
    State((jobs, operator)): State<(Jobs, Arc<OperatorKey>)>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    // Before a byte of the body is read.
    operator.admit(request.headers(), Scope::Curves)?;
    // What is handed over is told once: no gateway takes it before it knows which jobs are there to be shown.
    if !jobs.are_listed() {
        return Err(ApiError::unavailable(
            "jobs_unknown",
            "The gateway does not know yet which jobs there are.",
        ));
    }
    let (parts, body) = request.into_parts();
    let body = read_body(&parts.headers, body, MAX_CURVES_BYTES, |_| Ok::<_, ApiError>(())).await?;
    let told =
        JobCurves::parse(&body).map_err(|error| ApiError::invalid("invalid_curves", error.to_string()))?;
    told.curves.into_iter().for_each(|curve| jobs.plot(curve));
    Ok(StatusCode::NO_CONTENT)
}
