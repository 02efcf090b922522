//! From an operation to its kernel.

use super::gemm::{self, Begin, Extent};
use super::{Cpu, Element, attention, embed, glu, loss, norm, optimizer, pointwise};
use crate::device::Op;

/// Runs one operation to its end.
pub(super) fn run(cpu: &Cpu, op: Op) {
    match op {
        Op::Zero { x } => pointwise::zero(cpu, x),
        Op::Scale { x, by } => pointwise::scale(cpu, cpu.f32(x), by),
        Op::Add { from, to } => pointwise::add(cpu, cpu.f32(from), cpu.f32(to)),
        Op::Copy { from, to } => pointwise::copy(cpu, cpu.f32(from), cpu.f32(to)),
        Op::Linear { x, w, y, rows, outputs, inputs, start } => {
            let begin = Begin::of(cpu, start);
            let extent = Extent::dense(rows, outputs, inputs);
            gemm::linear(cpu, cpu.f32(x), cpu.matrix(w, outputs, inputs), cpu.f32(y), extent, begin);
        }
        Op::Quantize { from, to, first, rows, outputs, inputs } => {
            let (from, to) = (cpu.matrix(from, rows, inputs), gemm::Quantized::of(cpu, to, outputs, inputs));
            gemm::quantize(cpu, from, to, first, rows);
        }
        Op::LinearInputGrad { dy, w, dx, rows, outputs, inputs, keep } => {
            let begin = if keep { Begin::Keep } else { Begin::Zero };
            let extent = Extent::dense(rows, outputs, inputs);
            gemm::input_grad(cpu, cpu.f32(dy), cpu.matrix(w, outputs, inputs), cpu.f32(dx), extent, begin);
        }
        Op::LinearWeightGrad { x, dy, dw, rows, outputs, inputs, positions } => {
            let extent = Extent::dense(rows, outputs, inputs);
            // SAFETY: nobody writes the batch's numbers while an operation runs.
            let positions = positions.map(|buf| unsafe { cpu.u32(buf).part(0..rows).read() });
            gemm::weight_grad(cpu, cpu.f32(x), cpu.f32(dy), cpu.f32(dw), extent, positions);
        }
        Op::ColumnSum { x, sum, rows, width } => norm::column_sum(cpu, cpu.f32(x), cpu.f32(sum), rows, width),
        Op::LoraDown { x, mid, adapters, slots, rows, inputs, stride } => {
            let (x, mid, adapters) = (cpu.f32(x), cpu.f32(mid), cpu.u32(adapters));
            embed::each_adapter(adapters, rows, &slots, |rows, slot| {
                let (x, mid) = (x.rows(rows.clone(), inputs), mid.rows(rows.clone(), stride));
                let extent = Extent { y_stride: stride, ..Extent::dense(rows.len(), slot.rank, inputs) };
                gemm::linear(cpu, x, cpu.matrix(slot.a, slot.rank, inputs), mid, extent, Begin::Zero);
                pointwise::scale(cpu, mid, slot.scale);
            });
        }
        Op::LoraUp { mid, y, adapters, slots, rows, outputs, stride } => {
            let (mid, y, adapters) = (cpu.f32(mid), cpu.f32(y), cpu.u32(adapters));
            embed::each_adapter(adapters, rows, &slots, |rows, slot| {
                let (mid, y) = (mid.rows(rows.clone(), stride), y.rows(rows.clone(), outputs));
                let extent = Extent { y_stride: stride, ..Extent::dense(rows.len(), slot.rank, outputs) };
                gemm::input_grad(cpu, mid, cpu.matrix(slot.b, slot.rank, outputs), y, extent, Begin::Keep);
            });
        }
        Op::Dropout { x, y, seeds, starts, positions, sequences, width, salt, rate, keep } => {
            let (x, y, seeds) = (cpu.f32(x), cpu.f32(y), cpu.cells(seeds, Element::U64));
            let (starts, positions) = (cpu.u32(starts).part(0..sequences + 1), cpu.u32(positions));
            let mask = pointwise::Mask { seeds, starts, positions, salt, rate };
            pointwise::dropout(cpu, x, y, mask, width, keep);
        }
        Op::Embed { table, tokens, out, rows, vocab, width } => {
            let table = cpu.matrix(table, vocab, width);
            embed::embed(cpu, table, cpu.u32(tokens).part(0..rows), cpu.f32(out), vocab, width);
        }
        Op::EmbedGrad { d, tokens, dtable, rows, vocab, width } => {
            let tokens = cpu.u32(tokens).part(0..rows);
            embed::embed_grad(cpu, cpu.f32(d), tokens, cpu.f32(dtable), vocab, width);
        }
        Op::Gather { x, rows, out, count, width } => {
            embed::gather(cpu, cpu.f32(x), cpu.u32(rows).part(0..count), cpu.f32(out), width);
        }
        Op::Scatter { from, rows, x, count, width } => {
            embed::scatter(cpu, cpu.f32(from), cpu.u32(rows).part(0..count), cpu.f32(x), width);
        }
        Op::StoreRows { x, slots, cache, rows, width } => {
            embed::scatter(cpu, cpu.f32(x), cpu.u32(slots).part(0..rows), cpu.f32(cache), width);
        }
        Op::RmsNorm { x, weight, out, inv, rows, width, eps } => {
            let (x, weight, out, inv) = (cpu.f32(x), cpu.f32(weight), cpu.f32(out), cpu.f32(inv));
            norm::rms_norm(cpu, x, weight, out, inv, rows, width, eps);
        }
        Op::RmsNormGrad { x, weight, inv, dout, dx, dweight, rows, width } => {
            let (x, weight, inv) = (cpu.f32(x), cpu.f32(weight), cpu.f32(inv));
            let (dout, dx) = (cpu.f32(dout), cpu.f32(dx));
            norm::rms_norm_grad(cpu, x, weight, inv, dout, dx, rows, width);
            if let Some(dweight) = dweight {
                norm::rms_norm_weight_grad(cpu, x, inv, dout, cpu.f32(dweight), rows, width);
            }
        }
        Op::Rope { x, table, positions, rows, heads, head_dim, back } => {
            let positions = cpu.u32(positions).part(0..rows);
            pointwise::rope(cpu, cpu.f32(x), cpu.f32(table), positions, heads, head_dim, back);
        }
        Op::Glu { activation, gate, up, out } => {
            glu::forward(cpu, activation, cpu.f32(gate), cpu.f32(up), cpu.f32(out));
        }
        Op::LinearGlu { activation, x, w, y, out, rows, outputs, inputs } => {
            let (x, out, extent) = (cpu.f32(x), cpu.f32(out), Extent::dense(rows, outputs, inputs));
            let (w, y) = (w.map(|w| cpu.matrix(w, outputs, inputs)), y.map(|y| cpu.f32(y)));
            gemm::gated_linear(cpu, activation, x, w, y, out, extent);
        }
        Op::GluGrad { activation, gate, up, dout, dgate, dup } => {
            let (gate, up, dout) = (cpu.f32(gate), cpu.f32(up), cpu.f32(dout));
            glu::backward(cpu, activation, gate, up, dout, cpu.f32(dgate), cpu.f32(dup));
        }
        Op::Attention(a) => attention::forward(cpu, &a),
        Op::AttentionGrad { forward, dout, dq, dk, dv } => {
            let (dout, dq, dk, dv) = (cpu.f32(dout), cpu.f32(dq), cpu.f32(dk), cpu.f32(dv));
            attention::backward(cpu, &forward, dout, dq, dk, dv);
        }
        Op::LogitStats { logits, targets, stats, rows, vocab, first } => {
            let targets = cpu.u32(targets).part(0..rows);
            loss::logit_stats(cpu, cpu.f32(logits), targets, cpu.f32(stats), vocab, first);
        }
        Op::SampleSums { logits, stats, temperatures, sums, rows, vocab } => {
            let (logits, stats) = (cpu.f32(logits), cpu.f32(stats));
            let temperatures = cpu.f32(temperatures).part(0..rows);
            loss::sample_sums(cpu, logits, stats, temperatures, cpu.f32(sums), vocab);
        }
        Op::LogProbs { stats, log_probs, rows } => {
            loss::log_probs(cpu.f32(stats).part(0..3 * rows), cpu.f32(log_probs).part(0..rows));
        }
        Op::LogitGrad { logits, targets, stats, coefficients, rows, vocab, first } => {
            let (targets, coefficients) = (cpu.u32(targets).part(0..rows), cpu.f32(coefficients));
            loss::logit_grad(cpu, cpu.f32(logits), targets, cpu.f32(stats), coefficients, vocab, first);
        }
        Op::SumLoss { log_probs, coefficients, loss, rows } => {
            let (log_probs, coefficients) = (cpu.f32(log_probs), cpu.f32(coefficients));
            loss::sum_loss(log_probs.part(0..rows), coefficients.part(0..rows), cpu.f64(loss));
        }
        Op::SquaredNorm { gradients, partials, norm } => {
            optimizer::squared_norm(cpu, cpu.f32(gradients), cpu.f64(partials), cpu.f64(norm));
        }
        Op::AdamW {
            weights,
            copy,
            gradients,
            moments,
            settings,
            norm,
            loss,
            beta1,
            beta2,
            epsilon,
            decay,
        } => {
            let state = optimizer::State {
                weights: cpu.f32(weights),
                copy: copy.map(|c| cpu.cells(c, Element::BF16)),
                gradients: cpu.f32(gradients),
                moments: optimizer::Moments::of(cpu, moments),
            };
            let constants = optimizer::Constants { beta1, beta2, epsilon, decay };
            optimizer::adamw(cpu, state, cpu.f32(settings), cpu.f64(norm), cpu.f64(loss), constants);
        }
        Op::AllReduce { .. } => {}
    }
}
