//! A replica's answer on its way to the client: frame by frame as it comes, with nothing kept.
//!
//! Dropping the client's end drops the replica's, and with it the connection, which frees the replica's slot.
use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Response, header, response};
use http_body::Frame;
use serde_json::Value;
use tokio::time::{Instant, Sleep};

use crate::account::{Account, By};
use crate::error::ApiError;
use crate::headers;
use crate::upstream::Answer;

/// A worker writes a comment every 15 s into a stream that waits: one that is silent for so long is lost.
const SILENCE: Duration = Duration::from_secs(90);

/// The answer for the client; `account` stays open until it is over.
pub fn relay(answer: Response<Answer>, account: Account) -> Response<Body> {
    let (head, body) = answer.into_parts();
    let relay = Relay::of(&head, body, account);
    let mut response = Response::new(Body::new(relay));
    (*response.status_mut(), *response.headers_mut()) = (head.status, headers::for_client(head.headers));
    response
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
#[derive(Debug)]
pub struct Relay {
    body: Answer,
    account: Account,
    /// Where it comes in events, how long none has come.
    silence: Option<Silence>,
    /// The last two bytes that were sent; at the beginning as between two events.
    end: [u8; 2],
    /// Why the rest will not come.
    lost: Option<String>,
    over: bool,
}

impl Relay {
    /// Of a replica's answer.
    pub fn of(head: &response::Parts, body: Answer, mut account: Account) -> Self {
        account.answers(head.status.as_u16(), By::Replica);
        account.took(headers::usage(&head.headers));
        let silence = is_event_stream(&head.headers).then(Silence::begins);
        if silence.is_some() {
            account.streams();
        }
        Self { body, account, silence, end: EVENT_END, lost: None, over: false }
    }

    /// A piece that came.
    fn passes(&mut self, data: &Bytes) {
        self.account.sends(data);
        self.end = data.iter().rev().take(2).rev().fold(self.end, |[_, last], byte| [last, *byte]);
    }

    /// The replica is lost in the middle of an answer. Between two events the client is told by an event, and no `[DONE]` follows;
    /// elsewhere its connection breaks off, so that half an answer is never taken for a whole one.
    fn broken(&mut self, why: &str) -> Result<Bytes, BoxError> {
        self.over = true;
        self.account.breaks();
        tracing::warn!(why, "a replica was lost in the middle of an answer");
        if self.silence.is_some() && self.end == EVENT_END {
            return Ok(error_event(&ApiError::broken_off().body()));
        }
        Err("the replica was lost in the middle of its answer".into())
    }
}

impl http_body::Body for Relay {
    type Data = Bytes;
    type Error = BoxError;

    /// The next piece, as it came.
    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        while !self.over {
            if let Some(why) = self.lost.take() {
                return Poll::Ready(Some(self.broken(&why).map(Frame::data)));
            }
            let frame = match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(None) => {
                    self.over = true;
                    self.account.ends();
                    break;
                }
                Poll::Ready(Some(Err(error))) => {
                    // What came before goes out first, where the client takes it: an error would take it along.
                    self.lost = Some(error.to_string());
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Poll::Pending => {
                    let lasts = self.silence.as_mut().is_some_and(|silence| silence.is_over(context));
                    return match lasts {
                        true => Poll::Ready(Some(self.broken("it fell silent").map(Frame::data))),
                        false => Poll::Pending,
                    };
                }
            };
            if let Some(silence) = &mut self.silence {
                silence.is_broken();
            }
            match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) => {
                    self.passes(&data);
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Err(frame) => self.account.took(frame.trailers_ref().and_then(headers::usage)),
            }
        }
        Poll::Ready(None)
    }
}

/// How long nothing has come.
#[derive(Debug)]
struct Silence {
    since: Instant,
    /// Set again when it rings and not with each piece, of which there are many.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Silence {
    fn begins() -> Self {
        Self { since: Instant::now(), timer: None }
    }

    fn is_broken(&mut self) {
        self.since = Instant::now();
    }

    /// Whether it has lasted too long; if not, `context` is woken when it has.
    fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        let end = self.since + SILENCE;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(end)));
        while timer.as_mut().poll(context).is_ready() {
            if end <= Instant::now() {
                return true;
            }
            timer.as_mut().reset(end);
        }
        false
    }
}
