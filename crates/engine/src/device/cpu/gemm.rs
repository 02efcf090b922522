//! Products of activations with packed weights, and the gradients of both, cut into tasks for threads and into
//! blocks for the caches. See `tile` for why the cuts do not change a bit.
#![allow(unsafe_code)] // Threads write disjoint blocks; tiles take raw pointers.

use std::ops::Range;

use lathe_plan::PANEL;

use super::cells::Cells;
use super::tile::{self, TILE_ROWS, Tile};
use super::{Cpu, Level};
use crate::device::Start;

/// Steps of K between visits of C: a block of B (256 x 16 singles) stays in the first-level cache.
const K_BLOCK: usize = 256;
/// Rows of a task: with a K block they stay in the second-level cache.
const ROW_BLOCK: usize = 20 * TILE_ROWS;
/// Up to here B is widened in registers, beyond it once per block.
const FEW: usize = 2 * TILE_ROWS;
/// Inputs of a task of the weights' gradient.
const INPUT_BLOCK: usize = 14 * TILE_ROWS;

/// A packed weight.
#[derive(Clone, Copy)]
pub(super) enum Panels {
    F32(Cells<f32>),
    BF16(Cells<u16>),
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
        assert!(outputs.next_multiple_of(PANEL) * inputs <= w, "w is too small");
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

/// Cuts `rows` into blocks and `panels` into ranges, so that there are some tasks for each thread.
struct Grid {
    rows: usize,
    row_block: usize,
    row_blocks: usize,
    panels: usize,
    panel_block: usize,
}

impl Grid {
    fn new(rows: usize, row_block: usize, panels: usize, threads: usize) -> Grid {
        let row_blocks = rows.div_ceil(row_block).max(1);
        let wanted = if threads == 1 { 1 } else { (4 * threads).div_ceil(row_blocks) };
        let panel_block = panels.div_ceil(wanted).next_multiple_of(4);
        Grid { rows, row_block, row_blocks, panels, panel_block }
    }

    fn tasks(&self) -> usize {
        self.row_blocks * self.panels.div_ceil(self.panel_block)
    }

    fn task(&self, number: usize) -> (Range<usize>, Range<usize>) {
        let row = number % self.row_blocks * self.row_block;
        let panel = number / self.row_blocks * self.panel_block;
        (row..(row + self.row_block).min(self.rows), panel..(panel + self.panel_block).min(self.panels))
    }
}

fn chunks(of: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = of.end;
    of.step_by(size).map(move |start| start..(start + size).min(end))
}

fn columns_of(panel: usize, width: usize) -> usize {
    (width - panel * PANEL).min(PANEL)
}

/// `y = begin + x w^T`.
pub(super) fn linear(cpu: &Cpu, x: Cells<f32>, w: Panels, y: Cells<f32>, e: Extent, begin: Begin) {
    let stored = match w {
        Panels::F32(w) => w.len(),
        Panels::BF16(w) => w.len(),
    };
    e.check(x.len(), y.len(), stored);
    let grid = Grid::new(e.rows, ROW_BLOCK, e.outputs.div_ceil(PANEL), cpu.pool_threads());
    cpu.run(grid.tasks(), |level, task, scratch| {
        let (rows, panels) = grid.task(task);
        let columns = panels.start * PANEL..(panels.end * PANEL).min(e.outputs);
        begin.fill(y, e.y_stride, rows.clone(), columns.clone());
        if rows.len() <= FEW {
            return few(level, x, w, y, e, rows, columns);
        }
        for k in chunks(0..e.inputs, K_BLOCK) {
            for panel in panels.clone() {
                let at = panel * e.inputs * PANEL + k.start * PANEL;
                // SAFETY: `check` saw that panels, rows and columns exist; this task owns its block of y.
                unsafe {
                    let b = match w {
                        Panels::F32(w) => w.ptr().add(at),
                        Panels::BF16(w) => {
                            let wide = scratch.part(0..k.len() * PANEL).ptr_mut();
                            tile::widen(level, w.ptr().add(at), wide, k.len() * PANEL);
                            wide
                        }
                    };
                    let tile = Tile {
                        k: k.len(),
                        a: x.ptr().add(rows.start * e.x_stride + k.start),
                        a_row: e.x_stride,
                        a_k: 1,
                        b,
                        b_panel: 0,
                        c: y.ptr_mut().add(rows.start * e.y_stride + panel * PANEL),
                        c_row: e.y_stride,
                        c_panel: 0,
                    };
                    tile::column(level, rows.len(), columns_of(panel, e.outputs), tile);
                }
            }
        }
    });
}

fn few(
    level: Level,
    x: Cells<f32>,
    w: Panels,
    y: Cells<f32>,
    e: Extent,
    rows: Range<usize>,
    columns: Range<usize>,
) {
    fn at<W>(b: *const W, x: Cells<f32>, y: Cells<f32>, e: Extent, row: usize, column: usize) -> Tile<W> {
        // SAFETY: `linear` checked that the row and the column exist.
        unsafe {
            Tile {
                k: e.inputs,
                a: x.ptr().add(row * e.x_stride),
                a_row: e.x_stride,
                a_k: 1,
                b: b.add(column * e.inputs),
                b_panel: e.inputs * PANEL,
                c: y.ptr_mut().add(row * e.y_stride + column),
                c_row: e.y_stride,
                c_panel: PANEL,
            }
        }
    }
    // SAFETY: `check` saw that panels, rows and columns exist; this task owns its block of y.
    unsafe {
        let (first, count, width) = (rows.start, rows.len(), columns.len());
        match w {
            Panels::F32(w) => tile::few_f32(level, count, width, at(w.ptr(), x, y, e, first, columns.start)),
            Panels::BF16(w) => {
                tile::few_bf16(level, count, width, at(w.ptr(), x, y, e, first, columns.start))
            }
        }
    }
}

/// `dx = (dx or 0) + dy w`: contracts over outputs, so each block of the weight is transposed in scratch.
pub(super) fn input_grad(cpu: &Cpu, dy: Cells<f32>, w: Panels, dx: Cells<f32>, e: Extent, begin: Begin) {
    let stored = match w {
        Panels::F32(w) => w.len(),
        Panels::BF16(w) => w.len(),
    };
    e.check(dx.len(), dy.len(), stored);
    let grid = Grid::new(e.rows, ROW_BLOCK, e.inputs.div_ceil(PANEL), cpu.pool_threads());
    cpu.run(grid.tasks(), |level, task, scratch| {
        let (rows, panels) = grid.task(task);
        let columns = panels.start * PANEL..(panels.end * PANEL).min(e.inputs);
        begin.fill(dx, e.x_stride, rows.clone(), columns);
        for o in chunks(0..e.outputs, K_BLOCK) {
            for panel in panels.clone() {
                let inputs = columns_of(panel, e.inputs);
                let b = scratch.part(0..K_BLOCK * PANEL);
                turn(level, w, e.inputs, o.clone(), panel * PANEL, inputs, b);
                // SAFETY: `check` saw that rows and columns exist; this task owns its block of dx.
                unsafe {
                    let tile = Tile {
                        k: o.len(),
                        a: dy.ptr().add(rows.start * e.y_stride + o.start),
                        a_row: e.y_stride,
                        a_k: 1,
                        b: b.ptr(),
                        b_panel: 0,
                        c: dx.ptr_mut().add(rows.start * e.x_stride + panel * PANEL),
                        c_row: e.x_stride,
                        c_panel: 0,
                    };
                    tile::column(level, rows.len(), inputs, tile);
                }
            }
        }
    });
}

/// `b[o][i]` = weight of output `outputs.start + o` and input `first + i`, for 16 inputs (0 beyond `count`).
fn turn(
    level: Level,
    w: Panels,
    inputs: usize,
    outputs: Range<usize>,
    first: usize,
    count: usize,
    b: Cells<f32>,
) {
    for (block, panel) in (outputs.start / PANEL..outputs.end.div_ceil(PANEL)).enumerate() {
        let at = panel * inputs * PANEL + first * PANEL;
        let to = b.part(block * PANEL * PANEL..(block + 1) * PANEL * PANEL);
        // SAFETY: the weight has `count` inputs of 16 outputs from `at`; scratch is this thread's.
        unsafe {
            match w {
                Panels::F32(w) if count == PANEL => tile::transpose_f32(level, w.ptr().add(at), to.ptr_mut()),
                Panels::BF16(w) if count == PANEL => {
                    tile::transpose_bf16(level, w.ptr().add(at), to.ptr_mut())
                }
                _ => {
                    let to = to.write();
                    to.fill(0.0);
                    for i in 0..count {
                        for o in 0..PANEL {
                            let from = at + i * PANEL + o;
                            to[o * PANEL + i] = match w {
                                Panels::F32(w) => *w.ptr().add(from),
                                Panels::BF16(w) => f32::from_bits(u32::from(*w.ptr().add(from)) << 16),
                            };
                        }
                    }
                }
            }
        }
    }
}

/// `dw += dy^T x`, `dw` in panels: contracts over rows, in their order, so that micro-batches add up to the bits
/// of one large batch. Blocks of `x` and `dy` are packed in scratch.
pub(super) fn weight_grad(cpu: &Cpu, x: Cells<f32>, dy: Cells<f32>, dw: Cells<f32>, e: Extent) {
    e.check(x.len(), dy.len(), dw.len());
    let grid = Grid::new(e.inputs, INPUT_BLOCK, e.outputs.div_ceil(PANEL), cpu.pool_threads());
    cpu.run(grid.tasks(), |level, task, scratch| {
        let (inputs, panels) = grid.task(task);
        let a = scratch.part(0..INPUT_BLOCK * K_BLOCK);
        let b = scratch.part(INPUT_BLOCK * K_BLOCK..(INPUT_BLOCK + PANEL) * K_BLOCK);
        for rows in chunks(0..e.rows, K_BLOCK) {
            // SAFETY: scratch is this thread's; `check` saw that x and dy have these rows; this task owns its
            // inputs and panels of dw.
            unsafe {
                pack_inputs(x, e.x_stride, rows.clone(), inputs.clone(), a.write());
                for panel in panels.clone() {
                    let outputs = panel * PANEL..panel * PANEL + columns_of(panel, e.outputs);
                    pack_outputs(dy, e.y_stride, rows.clone(), outputs, b.write());
                    for (tile, input) in inputs.clone().step_by(TILE_ROWS).enumerate() {
                        let tile = Tile {
                            k: rows.len(),
                            a: a.ptr().add(tile * TILE_ROWS * K_BLOCK),
                            a_row: 1,
                            a_k: TILE_ROWS,
                            b: b.ptr(),
                            b_panel: 0,
                            c: dw.ptr_mut().add(panel * e.inputs * PANEL + input * PANEL),
                            c_row: PANEL,
                            c_panel: 0,
                        };
                        tile::column(level, TILE_ROWS.min(inputs.end - input), PANEL, tile);
                    }
                }
            }
        }
    });
}

/// `a[tile][row][6]`: 6 inputs side by side for each row.
unsafe fn pack_inputs(x: Cells<f32>, stride: usize, rows: Range<usize>, inputs: Range<usize>, a: &mut [f32]) {
    for (r, row) in rows.enumerate() {
        let at = row * stride;
        // SAFETY: nobody writes x while its gradient is taken.
        let from = unsafe { x.part(at + inputs.start..at + inputs.end).read() };
        for (tile, six) in from.chunks(TILE_ROWS).enumerate() {
            let to = tile * TILE_ROWS * K_BLOCK + r * TILE_ROWS;
            a[to..to + six.len()].copy_from_slice(six);
        }
    }
}

/// `b[row][16]`: the outputs of one panel, 0 beyond the last.
unsafe fn pack_outputs(
    dy: Cells<f32>,
    stride: usize,
    rows: Range<usize>,
    outputs: Range<usize>,
    b: &mut [f32],
) {
    for (row, to) in rows.zip(b.chunks_exact_mut(PANEL)) {
        let at = row * stride;
        // SAFETY: nobody writes dy while the gradient is taken.
        let from = unsafe { dy.part(at + outputs.start..at + outputs.end).read() };
        to[..from.len()].copy_from_slice(from);
        to[from.len()..].fill(0.0);
    }
}
