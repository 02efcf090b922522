//! Moving whole rows: token vectors, chosen rows, the cache; and rows by adapter.
#![allow(unsafe_code)] // Threads write disjoint rows or columns.

use std::ops::Range;

use super::Cpu;
use super::cells::Cells;
use super::gemm::Matrix;
use crate::device::{LoraSlot, NO_ADAPTER};

/// Calls `f` for each run of rows with one adapter that changes this layer.
pub(super) fn each_adapter(
    adapters: Cells<u32>,
    rows: usize,
    slots: &[LoraSlot],
    mut f: impl FnMut(Range<usize>, &LoraSlot),
) {
    // SAFETY: nobody writes the numbers while an operation runs.
    let adapters = unsafe { adapters.part(0..rows).read() };
    let mut start = 0;
    for run in adapters.chunk_by(|a, b| a == b) {
        let rows = start..start + run.len();
        start = rows.end;
        if run[0] != NO_ADAPTER && slots[run[0] as usize].rank > 0 {
            f(rows, &slots[run[0] as usize]);
        }
    }
}

/// `out[i] = table[tokens[i]]`.
pub(super) fn embed(
    cpu: &Cpu,
    table: Matrix,
    tokens: Cells<u32>,
    out: Cells<f32>,
    vocab: usize,
    width: usize,
) {
    cpu.run_ranges(tokens.len(), 8, |level, rows, _| {
        for row in rows {
            // SAFETY: nobody writes the numbers while an operation runs.
            let token = unsafe { tokens.read()[row] as usize };
            assert!(token < vocab, "token {token} of {vocab}");
            table.copy(level, token * width, out.rows(row..row + 1, width));
        }
    });
}

/// `dtable[tokens[i]] += d[i]`: threads split columns, so that each sum runs in the order of rows.
pub(super) fn embed_grad(
    cpu: &Cpu,
    d: Cells<f32>,
    tokens: Cells<u32>,
    dtable: Cells<f32>,
    vocab: usize,
    width: usize,
) {
    assert!(vocab * width <= dtable.len());
    cpu.run_ranges(width, 32, |_, columns, _| {
        // SAFETY: tokens and d are only read; this task owns its columns of the table.
        unsafe {
            for (row, &token) in tokens.read().iter().enumerate() {
                let token = token as usize;
                assert!(token < vocab, "token {token} of {vocab}");
                let from = d.part(row * width + columns.start..row * width + columns.end).read();
                let to = dtable.part(token * width + columns.start..token * width + columns.end);
                to.write().iter_mut().zip(from).for_each(|(sum, x)| *sum += x);
            }
        }
    });
}

/// `out[i] = x[rows[i]]`.
pub(super) fn gather(cpu: &Cpu, x: Cells<f32>, rows: Cells<u32>, out: Cells<f32>, width: usize) {
    cpu.run_ranges(rows.len(), 64, |_, range, _| {
        for i in range {
            // SAFETY: this task owns these rows of `out`; the rest is only read.
            unsafe {
                let row = rows.read()[i] as usize;
                out.rows(i..i + 1, width).write().copy_from_slice(x.rows(row..row + 1, width).read());
            }
        }
    });
}

/// `x[rows[i]] = from[i]`; the rows differ from each other.
pub(super) fn scatter(cpu: &Cpu, from: Cells<f32>, rows: Cells<u32>, x: Cells<f32>, width: usize) {
    cpu.run_ranges(rows.len(), 64, |_, range, _| {
        for i in range {
            // SAFETY: the rows differ, so this task owns its rows of x; the rest is only read.
            unsafe {
                let row = rows.read()[i] as usize;
                x.rows(row..row + 1, width).write().copy_from_slice(from.rows(i..i + 1, width).read());
            }
        }
    });
}
