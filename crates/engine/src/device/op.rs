//! The closed list of operations.

use std::ops::Range;
use std::sync::Arc;

use super::Buf;

/// What a product's result begins with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Start {
    /// Zeros.
    Zero,
    /// What the result holds already.
    Keep,
    /// A bias, the same for each row.
    Bias(Buf),
    /// Another `[rows, outputs]` buffer (the residual stream).
    Copy(Buf),
}

/// In a row's adapter number: the row has none.
pub const NO_ADAPTER: u32 = u32::MAX;

/// What a gate goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2` (Hendrycks and Gimpel, "Gaussian error linear units").
    GeluTanh,
}

/// One resident adapter's part for one linear layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraSlot {
    /// `A [rank, inputs]`, f32.
    pub a: Buf,
    /// `B^T [rank, outputs]`, f32: so that both products with it, and their gradients, read rows.
    pub b: Buf,
    /// Inner width; 0 where the adapter does not change this layer.
    pub rank: usize,
    /// Factor before `B A x`.
    pub scale: f32,
}

/// One operation. All matrices are row-major, weights `[outputs, inputs]` as files hold them.
///
/// Buffers of one operation do not overlap, except where one is said to be changed in place.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // Each variant's comment names its fields by their formula.
pub enum Op {
    /// `x[..] = 0`.
    Zero { x: Buf },
    /// `x[..] *= by`.
    Scale { x: Buf, by: f32 },
    /// `to[..] += from[..]`.
    Add { from: Buf, to: Buf },
    /// `to[..] = from[..]`.
    Copy { from: Buf, to: Buf },

    /// Rows `first..first + rows` of `to [outputs, inputs]`, of 8 or 4 bits ([`Element::quantized_bytes`]), become
    /// `from [rows, inputs]`.
    Quantize { from: Buf, to: Buf, first: usize, rows: usize, outputs: usize, inputs: usize },

    /// `y[rows, outputs] = start + x[rows, inputs] w^T`. Where `w` has 8 or 4 bits, `x` is rounded to 8.
    Linear { x: Buf, w: Buf, y: Buf, rows: usize, outputs: usize, inputs: usize, start: Start },
    /// `dx[rows, inputs] = (dx or 0) + dy[rows, outputs] w`.
    LinearInputGrad { dy: Buf, w: Buf, dx: Buf, rows: usize, outputs: usize, inputs: usize, keep: bool },
    /// `dw[outputs, inputs] += dy[rows, outputs]^T x[rows, inputs]`, in the order of rows. With `positions`, each row's place in
    /// its sequence, a level that has tiles rounds what it multiplies to bf16 and sums rows as [`summed_together`] says.
    LinearWeightGrad {
        x: Buf,
        dy: Buf,
        dw: Buf,
        rows: usize,
        outputs: usize,
        inputs: usize,
        positions: Option<Buf>,
    },
    /// `sum[width] += sum over rows of x[rows, width]`, the gradient of a bias.
    ColumnSum { x: Buf, sum: Buf, rows: usize, width: usize },

    /// `mid[rows, rank] = scale * x[rows, inputs] a^T` with each row's adapter; rows of `mid` are `stride` apart.
    LoraDown {
        x: Buf,
        mid: Buf,
        adapters: Buf,
        slots: Arc<[LoraSlot]>,
        rows: usize,
        inputs: usize,
        stride: usize,
    },
    /// `y[rows, outputs] += mid[rows, rank] b` (`b` is `B^T`) with each row's adapter.
    LoraUp {
        mid: Buf,
        y: Buf,
        adapters: Buf,
        slots: Arc<[LoraSlot]>,
        rows: usize,
        outputs: usize,
        stride: usize,
    },
    /// `y = x * mask / (1 - rate)` (or `y += ...` where `keep`). The mask of an element depends on its sequence's
    /// seed, `salt`, its position and its column alone. Sequence `s` has the rows `starts[s]..starts[s + 1]`.
    Dropout {
        x: Buf,
        y: Buf,
        seeds: Buf,
        starts: Buf,
        positions: Buf,
        sequences: usize,
        width: usize,
        salt: u64,
        rate: f32,
        keep: bool,
    },

    /// `out[i] = table[tokens[i]]`.
    Embed { table: Buf, tokens: Buf, out: Buf, rows: usize, vocab: usize, width: usize },
    /// `dtable[tokens[i]] += d[i]`, in the order of rows.
    EmbedGrad { d: Buf, tokens: Buf, dtable: Buf, rows: usize, vocab: usize, width: usize },
    /// `out[i] = x[rows[i]]`.
    Gather { x: Buf, rows: Buf, out: Buf, count: usize, width: usize },
    /// `x[rows[i]] = from[i]`; the rows differ from each other.
    Scatter { from: Buf, rows: Buf, x: Buf, count: usize, width: usize },

    /// `inv[i] = 1 / sqrt(mean(x[i]^2) + eps)`, `out[i] = x[i] * inv[i] * weight`.
    RmsNorm { x: Buf, weight: Buf, out: Buf, inv: Buf, rows: usize, width: usize, eps: f32 },
    /// `dx += d/dx`, `dweight += d/dweight` of [`Op::RmsNorm`] for the gradient `dout`.
    RmsNormGrad {
        x: Buf,
        weight: Buf,
        inv: Buf,
        dout: Buf,
        dx: Buf,
        dweight: Option<Buf>,
        rows: usize,
        width: usize,
    },
    /// Turns the pairs `(j, j + head_dim / 2)` of each head in place by the angles of the row's position;
    /// `table[position]` is `cos` then `sin`. `back` turns the other way (the gradient).
    Rope { x: Buf, table: Buf, positions: Buf, rows: usize, heads: usize, head_dim: usize, back: bool },
    /// `out = activation(gate) * up` (Shazeer, "GLU variants improve transformer").
    Glu { activation: Activation, gate: Buf, up: Buf, out: Buf },
    /// `out[rows, outputs] = activation(x[rows, inputs] w[0]^T) * (x w[1]^T)`: [`Op::Linear`] twice and [`Op::Glu`], with their
    /// bits. `y` is room for both products; what is there afterwards is not said.
    LinearGlu {
        activation: Activation,
        x: Buf,
        w: [Buf; 2],
        y: [Buf; 2],
        out: Buf,
        rows: usize,
        outputs: usize,
        inputs: usize,
    },
    /// `dgate`, `dup` of [`Op::Glu`] for the gradient `dout`.
    GluGrad { activation: Activation, gate: Buf, up: Buf, dout: Buf, dgate: Buf, dup: Buf },

    /// `cache[slots[i]] = x[i]`, for keys and for values.
    StoreRows { x: Buf, slots: Buf, cache: Buf, rows: usize, width: usize },
    /// Causal attention of a ragged batch, see [`Attention`].
    Attention(Attention),
    /// `dq`, `dk`, `dv` of [`Op::Attention`] for the gradient `dout`, where keys and values are the batch's own
    /// rows (training). `lse` is the forward pass's.
    AttentionGrad { forward: Attention, dout: Buf, dq: Buf, dk: Buf, dv: Buf },

    /// Per row of `logits[rows, vocab]`: `stats = (max, sum of exp(x - max), the target's logit)`. With a split
    /// vocabulary this shard begins at `first`, a target outside it counts 0, and shards are merged by an
    /// all-reduce of `stats`.
    LogitStats { logits: Buf, targets: Buf, stats: Buf, rows: usize, vocab: usize, first: usize },
    /// `sums[i, c]` = the sum of `exp((logits[i, j] - stats[i].max) / temperatures[i])` over the `c`th [`SAMPLE_CHUNK`] of the
    /// vocabulary; zeros where the temperature is 0 or below the normal range.
    SampleSums { logits: Buf, stats: Buf, temperatures: Buf, sums: Buf, rows: usize, vocab: usize },
    /// `log_probs[i]` from `stats[i]`.
    LogProbs { stats: Buf, log_probs: Buf, rows: usize },
    /// In place: `logits` becomes the gradient of `-sum coefficients[i] * log_probs[i]` by the logits.
    LogitGrad {
        logits: Buf,
        targets: Buf,
        stats: Buf,
        coefficients: Buf,
        rows: usize,
        vocab: usize,
        first: usize,
    },
    /// `loss -= sum coefficients[i] * log_probs[i]`, in f64, in the order of rows.
    SumLoss { log_probs: Buf, coefficients: Buf, loss: Buf, rows: usize },

    /// `norm = sum of gradients^2` in f64; `partials` holds one sum per [`NORM_CHUNK`] elements.
    SquaredNorm { gradients: Buf, partials: Buf, norm: Buf },
    /// AdamW on one parameter, for a finite `norm` (the squared gradient norm) and `loss` alone.
    /// `settings` = (learning rate, 1 / (1 - beta1^t), 1 / (1 - beta2^t), largest norm or infinity).
    /// `copy` receives the new weights in bf16.
    AdamW {
        weights: Buf,
        copy: Option<Buf>,
        gradients: Buf,
        moments: Moments,
        settings: Buf,
        norm: Buf,
        loss: Buf,
        beta1: f32,
        beta2: f32,
        epsilon: f32,
        decay: f32,
    },

    /// Sums `x` over the devices that share a model; nothing on one device.
    AllReduce { x: Buf },
}

/// AdamW's moments of one parameter, the first and the second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Moments {
    /// f32, as many as there are weights.
    F32([Buf; 2]),
    /// The dynamic code of 8 bits of each, signed for the first moment, and a scale (f32) for each block of
    /// [`MOMENT_BLOCK`]. All zero is a state of zeros.
    Int8 {
        /// As many as there are weights.
        codes: [Buf; 2],
        /// The last block may be shorter.
        scales: [Buf; 2],
    },
}

pub use lathe_plan::SAMPLE_CHUNK;

/// Moments that share a scale; blocks are counted from a parameter's beginning, so that no other parameter's numbers
/// have a part in them.
pub use lathe_plan::MOMENT_BLOCK;

/// Elements per partial sum of [`Op::SquaredNorm`], so that the sum's order does not depend on threads.
pub use lathe_plan::NORM_CHUNK;

/// `out[i, h] = softmax(cap(scale * q[i, h] . K)) V` over the keys that row `i` sees of its sequence, with `cap(s) =
/// soft_cap * tanh(s / soft_cap)` where there is a soft cap: see [`Attention::seen`]. Sequence `s` has the rows `starts[s]..starts[s + 1]`; its position `p` lies in row
/// `tables[table_starts[s] + p / 16] + p % 16` of `k` and `v`. `lse[i, h]`, where given, receives the logarithm of
/// the softmax's denominator. With `bf16` a level that has tiles rounds what it multiplies (queries, keys, weights, values).
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)] // The formula names the fields.
pub struct Attention {
    pub q: Buf,
    pub k: Buf,
    pub v: Buf,
    pub out: Buf,
    pub lse: Option<Buf>,
    pub starts: Buf,
    pub positions: Buf,
    pub tables: Buf,
    pub table_starts: Buf,
    pub sequences: usize,
    pub rows: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub soft_cap: Option<f32>,
    /// How many keys, its own last, a query sees; `None`: all up to its own.
    pub window: Option<usize>,
    /// Whether the model is held in less than f32.
    pub bf16: bool,
}

impl Attention {
    /// The positions whose keys a query at `position` sees.
    pub fn seen(&self, position: usize) -> Range<usize> {
        let end = position + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// Rows of one tile product.
const SUMMED: u32 = 32;

/// The rows that tiles sum before they add them to a weight's gradient: up to 32 of one sequence, counted from its position 0. So
/// sequences add up to the same bits in one batch as in several, and so do parts of them that are cut between such rows.
pub(crate) fn summed_together(positions: &[u32]) -> impl Iterator<Item = Range<usize>> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let first = next;
        next += usize::from(first < positions.len());
        while next < positions.len()
            && positions[next] == positions[next - 1] + 1
            && !positions[next].is_multiple_of(SUMMED)
        {
            next += 1;
        }
        (next > first).then_some(first..next)
    })
}

#[cfg(test)]
mod tests {
    use super::summed_together;

    #[test]
    fn rows_of_one_sequence_are_summed_by_32() {
        let positions: Vec<u32> = (0..70).chain(0..1).chain(0..32).chain(32..40).chain(0..2).collect();
        let found: Vec<_> = summed_together(&positions).collect();
        assert_eq!(found, [0..32, 32..64, 64..70, 70..71, 71..103, 103..111, 111..113]);
        assert_eq!(summed_together(&[]).count(), 0);
    }
}
