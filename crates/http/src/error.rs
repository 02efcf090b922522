//! Errors as OpenAI's API writes them: `{"error": {"message", "type", "param", "code"}}`.
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

/// What a client is told.
#[derive(Clone, Copy, Debug)]
pub struct ErrorBody<'a> {
    /// What is wrong, what is allowed, what to do next.
    pub message: &'a str,
    /// OpenAI's `type`.
    pub kind: &'a str,
    /// The field at fault, e.g. `messages[1].content`.
    pub param: Option<&'a str>,
    /// OpenAI's `code`.
    pub code: Option<&'a str>,
}

impl ErrorBody<'_> {
    /// The body of the answer, and the data of an error event in a stream.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }

    /// The whole answer. `retry_after` is in seconds: after so long the same request may succeed.
    #[must_use]
    pub fn answer(&self, status: StatusCode, retry_after: Option<u64>) -> Response {
        let mut response = (status, Json(self.json())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_when_and_how_to_ask_again() {
        let error = ErrorBody { message: "no", kind: "requests", param: None, code: Some("overloaded") };
        assert_eq!(
            error.json(),
            json!({"error": {"message": "no", "type": "requests", "param": null, "code": "overloaded"}})
        );
        assert_eq!(error.answer(StatusCode::TOO_MANY_REQUESTS, Some(3)).headers()["retry-after"], "3");
        assert_eq!(error.answer(StatusCode::UNAUTHORIZED, None).headers()["www-authenticate"], "Bearer");
    }
}
