//! The gradients of a product `y = x w^T`: `dx = dy w` and `dw = dy^T x`.
#![allow(unsafe_code)] // Threads write disjoint blocks; tiles take raw pointers.

use std::ops::Range;

use super::outer::{OUTER_COLUMNS, OUTER_ROWS, Outer, outer, outer_pairs};
use super::terms::{interleave, narrow};
use super::{Begin, Extent, Grid, Matrix, ROW_BLOCK, chunks, tiled_grad};
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
    let pairs = matches!(w, Matrix::BF16(_)) && cpu.level.takes_pairs(e.inputs);
    match w {
        Matrix::BF16(w) if pairs && cpu.level.has_tiles() && e.outputs > 0 => {
            return tiled_grad::input_grad(cpu, dy, w, dx, e, begin);
        }
        _ => (),
    }
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

    /// Rows are rounded to bf16 once for all inputs, and pairs of the weights' rows interleaved for all rows. An odd
    /// output comes with a zero.
    ///
    /// # Safety
    /// As above.
    unsafe fn pairs(&self, dy: Cells<f32>, w: Cells<u16>, dx: Cells<f32>, scratch: Cells<f32>) {
        const PAIRS: usize = OUTER_TERMS / 2;
        let (e, first) = (self.e, self.rows.start);
        let rounded = scratch.part(0..self.rows.len() * PAIRS);
        let panel = scratch.part(rounded.len()..rounded.len() + PAIRS * OUTER_COLUMNS);
        let (rounded, panel) = (rounded.ptr_mut(), panel.ptr_mut().cast::<u32>());
        let count = self.outputs.len();
        let pairs = count.div_ceil(2);
        let zeros = [0; OUTER_COLUMNS];
        // SAFETY: the caller's.
        unsafe {
            for (i, row) in self.rows.clone().enumerate() {
                let from =
                    dy.part(row * e.y_stride + self.outputs.start..row * e.y_stride + self.outputs.end);
                let to = rounded.add(i * PAIRS).cast::<u16>();
                narrow(self.level, from.ptr(), to, count);
                to.add(count).write_bytes(0, 2 * pairs - count);
            }
            for some in chunks(self.inputs.clone(), OUTER_COLUMNS) {
                for pair in 0..pairs {
                    let row = |output: usize| match output < self.outputs.end {
                        true => w.ptr().add(output * e.inputs + some.start),
                        false => zeros.as_ptr(),
                    };
                    let output = self.outputs.start + 2 * pair;
                    let to = panel.add(pair * OUTER_COLUMNS);
                    interleave(self.level, row(output), row(output + 1), to, some.len());
                }
                let t = Outer {
                    k: pairs,
                    a: rounded.cast_const().cast(),
                    a_row: PAIRS,
                    a_k: 1,
                    b: panel.cast_const(),
                    b_row: OUTER_COLUMNS,
                    c: dx.ptr_mut().add(first * e.x_stride + some.start),
                    c_row: e.x_stride,
                };
                outer_pairs(self.level, self.rows.len(), some.len(), t);
            }
        }
    }
}

/// `dw += dy^T x`: contracts over rows, in their order, so that micro-batches add up to the bits of one large batch.
/// Blocks of `dy` and `x` are copied to scratch.
pub(in super::super) fn weight_grad(cpu: &Cpu, x: Cells<f32>, dy: Cells<f32>, dw: Cells<f32>, e: Extent) {
    e.check(x.len(), dy.len(), dw.len());
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
