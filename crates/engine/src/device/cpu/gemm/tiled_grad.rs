//! `dx = begin + dy w` in tiles: rows are rounded once for all inputs and threads, and pairs of the weights' rows interleaved
//! for all rows.
#![allow(unsafe_code)] // Threads write disjoint blocks; kernels take raw pointers.

use std::ops::Range;

use super::gradients::{interleave_outputs, round_row};
use super::outer::OUTER_COLUMNS;
use super::tile_outer::{TileOuter, tile_outer};
use super::tiled::{OUTPUTS, ROWS, place, tasks};
use super::{Begin, Extent, chunks};
use crate::device::cpu::Cpu;
use crate::device::cpu::cells::Cells;
use crate::device::cpu::simd::TILE;
use lathe_plan::PRODUCT_SCRATCH;

/// Outputs that are summed apart: their weights for some inputs, 32 KiB, stay in the first-level cache.
const TERMS: usize = 512;

const _: () = assert!(TERMS / 2 * OUTER_COLUMNS <= PRODUCT_SCRATCH);
const _: () = assert!(OUTER_COLUMNS == OUTPUTS, "tasks are cut where tiles are");

/// `dx = begin + dy w`.
pub(super) fn input_grad(cpu: &Cpu, dy: Cells<f32>, w: Cells<u16>, dx: Cells<f32>, e: Extent, begin: Begin) {
    let panel = cpu.panel().cast::<u32>();
    for rows in chunks(0..e.rows, ROWS) {
        // Few rows fit as a whole, so that one pass goes through the weights.
        let blocks = (panel.len() / room(rows.len(), TERMS)).max(1);
        for outputs in chunks(0..e.outputs, blocks * TERMS) {
            let begin = if outputs.start == 0 { begin } else { Begin::Keep };
            let part = Part { rows: rows.clone(), outputs, rounded: panel, dy, w, dx, e, begin };
            part.round(cpu);
            part.multiply(cpu);
        }
    }
}

/// Pairs of the panel that so many outputs of these rows take.
fn room(rows: usize, outputs: usize) -> usize {
    rows.next_multiple_of(TILE) * stride(outputs)
}

/// Pairs from a row to the next one: a whole number of tiles, and one more, since rows that are a power of two apart meet in the
/// same few places of a cache.
fn stride(outputs: usize) -> usize {
    outputs.div_ceil(2).next_multiple_of(TILE) + TILE
}

/// Some rows and outputs.
struct Part {
    rows: Range<usize>,
    outputs: Range<usize>,
    /// The rows, rounded to bf16, [`stride`] apart.
    rounded: Cells<u32>,
    dy: Cells<f32>,
    w: Cells<u16>,
    dx: Cells<f32>,
    e: Extent,
    begin: Begin,
}

impl Part {
    fn round(&self, cpu: &Cpu) {
        let (e, outputs, stride) = (self.e, &self.outputs, stride(self.outputs.len()));
        cpu.run_ranges(self.rows.len(), TILE, |level, rows, _| {
            for row in rows {
                let at = (self.rows.start + row) * e.y_stride;
                let from = self.dy.part(at + outputs.start..at + outputs.end);
                // SAFETY: this row of the panel is this task's, and nobody writes dy.
                unsafe { round_row(level, from, self.rounded.rows(row..row + 1, stride)) };
            }
        });
    }

    fn multiply(&self, cpu: &Cpu) {
        let tasks = tasks(cpu, self.e.inputs);
        cpu.run(tasks.len(), |level, task, scratch| {
            // Rows of weights are read in the order of memory, as far as a task has inputs.
            for outputs in chunks(self.outputs.clone(), TERMS) {
                // As far as tiles reach.
                let pairs = outputs.len().div_ceil(2).next_multiple_of(TILE);
                let near = scratch.part(0..pairs * OUTER_COLUMNS).cast::<u32>();
                for inputs in chunks(tasks.range(task), OUTER_COLUMNS) {
                    // SAFETY: the scratch is this task's.
                    unsafe { interleave_outputs(level, self.w, self.e.inputs, &outputs, &inputs, near) };
                    let first = outputs.start - self.outputs.start;
                    let begin = if first == 0 { self.begin } else { Begin::Keep };
                    let t = TileOuter {
                        k: pairs,
                        a: self.rounded.part(first / 2..self.rounded.len()).ptr(),
                        a_row: stride(self.outputs.len()),
                        b: near.ptr(),
                        b_row: OUTER_COLUMNS,
                        to: place(begin, self.dx, self.e.x_stride, self.rows.start, inputs.start),
                    };
                    // SAFETY: `check` saw that rows and columns exist; this task owns its inputs of dx and its scratch.
                    unsafe { tile_outer(level, self.rows.len(), inputs.len(), t) };
                }
            }
        });
    }
}
