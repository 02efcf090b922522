//! Errors as OpenAI's API writes them, as the worker does: `{"error": {"message", "type", "param", "code"}}`.
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use lathe_http::{BodyError, ErrorBody, MAX_BODY};
use serde_json::Value;

use crate::month::Month;

/// Some headers; smaller than a map of them.
pub type Headers = Vec<(HeaderName, HeaderValue)>;

/// Seconds after which somebody who could not be held may find room: about what a replica takes to wake.
const HOLD_RETRY: u64 = 5;
/// What a client is told to wait at most: its key may have another limit by then.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// Why the gateway itself refuses a request.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// OpenAI's `code`, also the label of the metric.
    pub code: &'static str,
    /// What is wrong, what is allowed, what to do next.
    pub message: String,
    kind: &'static str,
    param: Option<&'static str>,
    retry_after: Option<u64>,
    /// Sent with it.
    pub headers: Headers,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: impl Into<String>) -> Self {
        let headers = Headers::new();
        Self { status, code, message: message.into(), kind, param: None, retry_after: None, headers }
    }

    /// A request that can never succeed as it is.
    pub fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", code, message)
    }

    /// As [`ApiError::invalid`], with `model` as the field at fault.
    pub fn invalid_model(code: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some("model"), ..Self::invalid(code, message) }
    }

    /// No key, or none that is known.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", "invalid_api_key", message)
    }

    /// No such model for this caller; `near` are names that it may use.
    pub fn model_not_found(model: &str, hint: &str, near: &[String]) -> Self {
        let shown: String = model.chars().take(100).collect();
        let near: Vec<String> = near.iter().map(|name| format!("`{name}`")).collect();
        let next = if near.is_empty() {
            " Your key can use no model here.".to_owned()
        } else {
            format!(" You can use: {}.", near.join(", "))
        };
        let message = format!("The model `{shown}` does not exist.{hint}{next}");
        Self {
            param: Some("model"),
            ..Self::new(StatusCode::NOT_FOUND, "invalid_request_error", "model_not_found", message)
        }
    }

    /// The URL is not this API's.
    pub fn unknown_url(method: &str, path: &str) -> Self {
        let message = format!("Invalid URL ({method} {})", shortened(path));
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", "unknown_url", message)
    }

    /// The path exists, for other methods.
    pub fn method_not_allowed(method: &str, path: &str) -> Self {
        let message = format!("Not allowed to {method} on {}", shortened(path));
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", "method_not_supported", message)
    }

    /// A body longer than any prompt that fits.
    fn body_too_large(limit: usize) -> Self {
        let message = format!("The request body must be at most {limit} bytes.");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", "request_too_large", message)
    }

    /// The client sends too slowly.
    fn body_timeout() -> Self {
        let message = "The request body did not arrive in time.";
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", "request_timeout", message)
    }

    /// The key's limit of `what` a minute is reached.
    pub fn rate_limited(what: &'static str, limit: u32, wait: Duration) -> Self {
        let retry_after = wait.min(LONGEST_WAIT).as_secs_f64().ceil().max(1.0) as u64;
        let message = format!(
            "Rate limit reached: this key may use {limit} {what} a minute. Try again in {retry_after} s."
        );
        Self {
            retry_after: Some(retry_after),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, what, "rate_limit_exceeded", message)
        }
    }

    /// The key's `budget` of the month has no room for a request of so many `tokens`.
    pub fn budget_used(budget: u64, used: u64, tokens: u64, month: Month, now: Timestamp) -> Self {
        let kind = "insufficient_quota";
        let message = format!(
            "This key's budget is {budget} tokens a month: {used} are used, and this request may take up to {tokens}. It begins \
             anew on {} 00:00 UTC. Until then ask for shorter answers (`max_tokens`), or have the gateway's administrator raise \
             `tokensPerMonth` of the key.",
            month.end()
        );
        // OpenAI's clients would ask again in a moment.
        let headers = vec![(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"))];
        Self {
            retry_after: Some(month.seconds_left(now)),
            headers,
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, kind, kind, message)
        }
    }

    /// The gateway has no place for one request more: it is at its limit of `what`.
    pub fn overloaded(what: &str) -> Self {
        let message = format!("The gateway is at its limit of {what}. Try again in 1 s.");
        Self {
            retry_after: Some(1),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", "overloaded", message)
        }
    }

    /// The key is at its share of the gateway: `what`.
    pub fn share_used(what: &str) -> Self {
        let message = format!(
            "This key is at its share: {what}. Try again in 1 s, or when one of its requests has ended."
        );
        Self {
            retry_after: Some(1),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", "rate_limit_exceeded", message)
        }
    }

    /// Not now.
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            retry_after: Some(1),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", code, message)
        }
    }

    /// The service has it, and its replicas do not answer to it yet.
    pub fn not_ready(model: &str, service: &str) -> Self {
        let message = format!(
            "The model `{model}` is not ready; the status of InferenceService `{service}` says why. Ask again."
        );
        Self::unavailable("model_not_ready", message)
    }

    /// Nobody is there to ask.
    pub fn no_replica(model: &str) -> Self {
        let message = format!(
            "No replica of `{model}` is ready; the status of its InferenceService says why. Ask again."
        );
        Self::unavailable("no_replica", message)
    }

    /// Nobody was there to ask in all the time that a request may be held.
    pub fn not_woken(model: &str, seconds: u64) -> Self {
        let message = format!(
            "No replica of `{model}` became ready within {seconds} s; the status of its InferenceService says why. Ask again."
        );
        Self::unavailable("no_replica", message)
    }

    /// Nobody is there to ask, and as many wait for that already as may: `what`.
    pub fn hold_full(model: &str, what: &str) -> Self {
        let message = format!(
            "No replica of `{model}` is ready yet, and {what} wait for one, which is the limit. Try again in {HOLD_RETRY} s."
        );
        Self {
            retry_after: Some(HOLD_RETRY),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", "hold_full", message)
        }
    }

    /// Nobody is there to ask, and the body is longer than any that may wait.
    pub fn too_long_to_hold(model: &str, limit: usize) -> Self {
        let message = format!(
            "No replica of `{model}` is ready yet, and a request that waits for one may have at most {limit} bytes. Send a shorter one."
        );
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", "request_too_large", message)
    }

    /// The gateway goes, and what is held with it.
    pub fn shutting_down() -> Self {
        Self::unavailable("shutting_down", "This gateway is shutting down; ask again.")
    }

    /// Nobody can be told from the operator.
    pub fn operator_unknown() -> Self {
        let message = "This gateway has no key of the operator: mount `operator.pub` of the Secret `lathe-keys`, which the operator \
                       makes, or name it with --operator-key.";
        Self::unavailable("no_operator_key", message)
    }

    /// A replica took the request and its connection failed, and no other could be asked.
    pub fn upstream_failed() -> Self {
        let message = "The replica failed before it answered, and no other one could be asked; ask again.";
        Self {
            retry_after: Some(1),
            ..Self::new(StatusCode::BAD_GATEWAY, "server_error", "upstream_failed", message)
        }
    }

    /// Our fault; what went wrong stands in the log alone.
    pub fn internal() -> Self {
        let message = "The gateway failed to answer this request; its log says why.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal_error", message)
    }

    /// A replica refuses the gateway's own token.
    pub fn not_believed() -> Self {
        let message =
            "The replica does not believe this gateway; your key is good. Tell the gateway's administrator.";
        Self::new(StatusCode::BAD_GATEWAY, "server_error", "upstream_failed", message)
    }

    /// A replica says nothing at all.
    pub fn upstream_timeout() -> Self {
        let message = "The replica did not answer in time; ask for a shorter answer, or stream it.";
        Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", "upstream_timeout", message)
    }

    /// A replica was lost in the middle of a stream.
    pub fn broken_off() -> Self {
        let message = "The replica was lost in the middle of this answer; ask again.";
        Self::new(StatusCode::BAD_GATEWAY, "server_error", "upstream_failed", message)
    }

    /// Sent with these headers too.
    pub fn with_headers(mut self, headers: Headers) -> Self {
        self.headers.extend(headers);
        self
    }

    /// The body of the answer, and the data of an error event in a stream.
    pub fn body(&self) -> Value {
        self.told().json()
    }

    fn told(&self) -> ErrorBody<'_> {
        let Self { status: _, code, message, kind, param, retry_after: _, headers: _ } = self;
        ErrorBody { message, kind, param: *param, code: Some(code) }
    }
}

impl From<BodyError> for ApiError {
    fn from(error: BodyError) -> Self {
        match error {
            BodyError::TooLong => Self::body_too_large(MAX_BODY),
            BodyError::TooSlow => Self::body_timeout(),
            BodyError::Broken => Self::invalid("invalid_body", "The request body did not arrive whole."),
        }
    }
}

fn shortened(path: &str) -> String {
    path.chars().take(200).collect()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.told().answer(self.status, self.retry_after);
        response.headers_mut().extend(self.headers);
        response
    }
}
