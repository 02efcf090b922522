//! A request's way to a replica, and to another one where the first did nothing with it.
//!
//! **Invariant.** A request is repeated only where no byte of an answer was sent to its client and the replica said, or its
//! connection shows, that it will not answer; and it goes to each replica at most once. Where it may have killed a replica, it goes to
//! one other and no more.
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::uri::{PathAndQuery, Scheme, Uri};
use axum::http::{HeaderMap, Method, Request, Response, StatusCode, response};
use axum::response::IntoResponse as _;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::account::{Account, By};
use crate::balance::Ask;
use crate::error::ApiError;
use crate::headers;
use crate::relay::relay;
use crate::tokens::Tokens;

/// The body of a replica's answer.
pub type Incoming = hyper::body::Incoming;

/// Pods answer at once or not at all.
const CONNECT: Duration = Duration::from_secs(2);
/// All connections of one request that could not be opened may take so long together.
const CONNECTING: Duration = Duration::from_secs(5);
/// A request is repeated after so many replicas were lost with it.
const RESETS: u32 = 1;
/// A worker closes a connection that is idle for 15 s; ours goes before, so that no request meets a closing one.
const IDLE: Duration = Duration::from_secs(10);
/// A node that vanished is noticed so late, also by a request that waits long for its answer.
const GONE: Duration = Duration::from_secs(30);
const PROBE: Duration = Duration::from_secs(10);
/// A whole answer's head comes when the answer is written.
const HEAD: Duration = Duration::from_secs(900);
/// Longest error that is read to find out what it is.
const MAX_ERROR: usize = 64 << 10;
const ERROR_TIMEOUT: Duration = Duration::from_secs(5);

/// Asks workers.
#[derive(Debug)]
pub struct Forwarder {
    client: Client<HttpConnector, Full<Bytes>>,
    tokens: Arc<Tokens>,
}

/// What is sent.
#[derive(Debug)]
pub struct Outgoing {
    /// The endpoint.
    pub path: &'static str,
    /// The client's headers.
    pub headers: HeaderMap,
    /// The body with the worker's name of the model.
    pub body: Bytes,
    /// Of the model and the prompt's beginning.
    pub key: u64,
}

/// What became of asking one replica.
enum Asked {
    /// Its answer, whatever it says.
    Answered(Response<Incoming>),
    /// It has no room.
    Full(Kept),
    /// It shuts down and does nothing with the request.
    Drains(Kept),
    /// It has not what is asked, or not yet.
    Unavailable(Kept),
    /// It could not be reached, or its connection ended before the head of an answer.
    Lost(Loss),
    /// Nothing came in a long time.
    Silent,
}

/// A short answer that was read.
struct Kept(response::Parts, Bytes);

impl Forwarder {
    /// A client of its own connections, with tokens of this gateway.
    pub fn new(tokens: Arc<Tokens>) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT));
        connector.set_keepalive(Some(PROBE));
        connector.set_keepalive_interval(Some(PROBE));
        connector.set_keepalive_retries(Some(2));
        #[cfg(target_os = "linux")]
        connector.set_tcp_user_timeout(Some(GONE));
        let client = Client::builder(TokioExecutor::new())
            // It sends a request again itself where a pooled connection was closed before anything was written to it.
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .build(connector);
        Self { client, tokens }
    }

    /// Asks one of `ready`, another one where that one does nothing, and passes on what is said.
    pub async fn forward(
        &self,
        mut account: Account,
        outgoing: Outgoing,
        ready: Vec<SocketAddr>,
    ) -> Response<Body> {
        let (model, balance, metrics) = account.parts();
        let ask = Ask { key: outgoing.key, tokens: account.estimate(), slots: model.service.slots };
        let mut untried = ready;
        let mut tries = Tries::default();
        let mut next = balance.with(|b| b.choose(&untried, ask, Instant::now()));
        // What the client is told where nobody answers.
        let mut last = None;
        while let Some(replica) = next {
            account.asks(Some(replica));
            untried.retain(|other| *other != replica);
            let sent = Instant::now();
            let asked = self.ask(replica, &outgoing, &model.service.uid).await;
            let now = Instant::now();
            let reason = match asked {
                Asked::Answered(answer) if refuses_us(answer.status()) => {
                    metrics.tokens_refused.inc();
                    tracing::error!(
                        %replica, status = answer.status().as_u16(),
                        "a replica does not believe this gateway: its key is not that of the Secret `lathe-keys`, or a clock is wrong"
                    );
                    return refuse(account, ApiError::not_believed());
                }
                Asked::Answered(answer) => {
                    balance.with(|b| match answer.status().is_server_error() {
                        true => b.erred(replica, now),
                        false => b.answered(replica, sent),
                    });
                    return relay(answer, account);
                }
                // A model that is not there yet, or never comes, is no fault of the replica.
                Asked::Unavailable(kept) => return kept.pass_on(account),
                Asked::Silent => {
                    balance.with(|b| b.failed(replica, now));
                    return refuse(account, ApiError::upstream_timeout());
                }
                Asked::Full(kept) => {
                    // One that has less to do may have room; where it has none either, more would only spread the load.
                    if matches!(last, Some(Last::Full(_))) {
                        return kept.pass_on(account);
                    }
                    last = Some(Last::Full(kept));
                    next = balance.with(|b| b.roomier(&untried, replica, ask.tokens, now));
                    "full"
                }
                Asked::Drains(kept) => {
                    balance.with(|b| b.drains(replica, now));
                    last.get_or_insert(Last::Drains(kept));
                    next = balance.with(|b| b.choose(&untried, ask, now));
                    "drain"
                }
                Asked::Lost(why) => {
                    tracing::debug!(%replica, ?why, "a replica was lost before it answered");
                    balance.with(|b| b.failed(replica, now));
                    last.get_or_insert(Last::Lost);
                    next = match tries.another(why, now.saturating_duration_since(sent)) {
                        true => balance.with(|b| b.choose(&untried, ask, now)),
                        false => None,
                    };
                    why.label()
                }
            };
            if next.is_some() {
                metrics.repeated(reason);
            }
        }
        match last {
            Some(Last::Full(kept) | Last::Drains(kept)) => kept.pass_on(account),
            Some(Last::Lost) => refuse(account, ApiError::upstream_failed()),
            None => refuse(account, ApiError::no_replica(&model.id())),
        }
    }

    async fn ask(&self, replica: SocketAddr, outgoing: &Outgoing, uid: &str) -> Asked {
        let token = self.tokens.bearer(uid, jiff::Timestamp::now().as_second());
        let uri = Uri::builder()
            .scheme(Scheme::HTTP)
            .authority(replica.to_string())
            .path_and_query(PathAndQuery::from_static(outgoing.path));
        let Ok(uri) = uri.build() else { return Asked::Lost(Loss::Refused) };
        let mut request = Request::new(Full::new(outgoing.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        *request.headers_mut() = headers::for_worker(&outgoing.headers, token);
        let answer = match tokio::time::timeout(HEAD, self.client.request(request)).await {
            Err(_) => return Asked::Silent,
            Ok(Err(error)) => {
                return Asked::Lost(if error.is_connect() { Loss::Refused } else { Loss::Reset });
            }
            Ok(Ok(answer)) => answer,
        };
        match answer.status() {
            StatusCode::TOO_MANY_REQUESTS => {
                Kept::read(answer).await.map_or(Asked::Lost(Loss::Reset), Asked::Full)
            }
            StatusCode::SERVICE_UNAVAILABLE => match Kept::read(answer).await {
                None => Asked::Lost(Loss::Reset),
                Some(kept) if kept.code().as_deref() == Some("shutting_down") => Asked::Drains(kept),
                Some(kept) => Asked::Unavailable(kept),
            },
            _ => Asked::Answered(answer),
        }
    }
}

/// How a replica was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// It could not be reached: it never saw the request.
    Refused,
    /// Its connection ended before the head of an answer: it may have died of the request.
    Reset,
}

impl Loss {
    /// The metric's label.
    fn label(self) -> &'static str {
        match self {
            Loss::Refused => "refused",
            Loss::Reset => "reset",
        }
    }
}

/// Whether a request whose replica was lost goes to one more.
#[derive(Debug, Default)]
struct Tries {
    resets: u32,
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
}

/// A worker that does not believe our token says so with these; the client's key was good.
fn refuses_us(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// What the client is told where nobody answers: the first word that a replica gave.
enum Last {
    Full(Kept),
    Drains(Kept),
    Lost,
}

impl Kept {
    async fn read(answer: Response<Incoming>) -> Option<Self> {
        let (parts, body) = answer.into_parts();
        let read = tokio::time::timeout(ERROR_TIMEOUT, Limited::new(body, MAX_ERROR).collect()).await;
        Some(Self(parts, read.ok()?.ok()?.to_bytes()))
    }

    /// OpenAI's `error.code`.
    fn code(&self) -> Option<String> {
        let body: serde_json::Value = serde_json::from_slice(&self.1).ok()?;
        body["error"]["code"].as_str().map(str::to_owned)
    }

    /// As the replica said it.
    fn pass_on(self, mut account: Account) -> Response<Body> {
        let Self(parts, body) = self;
        account.answers(parts.status.as_u16(), By::Replica);
        (parts.status, headers::for_client(&parts.headers), body).into_response()
    }
}

fn refuse(mut account: Account, error: ApiError) -> Response<Body> {
    account.answers(error.status.as_u16(), By::Gateway);
    error.into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

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
