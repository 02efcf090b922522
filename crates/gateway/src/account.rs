//! One request's account: what it holds while it is answered, and what is written down of it in the end, however it ends.
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::http::HeaderValue;
use lathe_contract::Usage;

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
    first_byte: Option<Instant>,
    /// Of the answer that the client got, and whose it is; `None`: it left before.
    status: Option<(u16, By)>,
    usage: Option<Usage>,
    /// Pieces of the answer that were sent.
    pieces: u64,
    /// A stream whose end was not reached.
    open: bool,
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
            books,
            asked,
            replica: None,
            first_byte: None,
            status: None,
            usage: None,
            pieces: 0,
            open: false,
        }
    }

    /// Another replica, which was charged already, or none; the one before is charged no longer.
    pub fn asks(&mut self, replica: Option<SocketAddr>) {
        if let Some(before) = std::mem::replace(&mut self.replica, replica) {
            self.balance.with(|balance| balance.release(before, self.asked.estimate.total()));
        }
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
    pub fn sends(&mut self) {
        self.pieces += 1;
        self.first_byte.get_or_insert_with(Instant::now);
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
        self.open = false;
        self.books.metrics.broken("replica");
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
        self.asks(None);
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

impl Account {
    /// A line of the usage log. Nothing of a prompt or an answer is ever in it.
    fn write(&self, status: u16, usage: Option<Usage>, estimated: bool, times: Times) {
        tracing::info!(
            target: "usage",
            key = &*self.asked.caller.key,
            namespace = self.asked.model.service.namespace,
            model = self.asked.model.name,
            status,
            request_id = self.asked.id.to_str().ok(),
            prompt_tokens = usage.map(|u| u.prompt),
            cached_tokens = usage.map(|u| u.cached),
            completion_tokens = usage.map(|u| u.completion),
            estimated,
            first_byte_ms = times.first_byte.map(|t| t.as_millis() as u64),
            total_ms = times.total.as_millis() as u64,
        );
    }
}
