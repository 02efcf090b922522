//! What a sequence is given and what a step gives back.

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

/// An adapter that was added to a [`crate::Generator`]; never used twice, so it works as the adapter's generation.
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
    /// [`crate::Generator::remove`].
    pub finished: bool,
    /// Tokens of its prompt that were in the cache when the sequence began, and were not read again.
    pub cached: usize,
}

/// The embedding of a prompt that a step has read to its end.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedded {
    /// The sequence, which is gone.
    pub sequence: u64,
    /// `[hidden]`, of length 1; not finite where the model's numbers are not.
    pub vector: Vec<f32>,
    /// As of [`Emitted`].
    pub cached: usize,
}

/// What a step computed, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepTokens {
    /// Of prompts, and of sequences that gave their blocks back and are computed again.
    pub prompt: usize,
    /// Of answers, each from the one before.
    pub generation: usize,
}

/// What is free and what is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Blocks of the cache.
    pub total_blocks: usize,
    /// Blocks that no sequence holds, those with them that keep a beginning.
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
