//! From the last block's output to log-probabilities, loss and gradient; or to logits for sampling.
//!
//! Only rows that count get logits, and those a chunk at a time, so the full `[T, vocab]` matrix never exists.

use std::ops::Range;

use lathe_plan::ModelShape;

use super::{Gradients, Planned, Weights, backward::rounded};
use crate::Result;
use crate::device::{Buf, Device, Op, Start, summed_together};

/// The buffers of the loss.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LossHead {
    /// `[T]`
    inv: Buf,
    /// `[C, H]`: the chunk's rows.
    rows: Buf,
    /// `[C, H]`
    d_rows: Buf,
    /// `[C, vocab]`: logits, then their gradient.
    logits: Buf,
    /// `[C, 3]`
    stats: Buf,
    /// `[T]`: which rows count.
    pub chosen: Buf,
    /// `[T]`: each chosen row's place among those of its sequence.
    pub places: Buf,
    /// `[T]`: the token that each chosen row should predict.
    pub targets: Buf,
    /// `[T]`: each chosen row's weight over the sum of weights.
    pub coefficients: Buf,
    /// `[T]`: of each chosen row's target.
    pub log_probs: Buf,
    /// `[1]`
    pub loss: Buf,
    /// Rows of a chunk.
    chunk: usize,
}

impl LossHead {
    pub(crate) fn of(planned: &Planned, shape: &ModelShape) -> Result<LossHead> {
        let rows = planned.get("head.rows")?;
        Ok(LossHead {
            inv: planned.get("head.inv")?,
            rows,
            d_rows: planned.get("head.d_rows")?,
            logits: planned.get("head.logits")?,
            stats: planned.get("head.stats")?,
            chosen: planned.get("batch.rows")?,
            places: planned.get("batch.places")?,
            targets: planned.get("batch.targets")?,
            coefficients: planned.get("batch.coefficients")?,
            log_probs: planned.get("batch.log_probs")?,
            loss: planned.get("step.loss")?,
            chunk: rows.len() / shape.hidden,
        })
    }

    /// Log-probabilities of `count` chosen rows of `x [T, H]`, without gradient. `n [T, H]` is overwritten.
    pub(crate) fn log_probs(
        &self,
        dev: &mut dyn Device,
        shape: &ModelShape,
        weights: &Weights,
        (x, n, rows): (Buf, Buf, usize),
        count: usize,
    ) {
        self.norm(dev, shape, weights, x, n, rows);
        for start in (0..count).step_by(self.chunk) {
            self.chunk_log_probs(dev, shape, weights, n, start, self.chunk.min(count - start));
        }
    }

    /// Log-probabilities, the weighted loss (added to `loss`) and its gradient: `d.x` becomes that of `x`, and
    /// `dhead`, `dnorm` are added to. `places` are what [`LossHead::places`] holds.
    #[allow(clippy::too_many_arguments)] // All of the formula's names.
    pub(crate) fn backward(
        &self,
        dev: &mut dyn Device,
        shape: &ModelShape,
        weights: &Weights,
        (x, n, rows): (Buf, Buf, usize),
        places: &[u32],
        d: &Gradients,
        dhead: Option<Buf>,
        dnorm: Option<Buf>,
    ) {
        let (vocab, width) = (shape.vocab, shape.hidden);
        let d = d.first(rows, shape);
        self.norm(dev, shape, weights, x, n, rows);
        dev.enqueue(Op::Zero { x: d.n });
        for some in chunks(places, self.chunk) {
            let (start, chunk) = (some.start, some.len());
            self.chunk_log_probs(dev, shape, weights, n, start, chunk);
            let (log_probs, coefficients) =
                (self.log_probs.part(start, chunk), self.coefficients.part(start, chunk));
            dev.enqueue(Op::SumLoss { log_probs, coefficients, loss: self.loss, rows: chunk });
            let (logits, stats) = (self.logits.first(chunk * vocab), self.stats.first(chunk * 3));
            let targets = self.targets.part(start, chunk);
            dev.enqueue(Op::LogitGrad { logits, targets, stats, coefficients, rows: chunk, vocab, first: 0 });
            let (dy, dx) = (logits, self.d_rows.first(chunk * width));
            let w = weights.head;
            dev.enqueue(Op::LinearInputGrad {
                dy,
                w,
                dx,
                rows: chunk,
                outputs: vocab,
                inputs: width,
                keep: false,
            });
            dev.enqueue(Op::AllReduce { x: dx });
            if let Some(dw) = dhead {
                let x = self.rows.first(chunk * width);
                let positions = rounded(w, self.places.part(start, chunk));
                let (rows, outputs, inputs) = (chunk, vocab, width);
                dev.enqueue(Op::LinearWeightGrad { x, dy, dw, rows, outputs, inputs, positions });
            }
            let rows = self.chosen.part(start, chunk);
            dev.enqueue(Op::Scatter { from: dx, rows, x: d.n, count: chunk, width });
        }
        dev.enqueue(Op::Zero { x: d.x });
        let (x, inv) = (x.first(rows * width), self.inv.first(rows));
        let (weight, dout, dx, dweight) = (weights.norm, d.n, d.x, dnorm);
        dev.enqueue(Op::RmsNormGrad { x, weight, inv, dout, dx, dweight, rows, width });
    }

    fn norm(&self, dev: &mut dyn Device, shape: &ModelShape, weights: &Weights, x: Buf, n: Buf, rows: usize) {
        let width = shape.hidden;
        let (x, out, inv) = (x.first(rows * width), n.first(rows * width), self.inv.first(rows));
        let eps = shape.rms_eps as f32;
        dev.enqueue(Op::RmsNorm { x, weight: weights.norm, out, inv, rows, width, eps });
    }

    fn chunk_log_probs(
        &self,
        dev: &mut dyn Device,
        shape: &ModelShape,
        weights: &Weights,
        n: Buf,
        start: usize,
        chunk: usize,
    ) {
        let (vocab, width) = (shape.vocab, shape.hidden);
        let x = self.rows.first(chunk * width);
        let (logits, stats) = (self.logits.first(chunk * vocab), self.stats.first(chunk * 3));
        let (chosen, targets) = (self.chosen.part(start, chunk), self.targets.part(start, chunk));
        dev.enqueue(Op::Gather { x: n, rows: chosen, out: x, count: chunk, width });
        let (w, y) = (weights.head, logits);
        dev.enqueue(Op::Linear { x, w, y, rows: chunk, outputs: vocab, inputs: width, start: Start::Zero });
        dev.enqueue(Op::LogitStats { logits, targets, stats, rows: chunk, vocab, first: 0 });
        dev.enqueue(Op::AllReduce { x: stats });
        dev.enqueue(Op::LogProbs { stats, log_probs: self.log_probs.part(start, chunk), rows: chunk });
    }
}

/// Chosen rows a chunk of at most so many at a time, cut where the sums of a weight's gradient are.
fn chunks(places: &[u32], most: usize) -> impl Iterator<Item = Range<usize>> {
    let mut steps = summed_together(places).peekable();
    std::iter::from_fn(move || {
        let Range { start, mut end } = steps.next()?;
        while let Some(next) = steps.next_if(|next| next.end - start <= most) {
            end = next.end;
        }
        Some(start..end)
    })
}

/// `n [count, H]`, the hidden states behind the final norm, of the rows `chosen [count]` of `x [T, H]`, through
/// `gathered [count, H]`.
#[allow(clippy::too_many_arguments)] // All of the formula's names.
pub(crate) fn last_states(
    dev: &mut dyn Device,
    shape: &ModelShape,
    weights: &Weights,
    x: Buf,
    chosen: Buf,
    gathered: Buf,
    inv: Buf,
    n: Buf,
) {
    let (count, width) = (chosen.len(), shape.hidden);
    let (gathered, n) = (gathered.first(count * width), n.first(count * width));
    dev.enqueue(Op::Gather { x, rows: chosen, out: gathered, count, width });
    let (weight, inv, eps) = (weights.norm, inv.first(count), shape.rms_eps as f32);
    dev.enqueue(Op::RmsNorm { x: gathered, weight, out: n, inv, rows: count, width, eps });
}

/// `logits [count, vocab]` of the first rows of `n`, see [`last_states`].
pub(crate) fn last_logits(
    dev: &mut dyn Device,
    shape: &ModelShape,
    weights: &Weights,
    n: Buf,
    count: usize,
    logits: Buf,
) {
    let (vocab, width) = (shape.vocab, shape.hidden);
    let (x, y) = (n.first(count * width), logits.first(count * vocab));
    let start = Start::Zero;
    dev.enqueue(Op::Linear { x, w: weights.head, y, rows: count, outputs: vocab, inputs: width, start });
}

#[cfg(test)]
mod tests {
    use super::chunks;

    #[test]
    fn chunks_are_cut_between_sums() {
        let places: Vec<u32> = (0..70).chain(0..33).chain(0..2).collect();
        assert_eq!(chunks(&places, 40).collect::<Vec<_>>(), [0..32, 32..70, 70..105]);
        assert!(chunks(&places, 512).eq(std::iter::once(0..105)));
        assert_eq!(chunks(&[], 40).count(), 0);
    }
}
