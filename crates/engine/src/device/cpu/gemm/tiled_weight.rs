//! `dw += dy^T x` in tiles: rows are taken in steps of one sequence each, `dy` is turned once for all inputs and threads.
#![allow(unsafe_code)] // Threads write disjoint blocks; kernels take raw pointers.

use std::ops::Range;

use super::tile_weight::{StepRows, TileWeight, pair_rows, tile_weight, turn_rows};
use super::tiled::{OUTPUTS, tasks};
use super::{Extent, chunks};
use crate::device::cpu::Cpu;
use crate::device::cpu::cells::Cells;
use crate::device::cpu::simd::{Block, TILE};
use crate::device::summed_together;
use lathe_plan::{PRODUCT_PANEL, PRODUCT_SCRATCH};

/// Steps whose rows are packed at a time. What `dw` holds is carried on from one part to the next, so the cut changes no bit.
const STEPS: usize = 32;
/// Groups of outputs that a task turns: so much of each row of `dy` lies in one piece.
const TURNED: usize = 4;

const _: () = assert!(2 * STEPS * TILE * TILE <= PRODUCT_SCRATCH);
const _: () = assert!(2 * STEPS * TILE * TILE <= PRODUCT_PANEL);
const _: () = assert!(OUTPUTS == 2 * TILE, "two tiles of outputs and of inputs");

/// `dw += dy^T x`, the rows' places in their sequences being `positions`.
pub(super) fn weight_grad(
    cpu: &Cpu,
    x: Cells<f32>,
    dy: Cells<f32>,
    dw: Cells<f32>,
    e: Extent,
    positions: &[u32],
) {
    let panel = cpu.panel().cast::<Block>();
    let mut all = summed_together(positions);
    loop {
        let mut steps: [Range<usize>; STEPS] = std::array::from_fn(|_| 0..0);
        let count = steps.iter_mut().zip(&mut all).map(|(step, rows)| *step = rows).count();
        if count == 0 {
            return;
        }
        let part = Part { steps: &steps[..count], x, dy, dw, e, turned: panel };
        for outputs in chunks(0..e.outputs, panel.len() / (2 * count) * OUTPUTS) {
            part.turn(cpu, &outputs);
            part.multiply(cpu, &outputs);
        }
    }
}

/// Some steps of the sum.
struct Part<'a> {
    steps: &'a [Range<usize>],
    x: Cells<f32>,
    dy: Cells<f32>,
    dw: Cells<f32>,
    e: Extent,
    /// `dy` of some outputs: for [`OUTPUTS`] of them two tiles for every step, then the next ones.
    turned: Cells<Block>,
}

impl Part<'_> {
    fn turn(&self, cpu: &Cpu, outputs: &Range<usize>) {
        let (e, tiles) = (self.e, 2 * self.steps.len());
        cpu.run_ranges(outputs.len().div_ceil(OUTPUTS), TURNED, |level, groups, _| {
            for (step, rows) in self.steps.iter().enumerate() {
                for group in groups.clone() {
                    let output = outputs.start + group * OUTPUTS;
                    let columns = (outputs.end - output).min(OUTPUTS);
                    let at = rows.start * e.y_stride + output;
                    let x = self.dy.part(at..(rows.end - 1) * e.y_stride + output + columns).ptr();
                    let at = group * tiles + 2 * step;
                    let to = self.turned.part(at..at + 2).ptr_mut();
                    let t = StepRows { x, x_row: e.y_stride, rows: rows.len(), columns, to };
                    // SAFETY: `part` saw that they exist; these tiles of the panel are this task's.
                    unsafe { turn_rows(level, t) };
                }
            }
        });
    }

    fn multiply(&self, cpu: &Cpu, outputs: &Range<usize>) {
        let (e, tasks) = (self.e, tasks(cpu, self.e.inputs));
        cpu.run(tasks.len(), |level, task, scratch| {
            let near = scratch.part(0..2 * self.steps.len() * TILE * TILE).cast::<Block>();
            for inputs in chunks(tasks.range(task), 2 * TILE) {
                for (step, rows) in self.steps.iter().enumerate() {
                    let at = rows.start * e.x_stride + inputs.start;
                    let x = self.x.part(at..(rows.end - 1) * e.x_stride + inputs.end).ptr();
                    let to = near.part(2 * step..2 * step + 2).ptr_mut();
                    let t = StepRows { x, x_row: e.x_stride, rows: rows.len(), columns: inputs.len(), to };
                    // SAFETY: `part` saw that they exist; the scratch is this task's.
                    unsafe { pair_rows(level, t) };
                }
                let c = self.dw.part(outputs.start * e.inputs + inputs.start..self.dw.len()).ptr_mut();
                let (a, b) = (self.turned.ptr(), near.ptr());
                let t = TileWeight { steps: self.steps.len(), a, b, c, c_row: e.inputs };
                // SAFETY: `check` saw that outputs and inputs exist; this task owns its inputs of dw.
                unsafe { tile_weight(level, outputs.len(), inputs.len(), t) };
            }
        });
    }
}
