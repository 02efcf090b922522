//! `dx = begin + dy w` in tiles: rows are rounded once for all inputs and threads, and pairs of the weights' rows interleaved
//! for all rows.
#![allow(unsafe_code)] // Threads write disjoint blocks; kernels take raw pointers.

use std::ops::Range;

use super::terms::{interleave, narrow};
use super::tile_outer::{TileOuter, tile_outer};
use super::tiled::{OUTPUTS as INPUTS, ROWS, place, tasks};
use super::{Begin, Extent, chunks};
use crate::device::cpu::cells::Cells;
use crate::device::cpu::simd::TILE;
use crate::device::cpu::{Cpu, Level};
use lathe_plan::PRODUCT_SCRATCH;

/// Outputs that are summed apart: their weights for some inputs, 32 KiB, stay in the first-level cache.
const TERMS: usize = 512;

const _: () = assert!(TERMS / 2 * INPUTS <= PRODUCT_SCRATCH);

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
    /// Rounds the rows. An odd output comes with a zero, and so do those that a tile has more.
    fn round(&self, cpu: &Cpu) {
        let (e, count, stride) = (self.e, self.outputs.len(), stride(self.outputs.len()));
        cpu.run_ranges(self.rows.len(), TILE, |level, rows, _| {
            for row in rows {
                let at = (self.rows.start + row) * e.y_stride + self.outputs.start;
                let from = self.dy.part(at..at + count);
                let to = self.rounded.part(row * stride..(row + 1) * stride).ptr_mut().cast::<u16>();
                // SAFETY: the range was checked, and this row of the panel is this task's.
                unsafe {
                    narrow(level, from.ptr(), to, count);
                    to.add(count).write_bytes(0, 2 * stride - count);
                }
            }
        });
    }

    fn multiply(&self, cpu: &Cpu) {
        let tasks = tasks(cpu, self.e.inputs);
        cpu.run(tasks.len(), |level, task, scratch| {
            let near = scratch.part(0..TERMS / 2 * INPUTS).cast::<u32>();
            // Rows of weights are read in the order of memory, as far as a task has inputs.
            for outputs in chunks(self.outputs.clone(), TERMS) {
                for inputs in chunks(tasks.range(task), INPUTS) {
                    let pairs = self.interleave(level, &inputs, &outputs, near);
                    let first = outputs.start - self.outputs.start;
                    let begin = if first == 0 { self.begin } else { Begin::Keep };
                    let t = TileOuter {
                        k: pairs,
                        a: self.rounded.part(first / 2..self.rounded.len()).ptr(),
                        a_row: stride(self.outputs.len()),
                        b: near.ptr(),
                        b_row: INPUTS,
                        to: place(begin, self.dx, self.e.x_stride, self.rows.start, inputs.start),
                    };
                    // SAFETY: `check` saw that rows and columns exist; this task owns its inputs of dx and its scratch.
                    unsafe { tile_outer(level, self.rows.len(), inputs.len(), t) };
                }
            }
        });
    }

    /// Pairs of these outputs' weights side by side, as far as tiles reach; returns how many.
    fn interleave(
        &self,
        level: Level,
        inputs: &Range<usize>,
        outputs: &Range<usize>,
        near: Cells<u32>,
    ) -> usize {
        let zeros = [0; INPUTS];
        let row = |output: usize| match output < outputs.end {
            true => {
                let at = output * self.e.inputs + inputs.start;
                self.w.part(at..at + inputs.len()).ptr()
            }
            false => zeros.as_ptr(),
        };
        let pairs = outputs.len().div_ceil(2).next_multiple_of(TILE);
        for pair in 0..pairs {
            let (output, to) = (outputs.start + 2 * pair, near.part(pair * INPUTS..(pair + 1) * INPUTS));
            // SAFETY: rows and places were checked; the scratch is the task's.
            unsafe { interleave(level, row(output), row(output + 1), to.ptr_mut(), inputs.len()) };
        }
        pairs
    }
}
