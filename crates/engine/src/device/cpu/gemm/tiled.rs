//! `y = begin + x w^T` in tiles: rows are packed for all outputs of a task, weights are loaded where they lie.
#![allow(unsafe_code)] // Threads write disjoint blocks; kernels take raw pointers.

use std::ops::Range;

use super::quantized::Bits;
use super::tile_dots::{TILE_TERMS, TileDots, pack_pairs, tile_dots};
use super::tile_ints::{IntPanel, IntTileDots, pack_ints, tile_int4, tile_int8};
use super::{Begin, Extent, Grid, Matrix, Quantized, chunks};
use crate::device::cpu::cells::Cells;
use crate::device::cpu::simd::{Block, TILE};
use crate::device::cpu::{Cpu, Level};
use lathe_plan::QUANT_GROUP;

/// Rows of a task.
const ROWS: usize = 6 * TILE;
/// Outputs of a task are a multiple of this.
const OUTPUTS: usize = 2 * TILE;
/// The most terms that are summed apart: those of [`ROWS`] rows, packed, stay in a thread's scratch and the second-level
/// cache.
const MOST_TERMS: usize = 1024;

const _: () = assert!(ROWS * MOST_TERMS / 2 <= lathe_plan::PRODUCT_SCRATCH);

/// Whether tiles take this weight at this level.
pub(super) fn takes(level: Level, w: Matrix, inputs: usize) -> bool {
    level.has_tiles()
        && match w {
            Matrix::F32(_) => false,
            Matrix::BF16(_) => level.takes_pairs(inputs),
            Matrix::Int(_) => true,
        }
}

/// `y = begin + x w^T`.
///
/// # Panics
/// Tiles do not take this weight: a mistake of the caller.
pub(super) fn linear(cpu: &Cpu, x: Cells<f32>, w: Matrix, y: Cells<f32>, e: Extent, begin: Begin) {
    let grid = Grid::new(e.rows, ROWS, e.outputs, OUTPUTS, cpu.pool_threads());
    let grain = if matches!(w, Matrix::Int(_)) { QUANT_GROUP } else { 2 * TILE_TERMS };
    // About equal blocks.
    let block = e.inputs.div_ceil(e.inputs.div_ceil(MOST_TERMS).max(1)).next_multiple_of(grain);
    cpu.run(grid.tasks(), |level, task, scratch| {
        let (rows, outputs) = grid.task(task);
        begin.fill(y, e.y_stride, rows.clone(), outputs.clone());
        // Few rows fit as a whole, so that one pass goes through the weights.
        let at_once = if room(w, rows.len(), e.inputs) <= scratch.len() { e.inputs.max(1) } else { block };
        for terms in chunks(0..e.inputs, at_once) {
            let part = Part { level, rows: rows.clone(), outputs: outputs.clone(), terms, block, x, y, e };
            // SAFETY: `check` saw that weights, rows and columns exist; this task owns its block of y and its scratch.
            unsafe {
                match w {
                    Matrix::BF16(w) => part.pairs(w, scratch),
                    Matrix::Int(w) => part.ints(w, scratch),
                    Matrix::F32(_) => unreachable!("`takes` refuses such weights"),
                }
            }
        }
    });
}

/// Elements of scratch that the rows take, packed.
fn room(w: Matrix, rows: usize, terms: usize) -> usize {
    let rows = rows.next_multiple_of(TILE);
    match w {
        Matrix::Int(_) => rows * terms.div_ceil(QUANT_GROUP) * (QUANT_GROUP / 4 + 2),
        _ => rows * terms.div_ceil(TILE_TERMS) * TILE,
    }
}

/// Rows, outputs and terms of a task, whose sums are taken in blocks of `block`.
struct Part {
    level: Level,
    rows: Range<usize>,
    outputs: Range<usize>,
    terms: Range<usize>,
    block: usize,
    x: Cells<f32>,
    y: Cells<f32>,
    e: Extent,
}

impl Part {
    /// Adds the products with a bf16 weight.
    ///
    /// # Safety
    /// The extents are inside the matrices, nobody else has this block of `y` or `scratch`.
    unsafe fn pairs(&self, w: Cells<u16>, scratch: Cells<f32>) {
        let (e, terms) = (self.e, self.terms.len());
        let panel = scratch.part(0..room(Matrix::BF16(w), self.rows.len(), terms)).ptr_mut().cast::<Block>();
        let first = self.outputs.start * e.inputs + self.terms.start;
        // SAFETY: the panel has room for these tiles; the rest is the caller's.
        unsafe {
            for rows in chunks(0..self.rows.len(), TILE) {
                let to = panel.add(rows.start / TILE * terms.div_ceil(TILE_TERMS));
                pack_pairs(self.level, self.row(rows.start), e.x_stride, rows.len(), terms, to);
            }
            let t = TileDots {
                terms,
                block: self.block,
                w: w.part(first..w.len()).ptr(),
                w_row: e.inputs,
                x: panel,
                y: self.result(),
                y_row: e.y_stride,
            };
            tile_dots(self.level, self.rows.len(), self.outputs.len(), t);
        }
    }

    /// Adds the products with a weight of few bits.
    ///
    /// # Safety
    /// As above.
    unsafe fn ints(&self, w: Quantized, scratch: Cells<f32>) {
        let (e, first_group) = (self.e, self.terms.start / QUANT_GROUP);
        let groups = self.terms.len().div_ceil(QUANT_GROUP);
        let panel = IntPanel::within(scratch, self.rows.len().div_ceil(TILE) * groups);
        let w_row = w.groups() * w.group_bytes();
        let codes = self.outputs.start * w_row + first_group * w.group_bytes();
        let scales = self.outputs.start * w.groups() + first_group;
        // SAFETY: as above.
        unsafe {
            for rows in chunks(0..self.rows.len(), TILE) {
                let to = panel.from(rows.start / TILE * groups);
                let bias = w.bits.bias();
                pack_ints(
                    self.level,
                    self.row(rows.start),
                    e.x_stride,
                    rows.len(),
                    self.terms.len(),
                    bias,
                    to,
                );
            }
            let t = IntTileDots {
                groups,
                block: self.block / QUANT_GROUP,
                w: w.codes.part(codes..w.codes.len()).ptr(),
                w_row,
                w_scales: w.scales.part(scales..w.scales.len()).ptr(),
                w_scales_row: w.groups(),
                x: panel,
                y: self.result(),
                y_row: e.y_stride,
            };
            match w.bits {
                Bits::Eight => tile_int8(self.level, self.rows.len(), self.outputs.len(), t),
                Bits::Four => tile_int4(self.level, self.rows.len(), self.outputs.len(), t),
            }
        }
    }

    /// The terms of a row.
    fn row(&self, i: usize) -> *const f32 {
        let at = (self.rows.start + i) * self.e.x_stride + self.terms.start;
        self.x.part(at..self.x.len()).ptr()
    }

    /// Where the block of `y` begins.
    fn result(&self) -> *mut f32 {
        let at = self.rows.start * self.e.y_stride + self.outputs.start;
        self.y.part(at..self.y.len()).ptr_mut()
    }
}
