//! `y = begin + x w^T`.
#![allow(unsafe_code)] // Threads write disjoint blocks; tiles take raw pointers.

use std::ops::Range;

use super::dots::{DOT_COLUMNS, Dots, dots, dots_bf16, dots_pairs};
use super::ints::{IntDots, dots_int4, dots_int8};
use super::quantized::{Bits, Rows, quantize_row};
use super::terms::{narrow, widen};
use super::{Begin, Extent, Grid, Matrix, Quantized, ROW_BLOCK, chunks, tiled};
use crate::device::Activation;
use crate::device::cpu::cells::Cells;
use crate::device::cpu::{Cpu, Level, glu};
use lathe_plan::QUANT_GROUP;

/// The most terms whose lanes are summed apart: a block of five weights and one of five rows stay in the first-level
/// cache.
const MOST_TERMS: usize = 1024;
/// The same of quantized terms, of which [`ROW_BLOCK`] rows fit into a thread's scratch.
const INT_TERMS: usize = 16 * QUANT_GROUP;

/// Elements that stay in the first-level cache beside a stream of weights.
const NEAR: usize = 6 << 10;

/// `y = begin + x w^T`.
pub(in super::super) fn linear(cpu: &Cpu, x: Cells<f32>, w: Matrix, y: Cells<f32>, e: Extent, begin: Begin) {
    e.check(x.len(), y.len(), w.len());
    if tiled::takes(cpu.level, w, e.inputs) {
        return tiled::linear(cpu, x, w, y, e, begin);
    }
    let grid = Grid::new(e.rows, ROW_BLOCK, e.outputs, 2 * DOT_COLUMNS, cpu.pool_threads());
    let terms = if matches!(w, Matrix::Int(_)) { INT_TERMS } else { sum_block(e.inputs) };
    cpu.run(grid.tasks(), |level, task, scratch| {
        let (rows, outputs) = grid.task(task);
        begin.fill(y, e.y_stride, rows.clone(), outputs.clone());
        let block = Block { level, rows, x, w, y, e };
        // SAFETY: `check` saw that weights, rows and columns exist; this task owns its block of y and its scratch.
        unsafe {
            // Few rows take all terms of an output before the next one: weights are read in the order of memory.
            let few = block.rows.len() <= few_rows(level) && block.room(e.inputs) <= NEAR.min(scratch.len());
            for k in chunks(0..e.inputs, if few { e.inputs } else { terms }) {
                let prepared = block.prepare(k.clone(), scratch);
                block.multiply(&prepared, k, terms, outputs.clone(), scratch);
            }
        }
    });
}

/// `out = activation(x gate^T) * (x up^T)`; `y` is room for both products, which may stay as it is.
pub(in super::super) fn gated_linear(
    cpu: &Cpu,
    activation: Activation,
    x: Cells<f32>,
    w: [Matrix; 2],
    y: [Cells<f32>; 2],
    out: Cells<f32>,
    e: Extent,
) {
    let [gate, up] = w;
    for (w, y) in w.into_iter().zip(y) {
        e.check(x.len(), out.len(), w.len());
        e.check(x.len(), y.len(), w.len());
    }
    if let (Some(fit), Matrix::BF16(gate), Matrix::BF16(up)) = (tiled::takes_gated(cpu, w, e), gate, up) {
        return tiled::gated_linear(cpu, activation, x, [gate, up], out, e, fit);
    }
    linear(cpu, x, gate, y[0], e, Begin::Zero);
    linear(cpu, x, up, y[1], e, Begin::Zero);
    glu::forward(cpu, activation, y[0], y[1], out);
}

/// Rows of a task, with the weights.
struct Block {
    level: Level,
    rows: Range<usize>,
    x: Cells<f32>,
    w: Matrix,
    y: Cells<f32>,
    e: Extent,
}

/// Rows as the products take them.
enum Prepared {
    /// Where they lie.
    Singles,
    /// Rounded to bf16, from term `first` on, rows `stride` apart.
    BF16 { rows: *const u16, first: usize, stride: usize },
    /// Quantized, from term `first` on.
    Int { rows: Rows, first: usize, groups: usize },
}

impl Block {
    /// Elements of scratch for `terms` terms of all rows, prepared.
    fn room(&self, terms: usize) -> usize {
        match self.w {
            Matrix::Int(_) => Rows::room(self.rows.len(), terms.div_ceil(QUANT_GROUP)),
            _ => self.rows.len() * terms.div_ceil(2),
        }
    }

    /// Rounds or quantizes terms `k` of all rows, once for all outputs.
    ///
    /// # Safety
    /// As all below: the extents are inside the matrices, nobody else has these rows of `y`, or `scratch`.
    unsafe fn prepare(&self, k: Range<usize>, scratch: Cells<f32>) -> Prepared {
        let row = |i: usize| {
            let at = (self.rows.start + i) * self.e.x_stride;
            self.x.part(at + k.start..at + k.end)
        };
        match self.w {
            Matrix::Int(_) => {
                let groups = k.len().div_ceil(QUANT_GROUP);
                let rows = Rows::within(scratch, self.rows.len(), groups);
                for i in 0..self.rows.len() {
                    // SAFETY: `within` saw that there is room.
                    unsafe { quantize_row(self.level, row(i).ptr(), k.len(), rows.row(i, groups), groups) };
                }
                Prepared::Int { rows, first: k.start, groups }
            }
            Matrix::BF16(_) if self.level.takes_pairs(self.e.inputs) => {
                let rows = scratch.part(0..self.room(k.len())).ptr_mut().cast::<u16>();
                for i in 0..self.rows.len() {
                    // SAFETY: there is room; terms of a block are even.
                    unsafe { narrow(self.level, row(i).ptr(), rows.add(i * k.len()), k.len()) };
                }
                Prepared::BF16 { rows, first: k.start, stride: k.len() }
            }
            _ => Prepared::Singles,
        }
    }

    /// Adds the products of terms `k` to `outputs` of all rows, the sum of `block` terms at a time.
    unsafe fn multiply(
        &self,
        prepared: &Prepared,
        k: Range<usize>,
        block: usize,
        outputs: Range<usize>,
        scratch: Cells<f32>,
    ) {
        let (level, rows) = (self.level, self.rows.len());
        for some in chunks(outputs, DOT_COLUMNS) {
            // SAFETY: the caller's.
            unsafe {
                match (self.w, prepared) {
                    (Matrix::F32(w), _) => dots(level, rows, some.len(), self.operands(w, &k, block, &some)),
                    (Matrix::BF16(w), &Prepared::BF16 { rows: a, first, stride }) => {
                        let Dots { b, b_row, c, c_row, .. } = self.operands(w, &k, block, &some);
                        let (a, a_row) = (a.add(k.start - first).cast(), stride / 2);
                        let (k, block, b, b_row) = (k.len() / 2, block / 2, b.cast(), b_row / 2);
                        dots_pairs(level, rows, some.len(), Dots { k, block, a, a_row, b, b_row, c, c_row });
                    }
                    (Matrix::BF16(w), _) if rows <= few_rows(level) => {
                        dots_bf16(level, rows, some.len(), self.operands(w, &k, block, &some));
                    }
                    (Matrix::BF16(w), _) => {
                        // Widened once for all rows.
                        let Dots { k, block, a, a_row, b, b_row, c, c_row } =
                            self.operands(w, &k, block, &some);
                        for i in 0..some.len() {
                            let to = scratch.part(i * MOST_TERMS..i * MOST_TERMS + k);
                            widen(level, b.add(i * b_row), to.ptr_mut(), k);
                        }
                        let t = Dots { k, block, a, a_row, b: scratch.ptr(), b_row: MOST_TERMS, c, c_row };
                        dots(level, rows, some.len(), t);
                    }
                    (Matrix::Int(w), &Prepared::Int { rows: a, first, groups }) => {
                        let a = a.from((k.start - first) / QUANT_GROUP);
                        let t = self.int_operands(w, &k, block, &some, a, groups);
                        match w.bits {
                            Bits::Eight => dots_int8(level, rows, some.len(), t),
                            Bits::Four => dots_int4(level, rows, some.len(), t),
                        }
                    }
                    (Matrix::Int(_), _) => unreachable!("`prepare` quantizes rows for such weights"),
                }
            }
        }
    }

    /// Terms `k` of all rows, and the outputs `some`, where they lie.
    fn operands<B: Copy>(
        &self,
        w: Cells<B>,
        k: &Range<usize>,
        block: usize,
        some: &Range<usize>,
    ) -> Dots<f32, B> {
        let (e, row) = (self.e, self.rows.start);
        let a = self.x.part(row * e.x_stride + k.start..self.x.len()).ptr();
        let b = w.part(some.start * e.inputs + k.start..w.len()).ptr();
        let c = self.y.part(row * e.y_stride + some.start..self.y.len()).ptr_mut();
        Dots { k: k.len(), block, a, a_row: e.x_stride, b, b_row: e.inputs, c, c_row: e.y_stride }
    }

    fn int_operands(
        &self,
        w: Quantized,
        k: &Range<usize>,
        block: usize,
        some: &Range<usize>,
        a: Rows,
        a_groups: usize,
    ) -> IntDots {
        let (e, group) = (self.e, k.start / QUANT_GROUP);
        let b_row = w.groups() * w.group_bytes();
        IntDots {
            groups: k.len().div_ceil(QUANT_GROUP),
            block: block / QUANT_GROUP,
            a,
            a_groups,
            b: w.codes.part(some.start * b_row + group * w.group_bytes()..w.codes.len()).ptr(),
            b_row,
            b_scales: w.scales.part(some.start * w.groups() + group..w.scales.len()).ptr(),
            b_scales_row: w.groups(),
            c: self.y.part(self.rows.start * e.y_stride + some.start..self.y.len()).ptr_mut(),
            c_row: e.y_stride,
        }
    }
}

/// Up to so many rows go through the weights once, in the order of memory, as far as registers allow. More take bf16 weights
/// widened from scratch.
fn few_rows(level: Level) -> usize {
    if level >= Level::Avx512 { 8 } else { 2 }
}

/// How many terms of a sum of `terms` lie in one block: about equal blocks, each a multiple of every vector.
fn sum_block(terms: usize) -> usize {
    terms.div_ceil(terms.div_ceil(MOST_TERMS).max(1)).next_multiple_of(64)
}
