//! `y = begin + x w^T` in tiles: rows are packed once for all outputs and threads, weights are loaded where they lie.
#![allow(unsafe_code)] // Threads write disjoint blocks; kernels take raw pointers.

use std::ops::Range;

use super::quantized::Bits;
use super::tile_dots::{TileDots, near_tiles, tile_dots};
use super::tile_gated::{SUMS, TileGated, tile_gated};
use super::tile_ints::{IntPanel, IntTileDots, pack_ints, tile_int4, tile_int8};
use super::tile_pack::{TILE_TERMS, pack_pairs};
use super::tile_sums::{First, Place};
use super::{Begin, Extent, Matrix, Quantized, chunks};
use crate::device::Activation;
use crate::device::cpu::cells::Cells;
use crate::device::cpu::simd::{Block, TILE};
use crate::device::cpu::{Cpu, Level};
use lathe_plan::{PRODUCT_PANEL, PRODUCT_SCRATCH, QUANT_GROUP};

/// Rows that go through the weights together.
pub(super) const ROWS: usize = 512;
/// Outputs of a task are a multiple of this.
pub(super) const OUTPUTS: usize = 2 * TILE;
/// The most terms that are summed apart.
const MOST_TERMS: usize = 1024;

const _: () = assert!(ROWS * MOST_TERMS / 2 <= PRODUCT_PANEL);
const _: () = assert!(near_tiles(ROWS) * TILE * TILE + ROWS * SUMS <= PRODUCT_SCRATCH);

/// Whether tiles take this weight at this level.
pub(super) fn takes(level: Level, w: Matrix, inputs: usize) -> bool {
    level.has_tiles()
        && inputs > 0
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
    let grain = if matches!(w, Matrix::Int(_)) { QUANT_GROUP } else { 2 * TILE_TERMS };
    let block = sum_block(e.inputs, grain);
    let panel = cpu.panel();
    for rows in chunks(0..e.rows, ROWS) {
        // Few rows fit as a whole, so that one pass goes through the weights.
        let blocks = (panel.len() / room(w, rows.len(), block)).max(1);
        for terms in chunks(0..e.inputs, blocks * block) {
            let begin = if terms.start == 0 { begin } else { Begin::Keep };
            let part = Part { rows: rows.clone(), terms, block, panel, x, y, e, begin };
            match w {
                Matrix::BF16(w) => part.pairs(cpu, w),
                Matrix::Int(w) => part.ints(cpu, w),
                Matrix::F32(_) => unreachable!("`takes` refuses such weights"),
            }
        }
    }
}

/// Rows that a gated layer of these weights takes at a time, with all of their terms in the panel; `None` where it does not pay.
pub(super) fn takes_gated(cpu: &Cpu, w: [Matrix; 2], e: Extent) -> Option<usize> {
    let [Matrix::BF16(_), Matrix::BF16(_)] = w else { return None };
    let fit = (cpu.panel().len() / room(w[0], TILE, e.inputs.max(1)) * TILE).min(ROWS);
    // Few rows leave little to save; with some at a time weights would be read more often than by two products.
    let many = e.rows > 2 * TILE && fit >= e.rows.min(ROWS);
    (takes(cpu.level, w[0], e.inputs) && many && e.outputs.is_multiple_of(TILE)).then_some(fit)
}

/// `out = activation(x gate^T) * (x up^T)`, for so many rows at a time.
pub(super) fn gated_linear(
    cpu: &Cpu,
    activation: Activation,
    x: Cells<f32>,
    [gate, up]: [Cells<u16>; 2],
    out: Cells<f32>,
    e: Extent,
    fit: usize,
) {
    let block = sum_block(e.inputs, 2 * TILE_TERMS);
    for rows in chunks(0..e.rows, fit) {
        let begin = Begin::Zero;
        let part =
            Part { rows: rows.clone(), terms: 0..e.inputs, block, panel: cpu.panel(), x, y: out, e, begin };
        let panel = part.pack_pairs(cpu);
        part.multiply(cpu, |level, outputs, scratch| {
            let near = near_tiles(ROWS) * TILE * TILE;
            let to = scratch.part(near..near + rows.len() * SUMS);
            let first = outputs.start * e.inputs;
            let t = TileDots {
                terms: e.inputs,
                block,
                w: gate.part(first..gate.len()).ptr(),
                w_row: e.inputs,
                x: panel.ptr(),
                to: Place { y: to.ptr_mut(), y_row: SUMS, first: First::Zero },
                near: scratch.part(0..near).ptr_mut().cast(),
            };
            let up = up.part(first..up.len()).ptr();
            let out = part.place(outputs.start).y;
            let t = TileGated { gate: t, up, activation, out, out_row: e.y_stride };
            // SAFETY: as in `pairs`.
            unsafe { tile_gated(level, rows.len(), outputs.len(), t) };
        });
    }
}

/// Terms that are summed apart: about equal blocks.
fn sum_block(inputs: usize, grain: usize) -> usize {
    inputs.div_ceil(inputs.div_ceil(MOST_TERMS)).next_multiple_of(grain)
}

/// Elements of the panel that so many terms of these rows take.
fn room(w: Matrix, rows: usize, terms: usize) -> usize {
    let rows = rows.next_multiple_of(TILE);
    match w {
        Matrix::Int(_) => rows * terms.div_ceil(QUANT_GROUP) * (QUANT_GROUP / 4 + 2),
        _ => rows * terms.div_ceil(TILE_TERMS) * TILE,
    }
}

/// Some rows and terms, whose sums are taken in blocks of `block`.
struct Part {
    rows: Range<usize>,
    terms: Range<usize>,
    block: usize,
    panel: Cells<f32>,
    x: Cells<f32>,
    y: Cells<f32>,
    e: Extent,
    begin: Begin,
}

impl Part {
    /// The rows as they meet bf16 weights.
    fn pack_pairs(&self, cpu: &Cpu) -> Cells<Block> {
        let (e, terms) = (self.e, self.terms.len());
        let tiles = terms.div_ceil(TILE_TERMS);
        let panel = self.panel.cast::<Block>().part(0..self.rows.len().div_ceil(TILE) * tiles);
        self.pack(cpu, |level, rows, x| {
            let to = panel.part(rows.start / TILE * tiles..panel.len());
            // SAFETY: these rows' part of the panel is this task's; `check` saw that the rows exist.
            unsafe { pack_pairs(level, x, e.x_stride, rows.len(), terms, to.ptr_mut()) };
        });
        panel
    }

    /// The products with a bf16 weight.
    fn pairs(&self, cpu: &Cpu, w: Cells<u16>) {
        let (e, terms) = (self.e, self.terms.len());
        let panel = self.pack_pairs(cpu);
        self.multiply(cpu, |level, outputs, scratch| {
            let first = outputs.start * e.inputs + self.terms.start;
            let t = TileDots {
                terms,
                block: self.block,
                w: w.part(first..w.len()).ptr(),
                w_row: e.inputs,
                x: panel.ptr(),
                to: self.place(outputs.start),
                near: scratch.part(0..near_tiles(ROWS) * TILE * TILE).ptr_mut().cast(),
            };
            // SAFETY: `check` saw that weights, rows and columns exist; this task owns its outputs of y and its scratch.
            unsafe { tile_dots(level, self.rows.len(), outputs.len(), t) };
        });
    }

    /// The products with a weight of few bits.
    fn ints(&self, cpu: &Cpu, w: Quantized) {
        let (e, first_group) = (self.e, self.terms.start / QUANT_GROUP);
        let groups = self.terms.len().div_ceil(QUANT_GROUP);
        let panel = || IntPanel::within(self.panel, self.rows.len().div_ceil(TILE) * groups);
        let bias = w.bits.bias();
        self.pack(cpu, |level, rows, x| {
            let to = panel().from(rows.start / TILE * groups);
            // SAFETY: as above.
            unsafe { pack_ints(level, x, e.x_stride, rows.len(), self.terms.len(), bias, to) };
        });
        self.multiply(cpu, |level, outputs, _| {
            let w_row = w.groups() * w.group_bytes();
            let codes = outputs.start * w_row + first_group * w.group_bytes();
            let scales = outputs.start * w.groups() + first_group;
            let t = IntTileDots {
                groups,
                block: self.block / QUANT_GROUP,
                w: w.codes.part(codes..w.codes.len()).ptr(),
                w_row,
                w_scales: w.scales.part(scales..w.scales.len()).ptr(),
                w_scales_row: w.groups(),
                x: panel(),
                to: self.place(outputs.start),
            };
            // SAFETY: as above.
            unsafe {
                match w.bits {
                    Bits::Eight => tile_int8(level, self.rows.len(), outputs.len(), t),
                    Bits::Four => tile_int4(level, self.rows.len(), outputs.len(), t),
                }
            }
        });
    }

    /// Calls `pack(level, rows, x)` for each tile of rows (counted from the part's first) and where its terms lie.
    fn pack(&self, cpu: &Cpu, pack: impl Fn(Level, Range<usize>, *const f32) + Sync) {
        cpu.run_ranges(self.rows.len(), TILE, |level, rows, _| {
            let at = (self.rows.start + rows.start) * self.e.x_stride + self.terms.start;
            pack(level, rows, self.x.part(at..self.x.len()).ptr());
        });
    }

    /// Calls `multiply(level, outputs, scratch)` for tasks of about equally many outputs.
    fn multiply(&self, cpu: &Cpu, multiply: impl Fn(Level, Range<usize>, Cells<f32>) + Sync) {
        let tasks = tasks(cpu, self.e.outputs);
        cpu.run(tasks.len(), |level, task, scratch| multiply(level, tasks.range(task), scratch));
    }

    /// Where the products of these rows and the outputs from `output` on go.
    fn place(&self, output: usize) -> Place {
        place(self.begin, self.y, self.e.y_stride, self.rows.start, output)
    }
}

/// The place in `y` from this row and column on, and what it begins with.
pub(super) fn place(begin: Begin, y: Cells<f32>, y_row: usize, row: usize, column: usize) -> Place {
    let at = row * y_row + column;
    let first = match begin {
        Begin::Zero => First::Zero,
        Begin::Keep => First::There,
        Begin::Bias(bias) => First::Of(bias.part(column..bias.len()).ptr(), 0),
        Begin::Copy(from) => First::Of(from.part(at..from.len()).ptr(), y_row),
    };
    Place { y: y.part(at..y.len()).ptr_mut(), y_row, first }
}

/// Columns of a result, cut into tasks of about equally many tiles, some for each thread.
pub(super) struct Tasks {
    columns: usize,
    tasks: usize,
}

pub(super) fn tasks(cpu: &Cpu, columns: usize) -> Tasks {
    let most = if cpu.pool_threads() == 1 { 1 } else { 4 * cpu.pool_threads() };
    Tasks { columns, tasks: columns.div_ceil(OUTPUTS).min(most) }
}

impl Tasks {
    pub(super) fn len(&self) -> usize {
        self.tasks
    }

    pub(super) fn range(&self, task: usize) -> Range<usize> {
        let start =
            |task: usize| (self.columns.div_ceil(OUTPUTS) * task / self.tasks * OUTPUTS).min(self.columns);
        start(task)..start(task + 1)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::device::{Device, Element};

    #[rstest]
    #[case::a_prompt(Level::AmxEmulated, (2048, 4864, 896), Element::BF16, Some(512))]
    #[case::the_fewest_rows(Level::AmxEmulated, (33, 16, 2), Element::BF16, Some(512))]
    #[case::as_many_as_there_is_room_for(Level::AmxEmulated, (128, 16, 4096), Element::BF16, Some(128))]
    #[case::more_than_there_is_room_for(Level::AmxEmulated, (129, 16, 4096), Element::BF16, None)]
    #[case::few_rows(Level::AmxEmulated, (32, 48, 896), Element::BF16, None)]
    #[case::part_of_a_tile(Level::AmxEmulated, (40, 50, 896), Element::BF16, None)]
    #[case::half_a_pair(Level::AmxEmulated, (40, 48, 35), Element::BF16, None)]
    #[case::wide(Level::AmxEmulated, (40, 48, 896), Element::F32, None)]
    #[case::no_tiles(Level::Portable, (40, 48, 896), Element::BF16, None)]
    fn one_pass_for_both_parts_of_a_gated_layer(
        #[case] level: Level,
        #[case] (rows, outputs, inputs): (usize, usize, usize),
        #[case] element: Element,
        #[case] expected: Option<usize>,
    ) {
        let mut cpu = Cpu::new(1, level);
        let scratch = cpu.alloc("scratch", Element::F32, PRODUCT_SCRATCH + PRODUCT_PANEL).expect("memory");
        cpu.set_scratch(scratch);
        let w = cpu.alloc("test", element, outputs * inputs).expect("memory");
        let w = cpu.matrix(w, outputs, inputs);
        assert_eq!(takes_gated(&cpu, [w, w], Extent::dense(rows, outputs, inputs)), expected);
    }
}
