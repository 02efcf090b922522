//! Products of activations with weights, and the gradients of both, cut into tasks for threads and into blocks for
//! the caches. All matrices are row-major, as files hold them; a block of a weight is widened or copied to a
//! thread's scratch where many rows use it. See `dots` and `outer` for why the cuts do not change a bit.
//!
//! From [`Level::Avx512Bf16`] on what is multiplied with a bf16 weight is rounded to bf16 first, and pairs are multiplied;
//! at [`Level::Amx`] in tiles, and so are weights of few bits.
#![allow(unsafe_code)] // Threads write disjoint blocks; tiles take raw pointers.

mod ahead;
mod dots;
mod forward;
mod gradients;
mod ints;
mod outer;
mod quantized;
mod terms;
mod tile_dots;
mod tile_gated;
mod tile_ints;
mod tile_outer;
mod tile_pack;
mod tile_sums;
mod tile_weight;
mod tiled;
mod tiled_grad;
mod tiled_weight;

use std::ops::Range;

use super::cells::Cells;
use super::{Cpu, Level};
use crate::device::Start;
pub(super) use dots::{Dots, dots};
pub(super) use forward::{gated_linear, linear};
pub(super) use gradients::{input_grad, weight_grad};
pub(super) use outer::{Outer, outer};
pub(super) use quantized::{Quantized, quantize};
use terms::widen;
pub(super) use tile_pack::{TILE_TERMS, pack_pairs};

/// Rows of a task: a block of them stays in the second-level cache.
const ROW_BLOCK: usize = 120;

/// A weight.
#[derive(Clone, Copy)]
pub(super) enum Matrix {
    F32(Cells<f32>),
    BF16(Cells<u16>),
    Int(Quantized),
}

impl Matrix {
    fn len(self) -> usize {
        match self {
            Matrix::F32(w) => w.len(),
            Matrix::BF16(w) => w.len(),
            Matrix::Int(w) => w.outputs * w.inputs,
        }
    }

    /// `to[..] = ` the elements from `at`, all of one row, widened.
    pub(super) fn copy(self, level: Level, at: usize, to: Cells<f32>) {
        // SAFETY: `part` checks the range; nobody writes a weight while an operation reads it, and `to` is the caller's.
        unsafe {
            match self {
                Matrix::F32(w) => to.write().copy_from_slice(w.part(at..at + to.len()).read()),
                Matrix::Int(w) => w.copy(at, to),
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
