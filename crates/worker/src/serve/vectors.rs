//! From the engine's thread to one client: the embeddings of one request, all at once or an error.
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lathe_contract::Usage;
use lathe_telemetry::{RequestTrace, genai};
use tokio::sync::oneshot;

use super::door::Place;
use super::error::ApiError;

/// The embeddings of a request's inputs, in their order, and what reading them took.
pub type Embeddings = (Vec<Vec<f32>>, Usage);

/// The engine's end, of which each input that is computed holds a clone.
#[derive(Clone, Debug)]
pub struct Poster(Arc<Mutex<State>>);

/// The client's end; dropping it takes the inputs out of the engine at the next step.
#[derive(Debug)]
pub struct Awaited(oneshot::Receiver<Result<Embeddings, ApiError>>);

#[derive(Debug)]
struct State {
    /// By the inputs' order; empty where one is not there yet.
    vectors: Vec<Vec<f32>>,
    missing: usize,
    usage: Usage,
    arrived: Instant,
    /// The first of them.
    started: Option<Instant>,
    client: Option<oneshot::Sender<Result<Embeddings, ApiError>>>,
    /// Given back before the client is told of the end: its next request finds it free.
    place: Option<Place>,
    trace: Option<RequestTrace>,
}

/// A pair of ends for `inputs` of so many tokens in all.
pub fn awaited(
    inputs: usize,
    tokens: usize,
    arrived: Instant,
    place: Place,
    trace: Option<RequestTrace>,
) -> (Poster, Awaited) {
    let (client, answer) = oneshot::channel();
    let state = State {
        vectors: vec![Vec::new(); inputs],
        missing: inputs,
        usage: Usage { prompt: tokens as u64, completion: 0, cached: 0 },
        arrived,
        started: None,
        client: Some(client),
        place: Some(place),
        trace,
    };
    (Poster(Arc::new(Mutex::new(state))), Awaited(answer))
}

impl Poster {
    /// The engine has taken an input.
    pub fn begin(&self, now: Instant) {
        self.lock().started.get_or_insert(now);
    }

    /// The embedding of the input at `at`, of which so many tokens came from the cache. Says how long the request was in
    /// the engine where this was the last that was missing.
    pub fn post(&self, at: usize, vector: Vec<f32>, cached: usize, now: Instant) -> Option<Duration> {
        let mut state = self.lock();
        state.usage.cached += cached as u64;
        state.missing = state.missing.saturating_sub(1);
        if let Some(place) = state.vectors.get_mut(at) {
            *place = vector;
        }
        (state.missing == 0).then(|| state.end(None, "stop", now))
    }

    /// The last word; later ones are ignored. `reason` is the metrics' word.
    pub fn fail(&self, why: ApiError, reason: &'static str, now: Instant) {
        self.lock().end(Some(why), reason, now);
    }

    /// Whether nobody waits for the rest any more.
    pub fn is_gone(&self) -> bool {
        self.lock().client.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn end(&mut self, failed: Option<ApiError>, reason: &'static str, now: Instant) -> Duration {
        let started = self.started.unwrap_or(now);
        if let Some(client) = self.client.take() {
            self.trace(failed.as_ref(), client.is_closed(), reason, now);
            self.place = None;
            let vectors = std::mem::take(&mut self.vectors);
            // One that has left needs no word.
            drop(client.send(failed.map_or(Ok((vectors, self.usage)), Err)));
        }
        now.saturating_duration_since(started)
    }

    /// Its spans, of times that were taken for the metrics.
    fn trace(&mut self, failed: Option<&ApiError>, gone: bool, reason: &'static str, now: Instant) {
        let Some(trace) = self.trace.take().filter(RequestTrace::is_recorded) else { return };
        trace.part("queue", self.arrived, self.started.unwrap_or(now));
        if let Some(started) = self.started {
            trace.part("prompt", started, now);
        }
        trace.set(genai::usage(self.usage.prompt, self.usage.cached, 0));
        match failed {
            None => trace.status(200),
            // Of a client that left nothing is known, and nobody is told.
            Some(_) if gone => trace.fails(reason),
            Some(error) => return error.traced(&trace),
        }
        trace.end();
    }
}

impl Awaited {
    /// All of them.
    ///
    /// # Errors
    /// The engine's; one that is lost unfinished is an error too, never a silence.
    pub async fn all(self) -> Result<Embeddings, ApiError> {
        self.0.await.unwrap_or_else(|_| Err(ApiError::internal()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::door::Door;
    use crate::serve::load::LoadMeter;

    fn pair(inputs: usize) -> (Arc<Door>, Poster, Awaited) {
        let now = Instant::now();
        let door = Door::new(1, 0, Arc::new(LoadMeter::new(now)));
        let (poster, awaited) = awaited(inputs, 9, now, door.enter().expect("free"), None);
        (door, poster, awaited)
    }

    #[tokio::test]
    async fn they_come_in_the_order_of_the_inputs_and_the_place_is_free() {
        let (door, poster, awaited) = pair(2);
        let now = Instant::now();
        poster.begin(now);
        assert_eq!(poster.post(1, vec![2.0], 16, now + Duration::from_secs(1)), None);
        assert!(door.enter().is_err());
        let took = poster.post(0, vec![1.0], 32, now + Duration::from_secs(3));
        assert_eq!(took, Some(Duration::from_secs(3)));
        assert!(door.enter().is_ok());
        let usage = Usage { prompt: 9, completion: 0, cached: 48 };
        assert_eq!(awaited.all().await, Ok((vec![vec![1.0], vec![2.0]], usage)));
    }

    #[tokio::test]
    async fn one_that_fails_is_the_whole_requests_failure_and_takes_the_others_out() {
        let (door, poster, awaited) = pair(3);
        let other = poster.clone();
        poster.fail(ApiError::not_json(), "error", Instant::now());
        assert!(other.is_gone() && door.enter().is_ok());
        other.fail(ApiError::internal(), "abort", Instant::now());
        assert_eq!(awaited.all().await, Err(ApiError::not_json()));
    }

    #[tokio::test]
    async fn a_lost_engine_is_an_error_and_a_client_that_left_is_seen() {
        let (_door, poster, awaited) = pair(1);
        drop(poster);
        assert_eq!(awaited.all().await, Err(ApiError::internal()));
        let (door, poster, awaited) = pair(1);
        assert!(!poster.is_gone());
        drop(awaited);
        assert!(poster.is_gone() && door.enter().is_err());
        drop(poster);
        assert!(door.enter().is_ok());
    }
}
