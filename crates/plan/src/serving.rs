//! What a serving process holds.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::buffers::List;
use crate::shape::wrong;
use crate::training::{block_buffers, common_buffers, forward_workspace, weight_buffers};
use crate::{Buffer, Category, Element, LoraSpec, ModelShape, PlanError, Precision, Target, Totals};
use Category::{Cache, Weights, Workspace};
use Element::{F32, U32};

/// Tokens of one block of the key and value cache.
pub const BLOCK: usize = 16;

/// Tokens of prompts that one forward pass of a serving worker reads, at most.
pub const SERVE_BATCH_TOKENS: usize = 512;

/// Adapters that a serving worker has room for beyond those it starts with, for those that are added or swapped later.
pub const SPARE_ADAPTERS: usize = 4;

/// The rank that any adapter may have in a serving worker, whatever those have that it starts with.
pub const SPARE_RANK: usize = 32;

/// How many adapters may be resident, and how large each may be.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AdapterBudget {
    /// Adapters at a time; 0 for none.
    pub slots: usize,
    /// The largest rank.
    pub max_rank: usize,
    /// The linear layers that adapters may change.
    pub targets: BTreeSet<Target>,
}

/// What a serving process is asked to do.
#[derive(Debug, Clone, PartialEq)]
pub struct ServeRequest {
    /// How the model's matrices are held.
    pub weights: Precision,
    /// The longest sequence, prompt and answer together, in tokens.
    pub context: usize,
    /// Sequences in one forward pass, at most.
    pub max_sequences: usize,
    /// Tokens in one forward pass, at most (prompts are cut into chunks).
    pub max_batch_tokens: usize,
    /// Tokens of the cache; `None` takes what `max_sequences` full contexts need, or less where the limit asks.
    pub cache_tokens: Option<usize>,
    /// Resident adapters.
    pub adapters: AdapterBudget,
    /// Threads of the worker (each holds scratch).
    pub threads: usize,
    /// Bytes that may be held; `None` is no limit.
    pub memory_limit: Option<u64>,
}

/// Every buffer of a serving process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServePlan {
    /// The model.
    pub shape: ModelShape,
    /// How the model's matrices are held.
    pub weights: Precision,
    /// The longest sequence, in tokens.
    pub context: usize,
    /// Sequences in one forward pass, at most.
    pub max_sequences: usize,
    /// Tokens in one forward pass, at most.
    pub max_batch_tokens: usize,
    /// Blocks of [`BLOCK`] tokens in the cache.
    pub cache_blocks: usize,
    /// Resident adapters.
    pub adapters: AdapterBudget,
    /// Threads of the worker.
    pub threads: usize,
    /// All buffers.
    pub buffers: Vec<Buffer>,
    /// Bytes by category.
    pub totals: Totals,
}

/// Tokens whose weights are summed apart, so that a token is drawn by looking at one such chunk of the vocabulary.
pub const SAMPLE_CHUNK: usize = 1024;

/// Plans a serving process. With a limit, the cache shrinks to what fits, down to one full context.
///
/// # Errors
/// [`PlanError::Shape`] for an absurd shape or request, [`PlanError::TooLarge`] where sizes overflow,
/// [`PlanError::DoesNotFit`] with the smallest arrangement's numbers.
pub fn plan_serving(shape: &ModelShape, request: &ServeRequest) -> Result<ServePlan, PlanError> {
    shape.validate()?;
    check(shape, request)?;
    let context_blocks = request.context.div_ceil(BLOCK);
    let wanted = match request.cache_tokens {
        Some(tokens) => tokens.div_ceil(BLOCK),
        None => context_blocks * request.max_sequences,
    };
    if wanted < context_blocks {
        let allowed = format!("at least one context of {} tokens", request.context);
        return Err(wrong("cacheTokens", allowed, wanted * BLOCK));
    }
    let plan = arrange(shape, request, wanted)?;
    let Some(limit) = request.memory_limit.filter(|&limit| plan.totals.total() > limit) else {
        return Ok(plan);
    };
    let per_block = plan.totals.cache / wanted as u64;
    let rest = plan.totals.total() - plan.totals.cache;
    let blocks = (limit.saturating_sub(rest) / per_block) as usize;
    if blocks >= context_blocks && request.cache_tokens.is_none() {
        return arrange(shape, request, blocks);
    }
    let least = if request.cache_tokens.is_some() { wanted } else { context_blocks };
    let totals = arrange(shape, request, least)?.totals;
    Err(PlanError::DoesNotFit { needed: totals.total(), limit, totals })
}

fn check(shape: &ModelShape, request: &ServeRequest) -> Result<(), PlanError> {
    if request.context < 2 || request.context > shape.max_position {
        let allowed = format!("between 2 and the model's context of {} tokens", shape.max_position);
        return Err(wrong("contextLength", allowed, request.context));
    }
    for (field, value, max) in [
        ("maxSequences", request.max_sequences, 1 << 14),
        ("maxBatchTokens", request.max_batch_tokens, 1 << 20),
        ("threads", request.threads, 1 << 12),
    ] {
        if value == 0 || value > max {
            return Err(wrong(field, format!("between 1 and {max}"), value));
        }
    }
    if request.max_batch_tokens < request.max_sequences {
        let allowed = format!("at least maxSequences ({})", request.max_sequences);
        return Err(wrong("maxBatchTokens", allowed, request.max_batch_tokens));
    }
    if request.cache_tokens.is_some_and(|tokens| tokens > 1 << 32) {
        return Err(wrong("cacheTokens", "at most 2^32".to_owned(), "more"));
    }
    let AdapterBudget { slots, max_rank, targets } = &request.adapters;
    if *slots > 1 << 12 {
        return Err(wrong("adapters", "at most 4096".to_owned(), slots));
    }
    if *slots > 0 {
        LoraSpec { rank: *max_rank, alpha: 1.0, dropout: 0.0, targets: targets.clone() }.validate()?;
    }
    Ok(())
}

fn arrange(shape: &ModelShape, request: &ServeRequest, blocks: usize) -> Result<ServePlan, PlanError> {
    let tokens = request.max_batch_tokens;
    let sequences = request.max_sequences;
    let mut list = List::default();
    weight_buffers(&mut list, shape, request.weights)?;
    for layer in 0..shape.layers {
        for part in ["k", "v"] {
            list.add(format!("cache.{layer}.{part}"), Cache, F32, &[blocks, BLOCK, shape.kv_dim()])?;
        }
    }
    list.add("x", Workspace, F32, &[tokens, shape.hidden])?;
    block_buffers(&mut list, shape, 0, tokens, Workspace)?;
    forward_workspace(&mut list, shape, tokens)?;
    let AdapterBudget { slots, max_rank, targets } = &request.adapters;
    if *slots > 0 {
        let largest = LoraSpec { rank: *max_rank, alpha: 1.0, dropout: 0.0, targets: targets.clone() };
        let stored = largest.elements(shape)?;
        for slot in 0..*slots {
            list.add(format!("adapter.{slot}"), Weights, F32, &[stored])?;
        }
        list.add("lora.mid", Workspace, F32, &[tokens, *max_rank])?;
    }
    list.add("head.inv", Workspace, F32, &[tokens])?;
    list.add("head.rows", Workspace, F32, &[sequences, shape.hidden])?;
    list.add("head.logits", Workspace, F32, &[sequences, shape.vocab])?;
    list.add("head.stats", Workspace, F32, &[sequences, 3])?;
    list.add("head.targets", Workspace, U32, &[sequences])?;
    list.add("head.temperatures", Workspace, F32, &[sequences])?;
    list.add("head.sums", Workspace, F32, &[sequences, shape.vocab.div_ceil(SAMPLE_CHUNK)])?;
    let table = request.context.div_ceil(BLOCK);
    for (name, len) in [
        ("batch.tokens", tokens),
        ("batch.positions", tokens),
        ("batch.slots", tokens),
        ("batch.adapters", tokens),
        ("batch.starts", sequences + 1),
        ("batch.table_starts", sequences),
        ("batch.rows", sequences),
    ] {
        list.add(name, Workspace, U32, &[len])?;
    }
    list.add("batch.tables", Workspace, U32, &[sequences, table])?;
    common_buffers(&mut list, shape, request.context, request.threads)?;

    let totals = Totals::of(&list.buffers);
    Ok(ServePlan {
        shape: shape.clone(),
        weights: request.weights,
        context: request.context,
        max_sequences: sequences,
        max_batch_tokens: tokens,
        cache_blocks: blocks,
        adapters: request.adapters.clone(),
        threads: request.threads,
        buffers: list.buffers,
        totals,
    })
}
