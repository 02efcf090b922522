//! A block's backward pass. What is cheap to compute (norms, the gate) is computed again instead of kept.
//! Frozen weights get no gradient: no product is spent on them.

use lathe_plan::{ModelShape, Target};

use super::{Batch, Block, Kept, Planned};
use crate::Result;
use crate::device::{Activation, Buf, Device, Element, Op, Start};

/// Where a linear layer's gradients go; `None` for what is frozen.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LinearGradients {
    pub w: Option<Buf>,
    pub bias: Option<Buf>,
    pub a: Option<Buf>,
    pub b: Option<Buf>,
}

/// Where a block's gradients go.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LayerGradients {
    pub attention_norm: Option<Buf>,
    pub mlp_norm: Option<Buf>,
    /// In the order of [`Target::ALL`].
    pub linears: [LinearGradients; 7],
}

/// Gradients of activations, overwritten block by block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gradients {
    /// `[T, H]`: of the residual stream; each block changes it from its output's to its input's.
    pub x: Buf,
    /// `[T, H]`
    pub n: Buf,
    /// `[T, Q]`
    pub q: Buf,
    /// `[T, K]`
    pub k: Buf,
    /// `[T, K]`
    pub v: Buf,
    /// `[T, Q]`
    pub attention: Buf,
    /// `[T, I]`
    pub gate: Buf,
    /// `[T, I]`
    pub up: Buf,
    /// `[T, I]`
    pub act: Buf,
    /// `[T, rank]`
    pub mid: Option<Buf>,
}

impl Gradients {
    pub(crate) fn of(planned: &Planned) -> Result<Gradients> {
        Ok(Gradients {
            x: planned.get("d.x")?,
            n: planned.get("d.n")?,
            q: planned.get("d.q")?,
            k: planned.get("d.k")?,
            v: planned.get("d.v")?,
            attention: planned.get("d.attention")?,
            gate: planned.get("d.gate")?,
            up: planned.get("d.up")?,
            act: planned.get("d.act")?,
            mid: planned.find("d.mid"),
        })
    }

    /// The part that `rows` rows take.
    pub(crate) fn first(&self, rows: usize, shape: &ModelShape) -> Gradients {
        let first = |buf: Buf, width: usize| buf.first(rows * width);
        Gradients {
            x: first(self.x, shape.hidden),
            n: first(self.n, shape.hidden),
            q: first(self.q, shape.q_dim()),
            k: first(self.k, shape.kv_dim()),
            v: first(self.v, shape.kv_dim()),
            attention: first(self.attention, shape.q_dim()),
            gate: first(self.gate, shape.intermediate),
            up: first(self.up, shape.intermediate),
            act: first(self.act, shape.intermediate),
            mid: self.mid,
        }
    }
}

impl Block<'_> {
    /// Turns `d.x` from the gradient of the block's output into that of its input `x`, and adds to `to`.
    pub(crate) fn backward(
        &self,
        dev: &mut dyn Device,
        x: Buf,
        kept: &Kept,
        d: &Gradients,
        to: &LayerGradients,
    ) {
        let (shape, rows) = (self.shape, self.batch.rows);
        let (kept, d) = (&kept.first(rows, shape), &d.first(rows, shape));
        let x = x.first(rows * shape.hidden);
        let act = self.work.act.first(rows * shape.intermediate);
        let (gate, up) = (kept.gate, kept.up);

        // x' = h + act Wd'
        dev.enqueue(Op::Glu { activation: Activation::Silu, gate, up, out: act });
        self.linear_backward(dev, Target::Down, act, d.x, d.act, false, kept, d, to);
        dev.enqueue(Op::GluGrad {
            activation: Activation::Silu,
            gate,
            up,
            dout: d.act,
            dgate: d.gate,
            dup: d.up,
        });
        // n = norm(h)
        let n = self.norm(dev, kept.h, self.weights.mlp_norm, kept.inv2);
        self.linear_backward(dev, Target::Gate, n, d.gate, d.n, false, kept, d, to);
        self.linear_backward(dev, Target::Up, n, d.up, d.n, true, kept, d, to);
        dev.enqueue(Op::AllReduce { x: d.n });
        self.norm_backward(dev, kept.h, self.weights.mlp_norm, kept.inv2, d, to.mlp_norm);

        // h = x + attention Wo'
        self.linear_backward(dev, Target::O, kept.attention, d.x, d.attention, false, kept, d, to);
        let forward = self.attention(kept, None);
        dev.enqueue(Op::AttentionGrad { forward, dout: d.attention, dq: d.q, dk: d.k, dv: d.v });
        self.rope(dev, d.q, shape.heads, true);
        self.rope(dev, d.k, shape.kv_heads, true);
        // n = norm(x)
        let n = self.norm(dev, x, self.weights.attention_norm, kept.inv1);
        self.linear_backward(dev, Target::Q, n, d.q, d.n, false, kept, d, to);
        self.linear_backward(dev, Target::K, n, d.k, d.n, true, kept, d, to);
        self.linear_backward(dev, Target::V, n, d.v, d.n, true, kept, d, to);
        dev.enqueue(Op::AllReduce { x: d.n });
        self.norm_backward(dev, x, self.weights.attention_norm, kept.inv1, d, to.attention_norm);
    }

    /// `d.x += ` the gradient through the norm of `d.n`.
    fn norm_backward(
        &self,
        dev: &mut dyn Device,
        x: Buf,
        weight: Buf,
        inv: Buf,
        d: &Gradients,
        dweight: Option<Buf>,
    ) {
        let (rows, width) = (self.batch.rows, self.shape.hidden);
        dev.enqueue(Op::RmsNormGrad { x, weight, inv, dout: d.n, dx: d.x, dweight, rows, width });
    }

    /// `dx = (dx or 0) + dy W (+ adapter)`; adds to the gradients of what is trained.
    #[allow(clippy::too_many_arguments)] // All of the formula's names.
    fn linear_backward(
        &self,
        dev: &mut dyn Device,
        target: Target,
        x: Buf,
        dy: Buf,
        dx: Buf,
        keep: bool,
        kept: &Kept,
        d: &Gradients,
        to: &LayerGradients,
    ) {
        let linear = &self.weights.linears[target as usize];
        let (rows, outputs, inputs) = (self.batch.rows, linear.outputs, linear.inputs);
        let to = &to.linears[target as usize];
        if let Some(dw) = to.w {
            let positions = rounded(linear.w, self.batch.positions);
            dev.enqueue(Op::LinearWeightGrad { x, dy, dw, rows, outputs, inputs, positions });
        }
        if let Some(sum) = to.bias {
            dev.enqueue(Op::ColumnSum { x: dy, sum, rows, width: outputs });
        }
        dev.enqueue(Op::LinearInputGrad { dy, w: linear.w, dx, rows, outputs, inputs, keep });

        let slots = &self.lora.slots[target as usize];
        let (Some([slot]), Some(mid), Some(dmid)) = (slots.as_deref(), kept.mid[target as usize], d.mid)
        else {
            return;
        };
        // y += mid B', mid = scale dropout(x) A'
        let rank = slot.rank;
        let (mid, dmid) = (mid.first(rows * rank), dmid.first(rows * rank));
        if let Some(dw) = to.b {
            let (outputs, inputs, positions) = (rank, outputs, None);
            dev.enqueue(Op::LinearWeightGrad { x: dy, dy: mid, dw, rows, outputs, inputs, positions });
        }
        // The slot holds B^T [rank, outputs].
        let (w, start) = (slot.b, Start::Zero);
        dev.enqueue(Op::Linear { x: dy, w, y: dmid, rows, outputs: rank, inputs: outputs, start });
        dev.enqueue(Op::Scale { x: dmid, by: slot.scale });
        if let Some(dw) = to.a {
            let x = self.dropped(dev, target, x);
            let (dy, outputs, positions) = (dmid, rank, None);
            dev.enqueue(Op::LinearWeightGrad { x, dy, dw, rows, outputs, inputs, positions });
        }
        let through =
            |dx, keep| Op::LinearInputGrad { dy: dmid, w: slot.a, dx, rows, outputs: rank, inputs, keep };
        match self.work.dropout {
            None => dev.enqueue(through(dx, true)),
            Some(dropout) => {
                let masked = dropout.dropped.first(rows * inputs);
                dev.enqueue(through(masked, false));
                self.dropout(dev, target, masked, dx, true);
            }
        }
    }
}

/// The places by which the gradient of `w` is summed: that of weights that are held in less than f32 may be rounded as they are.
pub(super) fn rounded(w: Buf, positions: Buf) -> Option<Buf> {
    (w.element() != Element::F32).then_some(positions)
}

/// Adds the gradient of the token vectors.
pub(crate) fn embedding_gradient(
    dev: &mut dyn Device,
    shape: &ModelShape,
    batch: &Batch,
    d: &Gradients,
    to: Buf,
) {
    let Batch { rows, tokens, .. } = *batch;
    let (vocab, width) = (shape.vocab, shape.hidden);
    dev.enqueue(Op::EmbedGrad { d: d.x.first(rows * width), tokens, dtable: to, rows, vocab, width });
}
