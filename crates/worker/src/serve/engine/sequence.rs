//! One answer that grows: tokens to text, to the client, to its end.
use std::sync::Arc;
use std::time::Instant;

use lathe_engine::Emitted;
use lathe_engine::files::{FileError, TextStream, Tokenizer};
use lathe_telemetry::opentelemetry::{Array, KeyValue, StringValue, Value};
use lathe_telemetry::{RequestTrace, genai};

use super::{Job, Resident};
use crate::serve::door::Place;
use crate::serve::error::ApiError;
use crate::serve::load::LoadMeter;
use crate::serve::mailbox::{Finish, Poster};
use crate::serve::metrics::Metrics;
use crate::serve::stops::StopFilter;

/// An answer in the engine.
#[derive(Debug)]
pub struct Sequence {
    pub poster: Poster,
    pub adapter: Option<Arc<Resident>>,
    tokenizer: Arc<Tokenizer>,
    text: TextStream,
    stops: StopFilter,
    ignore_eos: bool,
    prompt_tokens: usize,
    generated: usize,
    arrived: Instant,
    started: Instant,
    first: Option<Instant>,
    last: Instant,
    cached: usize,
    trace: Option<RequestTrace>,
    /// Given back before the client is told of the end: its next request finds it free.
    place: Option<Place>,
}

/// What every answer is measured with.
pub struct Surroundings<'a> {
    pub eos: &'a [u32],
    pub load: &'a LoadMeter,
    pub metrics: &'a Metrics,
    pub now: Instant,
}

impl Sequence {
    /// The answer to `job`, whose prompt the engine has taken.
    pub fn new(job: Job, metrics: &Metrics, now: Instant) -> Self {
        let Job { prompt, adapter, tokenizer, stops, ignore_eos, poster, place, arrived, trace, .. } = job;
        metrics.queue.observe(seconds(arrived, now));
        Sequence {
            poster,
            adapter,
            text: tokenizer.stream(),
            tokenizer,
            stops,
            ignore_eos,
            prompt_tokens: prompt.len(),
            generated: 0,
            arrived,
            started: now,
            first: None,
            last: now,
            cached: 0,
            trace,
            place: Some(place),
        }
    }

    /// Takes a token. Returns true where the answer is over.
    pub fn take(&mut self, emitted: &Emitted, around: &Surroundings<'_>) -> bool {
        let Emitted { token, finished, cached, .. } = *emitted;
        self.measure(cached, around);
        match self.grow(token, finished, around) {
            Ok(None) => false,
            Ok(Some(finish)) => {
                self.end(Ok(finish), finish.name(), around.metrics, around.now);
                around.load.answered(around.now.saturating_duration_since(self.started));
                true
            }
            Err(error) => {
                tracing::error!(%error, token, "a token could not be turned into text");
                self.end(Err(ApiError::internal()), "error", around.metrics, around.now);
                true
            }
        }
    }

    /// Ends the answer; `reason` is the metrics' word.
    pub fn end(
        &mut self,
        end: Result<Finish, ApiError>,
        reason: &'static str,
        metrics: &Metrics,
        now: Instant,
    ) {
        metrics.finished(reason);
        metrics.e2e.observe(seconds(self.arrived, now));
        if let Some(first) = self.first {
            metrics.decode.observe(seconds(first, now));
        }
        self.trace(&end, reason, now);
        self.place = None;
        self.poster.end(end);
    }

    /// Its spans, of times that were taken for the metrics.
    fn trace(&mut self, end: &Result<Finish, ApiError>, reason: &'static str, now: Instant) {
        let Some(trace) = self.trace.take().filter(RequestTrace::is_recorded) else { return };
        trace.part("queue", self.arrived, self.started);
        trace.part("prompt", self.started, self.first.unwrap_or(now));
        if let Some(first) = self.first {
            trace.part("generation", first, now);
        }
        let [prompt, cached, completion] =
            [self.prompt_tokens, self.cached, self.generated].map(|tokens| tokens as u64);
        trace.set(genai::usage(prompt, cached, completion));
        match end {
            Ok(finish) => {
                let finish = Array::from(vec![StringValue::from(finish.name())]);
                trace.set([KeyValue::new(genai::FINISH_REASONS, Value::Array(finish))]);
                trace.status(200);
            }
            // Of a client that left nothing is known, and nobody is told.
            Err(_) if self.poster.is_gone() => trace.fails(reason),
            Err(error) => return error.traced(&trace),
        }
        trace.end();
    }

    /// `cached`: tokens of the prompt that were not read.
    fn measure(&mut self, cached: usize, around: &Surroundings<'_>) {
        let Surroundings { load, metrics, now, .. } = *around;
        let mut read = 0;
        match self.first {
            None => {
                read = self.prompt_tokens.saturating_sub(cached);
                self.poster.begin(cached);
                self.cached = cached;
                self.first = Some(now);
                metrics.first_token.observe(seconds(self.arrived, now));
                metrics.prefill.observe(seconds(self.started, now));
                metrics.read(self.prompt_tokens, cached);
            }
            Some(_) => metrics.inter_token.observe(seconds(self.last, now)),
        }
        metrics.generation_tokens.inc();
        load.count(now, read, 1);
        self.last = now;
        self.generated += 1;
    }

    /// `full`: no other token can follow.
    fn grow(
        &mut self,
        token: u32,
        full: bool,
        around: &Surroundings<'_>,
    ) -> Result<Option<Finish>, FileError> {
        let ended = !self.ignore_eos && around.eos.contains(&token);
        if !ended {
            let piece = self.text.push(&self.tokenizer, token)?;
            let passed = self.stops.push(&piece);
            self.poster.post(&passed.text, self.generated);
            if passed.stopped {
                return Ok(Some(Finish::Stop));
            }
            if !full {
                return Ok(None);
            }
        }
        // The end: what was held back, because more could have changed it, comes out.
        let tail = std::mem::take(&mut self.text).finish(&self.tokenizer)?;
        let passed = self.stops.push(&tail);
        self.poster.post(&passed.text, self.generated);
        if passed.stopped {
            return Ok(Some(Finish::Stop));
        }
        self.poster.post(&std::mem::take(&mut self.stops).finish(), self.generated);
        Ok(Some(if ended { Finish::Stop } else { Finish::Length }))
    }
}

/// As the metrics have it.
pub fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}
