//! Generation: many sequences at a time, each with its own adapter and sampling.

use lathe_plan::ServePlan;

use crate::{Adapter, Model, Result};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token always (greedy).
    pub temperature: f32,
    /// Only the likeliest tokens whose probabilities sum to this; 1 for all.
    pub top_p: f32,
    /// Only this many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Equal seeds give equal answers, in any batch.
    pub seed: u64,
}

/// An adapter that was added to a [`Generator`]; never used twice, so it works as the adapter's generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub u64);

/// A token that a step produced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Emitted {
    /// The sequence.
    pub sequence: u64,
    /// Its next token.
    pub token: u32,
    /// The token's log-probability under the model (before temperature and cuts).
    pub log_prob: f32,
    /// The sequence has reached its `max_new_tokens` or the context and is gone; otherwise it goes on until
    /// [`Generator::remove`].
    pub finished: bool,
}

/// What is free and what is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Blocks of the cache.
    pub total_blocks: usize,
    /// Blocks that no sequence holds.
    pub free_blocks: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Sequences in the cache.
    pub running: usize,
    /// Sequences that wait for room.
    pub waiting: usize,
    /// Sequences in one step, at most.
    pub max_sequences: usize,
    /// Adapters that can still be added.
    pub free_adapter_slots: usize,
}

/// Continues sequences with a model: owns it, the cache and the resident adapters. Not shared: one thread owns a
/// generator and is spoken to by commands.
pub struct Generator {
    model: Model,
}

impl Generator {
    /// Allocates what the plan lists.
    ///
    /// # Errors
    /// The plan is another model's, no memory.
    pub fn new(model: Model, plan: &ServePlan) -> Result<Generator> {
        let _ = plan;
        Ok(Generator { model })
    }

    /// Queues a sequence. It produces at most `max_new_tokens` tokens, fewer when the context ends.
    ///
    /// # Errors
    /// [`crate::Error::Sequence`]: the id is in use, the prompt is empty, leaves no room in the context, or has a
    /// token outside the vocabulary, a sampling value is outside its range; [`crate::Error::Adapter`]: no such
    /// adapter.
    pub fn add_sequence(
        &mut self,
        id: u64,
        prompt: &[u32],
        adapter: Option<AdapterId>,
        sampling: Sampling,
        max_new_tokens: usize,
    ) -> Result<()> {
        let _ = (id, prompt, adapter, sampling, max_new_tokens);
        todo!()
    }

    /// One batched forward pass over what the scheduler chose: chunks of prompts and one token of each running
    /// sequence. Returns at most one token a sequence; empty when there is nothing to do (or only a part of a
    /// long prompt was read: see [`Generator::idle`]).
    ///
    /// # Errors
    /// Reading back from the device failed.
    pub fn step(&mut self) -> Result<Vec<Emitted>> {
        todo!()
    }

    /// Whether no sequence is queued or running.
    pub fn idle(&self) -> bool {
        todo!()
    }

    /// Ends a sequence and frees its blocks; nothing happens when it is gone already.
    pub fn remove(&mut self, id: u64) {
        let _ = id;
        todo!()
    }

    /// Makes an adapter resident.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`]: no free slot, or larger than the plan's budget, or of another base.
    pub fn add_adapter(&mut self, adapter: &Adapter) -> Result<AdapterId> {
        let _ = adapter;
        todo!()
    }

    /// Takes an adapter away: new sequences cannot name it, sequences in flight keep it to their end, then its
    /// slot is free.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`]: no such adapter.
    pub fn remove_adapter(&mut self, id: AdapterId) -> Result<()> {
        let _ = id;
        todo!()
    }

    /// What is free and what is in use.
    pub fn capacity(&self) -> Capacity {
        todo!()
    }

    /// The model; everything else is freed.
    pub fn into_model(self) -> Model {
        self.model
    }
}
