//! How the operator's leader asks what flows: a long poll on the port of probes, with a token that the operator signed.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::HeaderMap;
use axum::routing::get;
use axum::{Json, Router};
use lathe_contract::{Scope, TRAFFIC_PATH, Traffic, TrafficQuery};
use tokio::sync::Semaphore;

use crate::account::Books;
use crate::error::ApiError;
use crate::hold::Holds;
use crate::operator_key::OperatorKey;

/// Polls at a time: one leader has one open, and one that was leader before may have another.
const POLLS: usize = 4;
/// A second is over before; this is for a machine that stands still.
const LONGEST: Duration = Duration::from_secs(2);

/// What a poll asks for.
#[derive(Debug)]
pub struct Poll {
    books: Arc<Books>,
    holds: Arc<Holds>,
    operator: Arc<OperatorKey>,
    polls: Semaphore,
    /// Of the times that a service began to have held requests, as many as an answer has told of.
    told: AtomicU64,
}

/// [`TRAFFIC_PATH`].
pub fn router(books: Arc<Books>, holds: Arc<Holds>, operator: Arc<OperatorKey>) -> Router {
    let poll = Poll { books, holds, operator, polls: Semaphore::new(POLLS), told: AtomicU64::new(0) };
    Router::new().route(TRAFFIC_PATH, get(poll_traffic)).with_state(Arc::new(poll))
}

async fn poll_traffic(
    State(poll): State<Arc<Poll>>,
    headers: HeaderMap,
    query: Result<Query<TrafficQuery>, QueryRejection>,
) -> Result<Json<Traffic>, ApiError> {
    poll.operator.admit(&headers, Scope::Report)?;
    let Query(query) = query.map_err(|error| {
        ApiError::invalid("invalid_query", format!("{error}; `after` must be a whole number of seconds."))
    })?;
    let _turn =
        poll.polls.try_acquire().map_err(|_| ApiError::overloaded(&format!("{POLLS} polls at a time")))?;
    poll.answer(&query).await.map(Json)
}

impl Poll {
    async fn answer(&self, query: &TrafficQuery) -> Result<Traffic, ApiError> {
        let known = if query.instance == self.books.flows.instance { query.after } else { 0 };
        let (mut second, mut begun) = (self.books.flows.second.subscribe(), self.holds.begun());
        let news = async {
            tokio::select! {
                _ = second.wait_for(|second| *second > known) => {}
                _ = begun.wait_for(|begun| *begun > self.told.load(Relaxed)) => {}
            }
        };
        // What there is by then is told.
        let _ = tokio::time::timeout(LONGEST, news).await;
        let begun = *begun.borrow();
        self.told.fetch_max(begun, Relaxed);
        // The first answer to a new leader may be long.
        let (books, holds) = (Arc::clone(&self.books), Arc::clone(&self.holds));
        let told = tokio::task::spawn_blocking(move || books.flows.since(known, &holds.held()));
        told.await.map_err(|panic| {
            tracing::error!(%panic, "telling what flows panicked");
            ApiError::internal()
        })
    }
}
