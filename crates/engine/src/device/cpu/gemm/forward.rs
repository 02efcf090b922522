//! `y = begin + x w^T`.
#![allow(unsafe_code)] // Threads write disjoint blocks; tiles take raw pointers.

use std::ops::Range;

use super::dots::{DOT_COLUMNS, DOT_ROWS, Dots, dots, dots_bf16, dots_pairs};
use super::ints::{IntDots, dots_int4, dots_int8};
use super::quantized::{Bits, Rows, quantize_row};
use super::terms::{narrow, widen};
use super::{Begin, Extent, Grid, Matrix, Quantized, ROW_BLOCK, chunks};
use crate::device::cpu::cells::Cells;
use crate::device::cpu::{Cpu, Level};
use lathe_plan::QUANT_GROUP;

/// The most terms whose lanes are summed apart: a block of five weights and one of five rows stay in the first-level
/// cache.
const MOST_TERMS: usize = 1024;
/// The same of quantized terms, of which [`ROW_BLOCK`] rows fit into a thread's scratch.
const INT_TERMS: usize = 16 * QUANT_GROUP;
/// Up to here weights are read where they lie, beyond it from scratch.
const FEW: usize = 2 * DOT_ROWS;
/// Weights' rows that few rows are given at a time: the second block of rows finds them in the second-level cache. A
/// multiple of the columns of every block of few rows.
const FEW_COLUMNS: usize = 120;

/// `y = begin + x w^T`.
pub(in super::super) fn linear(cpu: &Cpu, x: Cells<f32>, w: Matrix, y: Cells<f32>, e: Extent, begin: Begin) {
    e.check(x.len(), y.len(), w.len());
    let grid = Grid::new(e.rows, ROW_BLOCK, e.outputs, 2 * DOT_COLUMNS, cpu.pool_threads());
    cpu.run(grid.tasks(), |level, task, scratch| {
        let (rows, outputs) = grid.task(task);
        begin.fill(y, e.y_stride, rows.clone(), outputs.clone());
        let terms = if matches!(w, Matrix::Int(_)) { INT_TERMS } else { sum_block(e.inputs) };
        for k in chunks(0..e.inputs, terms) {
            let block = Block { level, rows: rows.clone(), outputs: outputs.clone(), k, e };
            // SAFETY: `check` saw that weights, rows and columns exist; this task owns its block of y and its scratch.
            unsafe {
                match w {
                    Matrix::F32(w) => block.f32(x, w, y),
                    Matrix::BF16(w) if level.takes_pairs(e.inputs) => block.pairs(x, w, y, scratch),
                    Matrix::BF16(w) if rows.len() <= FEW => block.few_rows(x, w, y),
                    Matrix::BF16(w) => block.widened(x, w, y, scratch),
                    Matrix::Int(w) => block.ints(x, w, y, scratch),
                }
            }
        }
    });
}

/// Rows and outputs of a task, and a block of the sum.
struct Block {
    level: Level,
    rows: Range<usize>,
    outputs: Range<usize>,
    k: Range<usize>,
    e: Extent,
}

impl Block {
    /// # Safety
    /// As all below: the extents are inside the matrices, nobody else has this block of `y` or `scratch`.
    unsafe fn f32(&self, x: Cells<f32>, w: Cells<f32>, y: Cells<f32>) {
        for some in chunks(self.outputs.clone(), DOT_COLUMNS) {
            let t = self.operands(x, w, y, &some);
            // SAFETY: the caller's.
            unsafe { dots(self.level, self.rows.len(), some.len(), t) };
        }
    }

    unsafe fn few_rows(&self, x: Cells<f32>, w: Cells<u16>, y: Cells<f32>) {
        for some in chunks(self.outputs.clone(), FEW_COLUMNS) {
            let t = self.operands(x, w, y, &some);
            // SAFETY: the caller's.
            unsafe { dots_bf16(self.level, self.rows.len(), some.len(), t) };
        }
    }

    /// Each weight is widened once for all rows.
    unsafe fn widened(&self, x: Cells<f32>, w: Cells<u16>, y: Cells<f32>, scratch: Cells<f32>) {
        for some in chunks(self.outputs.clone(), DOT_COLUMNS) {
            let t = self.operands(x, w, y, &some);
            let Dots { k, a, a_row, c, c_row, .. } = t;
            for i in 0..some.len() {
                let to = scratch.part(i * MOST_TERMS..i * MOST_TERMS + k);
                // SAFETY: the caller's.
                unsafe { widen(self.level, t.b.add(i * t.b_row), to.ptr_mut(), k) };
            }
            let t = Dots { k, a, a_row, b: scratch.ptr(), b_row: MOST_TERMS, c, c_row };
            // SAFETY: the caller's.
            unsafe { dots(self.level, self.rows.len(), some.len(), t) };
        }
    }

    /// Rows are rounded to bf16 once for all outputs.
    unsafe fn pairs(&self, x: Cells<f32>, w: Cells<u16>, y: Cells<f32>, scratch: Cells<f32>) {
        let k = self.k.len();
        let rounded = scratch.part(0..self.rows.len() * k / 2).ptr_mut().cast::<u16>();
        for (i, row) in self.rows.clone().enumerate() {
            let from = x.part(row * self.e.x_stride..row * self.e.x_stride + self.e.inputs);
            // SAFETY: the caller's.
            unsafe { narrow(self.level, from.ptr().add(self.k.start), rounded.add(i * k), k) };
        }
        let columns = if self.rows.len() <= FEW { FEW_COLUMNS } else { DOT_COLUMNS };
        for some in chunks(self.outputs.clone(), columns) {
            let Dots { b, b_row, c, c_row, .. } = self.operands(x, w, y, &some);
            let (a, b) = (rounded.cast(), b.cast());
            let t = Dots { k: k / 2, a, a_row: k / 2, b, b_row: b_row / 2, c, c_row };
            // SAFETY: the caller's; `inputs` is even, so rows of pairs are whole.
            unsafe { dots_pairs(self.level, self.rows.len(), some.len(), t) };
        }
    }

    /// Rows are quantized once for all outputs.
    unsafe fn ints(&self, x: Cells<f32>, w: Quantized, y: Cells<f32>, scratch: Cells<f32>) {
        let (e, group) = (self.e, self.k.start / QUANT_GROUP);
        let groups = self.k.len().div_ceil(QUANT_GROUP);
        let all = Rows::within(scratch, self.rows.len(), groups);
        // SAFETY: the caller's.
        unsafe {
            for (i, row) in self.rows.clone().enumerate() {
                let from = x.part(row * e.x_stride + self.k.start..row * e.x_stride + self.k.end);
                let to = Rows {
                    codes: all.codes.add(i * groups * QUANT_GROUP),
                    scales: all.scales.add(i * groups),
                    sums: all.sums.add(i * groups),
                };
                quantize_row(self.level, from.ptr(), from.len(), to, groups);
            }
            let b_row = w.groups() * w.group_bytes();
            for some in chunks(self.outputs.clone(), DOT_COLUMNS) {
                let t = IntDots {
                    groups,
                    a: all.codes,
                    a_scales: all.scales,
                    a_sums: all.sums,
                    a_row: groups * QUANT_GROUP,
                    b: w.codes.ptr().add(some.start * b_row + group * w.group_bytes()),
                    b_row,
                    b_scales: w.scales.ptr().add(some.start * w.groups() + group),
                    b_scales_row: w.groups(),
                    c: y.ptr_mut().add(self.rows.start * e.y_stride + some.start),
                    c_row: e.y_stride,
                };
                match w.bits {
                    Bits::Eight => dots_int8(self.level, self.rows.len(), some.len(), t),
                    Bits::Four => dots_int4(self.level, self.rows.len(), some.len(), t),
                }
            }
        }
    }

    /// All rows, and the outputs `some`, where they lie.
    fn operands<B: Copy>(
        &self,
        x: Cells<f32>,
        w: Cells<B>,
        y: Cells<f32>,
        some: &Range<usize>,
    ) -> Dots<f32, B> {
        let (e, row, k) = (self.e, self.rows.start, &self.k);
        let a = x.part(row * e.x_stride + k.start..x.len()).ptr();
        let b = w.part(some.start * e.inputs + k.start..w.len()).ptr();
        let c = y.part(row * e.y_stride + some.start..y.len()).ptr_mut();
        Dots { k: k.len(), a, a_row: e.x_stride, b, b_row: e.inputs, c, c_row: e.y_stride }
    }
}

/// How many terms of a sum of `terms` lie in one block: about equal blocks, each a multiple of every vector.
fn sum_block(terms: usize) -> usize {
    terms.div_ceil(terms.div_ceil(MOST_TERMS).max(1)).next_multiple_of(64)
}
