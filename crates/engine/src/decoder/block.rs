//! A block's forward pass:
//!
//! ```text
//! n = norm(x)      q, k, v = n Wq', n Wk', n Wv' (+ bias)      q, k = rope(q), rope(k)
//! h = x + attention(q, k, v) Wo'
//! n = norm(h)      x' = h + (silu(n Wg') * (n Wu')) Wd'
//! ```
//!
//! Each linear layer may have adapters: `y += scale dropout(x) A' B'`.

use lathe_plan::{ModelShape, Target};

use super::{Batch, Kept, LayerCache, LayerLora, LayerWeights, Work};
use crate::device::{Activation, Attention, Buf, Device, Element, Op, Start};

/// A block with everything it works on.
pub(crate) struct Block<'a> {
    pub shape: &'a ModelShape,
    pub layer: usize,
    pub weights: &'a LayerWeights,
    pub lora: &'a LayerLora,
    pub batch: &'a Batch,
    pub work: &'a Work,
}

impl Block<'_> {
    /// From `x [T, H]` to `out [T, H]`, which may be `x`. Fills `kept`; with a cache, keys and values go there and
    /// attention reads them from there, without one it reads the batch's own.
    pub(crate) fn forward(
        &self,
        dev: &mut dyn Device,
        x: Buf,
        out: Buf,
        kept: &Kept,
        cache: Option<LayerCache>,
    ) {
        let (shape, rows) = (self.shape, self.batch.rows);
        let kept = &kept.first(rows, shape);
        let (x, out) = (x.first(rows * shape.hidden), out.first(rows * shape.hidden));
        let act = self.work.act.first(rows * shape.intermediate);

        let n = self.norm(dev, x, self.weights.attention_norm, kept.inv1);
        for (target, y) in [(Target::Q, kept.q), (Target::K, kept.k), (Target::V, kept.v)] {
            self.linear(dev, target, n, y, Start::Zero, kept);
        }
        self.rope(dev, kept.q, shape.heads, false);
        self.rope(dev, kept.k, shape.kv_heads, false);
        if let (Some(LayerCache { k, v }), Some(slots)) = (cache, self.batch.slots) {
            let width = shape.kv_dim();
            dev.enqueue(Op::StoreRows { x: kept.k, slots, cache: k, rows, width });
            dev.enqueue(Op::StoreRows { x: kept.v, slots, cache: v, rows, width });
        }
        dev.enqueue(Op::Attention(self.attention(kept, cache)));
        self.linear(dev, Target::O, kept.attention, kept.h, Start::Copy(x), kept);
        dev.enqueue(Op::AllReduce { x: kept.h });

        let n = self.norm(dev, kept.h, self.weights.mlp_norm, kept.inv2);
        self.gated(dev, n, act, kept);
        self.linear(dev, Target::Down, act, out, Start::Copy(kept.h), kept);
        dev.enqueue(Op::AllReduce { x: out });
    }

    /// `act = silu(n Wg') * (n Wu')`. Training needs both products again; an adapter adds to them.
    fn gated(&self, dev: &mut dyn Device, n: Buf, act: Buf, kept: &Kept) {
        let (activation, y) = (Activation::Silu, [kept.gate, kept.up]);
        let both = [Target::Gate, Target::Up];
        let slots = |target: Target| self.lora.slots[target as usize].iter().flat_map(|slots| slots.iter());
        let adapted = |target| slots(target).any(|slot| slot.rank > 0);
        if kept.lse.is_some() || both.into_iter().any(adapted) {
            self.linear(dev, Target::Gate, n, kept.gate, Start::Zero, kept);
            self.linear(dev, Target::Up, n, kept.up, Start::Zero, kept);
            return dev.enqueue(Op::Glu { activation, gate: kept.gate, up: kept.up, out: act });
        }
        let [gate, up] = both.map(|target| &self.weights.linears[target as usize]);
        let (rows, outputs, inputs) = (self.batch.rows, gate.outputs, gate.inputs);
        dev.enqueue(Op::LinearGlu {
            activation,
            x: n,
            w: [gate.w, up.w],
            y,
            out: act,
            rows,
            outputs,
            inputs,
        });
    }

    /// `work.n = norm(x)`.
    pub(super) fn norm(&self, dev: &mut dyn Device, x: Buf, weight: Buf, inv: Buf) -> Buf {
        let (rows, width) = (self.batch.rows, self.shape.hidden);
        let out = self.work.n.first(rows * width);
        dev.enqueue(Op::RmsNorm { x, weight, out, inv, rows, width, eps: self.shape.rms_eps as f32 });
        out
    }

    pub(super) fn rope(&self, dev: &mut dyn Device, x: Buf, heads: usize, back: bool) {
        let Batch { rows, positions, .. } = *self.batch;
        dev.enqueue(Op::Rope {
            x,
            table: self.work.rope,
            positions,
            rows,
            heads,
            head_dim: self.shape.head_dim,
            back,
        });
    }

    pub(super) fn attention(&self, kept: &Kept, cache: Option<LayerCache>) -> Attention {
        let (k, v) = cache.map_or((kept.k, kept.v), |cache| (cache.k, cache.v));
        Attention {
            q: kept.q,
            k,
            v,
            out: kept.attention,
            lse: kept.lse,
            starts: self.batch.starts,
            positions: self.batch.positions,
            tables: self.batch.tables,
            table_starts: self.batch.table_starts,
            sequences: self.batch.sequences,
            rows: self.batch.rows,
            heads: self.shape.heads,
            kv_heads: self.shape.kv_heads,
            head_dim: self.shape.head_dim,
            scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
            soft_cap: None,
            window: self.shape.sliding_window,
            bf16: self.weights.linears[Target::Q as usize].w.element() != Element::F32,
        }
    }

    /// `y = start + x W' (+ bias) (+ scale dropout(x) A' B')`.
    fn linear(&self, dev: &mut dyn Device, target: Target, x: Buf, y: Buf, start: Start, kept: &Kept) {
        let linear = &self.weights.linears[target as usize];
        let (rows, outputs, inputs) = (self.batch.rows, linear.outputs, linear.inputs);
        let start = linear.bias.map_or(start, Start::Bias);
        dev.enqueue(Op::Linear { x, w: linear.w, y, rows, outputs, inputs, start });
        let (Some(slots), Some(mid)) = (&self.lora.slots[target as usize], kept.mid[target as usize]) else {
            return;
        };
        let (adapters, stride) = (self.batch.adapters, self.lora.stride);
        let mid = mid.first(rows * stride);
        let x = self.dropped(dev, target, x);
        dev.enqueue(Op::LoraDown { x, mid, adapters, slots: slots.clone(), rows, inputs, stride });
        dev.enqueue(Op::LoraUp { mid, y, adapters, slots: slots.clone(), rows, outputs, stride });
    }

    /// `dropout(x)` for the adapter of this target: the same in every pass over the same rows.
    pub(super) fn dropped(&self, dev: &mut dyn Device, target: Target, x: Buf) -> Buf {
        let Some(dropout) = self.work.dropout else { return x };
        let y = dropout.dropped.first(x.len());
        self.dropout(dev, target, x, y, false);
        y
    }

    /// `y = dropout(x)`, or `y += dropout(x)`: also its own gradient, since the mask is the same.
    pub(super) fn dropout(&self, dev: &mut dyn Device, target: Target, x: Buf, y: Buf, keep: bool) {
        let Batch { starts, positions, sequences, seeds, .. } = *self.batch;
        let (Some(dropout), Some(seeds)) = (self.work.dropout, seeds) else { return };
        let width = self.weights.linears[target as usize].inputs;
        let salt = (self.layer * Target::ALL.len() + target as usize) as u64;
        let rate = dropout.rate;
        dev.enqueue(Op::Dropout { x, y, seeds, starts, positions, sequences, width, salt, rate, keep });
    }
}
