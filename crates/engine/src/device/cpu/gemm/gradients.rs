//! The gradients of a product `y = x w^T`: `dx = dy w` and `dw = dy^T x`.
#![allow(unsafe_code)] // Threads write disjoint blocks; tiles take raw pointers.

use std::ops::Range;

use super::outer::{OUTER_COLUMNS, OUTER_ROWS, Outer, outer, outer_pairs};
use super::terms::{interleave, narrow};
use super::{Begin, Extent, Grid, Matrix, ROW_BLOCK, chunks, tiled, tiled_grad, tiled_weight};
use crate::device::cpu::cells::Cells;
use crate::device::cpu::{Cpu, Level};

/// Terms of a block: with its columns they stay in the first-level cache.
const OUTER_TERMS: usize = 256;
/// Outputs of a task of the weights' gradient.
const OUTPUT_BLOCK: usize = 7 * OUTER_ROWS;

/// `dx = (dx or 0) + dy w`: contracts over outputs, in their order.
pub(in super::super) fn input_grad(
    cpu: &Cpu,
    dy: Cells<f32>,
    w: Matrix,
    dx: Cells<f32>,
    e: Extent,
    begin: Begin,
) {
    e.check(dx.len(), dy.len(), w.len());
    if let Matrix::BF16(w16) = w
        && tiled::takes(cpu.level, w, e.inputs)
        && e.outputs > 0
    {
        return tiled_grad::input_grad(cpu, dy, w16, dx, e, begin);
    }
    let pairs = matches!(w, Matrix::BF16(_)) && cpu.level.takes_pairs(e.inputs);
    let grid = Grid::new(e.rows, ROW_BLOCK, e.inputs, OUTER_COLUMNS, cpu.pool_threads());
    cpu.run(grid.tasks(), |level, task, scratch| {
        let (rows, inputs) = grid.task(task);
        begin.fill(dx, e.x_stride, rows.clone(), inputs.clone());
        for outputs in chunks(0..e.outputs, OUTER_TERMS) {
            let block = Block { level, rows: rows.clone(), inputs: inputs.clone(), outputs, e };
            // SAFETY: `check` saw that rows and columns exist; this task owns its block of dx and its scratch.
            unsafe {
                match w {
                    Matrix::BF16(w) if pairs => block.pairs(dy, w, dx, scratch),
                    _ => block.singles(dy, w, dx, scratch),
                }
            }
        }
    });
}

/// Rows and inputs of a task, and a block of the sum.
struct Block {
    level: Level,
    rows: Range<usize>,
    inputs: Range<usize>,
    outputs: Range<usize>,
    e: Extent,
}

impl Block {
    /// The weights' block is copied, or widened, for all rows.
    ///
    /// # Safety
    /// The extents are inside the matrices, nobody else has this block of `dx` or `scratch`.
    unsafe fn singles(&self, dy: Cells<f32>, w: Matrix, dx: Cells<f32>, scratch: Cells<f32>) {
        let (e, first) = (self.e, self.rows.start);
        for some in chunks(self.inputs.clone(), OUTER_COLUMNS) {
            for (i, output) in self.outputs.clone().enumerate() {
                let to = scratch.part(i * OUTER_COLUMNS..i * OUTER_COLUMNS + some.len());
                w.copy(self.level, output * e.inputs + some.start, to);
            }
            // SAFETY: the caller's.
            unsafe {
                let t = Outer {
                    k: self.outputs.len(),
                    a: dy.ptr().add(first * e.y_stride + self.outputs.start),
                    a_row: e.y_stride,
                    a_k: 1,
                    b: scratch.ptr(),
                    b_row: OUTER_COLUMNS,
                    c: dx.ptr_mut().add(first * e.x_stride + some.start),
                    c_row: e.x_stride,
                };
                outer(self.level, self.rows.len(), some.len(), t);
            }
        }
    }

    /// Rows are rounded to bf16 once for all inputs, and pairs of the weights' rows interleaved for all rows.
    ///
    /// # Safety
    /// As above.
    unsafe fn pairs(&self, dy: Cells<f32>, w: Cells<u16>, dx: Cells<f32>, scratch: Cells<f32>) {
        let (e, pairs) = (self.e, self.outputs.len().div_ceil(2));
        let scratch = scratch.cast::<u32>();
        let rounded = scratch.part(0..self.rows.len() * pairs);
        let near = scratch.part(rounded.len()..rounded.len() + pairs * OUTER_COLUMNS);
        // SAFETY: the caller's.
        unsafe {
            for (i, row) in self.rows.clone().enumerate() {
                let at = row * e.y_stride;
                let from = dy.part(at + self.outputs.start..at + self.outputs.end);
                round_row(self.level, from, rounded.rows(i..i + 1, pairs));
            }
            for some in chunks(self.inputs.clone(), OUTER_COLUMNS) {
                interleave_outputs(self.level, w, e.inputs, &self.outputs, &some, near);
                let t = Outer {
                    k: pairs,
                    a: rounded.ptr(),
                    a_row: pairs,
                    a_k: 1,
                    b: near.ptr(),
                    b_row: OUTER_COLUMNS,
                    c: dx.ptr_mut().add(self.rows.start * e.x_stride + some.start),
                    c_row: e.x_stride,
                };
                outer_pairs(self.level, self.rows.len(), some.len(), t);
            }
        }
    }
}

/// Rounds a row to pairs of bf16 numbers; zeros beyond it.
///
/// # Safety
/// Nobody writes `from`, and nobody else reads or writes `to`, which is long enough.
pub(super) unsafe fn round_row(level: Level, from: Cells<f32>, to: Cells<u32>) {
    assert!(from.len() <= 2 * to.len(), "there are fewer pairs than numbers");
    let start = to.ptr_mut().cast::<u16>();
    // SAFETY: there is room; the rest is the caller's.
    unsafe {
        narrow(level, from.ptr(), start, from.len());
        start.add(from.len()).write_bytes(0, 2 * to.len() - from.len());
    }
}

/// `to`, [`OUTER_COLUMNS`] apart, becomes pairs of the weights' rows of these outputs, for some inputs: the first two outputs', then
/// the next two's. An odd output comes with a zero, and zeros fill what `to` has more.
///
/// # Safety
/// Nobody else reads or writes `to`.
pub(super) unsafe fn interleave_outputs(
    level: Level,
    w: Cells<u16>,
    w_row: usize,
    outputs: &Range<usize>,
    inputs: &Range<usize>,
    to: Cells<u32>,
) {
    let zeros = [0; OUTER_COLUMNS];
    let row = |output: usize| match output < outputs.end {
        true => w.part(output * w_row + inputs.start..output * w_row + inputs.end).ptr(),
        false => zeros.as_ptr(),
    };
    for pair in 0..to.len() / OUTER_COLUMNS {
        let (output, to) = (outputs.start + 2 * pair, to.rows(pair..pair + 1, OUTER_COLUMNS));
        assert!(inputs.len() <= to.len(), "more inputs than a row of pairs has");
        // SAFETY: rows of weights were checked, and the row of pairs is long enough.
        unsafe { interleave(level, row(output), row(output + 1), to.ptr_mut(), inputs.len()) };
    }
}

/// `dw += dy^T x`: contracts over rows, in their order, so that micro-batches add up to the bits of one large batch.
/// Blocks of `dy` and `x` are copied to scratch. With `positions` a level that has tiles rounds both to bf16.
pub(in super::super) fn weight_grad(
    cpu: &Cpu,
    x: Cells<f32>,
    dy: Cells<f32>,
    dw: Cells<f32>,
    e: Extent,
    positions: Option<&[u32]>,
) {
    e.check(x.len(), dy.len(), dw.len());
    if let Some(positions) = positions
        && cpu.level.has_tiles()
    {
        return tiled_weight::weight_grad(cpu, x, dy, dw, e, positions);
    }
    let grid = Grid::new(e.outputs, OUTPUT_BLOCK, e.inputs, OUTER_COLUMNS, cpu.pool_threads());
    cpu.run(grid.tasks(), |level, task, scratch| {
        let (outputs, inputs) = grid.task(task);
        let a = scratch.part(0..OUTPUT_BLOCK * OUTER_TERMS);
        let b = scratch.part(a.len()..a.len() + OUTER_COLUMNS * OUTER_TERMS);
        for rows in chunks(0..e.rows, OUTER_TERMS) {
            // SAFETY: scratch is this thread's; `check` saw that x and dy have these rows; this task owns its outputs
            // and inputs of dw.
            unsafe {
                turn(dy, e.y_stride, rows.clone(), outputs.clone(), a.write());
                for some in chunks(inputs.clone(), OUTER_COLUMNS) {
                    for (row, to) in rows.clone().zip(b.write().chunks_exact_mut(OUTER_COLUMNS)) {
                        let at = row * e.x_stride;
                        to[..some.len()].copy_from_slice(x.part(at + some.start..at + some.end).read());
                    }
                    for (block, first) in outputs.clone().step_by(OUTER_ROWS).enumerate() {
                        let t = Outer {
                            k: rows.len(),
                            a: a.ptr().add(block * OUTER_ROWS * OUTER_TERMS),
                            a_row: 1,
                            a_k: OUTER_ROWS,
                            b: b.ptr(),
                            b_row: OUTER_COLUMNS,
                            c: dw.ptr_mut().add(first * e.inputs + some.start),
                            c_row: e.inputs,
                        };
                        outer(level, OUTER_ROWS.min(outputs.end - first), some.len(), t);
                    }
                }
            }
        }
    });
}

/// `a[block][row][12]`: 12 outputs side by side for each row.
unsafe fn turn(dy: Cells<f32>, stride: usize, rows: Range<usize>, outputs: Range<usize>, a: &mut [f32]) {
    for (r, row) in rows.enumerate() {
        let at = row * stride;
        // SAFETY: nobody writes dy while the gradient is taken.
        let from = unsafe { dy.part(at + outputs.start..at + outputs.end).read() };
        for (block, some) in from.chunks(OUTER_ROWS).enumerate() {
            let to = block * OUTER_ROWS * OUTER_TERMS + r * OUTER_ROWS;
            a[to..to + some.len()].copy_from_slice(some);
        }
    }
}
