//! A replica's answer on its way to the client: frame by frame as it comes, with nothing kept.
//!
//! Dropping the client's end drops the replica's, and with it the connection, which frees the replica's slot.
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Response, header};
use axum::response::IntoResponse as _;
use futures::stream;
use http_body::Frame;
use http_body_util::BodyExt as _;
use serde_json::Value;

use crate::account::{Account, By};
use crate::error::ApiError;
use crate::forward::Incoming;
use crate::headers;

/// A worker writes a comment every 15 s into a stream that waits: one that is silent for so long is lost.
const SILENCE: Duration = Duration::from_secs(90);

/// The answer for the client; `account` stays open until it is over.
pub fn relay(answer: Response<Incoming>, account: Account) -> Response<Body> {
    let (status, headers) = (answer.status(), headers::for_client(answer.headers()));
    let body = Body::from_stream(stream::unfold(Relay::of(answer, account), Relay::next));
    (status, headers, body).into_response()
}

/// An error in a stream, after which it ends.
pub fn error_event(error: &Value) -> Bytes {
    format!("data: {error}\n\n").into()
}

/// Whether the answer comes in events.
pub fn is_event_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    kind.is_some_and(|kind| kind.starts_with("text/event-stream"))
}

/// What stands between two events.
const EVENT_END: [u8; 2] = *b"\n\n";

/// The body of an answer.
pub struct Relay {
    body: Incoming,
    account: Account,
    events: bool,
    /// The last two bytes that were sent; at the beginning as between two events.
    end: [u8; 2],
    over: bool,
}

impl Relay {
    /// Of a replica's answer.
    pub fn of(answer: Response<Incoming>, mut account: Account) -> Self {
        let (parts, body) = answer.into_parts();
        account.answers(parts.status.as_u16(), By::Replica);
        account.took(headers::usage(&parts.headers));
        let events = is_event_stream(&parts.headers);
        if events {
            account.streams();
        }
        Self { body, account, events, end: EVENT_END, over: false }
    }

    /// The next piece, as it came.
    pub async fn next(mut self) -> Option<(Result<Bytes, BoxError>, Self)> {
        if self.over {
            return None;
        }
        loop {
            let frame = match self.frame().await {
                Ok(Some(frame)) => frame,
                Ok(None) => {
                    self.account.ends();
                    return None;
                }
                Err(why) => return Some((self.broken(&why), self)),
            };
            match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) => {
                    self.account.sends();
                    self.end =
                        data.iter().rev().take(2).rev().fold(self.end, |[_, last], byte| [last, *byte]);
                    return Some((Ok(data), self));
                }
                Err(frame) => self.account.took(frame.trailers_ref().and_then(headers::usage)),
            }
        }
    }

    async fn frame(&mut self) -> Result<Option<Frame<Bytes>>, String> {
        let next = self.body.frame();
        let frame = match self.events {
            true => tokio::time::timeout(SILENCE, next).await.map_err(|_| "it fell silent".to_owned())?,
            false => next.await,
        };
        frame.transpose().map_err(|error| error.to_string())
    }

    /// The replica is lost in the middle of an answer. Between two events the client is told by an event, and no `[DONE]` follows;
    /// elsewhere its connection breaks off, so that half an answer is never taken for a whole one.
    fn broken(&mut self, why: &str) -> Result<Bytes, BoxError> {
        self.over = true;
        self.account.breaks();
        tracing::warn!(why, "a replica was lost in the middle of an answer");
        if self.events && self.end == EVENT_END {
            return Ok(error_event(&ApiError::broken_off().body()));
        }
        Err("the replica was lost in the middle of its answer".into())
    }
}
