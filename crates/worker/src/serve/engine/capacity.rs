//! How many tokens a second this replica can produce.
//!
//! It is measured with a full batch of short answers, but only while nobody asks for anything: a replica is ready
//! before it knows, and a request waits for one step of the measurement at most.
use std::time::{Duration, Instant};

use lathe_contract::ReplicaCapacity;
use lathe_engine::Generator;
use lathe_engine::plan::BLOCK;

use super::warm_up::GREEDY;
use crate::failure::Done;

/// How long nobody must have asked for anything.
pub const PAUSE: Duration = Duration::from_secs(1);
/// Steps that are measured, at most, and the time for them: with the prompt's token as many as one block of the cache holds.
const STEPS: usize = BLOCK - 1;
const TIME: Duration = Duration::from_secs(1);

/// A measurement, a step at a time. One that was broken off begins anew.
pub struct Measurement {
    sequences: usize,
    under_way: Option<UnderWay>,
}

struct UnderWay {
    since: Instant,
    steps: usize,
    tokens: usize,
}

impl Measurement {
    /// Of so many sequences at a time.
    pub fn new(sequences: usize) -> Self {
        Self { sequences, under_way: None }
    }

    /// Whether its sequences are in the engine.
    pub fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// One forward pass; tokens a second after the last one, 0 where the context has no room for more than a token.
    ///
    /// # Errors
    /// The engine's.
    pub fn step(&mut self, generator: &mut Generator) -> Done<Option<ReplicaCapacity>> {
        let Some(under_way) = &mut self.under_way else {
            let begun = || Some(UnderWay { since: Instant::now(), steps: 0, tokens: 0 });
            // From here on there is something to take out again.
            self.under_way = begun();
            for id in self.ids() {
                generator.add_sequence(id, &[0], None, GREEDY, STEPS + 1)?;
            }
            // The prompts' step is another kind of work.
            generator.step()?;
            self.under_way = begun();
            return Ok(None);
        };
        under_way.tokens += generator.step()?.len();
        under_way.steps += 1;
        let took = under_way.since.elapsed();
        if took <= TIME && under_way.steps < STEPS && !generator.idle() {
            return Ok(None);
        }
        let tokens = under_way.tokens;
        self.stop(generator);
        let generation = tokens as f64 / took.as_secs_f64().max(1e-6);
        Ok(Some(ReplicaCapacity { prompt: generation, generation, sequences: self.sequences as u32 }))
    }

    /// Takes its sequences out of the engine.
    pub fn stop(&mut self, generator: &mut Generator) {
        if self.under_way.take().is_some() {
            self.ids().for_each(|id| generator.remove(id));
        }
    }

    /// Numbers that no request has.
    fn ids(&self) -> impl Iterator<Item = u64> + use<> {
        (0..self.sequences as u64).map(|i| u64::MAX - i)
    }
}
