//! Generated answers in the shapes of OpenAI's API, whole or as server-sent events.
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, OnceLock};

use axum::Json;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream;
use http_body_util::BodyExt as _;
use lathe_contract::{USAGE_HEADER, Usage};
use lathe_telemetry::Operation;
use serde_json::{Value, json};

use super::error::ApiError;
use super::mailbox::{Delivery, Finish, Mailbox};

const USAGE: HeaderName = HeaderName::from_static(USAGE_HEADER);

/// Which of the two endpoints that generate was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completion,
}

impl Endpoint {
    /// Its name and path.
    pub fn operation(self) -> Operation {
        match self {
            Endpoint::Chat => Operation::CHAT,
            Endpoint::Completion => Operation::COMPLETION,
        }
    }
}

/// What every answer carries beside its text.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The answer's id.
    pub id: String,
    /// Unix time in seconds.
    pub created: i64,
    /// The model id that was asked.
    pub model: String,
    /// Which weights and which program.
    pub fingerprint: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
}

/// Waits for the end and answers in one piece.
///
/// # Errors
/// The engine's.
pub async fn whole(frame: Frame, mut mailbox: Mailbox) -> Result<Response, ApiError> {
    let mut text = String::new();
    let (finish, usage) = loop {
        let mut delivery = mailbox.next().await;
        text.push_str(&delivery.text);
        if let Some(end) = delivery.end.take() {
            break (end?, frame.took(&delivery));
        }
    };
    let choice = match frame.endpoint {
        Endpoint::Chat => json!({
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": null},
            "logprobs": null,
            "finish_reason": finish.name(),
        }),
        Endpoint::Completion => {
            json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish.name()})
        }
    };
    let mut body = frame.body(false, json!([choice]));
    body["usage"] = in_body(usage);
    let mut response = Json(body).into_response();
    response.headers_mut().extend(told(usage));
    Ok(response)
}

/// Answers event by event; dropping the response drops the mailbox, and with it the work.
pub fn streamed(frame: Frame, mailbox: Mailbox, include_usage: bool) -> Response {
    let took = Arc::default();
    let mut events = Events {
        frame,
        mailbox,
        include_usage,
        ready: VecDeque::new(),
        took: Arc::clone(&took),
        over: false,
    };
    if events.frame.endpoint == Endpoint::Chat {
        events.chunk(json!({"role": "assistant", "content": ""}), None);
    }
    let stream = stream::unfold(events, Events::next);
    // Comments keep proxies from giving up on an answer that waits for its turn.
    let response = Sse::new(stream).keep_alive(KeepAlive::default()).into_response();
    // Sent to those alone who ask for trailers, as the gateway does.
    let trailer = async move { took.get().map(|&usage| Ok(told(usage).into_iter().collect::<HeaderMap>())) };
    let mut response = response.map(|body| Body::new(body.with_trailers(trailer)));
    response.headers_mut().insert(header::TRAILER, HeaderValue::from_static(USAGE_HEADER));
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// The header or trailer for the gateway.
pub fn told(usage: Usage) -> Option<(HeaderName, HeaderValue)> {
    Some((USAGE, HeaderValue::from_str(&usage.to_string()).ok()?))
}

/// The same in OpenAI's words.
fn in_body(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.total(),
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    })
}

impl Frame {
    /// What the answer took up to a delivery.
    fn took(&self, so_far: &Delivery) -> Usage {
        Usage {
            prompt: self.prompt_tokens as u64,
            completion: so_far.tokens as u64,
            cached: so_far.cached as u64,
        }
    }

    fn body(&self, chunk: bool, choices: Value) -> Value {
        let object = match (self.endpoint, chunk) {
            (Endpoint::Chat, false) => "chat.completion",
            (Endpoint::Chat, true) => "chat.completion.chunk",
            (Endpoint::Completion, _) => "text_completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.fingerprint,
        })
    }
}

struct Events {
    frame: Frame,
    mailbox: Mailbox,
    include_usage: bool,
    ready: VecDeque<String>,
    /// Set at the end, also at one that is an error.
    took: Arc<OnceLock<Usage>>,
    over: bool,
}

impl Events {
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some((Ok(Event::default().data(data)), self));
            }
            if self.over {
                return None;
            }
            self.receive().await;
        }
    }

    async fn receive(&mut self) {
        let delivery = self.mailbox.next().await;
        if !delivery.text.is_empty() {
            self.chunk(json!({"content": delivery.text}), None);
        }
        let usage = self.frame.took(&delivery);
        if delivery.end.is_some() {
            // Set once, here.
            let _ = self.took.set(usage);
        }
        match delivery.end {
            None => return,
            Some(Ok(finish)) => {
                self.chunk(json!({}), Some(finish));
                if self.include_usage {
                    let mut body = self.frame.body(true, json!([]));
                    body["usage"] = in_body(usage);
                    self.ready.push_back(body.to_string());
                }
                self.ready.push_back("[DONE]".into());
            }
            // No `[DONE]`: the answer is not whole.
            Some(Err(error)) => self.ready.push_back(error.body().to_string()),
        }
        self.over = true;
    }

    /// Queues a piece of the answer; `delta` is chat's form of it.
    fn chunk(&mut self, delta: Value, finish: Option<Finish>) {
        let finish_reason = finish.map(Finish::name);
        let choice = match self.frame.endpoint {
            Endpoint::Chat => {
                json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish_reason})
            }
            Endpoint::Completion => {
                let text = delta["content"].as_str().unwrap_or_default();
                json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish_reason})
            }
        };
        let mut body = self.frame.body(true, json!([choice]));
        if self.include_usage {
            body["usage"] = Value::Null;
        }
        self.ready.push_back(body.to_string());
    }
}
