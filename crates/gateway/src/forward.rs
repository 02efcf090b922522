//! A request's way to a replica, and to another one where the first did nothing with it.
//!
//! **Invariant.** A request is repeated only where no byte of an answer was sent to its client and the replica said, or its
//! connection shows, that it will not answer; and it goes to each replica at most once. Where it may have killed a replica, it goes to
//! one other and no more.
use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::header::RETRY_AFTER;
use axum::http::uri::Uri;
use axum::http::{HeaderMap, Method, Request, Response, StatusCode, response};
use axum::response::IntoResponse as _;
use http_body_util::{BodyExt as _, Full, Limited};
use lathe_telemetry::Operation;
use serde_json::Value;

use crate::account::{Account, By};
use crate::balance::Ask;
use crate::error::ApiError;
use crate::flow::ReplicaLoad;
use crate::headers;
use crate::relay::error_event;
use crate::table::Sides;
use crate::tokens::Tokens;
use crate::upstream::{Answer, Loss, Upstream};

/// All connections of one request that could not be opened may take so long together.
const CONNECTING: Duration = Duration::from_secs(5);
/// A request is repeated after so many replicas were lost with it.
const RESETS: u32 = 1;
/// So many replicas are asked for what the first of them does not have: where none of them has it, hardly anybody does.
const LACKING: u32 = 3;
/// A whole answer's head comes when the answer is written.
const HEAD: Duration = Duration::from_secs(900);
/// Longest error that is read to find out what it is.
const MAX_ERROR: usize = 64 << 10;
const ERROR_TIMEOUT: Duration = Duration::from_secs(5);

/// Asks workers.
#[derive(Debug)]
pub struct Forwarder {
    upstream: Upstream,
    tokens: Arc<Tokens>,
}

/// What is sent.
#[derive(Debug)]
pub struct Outgoing {
    /// The endpoint.
    pub operation: Operation,
    /// The client's headers.
    pub headers: HeaderMap,
    /// The body with the worker's name of the model.
    pub body: Bytes,
    /// Of the model and the prompt's beginning.
    pub key: u64,
    /// Whether the answer is to be a stream.
    pub stream: bool,
}

/// What became of a request.
#[derive(Debug)]
pub enum Attempt {
    /// A replica answers it.
    Answered(Response<Answer>),
    /// It is not answered, and asking again would be to repeat it.
    Over(Reply),
    /// Nobody did anything with it, so it may be asked later.
    Later(Why, Reply),
}

/// Why nobody did anything with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Nobody is there any more.
    Nobody,
    /// Those who were asked have no room.
    Full,
    /// The replicas do not have what is asked, or not yet.
    Unavailable,
}

/// What the client is told where no replica answers.
#[derive(Debug)]
pub enum Reply {
    /// What a replica said.
    Said(Kept),
    /// The gateway's own.
    Own(ApiError),
}

/// What became of asking one replica.
enum Asked {
    /// Its answer, whatever it says.
    Answered(Response<Answer>),
    /// It has no room.
    Full(Kept),
    /// It shuts down and does nothing with the request.
    Drains(Kept),
    /// It does not have what is asked, or not yet.
    Lacks(Kept),
    /// It could not be reached, or its connection ended before the head of an answer.
    Lost(Loss),
    /// Nothing came in a long time.
    Silent,
}

/// A short answer that was read.
#[derive(Debug)]
pub struct Kept(response::Parts, Bytes);

impl Forwarder {
    /// Asks over these connections, with tokens of this gateway.
    pub fn new(upstream: Upstream, tokens: Arc<Tokens>) -> Self {
        Self { upstream, tokens }
    }

    /// Asks one of a request's own side, another one where that one does nothing, and one of the other side where none is left.
    pub async fn attempt(&self, account: &mut Account, outgoing: &Outgoing, mut sides: Sides) -> Attempt {
        let (model, balance, metrics) = account.parts();
        let ask = Ask { key: outgoing.key, tokens: account.estimate(), slots: model.service.slots };
        // A side that rests as a whole is asked last.
        if !sides.other.is_empty() && !balance.with(|b| b.has_open(&sides.own, Instant::now())) {
            std::mem::swap(&mut sides.own, &mut sides.other);
        }
        let choose = |sides: &mut Sides, now| {
            balance.with(|b| {
                b.choose(&sides.own, ask, now).or_else(|| {
                    sides.own = std::mem::take(&mut sides.other);
                    b.choose(&sides.own, ask, now)
                })
            })
        };
        let mut tries = Tries::default();
        let mut next = choose(&mut sides, Instant::now());
        let mut last = Last::default();
        while let Some(replica) = next {
            account.asks(Some(replica));
            sides.own.retain(|untried| *untried != replica);
            let sent = Instant::now();
            let asked = self.ask(replica, outgoing, account).await;
            account.hopped(asked.came());
            let now = Instant::now();
            let reason = match asked {
                Asked::Answered(answer) if refuses_us(answer.status()) => {
                    metrics.tokens_refused.inc();
                    tracing::error!(
                        %replica, status = answer.status().as_u16(),
                        "a replica does not believe this gateway: its key is not that of the Secret `lathe-keys`, or a clock is wrong"
                    );
                    return Attempt::Over(Reply::Own(ApiError::not_believed()));
                }
                Asked::Answered(answer) => {
                    balance.with(|b| match answer.status().is_server_error() {
                        true => b.erred(replica, now),
                        false => b.answered(replica, sent),
                    });
                    return Attempt::Answered(answer);
                }
                // An adapter that is not there yet, or never comes, is no fault of the replica. One that has just started may be
                // the only one without it.
                Asked::Lacks(kept) => {
                    balance.with(|b| b.answered(replica, sent));
                    last.add(Why::Unavailable, Reply::Said(kept));
                    next = match tries.another_for_what_it_lacks() {
                        true => choose(&mut sides, now),
                        false => None,
                    };
                    "lacking"
                }
                Asked::Silent => {
                    account.loses(replica);
                    balance.with(|b| b.failed(replica, now));
                    return Attempt::Over(Reply::Own(ApiError::upstream_timeout()));
                }
                Asked::Full(kept) => {
                    // One that has less to do may have room; where it has none either, more would only spread the load.
                    next = match last.0 {
                        Some((Why::Full, _)) => None,
                        _ => balance.with(|b| b.roomier(&sides.own, replica, ask.tokens, now)),
                    };
                    if next.is_none() && !sides.other.is_empty() {
                        sides.own.clear();
                        next = choose(&mut sides, now);
                    }
                    last = Last(Some((Why::Full, Reply::Said(kept))));
                    "full"
                }
                Asked::Drains(kept) => {
                    balance.with(|b| b.drains(replica, now));
                    last.add(Why::Nobody, Reply::Said(kept));
                    next = choose(&mut sides, now);
                    "drain"
                }
                Asked::Lost(why) => {
                    tracing::debug!(%replica, ?why, "a replica was lost before it answered");
                    account.loses(replica);
                    balance.with(|b| b.failed(replica, now));
                    // What killed one of a revision is not given to the next of it.
                    if why == Loss::Reset && !sides.other.is_empty() {
                        sides.own = std::mem::take(&mut sides.other);
                    }
                    last.add(Why::Nobody, Reply::Own(ApiError::upstream_failed()));
                    next = match tries.another(why, now.saturating_duration_since(sent)) {
                        true => choose(&mut sides, now),
                        false => None,
                    };
                    why.label()
                }
            };
            if next.is_some() {
                metrics.repeated(reason);
            }
        }
        account.asks(None);
        let (why, reply) = match last.0 {
            None => (Why::Nobody, Reply::Own(ApiError::no_replica(&model.id()))),
            // The service's status names it, so it is on its way to them, and no mistake of the client's.
            Some((why, reply)) if reply.code().as_deref() == Some("model_not_found") => {
                (why, Reply::Own(ApiError::not_ready(&model.id(), &model.service.name)))
            }
            Some(last) => last,
        };
        match tries.resets {
            0 => Attempt::Later(why, reply),
            // One that may have died of it is not followed by whoever comes next.
            _ => Attempt::Over(reply),
        }
    }

    async fn ask(&self, replica: SocketAddr, outgoing: &Outgoing, account: &mut Account) -> Asked {
        let token = self.tokens.bearer(account.service(), jiff::Timestamp::now().as_second());
        let mut request = Request::new(Full::new(outgoing.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = Uri::from_static(outgoing.operation.route);
        *request.headers_mut() = headers::for_worker(&outgoing.headers, token);
        lathe_telemetry::put(account.hops(outgoing.operation, replica).as_ref(), request.headers_mut());
        let answer = match tokio::time::timeout(HEAD, self.upstream.ask(replica, request)).await {
            Err(_) => return Asked::Silent,
            Ok(Err(loss)) => return Asked::Lost(loss),
            Ok(Ok(answer)) => answer,
        };
        if let Some(load) = ReplicaLoad::read(answer.headers()) {
            account.hears(replica, &load);
        }
        match answer.status() {
            StatusCode::TOO_MANY_REQUESTS => {
                Kept::read(answer).await.map_or(Asked::Lost(Loss::Reset), Asked::Full)
            }
            StatusCode::NOT_FOUND => Kept::read(answer).await.map_or(Asked::Lost(Loss::Reset), Asked::Lacks),
            StatusCode::SERVICE_UNAVAILABLE => match Kept::read(answer).await {
                None => Asked::Lost(Loss::Reset),
                Some(kept) if kept.code().as_deref() == Some("shutting_down") => Asked::Drains(kept),
                Some(kept) => Asked::Lacks(kept),
            },
            _ => Asked::Answered(answer),
        }
    }
}

impl Asked {
    /// The status, or how the replica was lost.
    fn came(&self) -> Result<u16, &'static str> {
        match self {
            Asked::Answered(answer) => Ok(answer.status().as_u16()),
            Asked::Full(kept) | Asked::Drains(kept) | Asked::Lacks(kept) => Ok(kept.0.status.as_u16()),
            Asked::Lost(loss) => Err(loss.label()),
            Asked::Silent => Err("timeout"),
        }
    }
}

/// What the client is told where nobody answers: the first word that a replica gave.
#[derive(Debug, Default)]
struct Last(Option<(Why, Reply)>);

impl Last {
    /// That a replica does not know what is asked, says less than that another one does and cannot give it yet.
    fn add(&mut self, why: Why, reply: Reply) {
        let unknown = |said: &Reply| said.status() == StatusCode::NOT_FOUND;
        let says_more = match &self.0 {
            None => true,
            // Somebody is there: whoever else cannot be reached, before or after, is no reason to wait for one.
            Some((Why::Nobody, _)) => why != Why::Nobody,
            Some((_, said)) => unknown(said) && why != Why::Nobody,
        };
        if says_more {
            self.0 = Some((why, reply));
        }
    }
}

/// Whether a request whose replica was lost goes to one more.
#[derive(Debug, Default)]
struct Tries {
    resets: u32,
    lacking: u32,
    connecting: Duration,
}

impl Tries {
    /// A request that kills its replica must not kill them all, and one whose replicas vanished must not wait for each of them.
    fn another(&mut self, why: Loss, took: Duration) -> bool {
        match why {
            Loss::Refused => self.connecting = self.connecting.saturating_add(took),
            Loss::Reset => self.resets += 1,
        }
        self.resets <= RESETS && self.connecting < CONNECTING
    }

    /// A request for what no replica has must not go to all of them.
    fn another_for_what_it_lacks(&mut self) -> bool {
        self.lacking += 1;
        self.lacking < LACKING && self.resets == 0
    }
}

/// A worker that does not believe our token says so with these; the client's key was good.
fn refuses_us(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

impl Kept {
    async fn read(answer: Response<Answer>) -> Option<Self> {
        let (parts, body) = answer.into_parts();
        let read = tokio::time::timeout(ERROR_TIMEOUT, Limited::new(body, MAX_ERROR).collect()).await;
        Some(Self(parts, read.ok()?.ok()?.to_bytes()))
    }

    /// The whole error, where it has OpenAI's form.
    fn error(&self) -> Option<Value> {
        let body: Value = serde_json::from_slice(&self.1).ok()?;
        body["error"].is_object().then_some(body)
    }

    /// OpenAI's `error.code`.
    fn code(&self) -> Option<String> {
        self.error()?["error"]["code"].as_str().map(str::to_owned)
    }

    /// Seconds after which the same request may succeed.
    fn retry_after(&self) -> Option<Duration> {
        let seconds = self.0.headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
        Some(Duration::from_secs(seconds))
    }
}

impl Reply {
    /// What a replica answered, where that is no stream.
    pub async fn read(answer: Response<Answer>) -> Self {
        match Kept::read(answer).await {
            Some(kept) => Reply::Said(kept),
            None => Reply::Own(ApiError::broken_off()),
        }
    }

    /// Whether a replica says that it has not loaded yet what is asked.
    pub fn is_loading(&self) -> bool {
        self.code().as_deref() == Some("model_not_ready")
    }

    /// OpenAI's `error.code`.
    fn code(&self) -> Option<Cow<'static, str>> {
        match self {
            Reply::Said(kept) => kept.code().map(Cow::Owned),
            Reply::Own(error) => Some(Cow::Borrowed(error.code)),
        }
    }

    /// When to ask again, where a replica said so.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Reply::Said(kept) => kept.retry_after(),
            Reply::Own(_) => None,
        }
    }

    /// The whole answer.
    pub fn answer(self, mut account: Account) -> Response<Body> {
        account.answers(self.status(), self.by());
        match self {
            Reply::Said(Kept(parts, body)) => {
                (parts.status, headers::for_client(parts.headers), body).into_response()
            }
            Reply::Own(error) => error.into_response(),
        }
    }

    /// The last event of a stream that has begun.
    pub fn event(self, mut account: Account) -> Bytes {
        account.answers(self.status(), self.by());
        let error = match &self {
            Reply::Said(kept) => kept.error(),
            Reply::Own(error) => Some(error.body()),
        };
        error_event(&error.unwrap_or_else(|| ApiError::broken_off().body()))
    }

    fn status(&self) -> u16 {
        match self {
            Reply::Said(kept) => kept.0.status.as_u16(),
            Reply::Own(error) => error.status.as_u16(),
        }
    }

    fn by(&self) -> By {
        match self {
            Reply::Said(_) => By::Replica,
            Reply::Own(_) => By::Gateway,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::CONNECT;

    #[test]
    fn a_request_that_kills_its_replica_kills_one_more_at_most_and_nobody_waits_for_all_that_vanished() {
        let mut tries = Tries::default();
        assert!((0..1000).all(|_| tries.another(Loss::Refused, Duration::from_millis(1))));
        assert!(tries.another(Loss::Reset, Duration::from_secs(600)));
        assert!(!tries.another(Loss::Reset, Duration::ZERO));
        let mut tries = Tries::default();
        let asked = (0..100).take_while(|_| tries.another(Loss::Refused, CONNECT)).count();
        assert_eq!(asked, 2);
    }
}
