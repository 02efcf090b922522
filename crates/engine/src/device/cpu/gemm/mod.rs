//! Products of activations with weights, and the gradients of both, cut into tasks for threads and into blocks for
//! the caches. All matrices are row-major, as files hold them; a block of a weight is widened or copied to a
//! thread's scratch where many rows use it. See `tile` for why the cuts do not change a bit.
#![allow(unsafe_code)] // Threads write disjoint blocks; tiles take raw pointers.

mod tile;

use std::ops::Range;

use super::cells::Cells;
use super::{Cpu, Level};
use crate::device::Start;
use tile::widen;
use tile::{DOT_COLUMNS, DOT_ROWS, OUTER_COLUMNS, OUTER_ROWS};
pub(super) use tile::{Dots, Outer, dots, outer};

/// The most terms whose lanes are summed apart: a block of five weights and one of five rows stay in the first-level
/// cache.
const MOST_TERMS: usize = 1024;
/// Rows of a task: a block of them stays in the second-level cache.
const ROW_BLOCK: usize = 120;
/// Up to here weights are read where they lie, beyond it from scratch.
const FEW: usize = 2 * DOT_ROWS;
/// Weights' rows that few rows are given at a time: the second block of rows finds them in the second-level cache. A
/// multiple of the columns of every block of few rows.
const FEW_COLUMNS: usize = 120;
/// Terms of a block of an outer product: with its columns they stay in the first-level cache.
const OUTER_TERMS: usize = 256;
/// Outputs of a task of the weights' gradient.
const OUTPUT_BLOCK: usize = 7 * OUTER_ROWS;

/// A weight.
#[derive(Clone, Copy)]
pub(super) enum Matrix {
    F32(Cells<f32>),
    BF16(Cells<u16>),
}

impl Matrix {
    fn len(self) -> usize {
        match self {
            Matrix::F32(w) => w.len(),
            Matrix::BF16(w) => w.len(),
        }
    }

    /// `to[..] = ` the elements from `at`, widened.
    pub(super) fn copy(self, level: Level, at: usize, to: Cells<f32>) {
        // SAFETY: `part` checks the range; nobody writes a weight while an operation reads it, and `to` is the caller's.
        unsafe {
            match self {
                Matrix::F32(w) => to.write().copy_from_slice(w.part(at..at + to.len()).read()),
                Matrix::BF16(w) => widen(level, w.part(at..at + to.len()).ptr(), to.ptr_mut(), to.len()),
            }
        }
    }
}

/// The extent of a product: `x [rows, inputs]`, `w [outputs, inputs]`, `y [rows, outputs]`, with the distance
/// between rows of the narrow side (`mid` of an adapter has a wider stride than its rank).
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub rows: usize,
    pub outputs: usize,
    pub inputs: usize,
    pub x_stride: usize,
    pub y_stride: usize,
}

impl Extent {
    pub(super) fn dense(rows: usize, outputs: usize, inputs: usize) -> Extent {
        Extent { rows, outputs, inputs, x_stride: inputs, y_stride: outputs }
    }

    /// Panics where a buffer is smaller than the extent says: a mistake of the engine.
    fn check(&self, x: usize, y: usize, w: usize) {
        let Extent { rows, outputs, inputs, x_stride, y_stride } = *self;
        assert!(inputs <= x_stride && outputs <= y_stride, "strides are shorter than rows");
        assert!(rows == 0 || (rows - 1) * x_stride + inputs <= x, "x is too small");
        assert!(rows == 0 || (rows - 1) * y_stride + outputs <= y, "y is too small");
        assert!(outputs * inputs <= w, "w is too small");
    }
}

/// What the rows of `y` begin with.
#[derive(Clone, Copy)]
pub(super) enum Begin {
    Zero,
    Keep,
    Bias(Cells<f32>),
    Copy(Cells<f32>),
}

impl Begin {
    pub(super) fn of(cpu: &Cpu, start: Start) -> Begin {
        match start {
            Start::Zero => Begin::Zero,
            Start::Keep => Begin::Keep,
            Start::Bias(bias) => Begin::Bias(cpu.f32(bias)),
            Start::Copy(from) => Begin::Copy(cpu.f32(from)),
        }
    }

    /// Fills `y[rows, columns]`.
    fn fill(self, y: Cells<f32>, stride: usize, rows: Range<usize>, columns: Range<usize>) {
        for row in rows {
            let at = |columns: &Range<usize>| row * stride + columns.start..row * stride + columns.end;
            // SAFETY: the task owns these rows and columns of y; bias and residual are other buffers.
            unsafe {
                match self {
                    Begin::Keep => return,
                    Begin::Zero => y.part(at(&columns)).write().fill(0.0),
                    Begin::Bias(b) => {
                        y.part(at(&columns)).write().copy_from_slice(b.part(columns.clone()).read())
                    }
                    Begin::Copy(c) => {
                        y.part(at(&columns)).write().copy_from_slice(c.part(at(&columns)).read())
                    }
                }
            }
        }
    }
}

/// Cuts rows and columns of a result into blocks, so that there are some tasks for each thread.
struct Grid {
    rows: usize,
    row_block: usize,
    row_blocks: usize,
    columns: usize,
    column_block: usize,
}

impl Grid {
    /// Blocks of columns are multiples of `grain`.
    fn new(rows: usize, row_block: usize, columns: usize, grain: usize, threads: usize) -> Grid {
        let row_blocks = rows.div_ceil(row_block).max(1);
        let wanted = if threads == 1 { 1 } else { (4 * threads).div_ceil(row_blocks) };
        let column_block = columns.div_ceil(wanted).next_multiple_of(grain);
        Grid { rows, row_block, row_blocks, columns, column_block }
    }

    fn tasks(&self) -> usize {
        self.row_blocks * self.columns.div_ceil(self.column_block)
    }

    fn task(&self, number: usize) -> (Range<usize>, Range<usize>) {
        let row = number % self.row_blocks * self.row_block;
        let column = number / self.row_blocks * self.column_block;
        (row..(row + self.row_block).min(self.rows), column..(column + self.column_block).min(self.columns))
    }
}

fn chunks(of: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let end = of.end;
    of.step_by(size).map(move |start| start..(start + size).min(end))
}

/// How many terms of a sum of `terms` lie in one block: about equal blocks, each a multiple of every vector.
fn sum_block(terms: usize) -> usize {
    terms.div_ceil(terms.div_ceil(MOST_TERMS).max(1)).next_multiple_of(64)
}

/// `y = begin + x w^T`.
pub(super) fn linear(cpu: &Cpu, x: Cells<f32>, w: Matrix, y: Cells<f32>, e: Extent, begin: Begin) {
    e.check(x.len(), y.len(), w.len());
    let grid = Grid::new(e.rows, ROW_BLOCK, e.outputs, 2 * DOT_COLUMNS, cpu.pool_threads());
    cpu.run(grid.tasks(), |level, task, scratch| {
        let (rows, outputs) = grid.task(task);
        begin.fill(y, e.y_stride, rows.clone(), outputs.clone());
        for k in chunks(0..e.inputs, sum_block(e.inputs)) {
            // SAFETY: `check` saw that weights, rows and columns exist; this task owns its block of y.
            unsafe {
                let a = x.ptr().add(rows.start * e.x_stride + k.start);
                let c = |output: usize| y.ptr_mut().add(rows.start * e.y_stride + output);
                let at = |output: usize| output * e.inputs + k.start;
                let (a_row, c_row) = (e.x_stride, e.y_stride);
                match w {
                    Matrix::F32(w) => {
                        for some in chunks(outputs.clone(), DOT_COLUMNS) {
                            let (b, c) = (w.ptr().add(at(some.start)), c(some.start));
                            let t = Dots { k: k.len(), a, a_row, b, b_row: e.inputs, c, c_row };
                            dots(level, rows.len(), some.len(), t);
                        }
                    }
                    Matrix::BF16(w) if rows.len() <= FEW => {
                        for some in chunks(outputs.clone(), FEW_COLUMNS) {
                            let (b, c) = (w.ptr().add(at(some.start)), c(some.start));
                            let t = Dots { k: k.len(), a, a_row, b, b_row: e.inputs, c, c_row };
                            tile::dots_bf16(level, rows.len(), some.len(), t);
                        }
                    }
                    Matrix::BF16(w) => {
                        for some in chunks(outputs.clone(), DOT_COLUMNS) {
                            for (i, output) in some.clone().enumerate() {
                                let to = scratch.part(i * MOST_TERMS..i * MOST_TERMS + k.len());
                                widen(level, w.ptr().add(at(output)), to.ptr_mut(), k.len());
                            }
                            let (b, c) = (scratch.ptr(), c(some.start));
                            let t = Dots { k: k.len(), a, a_row, b, b_row: MOST_TERMS, c, c_row };
                            dots(level, rows.len(), some.len(), t);
                        }
                    }
                }
            }
        }
    });
}

/// `dx = (dx or 0) + dy w`: contracts over outputs, in their order.
pub(super) fn input_grad(cpu: &Cpu, dy: Cells<f32>, w: Matrix, dx: Cells<f32>, e: Extent, begin: Begin) {
    e.check(dx.len(), dy.len(), w.len());
    let grid = Grid::new(e.rows, ROW_BLOCK, e.inputs, OUTER_COLUMNS, cpu.pool_threads());
    cpu.run(grid.tasks(), |level, task, scratch| {
        let (rows, inputs) = grid.task(task);
        begin.fill(dx, e.x_stride, rows.clone(), inputs.clone());
        for outputs in chunks(0..e.outputs, OUTER_TERMS) {
            for some in chunks(inputs.clone(), OUTER_COLUMNS) {
                for (i, output) in outputs.clone().enumerate() {
                    let to = scratch.part(i * OUTER_COLUMNS..i * OUTER_COLUMNS + some.len());
                    w.copy(level, output * e.inputs + some.start, to);
                }
                // SAFETY: `check` saw that rows and columns exist; this task owns its block of dx.
                unsafe {
                    let t = Outer {
                        k: outputs.len(),
                        a: dy.ptr().add(rows.start * e.y_stride + outputs.start),
                        a_row: e.y_stride,
                        a_k: 1,
                        b: scratch.ptr(),
                        b_row: OUTER_COLUMNS,
                        c: dx.ptr_mut().add(rows.start * e.x_stride + some.start),
                        c_row: e.x_stride,
                    };
                    outer(level, rows.len(), some.len(), t);
                }
            }
        }
    });
}

/// `dw += dy^T x`: contracts over rows, in their order, so that micro-batches add up to the bits of one large batch.
/// Blocks of `dy` and `x` are copied to scratch.
pub(super) fn weight_grad(cpu: &Cpu, x: Cells<f32>, dy: Cells<f32>, dw: Cells<f32>, e: Extent) {
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
