//! One request's account: what it holds while it is answered, and what is written down of it in the end, however it ends.
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use lathe_contract::Usage;
use tokio::sync::OwnedSemaphorePermit;

use crate::balance::Balance;
use crate::keys::Caller;
use crate::limits::Quotas;
use crate::metrics::{Metrics, Times};
use crate::table::Model;

/// What requests are charged to.
#[derive(Debug)]
pub struct Books {
    /// What replicas have to do.
    pub balance: Mutex<Balance>,
    /// What keys may use.
    pub quotas: Arc<Quotas>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Whether each request is written to the usage log.
    pub usage_log: bool,
}

impl Books {
    /// The balance; every change of it is whole.
    pub fn balance<T>(&self, change: impl FnOnce(&mut Balance) -> T) -> T {
        change(&mut self.balance.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// An open account. When it is dropped the request is over: its end was reached, or its client has left.
#[derive(Debug)]
pub struct Account {
    books: Arc<Books>,
    caller: Arc<Caller>,
    model: Arc<Model>,
    /// Tokens that were taken from the key's minute, and that its replica is charged with.
    estimate: u64,
    arrived: Instant,
    replica: Option<SocketAddr>,
    first_byte: Option<Instant>,
    /// Of the answer that the client got; `None`: it left before.
    status: Option<u16>,
    usage: Option<Usage>,
    _place: OwnedSemaphorePermit,
}

/// OpenTelemetry and nginx have no status for a client that left; nginx's own log says 499.
const CLIENT_LEFT: u16 = 499;

impl Account {
    /// Opens an account for a request whose estimate was taken from its key's minute.
    pub fn open(
        books: Arc<Books>,
        caller: Arc<Caller>,
        model: Arc<Model>,
        estimate: u64,
        arrived: Instant,
        place: OwnedSemaphorePermit,
    ) -> Self {
        books.metrics.in_flight.inc();
        Self {
            books,
            caller,
            model,
            estimate,
            arrived,
            replica: None,
            first_byte: None,
            status: None,
            usage: None,
            _place: place,
        }
    }

    /// Another replica, which was charged already, or none; the one before is charged no longer.
    pub fn asks(&mut self, replica: Option<SocketAddr>) {
        if let Some(before) = std::mem::replace(&mut self.replica, replica) {
            self.books.balance(|balance| balance.release(before, self.estimate));
        }
    }

    /// The status that the client is told.
    pub fn answers(&mut self, status: u16) {
        self.status = Some(status);
    }

    /// Bytes of the answer's body go to the client.
    pub fn sends(&mut self) {
        self.first_byte.get_or_insert_with(Instant::now);
    }

    /// What the worker counted.
    pub fn took(&mut self, usage: Option<Usage>) {
        self.usage = usage.or(self.usage);
    }

    /// What is asked, and what all requests are charged to.
    pub fn parts(&self) -> (Arc<Model>, Arc<Books>) {
        (Arc::clone(&self.model), Arc::clone(&self.books))
    }

    /// What it is thought to take.
    pub fn estimate(&self) -> u64 {
        self.estimate
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.asks(None);
        let Books { balance: _, quotas, metrics, usage_log } = &*self.books;
        metrics.in_flight.dec();
        let status = self.status.unwrap_or(CLIENT_LEFT);
        let used = match (self.usage, status) {
            (Some(usage), _) => usage.total(),
            // An answer that broke off was worked for, and nobody says how long: the estimate stays.
            (None, 200..300 | CLIENT_LEFT) => self.estimate,
            (None, _) => 0,
        };
        quotas.settle(&self.caller.key, self.estimate, used);
        let times = Times {
            first_byte: self.first_byte.map(|at| at.saturating_duration_since(self.arrived)),
            total: self.arrived.elapsed(),
        };
        metrics.answered(&self.caller.key, &self.model, status, self.usage, times);
        if *usage_log {
            self.write(status, times);
        }
    }
}

impl Account {
    /// A line of the usage log. Nothing of a prompt or an answer is ever in it.
    fn write(&self, status: u16, times: Times) {
        tracing::info!(
            target: "usage",
            key = self.caller.key,
            namespace = self.model.service.namespace,
            model = self.model.name,
            status,
            prompt_tokens = self.usage.map(|u| u.prompt),
            completion_tokens = self.usage.map(|u| u.completion),
            first_byte_ms = times.first_byte.map(|t| t.as_millis() as u64),
            total_ms = times.total.as_millis() as u64,
        );
    }
}
