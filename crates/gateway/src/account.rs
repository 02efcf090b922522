//! One request's account: what it holds while it is answered, and what is written down of it in the end, however it ends.
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::http::HeaderValue;
use lathe_contract::{Ended, Usage};
use lathe_telemetry::opentelemetry::KeyValue;
use lathe_telemetry::opentelemetry::trace::{Span as _, SpanContext, Status};
use lathe_telemetry::{Operation, RequestTrace, Span, genai};

use crate::balance::{Balances, Shared};
use crate::flow::{Flows, ReplicaLoad, Share};
use crate::keys::Caller;
use crate::limits::Quotas;
use crate::metrics::{Metrics, Times};
use crate::month::Month;
use crate::places::Place;
use crate::table::Model;

/// What requests are charged to.
#[derive(Debug)]
pub struct Books {
    /// What replicas have to do.
    pub balances: Balances,
    /// What keys may use.
    pub quotas: Arc<Quotas>,
    /// What flows to services.
    pub flows: Flows,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Whether each request is written to the usage log.
    pub usage_log: bool,
}

/// Whose word a status is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum By {
    /// The replica's.
    Replica,
    /// The gateway's own, of a request that no replica answered.
    Gateway,
    /// Nobody's: the client left.
    Client,
}

impl By {
    /// The metric's label.
    pub fn label(self) -> &'static str {
        match self {
            By::Replica => "replica",
            By::Gateway => "gateway",
            By::Client => "client",
        }
    }
}

/// What an account is opened for.
#[derive(Debug)]
pub struct Asked {
    /// The request's id.
    pub id: HeaderValue,
    /// Who asks.
    pub caller: Arc<Caller>,
    /// What is asked.
    pub model: Arc<Model>,
    /// Tokens that were taken from the key's minute and month, and that its replica is charged with.
    pub estimate: Usage,
    /// Of whose budget they were taken.
    pub month: Month,
    /// When its head was here.
    pub arrived: Instant,
    /// Its spans, where it has any.
    pub trace: Option<RequestTrace>,
    /// Held until the account is closed.
    pub _place: Place,
}

/// An open account. When it is dropped the request is over: its end was reached, or its client has left.
#[derive(Debug)]
pub struct Account {
    books: Arc<Books>,
    asked: Asked,
    /// Of the model's service.
    balance: Arc<Shared>,
    /// Of what flows to the model's service.
    flow: Share,
    replica: Option<SocketAddr>,
    /// When it was asked.
    sent: Instant,
    first_byte: Option<Instant>,
    /// Of a stream: when its first and its last token came, as far as can be seen here.
    tokens: Option<(Instant, Instant)>,
    /// Of the answer that the client got, and whose it is; `None`: it left before.
    status: Option<(u16, By)>,
    usage: Option<Usage>,
    /// Pieces of the answer that were sent.
    pieces: u64,
    /// A stream whose end was not reached.
    open: bool,
    /// The span of asking `replica`.
    hop: Option<Span>,
    /// The answer's end was lost with its replica.
    broken: bool,
}

/// OpenTelemetry and nginx have no status for a client that left; nginx's own log says 499.
const CLIENT_LEFT: u16 = 499;
/// The gateway's own word that nobody is there: the request was none of its key's minute.
const UNAVAILABLE: u16 = 503;

impl Account {
    /// Opens an account for a request whose estimate was taken from its key's minute.
    pub fn open(books: Arc<Books>, asked: Asked) -> Self {
        books.metrics.in_flight.inc();
        Self {
            balance: books.balances.of(&asked.model.service.uid),
            flow: Share::of(books.flows.of(&asked.model.service.uid)),
            sent: asked.arrived,
            books,
            asked,
            replica: None,
            first_byte: None,
            tokens: None,
            status: None,
            usage: None,
            pieces: 0,
            open: false,
            hop: None,
            broken: false,
        }
    }

    /// Another replica, which was charged already, or none; the one before is charged no longer.
    pub fn asks(&mut self, replica: Option<SocketAddr>) {
        if let Some(before) = std::mem::replace(&mut self.replica, replica) {
            self.balance.with(|balance| balance.release(before, self.asked.estimate.total()));
        }
        self.sent = Instant::now();
    }

    /// This replica was lost with it, before an answer.
    pub fn loses(&self, replica: SocketAddr) {
        self.ended(replica, Ended { requests: 1, errors: 1, ..Ended::default() });
    }

    /// Asks a replica in the request's trace; `None`: it has none.
    pub fn hops(&mut self, operation: Operation, replica: SocketAddr) -> Option<SpanContext> {
        let trace = self.asked.trace.as_ref()?;
        self.hop = trace.hop(operation, &self.asked.model.name, replica);
        trace.parent(self.hop.as_ref()).cloned()
    }

    /// What came of asking it: a status, or how it was lost.
    pub fn hopped(&mut self, came: Result<u16, &'static str>) {
        let Some(hop) = &mut self.hop else { return };
        if let Ok(status) = came {
            hop.set_attribute(KeyValue::new(genai::STATUS_CODE, i64::from(status)));
        }
        let failed = match came {
            Ok(..400) => return,
            Ok(status) => status.to_string(),
            Err(how) => how.to_owned(),
        };
        hop.set_status(Status::error(failed.clone()));
        hop.set_attribute(KeyValue::new(genai::ERROR_TYPE, failed));
        self.hop = None;
    }

    /// Nobody is ready, and it waits.
    pub fn waits(&self) {
        self.asked.trace.iter().for_each(|trace| trace.event("held"));
    }

    /// The status that the client is told, and by whom.
    pub fn answers(&mut self, status: u16, by: By) {
        self.status = Some((status, by));
    }

    /// The answer is a stream.
    pub fn streams(&mut self) {
        self.open = true;
    }

    /// A piece of the answer's body goes to the client; a worker writes about one for each token of a stream.
    pub fn sends(&mut self, piece: &[u8]) {
        self.pieces += 1;
        self.first_byte.get_or_insert_with(Instant::now);
        let compared = self.open && self.asked.model.service.canary.is_some();
        if compared && (self.tokens.is_some() || has_token(piece)) {
            let now = Instant::now();
            self.tokens = Some((self.tokens.map_or(now, |(first, _)| first), now));
        }
        if self.open && self.usage.is_none() {
            self.flow.took(self.seen());
        }
    }

    /// The answer's end was reached.
    pub fn ends(&mut self) {
        self.open = false;
    }

    /// The replica was lost in the middle of the answer.
    pub fn breaks(&mut self) {
        (self.open, self.broken) = (false, true);
        self.books.metrics.broken("replica");
        self.asked.trace.iter().for_each(|trace| trace.fails("upstream_failed"));
    }

    /// What the worker counted.
    pub fn took(&mut self, usage: Option<Usage>) {
        let Some(usage) = usage else { return };
        self.usage = Some(usage);
        self.flow.took(usage);
    }

    /// What a replica that it was sent to says of itself.
    pub fn hears(&self, replica: SocketAddr, load: &ReplicaLoad) {
        self.balance.with(|balance| balance.told(replica, load, Instant::now()));
        if let Some(capacity) = load.capacity {
            self.flow.hears(capacity);
        }
    }

    /// What is asked, what all requests to it are charged to, and what is counted.
    pub fn parts(&self) -> (Arc<Model>, Arc<Shared>, Arc<Metrics>) {
        (Arc::clone(&self.asked.model), Arc::clone(&self.balance), Arc::clone(&self.books.metrics))
    }

    /// UID of the model's service.
    pub fn service(&self) -> &str {
        &self.asked.model.service.uid
    }

    /// What it is thought to take.
    pub fn estimate(&self) -> u64 {
        self.asked.estimate.total()
    }

    /// Tells how it ended at a replica, where two revisions are compared.
    fn ended(&self, replica: SocketAddr, ended: Ended) {
        let service = &self.asked.model.service;
        let (Some(canary), Some(candidate)) = (&service.canary, service.is_candidate(replica)) else {
            return;
        };
        let revision = if candidate { &canary.candidate } else { &canary.stable };
        self.flow.ended(revision, ended);
        self.books.metrics.canary.ended(service, candidate, ended);
    }

    /// How its answer ended: a client's own errors are none of the replica's.
    fn outcome(&self, usage: Option<Usage>) -> Option<Ended> {
        let (status, _) = self.status.filter(|(_, by)| *by == By::Replica)?;
        let failed = self.broken || status >= 500;
        let ended = Ended { requests: 1, errors: failed.into(), ..Ended::default() };
        let Some((first, last)) = self.tokens.filter(|_| !failed) else { return Some(ended) };
        let millis = |from: Instant, to: Instant| to.saturating_duration_since(from).as_millis() as u64;
        Some(Ended {
            streams: 1,
            first_token_ms: millis(self.sent, first),
            tokens: usage.map_or(self.pieces, |usage| usage.completion).saturating_sub(1),
            decode_ms: millis(first, last),
            ..ended
        })
    }

    /// What it has taken as far as can be seen here.
    fn seen(&self) -> Usage {
        Usage { completion: self.pieces, ..self.asked.estimate }
    }

    /// What the worker counted, or nearly that where it could not say so any more, and whether the count is such an estimate.
    fn used(&self, status: u16) -> (Option<Usage>, bool) {
        match (self.usage, status) {
            (Some(usage), _) => (Some(usage), false),
            (None, 200..300 | CLIENT_LEFT) if self.replica.is_some() => (Some(self.seen()), true),
            // What was refused, or left while no replica had it, was not worked for.
            (None, _) => (None, false),
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let (status, by) = self.status.unwrap_or((CLIENT_LEFT, By::Client));
        let (usage, estimated) = self.used(status);
        if let Some((replica, ended)) = self.replica.zip(self.outcome(usage)) {
            self.ended(replica, ended);
        }
        self.asks(None);
        self.trace((status, by), usage);
        let Books { balances: _, quotas, flows: _, metrics, usage_log } = &*self.books;
        if self.open {
            metrics.broken("client");
        }
        if (status, by) == (UNAVAILABLE, By::Gateway) {
            quotas.give_back(&self.asked.caller.key, self.asked.month);
        }
        let estimate = self.asked.estimate.total();
        let used = match usage.map_or(0, |usage| usage.total()) {
            // An answer of which little was seen may have been worked for all the same.
            seen if estimated => seen.max(estimate),
            counted => counted,
        };
        quotas.settle(&self.asked.caller.key, self.asked.month, estimate, used);
        let times = Times {
            first_byte: self.first_byte.map(|at| at.saturating_duration_since(self.asked.arrived)),
            total: self.asked.arrived.elapsed(),
        };
        metrics.answered(&self.asked.caller.key, &self.asked.model, (status, by), usage, times);
        if *usage_log {
            self.write(status, usage, estimated, times);
        }
        metrics.in_flight.dec();
    }
}

/// Whether a stream's piece has a token: neither a comment while the answer waits, nor chat's opening, whose text is empty.
fn has_token(piece: &[u8]) -> bool {
    const NO_TEXT: &[u8] = br#""content":"""#;
    !piece.starts_with(b":") && !piece.windows(NO_TEXT.len()).any(|part| part == NO_TEXT)
}

impl Account {
    /// The last words of its spans.
    fn trace(&mut self, (status, by): (u16, By), usage: Option<Usage>) {
        let hop = self.hop.take();
        let Some(trace) = &self.asked.trace else { return };
        let used = usage.map(|usage| genai::usage(usage.prompt, usage.cached, usage.completion));
        if let Some(mut hop) = hop {
            hop.set_attributes(used.iter().flatten().cloned());
        }
        trace.set(used.into_iter().flatten());
        trace.status(status);
        if by == By::Replica {
            trace.set([KeyValue::new(genai::RESPONSE_MODEL, self.asked.model.id())]);
        }
        if by == By::Client || self.open {
            trace.fails("client_left");
        } else if status >= 500 || (by == By::Gateway && status >= 400) {
            trace.fails(status.to_string());
        }
        trace.end();
    }

    /// A line of the usage log. Nothing of a prompt or an answer is ever in it.
    fn write(&self, status: u16, usage: Option<Usage>, estimated: bool, times: Times) {
        tracing::info!(
            target: "usage",
            key = &*self.asked.caller.key,
            namespace = self.asked.model.service.namespace,
            model = self.asked.model.name,
            status,
            request_id = self.asked.id.to_str().ok(),
            trace_id = self.asked.trace.as_ref().map(|trace| tracing::field::display(trace.id())),
            prompt_tokens = usage.map(|u| u.prompt),
            cached_tokens = usage.map(|u| u.cached),
            completion_tokens = usage.map(|u| u.completion),
            estimated,
            first_byte_ms = times.first_byte.map(|t| t.as_millis() as u64),
            total_ms = times.total.as_millis() as u64,
        );
    }
}
