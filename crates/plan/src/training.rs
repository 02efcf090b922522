//! What a training run holds.

use serde::{Deserialize, Serialize};

use crate::buffers::List;
use crate::shape::wrong;
use crate::{
    BLOCK, Buffer, Category, Element, ModelShape, PlanError, Precision, Tensor, Totals, TrainMethod,
};
use Category::{Activations, Gradients, Optimizer, Weights, Workspace};
use Element::{F32, F64, U8, U32, U64};

/// How AdamW's two moments are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum OptimizerState {
    /// 8 bytes a weight.
    F32,
    /// A code of 8 bits for each, and a scale (f32) for each [`MOMENT_BLOCK`]: about 2.03 bytes a weight.
    Int8,
}

/// Moments of a parameter, one after the other, that share a scale; the last block of a parameter may be shorter.
pub const MOMENT_BLOCK: usize = 256;

/// What a training run is asked to do.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainRequest {
    /// What is trained.
    pub method: TrainMethod,
    /// How the model's matrices are held.
    pub weights: Precision,
    /// The longest row, in tokens.
    pub max_row_tokens: usize,
    /// The most tokens of one optimizer step; a micro-batch is never larger.
    pub batch_tokens: usize,
    /// Tokens of one forward and backward pass; `None` lets the plan choose.
    pub micro_batch_tokens: Option<usize>,
    /// Whether activations are computed twice instead of kept; `None` lets the plan choose.
    pub recompute: Option<bool>,
    /// How moments are held; `None` lets the plan choose.
    pub optimizer_state: Option<OptimizerState>,
    /// Threads of the worker (each holds scratch).
    pub threads: usize,
    /// Bytes that may be held; `None` is no limit.
    pub memory_limit: Option<u64>,
}

/// Every buffer of a training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainPlan {
    /// The model.
    pub shape: ModelShape,
    /// What is trained.
    pub method: TrainMethod,
    /// How the model's matrices are held.
    pub weights: Precision,
    /// The longest row, in tokens.
    pub max_row_tokens: usize,
    /// Tokens of one forward and backward pass.
    pub micro_batch_tokens: usize,
    /// Whether activations are computed twice instead of kept.
    pub recompute: bool,
    /// How moments are held.
    pub optimizer_state: OptimizerState,
    /// Threads of the worker.
    pub threads: usize,
    /// All buffers.
    pub buffers: Vec<Buffer>,
    /// Bytes by category.
    pub totals: Totals,
}

/// Elements per partial sum of the gradient's norm, so that the sum's order does not depend on threads.
pub const NORM_CHUNK: usize = 1 << 14;

/// Beyond this a larger micro-batch makes products no faster.
const ENOUGH_TOKENS: usize = 2048;

/// Plans a training run: the largest useful micro-batch that fits. Activations are computed twice only where
/// nothing else fits, which costs time; moments of 8 bits are taken only where that does not help either, and only
/// where every weight is trained: they cost a little of the result, and those of an adapter are small.
///
/// # Errors
/// [`PlanError::Shape`] for an absurd shape or request, [`PlanError::TooLarge`] where sizes overflow,
/// [`PlanError::DoesNotFit`] with the smallest arrangement's numbers.
pub fn plan_training(shape: &ModelShape, request: &TrainRequest) -> Result<TrainPlan, PlanError> {
    shape.validate()?;
    if let TrainMethod::Lora(lora) = &request.method {
        lora.validate()?;
    }
    let row = request.max_row_tokens;
    if row < 2 || row > shape.max_position {
        let allowed = format!("between 2 and the model's context of {} tokens", shape.max_position);
        return Err(wrong("sequenceLength", allowed, row));
    }
    if !request.weights.is_float() {
        return Err(wrong("weights", "F32 or BF16".to_owned(), format!("{:?}", request.weights)));
    }
    if request.batch_tokens > 1 << 28 || request.threads == 0 || request.threads > 4096 {
        let found = format!("{} and {}", request.batch_tokens, request.threads);
        return Err(wrong("batchTokens and threads", "at most 2^28, and 1 to 4096".to_owned(), found));
    }
    if let Some(tokens) = request.micro_batch_tokens.filter(|&tokens| tokens > 1 << 28) {
        return Err(wrong("micro_batch_tokens", "at most 2^28".to_owned(), tokens));
    }
    let largest = request.micro_batch_tokens.unwrap_or(request.batch_tokens.min(ENOUGH_TOKENS)).max(row);
    let states = match (request.optimizer_state, &request.method) {
        (Some(state), _) => vec![state],
        (None, TrainMethod::Full) => vec![OptimizerState::F32, OptimizerState::Int8],
        (None, TrainMethod::Lora(_)) => vec![OptimizerState::F32],
    };
    let recomputing = request.recompute.map_or(vec![false, true], |recompute| vec![recompute]);
    let mut smallest = None;
    for (&state, &recompute) in
        states.iter().flat_map(|state| recomputing.iter().map(move |recompute| (state, recompute)))
    {
        let mut tokens = largest;
        loop {
            let plan = arrange(shape, request, tokens, recompute, state)?;
            match request.memory_limit {
                Some(limit) if plan.totals.total() > limit => smallest = Some((plan.totals, limit)),
                _ => return Ok(plan),
            }
            if tokens == row || request.micro_batch_tokens.is_some() {
                break;
            }
            tokens = (tokens / 2).max(row);
        }
    }
    let (totals, limit) = smallest.unwrap_or_default();
    Err(PlanError::DoesNotFit { needed: totals.total(), limit, totals })
}

fn arrange(
    shape: &ModelShape,
    request: &TrainRequest,
    tokens: usize,
    recompute: bool,
    optimizer_state: OptimizerState,
) -> Result<TrainPlan, PlanError> {
    let mut list = List::default();
    weight_buffers(&mut list, shape, request.weights)?;
    optimizer_buffers(&mut list, shape, request, optimizer_state)?;

    let slots = if recompute { 1 } else { shape.layers };
    for layer in 0..=shape.layers {
        list.add(format!("x.{layer}"), Activations, F32, &[tokens, shape.hidden])?;
    }
    let lora = match &request.method {
        TrainMethod::Lora(lora) => Some(lora),
        TrainMethod::Full => None,
    };
    for slot in 0..slots {
        block_buffers(&mut list, shape, slot, tokens, Activations)?;
        list.add(format!("block.{slot}.lse"), Activations, F32, &[tokens, shape.heads])?;
        if let Some(lora) = lora {
            for target in &lora.targets {
                let name = format!("block.{slot}.mid.{}", target.name());
                list.add(name, Activations, F32, &[tokens, lora.rank])?;
            }
        }
    }
    forward_workspace(&mut list, shape, tokens)?;
    for (name, width) in [
        ("d.x", shape.hidden),
        ("d.n", shape.hidden),
        ("d.q", shape.q_dim()),
        ("d.k", shape.kv_dim()),
        ("d.v", shape.kv_dim()),
        ("d.attention", shape.q_dim()),
        ("d.gate", shape.intermediate),
        ("d.up", shape.intermediate),
        ("d.act", shape.intermediate),
    ] {
        list.add(name, Workspace, F32, &[tokens, width])?;
    }
    if let Some(lora) = lora {
        list.add("d.mid", Workspace, F32, &[tokens, lora.rank])?;
        if lora.dropout > 0.0 {
            let widest = lora.targets.iter().map(|&t| shape.linear(t).1).max().unwrap_or(0);
            list.add("lora.dropped", Workspace, F32, &[tokens, widest])?;
        }
    }
    let chunk = loss_chunk(shape, tokens);
    list.add("head.inv", Workspace, F32, &[tokens])?;
    list.add("head.rows", Workspace, F32, &[chunk, shape.hidden])?;
    list.add("head.d_rows", Workspace, F32, &[chunk, shape.hidden])?;
    list.add("head.logits", Workspace, F32, &[chunk, shape.vocab])?;
    list.add("head.stats", Workspace, F32, &[chunk, 3])?;

    // A row takes at least one token, so there are never more sequences or tables than tokens.
    list.add("batch.tokens", Workspace, U32, &[tokens])?;
    list.add("batch.positions", Workspace, U32, &[tokens])?;
    list.add("batch.starts", Workspace, U32, &[tokens + 1])?;
    list.add("batch.table_starts", Workspace, U32, &[tokens])?;
    list.add("batch.tables", Workspace, U32, &[tokens + tokens.div_ceil(BLOCK)])?;
    list.add("batch.seeds", Workspace, U64, &[tokens])?;
    list.add("batch.rows", Workspace, U32, &[tokens])?;
    list.add("batch.places", Workspace, U32, &[tokens])?;
    list.add("batch.targets", Workspace, U32, &[tokens])?;
    list.add("batch.coefficients", Workspace, F32, &[tokens])?;
    list.add("batch.log_probs", Workspace, F32, &[tokens])?;
    list.add("batch.adapters", Workspace, U32, &[tokens])?;
    list.add("step.loss", Workspace, F64, &[1])?;
    list.add("step.norm", Workspace, F64, &[1])?;
    list.add("step.optimizer", Workspace, F32, &[4])?;
    common_buffers(&mut list, shape, request.max_row_tokens, request.threads)?;

    let totals = Totals::of(&list.buffers);
    Ok(TrainPlan {
        shape: shape.clone(),
        method: request.method.clone(),
        weights: request.weights,
        max_row_tokens: request.max_row_tokens,
        micro_batch_tokens: tokens,
        recompute,
        optimizer_state,
        threads: request.threads,
        buffers: list.buffers,
        totals,
    })
}

/// Gradients, moments and (where the weights are not f32) masters, each one flat range over all parameters.
fn optimizer_buffers(
    list: &mut List,
    shape: &ModelShape,
    request: &TrainRequest,
    state: OptimizerState,
) -> Result<(), PlanError> {
    let (mut trained, mut blocks) = (0usize, 0usize);
    for len in parameters(shape, &request.method)? {
        let too_large = || PlanError::TooLarge { what: "trained".to_owned() };
        trained = trained.checked_add(len).ok_or_else(too_large)?;
        blocks += len.div_ceil(MOMENT_BLOCK);
    }
    match request.method {
        TrainMethod::Lora(_) => list.add("trained", Optimizer, F32, &[trained])?,
        TrainMethod::Full if request.weights != Precision::F32 => {
            list.add("trained", Optimizer, F32, &[trained])?;
        }
        TrainMethod::Full => {}
    }
    list.add("gradients", Gradients, F32, &[trained])?;
    if shape.tie_embeddings && request.method == TrainMethod::Full {
        // A tied table has a sum over lookups and one over logits. Apart, each runs in the order of rows, so that
        // micro-batches add up to the bits of one large batch.
        list.add("gradients.lookup", Gradients, F32, &[shape.vocab, shape.hidden])?;
    }
    list.add("step.partials", Workspace, F64, &[trained.div_ceil(NORM_CHUNK)])?;
    for moment in ["moment1", "moment2"] {
        match state {
            OptimizerState::F32 => list.add(moment, Optimizer, F32, &[trained])?,
            OptimizerState::Int8 => {
                list.add(moment, Optimizer, U8, &[trained])?;
                list.add(format!("{moment}.scales"), Optimizer, F32, &[blocks])?;
            }
        }
    }
    Ok(())
}

/// Elements of each tensor that is trained.
fn parameters(shape: &ModelShape, method: &TrainMethod) -> Result<Vec<usize>, PlanError> {
    match method {
        TrainMethod::Full => shape.tensors().iter().map(Tensor::elements).collect(),
        TrainMethod::Lora(lora) => {
            // Checked for all together; then none of them wraps.
            lora.elements(shape)?;
            let pair = |target| {
                let (outputs, inputs) = shape.linear(target);
                [inputs * lora.rank, outputs * lora.rank]
            };
            let layer: Vec<usize> = lora.targets.iter().copied().flat_map(pair).collect();
            Ok(layer.repeat(shape.layers))
        }
    }
}

/// The model's weights under their Hugging Face names.
pub(crate) fn weight_buffers(
    list: &mut List,
    shape: &ModelShape,
    precision: Precision,
) -> Result<(), PlanError> {
    for tensor in shape.tensors() {
        let (element, len) = precision.storage(&tensor)?;
        list.add(tensor.name, Weights, element, &[len])?;
    }
    Ok(())
}

/// What one block computes that its backward pass needs again.
pub(crate) fn block_buffers(
    list: &mut List,
    shape: &ModelShape,
    slot: usize,
    tokens: usize,
    category: Category,
) -> Result<(), PlanError> {
    for (name, width) in [
        ("inv1", 1),
        ("q", shape.q_dim()),
        ("k", shape.kv_dim()),
        ("v", shape.kv_dim()),
        ("attention", shape.q_dim()),
        ("h", shape.hidden),
        ("inv2", 1),
        ("gate", shape.intermediate),
        ("up", shape.intermediate),
    ] {
        list.add(format!("block.{slot}.{name}"), category, F32, &[tokens, width])?;
    }
    Ok(())
}

/// What the forward pass overwrites block by block.
pub(crate) fn forward_workspace(list: &mut List, shape: &ModelShape, tokens: usize) -> Result<(), PlanError> {
    list.add("n", Workspace, F32, &[tokens, shape.hidden])?;
    list.add("act", Workspace, F32, &[tokens, shape.intermediate])
}

/// Rotary tables, each thread's scratch and what they share.
pub(crate) fn common_buffers(
    list: &mut List,
    shape: &ModelShape,
    context: usize,
    threads: usize,
) -> Result<(), PlanError> {
    list.add("rope", Weights, F32, &[context, shape.head_dim])?;
    let each = thread_scratch(shape.heads / shape.kv_heads, shape.head_dim);
    list.add("threads", Workspace, F32, &[threads * each + PRODUCT_PANEL])
}

/// Keys that attention looks at together.
pub const ATTENTION_KEYS: usize = 256;

/// Queries of one key head that attention looks at together, where they are at least one row's.
pub const ATTENTION_QUERIES: usize = 64;

/// As [`ATTENTION_QUERIES`], where tiles multiply: keys and values are packed once for all of them.
pub const ATTENTION_TILE_QUERIES: usize = 256;

/// Elements of a thread's scratch for blocks of a product.
pub const PRODUCT_SCRATCH: usize = 1 << 16;

/// Elements of scratch that all threads share, after their own: rows that they multiply with weights in tiles, packed.
pub const PRODUCT_PANEL: usize = 1 << 18;

/// Elements of scratch per thread for a model in which `group` query heads of this width share a key head: blocks of a product,
/// or of attention (for each query two chunks of scores, four vectors, and some numbers; and a chunk of keys), or of attention on
/// tiles (for each query a vector, one of half the size and some numbers, a chunk of both keys and values in half the size, and
/// one and a half of scores of two tiles).
pub fn thread_scratch(group: usize, head_dim: usize) -> usize {
    let vectors = ATTENTION_QUERIES.max(group) * (2 * ATTENTION_KEYS + 4 * head_dim + 4);
    let vectors = vectors + ATTENTION_KEYS * head_dim;
    let (queries, width) = (ATTENTION_TILE_QUERIES.max(group), head_dim.next_multiple_of(32));
    let queries = queries.next_multiple_of(32);
    let tiles = queries * (width * 3 / 2 + 4) + ATTENTION_KEYS * (width + 48);
    // A thread's part begins where a cache line does.
    PRODUCT_SCRATCH.max(vectors).max(tiles).next_multiple_of(16)
}

/// Rows of logits held at a time: the full matrix of a long batch over a large vocabulary never exists. As tiles sum rows, 32 of them.
pub fn loss_chunk(shape: &ModelShape, tokens: usize) -> usize {
    ((1usize << 25) / shape.vocab).next_multiple_of(32).clamp(32, 512).min(tokens)
}
