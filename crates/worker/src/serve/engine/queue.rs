//! What waits for the engine, and what is in it: answers, and embeddings.
//!
//! A request for embeddings gives the engine as many inputs as one step reads and then stands at the end of the queue again, so
//! that many inputs keep nobody waiting longer than one prompt does.
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use lathe_engine::{AdapterId, Embedded, Generator};

use super::sequence::{Sequence, Surroundings, seconds};
use super::{Job, Resident};
use crate::serve::error::ApiError;
use crate::serve::metrics::Metrics;
use crate::serve::vectors::Poster;

/// Tokens of one turn, where one input has no more.
const TURN: usize = 512;

/// A request for embeddings, judged and turned into tokens.
#[derive(Debug)]
pub struct EmbedJob {
    /// What is not in the engine yet, never nothing: each input's place in the request, and its tokens, at least one and at
    /// most the context.
    pub inputs: VecDeque<(usize, Vec<u32>)>,
    /// As of [`Job`].
    pub adapter: Option<Arc<Resident>>,
    /// Where they go.
    pub poster: Poster,
    /// When the request came.
    pub arrived: Instant,
    /// Tokens that are left of its turn.
    turn: usize,
}

impl EmbedJob {
    /// Of these inputs, in their order.
    pub fn new(
        inputs: Vec<Vec<u32>>,
        adapter: Option<Arc<Resident>>,
        poster: Poster,
        arrived: Instant,
    ) -> Self {
        Self { inputs: inputs.into_iter().enumerate().collect(), adapter, poster, arrived, turn: TURN }
    }
}

/// A request that waits.
#[derive(Debug)]
pub enum Waiting {
    Answer(Box<Job>),
    Embeddings(EmbedJob),
}

impl Waiting {
    /// How many sequences it will be.
    pub fn count(&self) -> usize {
        match self {
            Waiting::Answer(_) => 1,
            Waiting::Embeddings(job) => job.inputs.len(),
        }
    }

    pub fn adapter(&self) -> Option<&Arc<Resident>> {
        match self {
            Waiting::Answer(job) => job.adapter.as_ref(),
            Waiting::Embeddings(job) => job.adapter.as_ref(),
        }
    }

    /// Whether its client has left.
    pub fn is_gone(&self) -> bool {
        match self {
            Waiting::Answer(job) => job.poster.is_gone(),
            Waiting::Embeddings(job) => job.poster.is_gone(),
        }
    }

    /// Gives the engine its next sequence.
    ///
    /// # Errors
    /// The engine's.
    pub fn add(
        &self,
        generator: &mut Generator,
        id: u64,
        adapter: Option<AdapterId>,
    ) -> lathe_engine::Result<()> {
        match self {
            Waiting::Answer(job) => {
                generator.add_shared(id, &job.prompt, adapter, job.sampling, job.max_tokens)
            }
            Waiting::Embeddings(job) => {
                job.inputs.front().map_or(Ok(()), |(_, input)| generator.add_embedding(id, input, adapter))
            }
        }
    }

    /// The sequence that the engine has taken, and what is left.
    pub fn begin(self, metrics: &Metrics, now: Instant) -> (Option<Running>, Option<Waiting>) {
        match self {
            Waiting::Answer(job) => {
                (Some(Running::Answer(Box::new(Sequence::new(*job, metrics, now)))), None)
            }
            Waiting::Embeddings(mut job) => {
                metrics.queue.observe(seconds(job.arrived, now));
                job.poster.begin(now);
                let next = job.inputs.pop_front();
                job.turn = job.turn.saturating_sub(next.as_ref().map_or(0, |(_, input)| input.len()));
                let part = next.map(|(at, input)| Part {
                    at,
                    tokens: input.len(),
                    adapter: job.adapter.clone(),
                    poster: job.poster.clone(),
                    arrived: job.arrived,
                    started: now,
                });
                let rest = (!job.inputs.is_empty()).then_some(Waiting::Embeddings(job));
                (part.map(Running::Embedding), rest)
            }
        }
    }

    /// Whether the next input is its turn too.
    pub fn has_turn(&self) -> bool {
        match self {
            Waiting::Answer(_) => false,
            Waiting::Embeddings(job) => job.inputs.front().is_some_and(|(_, input)| input.len() <= job.turn),
        }
    }

    /// It waits for another turn.
    pub fn next_turn(mut self) -> Self {
        if let Waiting::Embeddings(job) = &mut self {
            job.turn = TURN;
        }
        self
    }

    /// Its client has left before its turn.
    pub fn forget(&self, metrics: &Metrics) {
        (0..self.count()).for_each(|_| metrics.finished("abort"));
        match self {
            Waiting::Answer(job) => {
                if let Some(trace) = &job.trace {
                    trace.fails("abort");
                    trace.end();
                }
            }
            Waiting::Embeddings(job) => job.poster.fail(ApiError::internal(), "abort", Instant::now()),
        }
    }

    /// Ends it unanswered; its place is free before its client is told. `reason` is the metrics' word.
    pub fn refuse(self, why: ApiError, reason: &'static str, metrics: &Metrics) {
        (0..self.count()).for_each(|_| metrics.finished(reason));
        match self {
            Waiting::Answer(job) => job.refuse(why),
            Waiting::Embeddings(job) => job.poster.fail(why, reason, Instant::now()),
        }
    }
}

/// A sequence in the engine.
#[derive(Debug)]
pub enum Running {
    Answer(Box<Sequence>),
    Embedding(Part),
}

impl Running {
    pub fn adapter(&self) -> Option<&Arc<Resident>> {
        match self {
            Running::Answer(sequence) => sequence.adapter.as_ref(),
            Running::Embedding(part) => part.adapter.as_ref(),
        }
    }

    /// Whether its client has left.
    pub fn is_gone(&self) -> bool {
        match self {
            Running::Answer(sequence) => sequence.poster.is_gone(),
            Running::Embedding(part) => part.poster.is_gone(),
        }
    }

    /// Ends it before its own end; `reason` is the metrics' word.
    pub fn fail(&mut self, why: ApiError, reason: &'static str, metrics: &Metrics, now: Instant) {
        match self {
            Running::Answer(sequence) => sequence.end(Err(why), reason, metrics, now),
            Running::Embedding(part) => part.fail(why, reason, metrics, now),
        }
    }
}

/// One input of a request for embeddings.
#[derive(Debug)]
pub struct Part {
    at: usize,
    tokens: usize,
    adapter: Option<Arc<Resident>>,
    poster: Poster,
    arrived: Instant,
    started: Instant,
}

impl Part {
    /// Takes its embedding. As in vLLM an input counts as a request that ends by `stop`; there is no first token to measure.
    pub fn take(&self, embedded: Embedded, around: &Surroundings<'_>) {
        let Surroundings { load, metrics, now, .. } = *around;
        let Embedded { vector, cached, .. } = embedded;
        metrics.prefill.observe(seconds(self.started, now));
        metrics.read(self.tokens, cached);
        load.count(now, self.tokens.saturating_sub(cached), 0);
        // JSON has no word for what is not finite, and a vector that holds it is none.
        if !vector.iter().all(|x| x.is_finite()) {
            tracing::error!(
                "an embedding is not finite: the model's weights, or its adapter's, do not fit its numbers"
            );
            return self.fail(ApiError::internal(), "error", metrics, now);
        }
        metrics.finished("stop");
        metrics.e2e.observe(seconds(self.arrived, now));
        if let Some(took) = self.poster.post(self.at, vector, cached, now) {
            load.answered(took);
        }
    }

    fn fail(&self, why: ApiError, reason: &'static str, metrics: &Metrics, now: Instant) {
        metrics.finished(reason);
        metrics.e2e.observe(seconds(self.arrived, now));
        self.poster.fail(why, reason, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::door::Door;
    use crate::serve::load::LoadMeter;
    use crate::serve::vectors::awaited;

    #[test]
    fn a_turn_is_as_many_inputs_as_a_step_reads_and_at_least_one() {
        let now = Instant::now();
        let place = Door::new(1, 0, Arc::new(LoadMeter::new(now))).enter().expect("free");
        let lengths = [1000, 200, 300, 20, 400];
        let (poster, _awaited) = awaited(lengths.len(), 1920, now, place, None);
        let inputs = lengths.map(|length| vec![1; length]).to_vec();
        let metrics = Metrics::register(&mut prometheus_client::registry::Registry::default(), "m");
        let mut rest = Some(Waiting::Embeddings(EmbedJob::new(inputs, None, poster, now)));
        let mut turns = vec![0];
        while let Some(job) = rest.take() {
            let (begun, left) = job.begin(&metrics, now);
            assert!(begun.is_some());
            turns.last_mut().into_iter().for_each(|turn| *turn += 1);
            rest = match left {
                Some(left) if left.has_turn() => Some(left),
                left => left.map(Waiting::next_turn).inspect(|_| turns.push(0)),
            };
        }
        assert_eq!(turns, [1, 2, 2]);
    }
}
