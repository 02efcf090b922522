//! A request's way through the hold: asked at once where somebody is ready, held where nobody is, and asked again in its turn.
use std::sync::Arc;
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, Bytes};
use axum::http::{HeaderName, Response, StatusCode, header};
use axum::response::IntoResponse as _;
use futures::future::BoxFuture;
use futures::stream;
use http_body_util::BodyExt as _;
use tokio::time::Interval;

use super::{Held, Holds};
use crate::account::Account;
use crate::error::ApiError;
use crate::forward::{Attempt, Forwarder, Outgoing, Reply, Why};
use crate::places::Room;
use crate::relay::{Relay, is_event_stream, relay};
use crate::table::Sides;
use crate::upstream::Answer;

/// Between two comments in a stream that waits; proxies drop connections that are silent for a minute, some after less.
const COMMENTS: Duration = Duration::from_secs(5);
const COMMENT: &str = ": waiting for a replica\n\n";
/// Whoever found nobody although the table has somebody looks again after so long, unless the table changes.
const PAUSE: Duration = Duration::from_secs(1);
/// Of a replica's own word when to ask again: one that has room sooner shall not stand idle for long.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A request that may go to a replica.
#[derive(Debug)]
pub struct Asking {
    /// Open until its answer is over.
    pub account: Account,
    /// What is sent.
    pub outgoing: Outgoing,
    /// Of its body, as long as that may be sent.
    pub _room: Room,
}

/// Asks, and holds who cannot be answered yet.
#[derive(Debug)]
pub struct Asker {
    forwarder: Forwarder,
    holds: Arc<Holds>,
}

impl Asker {
    /// Who is held is held by `holds`.
    pub fn new(forwarder: Forwarder, holds: Arc<Holds>) -> Arc<Self> {
        Arc::new(Self { forwarder, holds })
    }

    /// Who is held.
    pub fn holds(&self) -> &Holds {
        &self.holds
    }

    /// The answer of one of these, or of one that will be.
    pub async fn answer(self: &Arc<Self>, mut asking: Asking, sides: Sides) -> Response<Body> {
        let (model, ..) = asking.account.parts();
        let Asking { account, outgoing, _room } = &mut asking;
        let reply = match self.forwarder.attempt(account, outgoing, sides).await {
            Attempt::Answered(answer) => return relay(answer, asking.account),
            Attempt::Later(Why::Nobody, reply) => reply,
            // It has just woken: whoever came before waits for the adapter as well.
            Attempt::Later(Why::Unavailable, reply) if reply.is_loading() && !model.service.told => reply,
            Attempt::Over(reply) | Attempt::Later(Why::Full | Why::Unavailable, reply) => {
                return reply.answer(asking.account);
            }
        };
        if !self.holds.may_wait(&model.service, tokio::time::Instant::now()) {
            return reply.answer(asking.account);
        }
        let held = match self.holds.enter(&model, asking.outgoing.body.len()) {
            Ok(held) => held,
            Err(error) => return Reply::Own(error).answer(asking.account),
        };
        asking.account.waits();
        let stream = asking.outgoing.stream;
        let answered = Arc::clone(self).answered(asking, held);
        if stream {
            return streamed(Box::pin(answered));
        }
        match answered.await {
            (account, Ok(answer)) => relay(answer, account),
            (account, Err(reply)) => reply.answer(account),
        }
    }

    /// What comes of a request that is held, once something does.
    async fn answered(self: Arc<Self>, mut asking: Asking, mut held: Held) -> Answered {
        // Of a replica that was there.
        let mut last = None;
        loop {
            let Asking { account, outgoing, _room } = &mut asking;
            let ready = match held.turn().await {
                Ok(ready) => ready,
                Err(error) => {
                    let reply = last.filter(|_| held.is_over()).unwrap_or(Reply::Own(error));
                    return (asking.account, Err(reply));
                }
            };
            // Whose revision is ready at last, is asked.
            let sides = Sides { own: ready, other: Vec::new() };
            let (why, reply) = match self.forwarder.attempt(account, outgoing, sides).await {
                Attempt::Answered(answer) => return (asking.account, Ok(answer)),
                Attempt::Over(reply) => return (asking.account, Err(reply)),
                Attempt::Later(why, reply) => (why, reply),
            };
            match why {
                Why::Full => held.back(pause(reply.retry_after())),
                Why::Nobody => held.back(PAUSE),
                // An adapter comes a moment after its base.
                Why::Unavailable if reply.is_loading() => held.again(PAUSE).await,
                Why::Unavailable => return (asking.account, Err(reply)),
            }
            last = (why != Why::Nobody).then_some(reply);
        }
    }
}

/// How long nobody goes after a replica said that it has no room, and when it has.
fn pause(said: Option<Duration>) -> Duration {
    said.unwrap_or(PAUSE).clamp(PAUSE, LONGEST_PAUSE)
}

/// A replica's answer, or what is told instead.
type Answered = (Account, Result<Response<Answer>, Reply>);

/// A stream whose head is sent now, with comments until its events come.
fn streamed(answered: BoxFuture<'static, Answered>) -> Response<Body> {
    let waiting = Streamed::Waits { answered, comments: tokio::time::interval(COMMENTS) };
    let head = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        // As the worker says it: nginx passes each event on as it comes.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (head, Body::from_stream(stream::unfold(waiting, Streamed::next))).into_response()
}

enum Streamed {
    Waits { answered: BoxFuture<'static, Answered>, comments: Interval },
    Relays(Box<Relay>),
    Over,
}

impl Streamed {
    async fn next(self) -> Option<(Result<Bytes, BoxError>, Self)> {
        match self {
            Streamed::Waits { mut answered, mut comments } => tokio::select! {
                biased;
                (account, answer) = &mut answered => Self::begins(account, answer).await,
                _ = comments.tick() => {
                    Some((Ok(Bytes::from_static(COMMENT.as_bytes())), Streamed::Waits { answered, comments }))
                }
            },
            Streamed::Relays(relay) => Self::relayed(relay).await,
            Streamed::Over => None,
        }
    }

    /// What is no stream is told as an error, after which there is nothing.
    async fn begins(
        account: Account,
        answer: Result<Response<Answer>, Reply>,
    ) -> Option<(Result<Bytes, BoxError>, Self)> {
        let reply = match answer {
            Ok(answer) if answer.status() == StatusCode::OK && is_event_stream(answer.headers()) => {
                let (head, body) = answer.into_parts();
                return Self::relayed(Box::new(Relay::of(&head, body, account))).await;
            }
            Ok(answer) if answer.status().is_success() => Reply::Own(ApiError::upstream_failed()),
            Ok(answer) => Reply::read(answer).await,
            Err(reply) => reply,
        };
        Some((Ok(reply.event(account)), Streamed::Over))
    }

    async fn relayed(mut relay: Box<Relay>) -> Option<(Result<Bytes, BoxError>, Self)> {
        // It has no other frames than data.
        let piece = relay.frame().await?.map(|frame| frame.into_data().unwrap_or_default());
        Some((piece, Streamed::Relays(relay)))
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(None, 1)]
    #[case(Some(0), 1)]
    #[case(Some(7), 7)]
    #[case(Some(u64::MAX), 30)]
    fn a_replica_stops_nobody_for_long(#[case] said: Option<u64>, #[case] seconds: u64) {
        assert_eq!(pause(said.map(Duration::from_secs)), Duration::from_secs(seconds));
    }
}
