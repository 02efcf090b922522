//! Errors as OpenAI's API writes them: `{"error": {"message", "type", "param", "code"}}`.
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use lathe_http::{BodyError, ErrorBody};
use lathe_telemetry::RequestTrace;
use serde_json::Value;

/// Why a request was not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What is wrong, what is allowed, what to do next.
    pub message: String,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// The field at fault, e.g. `messages[1].content`.
    pub param: Option<String>,
    /// OpenAI's `code`.
    pub code: Option<&'static str>,
    /// Seconds after which the same request may succeed.
    pub retry_after: Option<u64>,
}

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: Option<&'static str>,
        message: impl Into<String>,
    ) -> Self {
        Self { status, message: message.into(), kind, param: None, code, retry_after: None }
    }

    /// The last word of a request's span.
    pub fn traced(&self, trace: &RequestTrace) {
        trace.status(self.status.as_u16());
        trace.fails(self.code.unwrap_or(self.kind));
        trace.end();
    }

    /// A request that can never succeed as it is.
    pub fn invalid(code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", code, message)
    }

    /// As [`ApiError::invalid`], with the field at fault.
    pub fn field(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::invalid(Some(code), message) }
    }

    /// Prompt, or prompt and asked answer, are longer than the context. `param` is where the prompt stands.
    pub fn context_exceeded(param: &str, context: usize, prompt: usize, answer: Option<usize>) -> Self {
        let found = match answer {
            None => format!(
                "your {param} has {prompt} tokens and leaves no room for an answer. Shorten the {param}."
            ),
            Some(answer) => format!(
                "you asked for {} tokens ({prompt} in the {param}, {answer} in the answer). Shorten the {param} or \
                 the answer.",
                prompt.saturating_add(answer)
            ),
        };
        let message = format!("This model's maximum context length is {context} tokens; {found}");
        Self::field(param, "context_length_exceeded", message)
    }

    /// An input to be embedded is longer than the context. `param` is where it stands.
    pub fn input_too_long(param: &str, context: usize, tokens: usize) -> Self {
        let message = format!(
            "This model's maximum context length is {context} tokens; your {param} has {tokens}. Shorten it."
        );
        Self::field(param, "context_length_exceeded", message)
    }

    /// The URL or the method is not this API's.
    pub fn unknown_url(method: &str, path: &str) -> Self {
        let path: String = path.chars().take(200).collect();
        let message = format!("Invalid URL ({method} {path})");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("unknown_url"), message)
    }

    /// The path exists, for other methods.
    pub fn method_not_allowed(method: &str, path: &str) -> Self {
        let path: String = path.chars().take(200).collect();
        let message = format!("Not allowed to {method} on {path}");
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            Some("method_not_supported"),
            message,
        )
    }

    /// No such model; `near` are the names that come closest.
    pub fn model_not_found(model: &str, near: &[String]) -> Self {
        let shown: String = model.chars().take(100).collect();
        let next = match near {
            [] => String::new(),
            names => {
                format!(
                    " Served here: {}.",
                    names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
                )
            }
        };
        Self {
            param: Some("model".into()),
            ..Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                Some("model_not_found"),
                format!("The model `{shown}` does not exist.{next}"),
            )
        }
    }

    /// The token is missing or not believed.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", Some("invalid_api_key"), message)
    }

    /// A body longer than any prompt that fits.
    fn body_too_large(limit: usize) -> Self {
        let message = format!("The request body must be at most {limit} bytes.");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", Some("request_too_large"), message)
    }

    /// The client sends too slowly.
    fn body_timeout() -> Self {
        let message = "The request body did not arrive in time.";
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", Some("request_timeout"), message)
    }

    /// Another content type than JSON.
    pub fn not_json() -> Self {
        let message = "The request must have the header `Content-Type: application/json`.";
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request_error",
            Some("unsupported_media_type"),
            message,
        )
    }

    /// The queue is full.
    pub fn queue_full(waiting: usize, limit: usize, retry_after: u64) -> Self {
        let message = format!(
            "This replica is at its limit: {waiting} requests are in work or waiting (limit {limit}). Try again in \
             {retry_after} s."
        );
        Self {
            retry_after: Some(retry_after),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", Some("rate_limit_exceeded"), message)
        }
    }

    /// Vectors of other requests, unread by their clients, take all the room that there is for them.
    pub fn vectors_full() -> Self {
        let message = "This replica holds as many embeddings for other clients as it may until they have read them. Try again in 1 s.";
        Self {
            retry_after: Some(1),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", Some("rate_limit_exceeded"), message)
        }
    }

    /// Not now: loading, draining, or an adapter on its way.
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            retry_after: Some(1),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some(code), message)
        }
    }

    /// Our fault; what went wrong stands in the log alone.
    pub fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            Some("internal_error"),
            "The server failed to answer this request; the worker's log says why.",
        )
    }

    /// The body of the answer, and the data of an error event in a stream.
    pub fn body(&self) -> Value {
        self.told().json()
    }

    /// Why a body of at most `limit` bytes was not read.
    pub fn of_body(error: BodyError, limit: usize) -> Self {
        match error {
            BodyError::TooLong => Self::body_too_large(limit),
            BodyError::TooSlow => Self::body_timeout(),
            BodyError::Broken => {
                Self::invalid(Some("invalid_body"), "The request body did not arrive whole.")
            }
        }
    }

    fn told(&self) -> ErrorBody<'_> {
        let Self { status: _, message, kind, param, code, retry_after: _ } = self;
        ErrorBody { message, kind, param: param.as_deref(), code: *code }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.told().answer(self.status, self.retry_after)
    }
}
