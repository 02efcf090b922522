//! The forward pass.
#![allow(unsafe_code)] // Threads write disjoint rows and heads.

use std::ops::Range;

use super::softmax::{capped, scaled, soften};
use super::{Heads, KEYS, QUERIES, Scratch, TILE_QUERIES, on_tiles, runs, tiled, within};
use crate::device::Attention;
use crate::device::cpu::cells::Cells;
use crate::device::cpu::gemm::{Dots, Outer, dots, outer};
use crate::device::cpu::{Cpu, Level};
use lathe_plan::BLOCK;

/// Keys and values, and what is written.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub q: Cells<f32>,
    pub k: Cells<f32>,
    pub v: Cells<f32>,
    pub out: Cells<f32>,
    pub lse: Option<Cells<f32>>,
    pub heads: Heads,
    pub a: &'a Attention,
}

/// See [`Attention`].
pub(in super::super) fn forward(cpu: &Cpu, a: &Attention) {
    let heads = Heads { heads: a.heads, kv_heads: a.kv_heads, dim: a.head_dim };
    let lse = a.lse.map(|lse| cpu.f32(lse).part(0..a.rows * a.heads));
    let (q, k, v, out) = (cpu.f32(a.q), cpu.f32(a.k), cpu.f32(a.v), cpu.f32(a.out));
    let rows = Rows { q, k, v, out, lse, heads, a };
    // SAFETY: nobody writes the batch's numbers while an operation runs.
    let (starts, positions, tables, table_starts) = unsafe {
        (
            cpu.u32(a.starts).part(0..a.sequences + 1).read(),
            cpu.u32(a.positions).part(0..a.rows).read(),
            cpu.u32(a.tables).read(),
            cpu.u32(a.table_starts).part(0..a.sequences).read(),
        )
    };
    let slots = rows.k.len() / (a.kv_heads * a.head_dim);
    assert!(rows.v.len() >= slots * a.kv_heads * a.head_dim);
    // Fewer rows a task where there would be too few tasks for all threads.
    let tiles = on_tiles(cpu, a);
    let most = heads.rows(if tiles { TILE_QUERIES } else { QUERIES });
    let block = (a.rows * a.kv_heads / (4 * cpu.pool_threads())).clamp(1, most);
    let blocks = a.rows.div_ceil(block);
    cpu.run(blocks * a.kv_heads, |level, task, scratch| {
        let (first, kv_head) = (task % blocks * block, task / blocks);
        let end = (first + block).min(a.rows);
        let mut row = first;
        while row < end {
            let sequence = starts.partition_point(|&start| start as usize <= row) - 1;
            let some = row..end.min(starts[sequence + 1] as usize);
            row = some.end;
            let [lowest, last] = [some.start, some.end - 1].map(|row| a.seen(positions[row] as usize));
            let keys = lowest.start..last.end;
            let table = table_starts[sequence] as usize;
            let table = &tables[table..table + keys.end.div_ceil(BLOCK)];
            assert!(runs(table, keys).all(|(_, run)| run.end <= slots), "a page outside the cache");
            // SAFETY: the pages were checked; this task owns these heads of these rows of `out` and `lse`.
            unsafe {
                let attend = if tiles { tiled::attend } else { attend };
                attend(level, rows, table, &positions[some.clone()], some, kv_head, scratch);
            }
        }
    });
}

/// Some rows of one sequence, all query heads of one key head.
///
/// # Safety
/// The pages of all positions are rows of keys and values; nobody else writes what these rows and heads write.
unsafe fn attend(
    level: Level,
    x: Rows<'_>,
    table: &[u32],
    positions: &[u32],
    rows: Range<usize>,
    kv_head: usize,
    scratch: Cells<f32>,
) {
    let Heads { kv_heads, dim, .. } = x.heads;
    let (group, stride) = (x.heads.group(), kv_heads * dim);
    let queries = rows.len() * group;
    let mut scratch = Scratch { rest: scratch };
    let (q, acc) = (scratch.take(queries * dim), scratch.take(queries * dim));
    let (scores, norm) = (scratch.take(queries * KEYS), scratch.take(queries * 2));
    x.heads.gather(x.q, rows.clone(), kv_head, x.a.scale, q);
    // SAFETY: scratch is this thread's; the rest is the caller's.
    unsafe {
        acc.write().fill(0.0);
        // For each query the largest score so far and the sum of exponentials.
        norm.write().chunks_exact_mut(2).for_each(|n| n.copy_from_slice(&[f32::NEG_INFINITY, 0.0]));
        let keys = |row: usize| x.a.seen(positions[row] as usize);
        let (lowest, count) = (keys(0).start, keys(rows.len() - 1).end);
        for start in (lowest / KEYS * KEYS..count).step_by(KEYS) {
            let (first, end) = (start.max(lowest), (start + KEYS).min(count));
            for query in 0..queries {
                scores.part(query * KEYS..query * KEYS + end - start).write().fill(0.0);
            }
            for (position, run) in runs(table, first..end) {
                let t = Dots {
                    k: dim,
                    block: dim,
                    a: q.ptr(),
                    a_row: dim,
                    b: x.k.ptr().add(run.start * stride + kv_head * dim),
                    b_row: stride,
                    c: scores.ptr_mut().add(position - start),
                    c_row: KEYS,
                };
                dots(level, queries, run.len(), t);
            }
            let seen = |row: usize| within(keys(row), &(start..end));
            for query in 0..queries {
                let some = scores.part(query * KEYS..(query + 1) * KEYS);
                if let Some(cap) = x.a.soft_cap {
                    capped(level, some.part(first - start..end - start), cap);
                }
                let (norm, acc) = (norm.rows(query..query + 1, 2), acc.rows(query..query + 1, dim));
                soften(level, some, seen(query / group), norm.write(), acc);
            }
            // The keys up to those of the first row for all rows together (what a row does not see any more counts 0
            // there), the last ones row by row.
            let all = start + seen(0).end;
            let sum = |rows: Range<usize>, keys: Range<usize>| {
                for (position, run) in runs(table, keys) {
                    let t = Outer {
                        k: run.len(),
                        a: scores.ptr().add(rows.start * group * KEYS + position - start),
                        a_row: KEYS,
                        a_k: 1,
                        b: x.v.ptr().add(run.start * stride + kv_head * dim),
                        b_row: stride,
                        c: acc.ptr_mut().add(rows.start * group * dim),
                        c_row: dim,
                    };
                    outer(level, rows.len() * group, dim, t);
                }
            };
            sum(0..rows.len(), first..all);
            (0..rows.len()).for_each(|row| sum(row..row + 1, all..start + seen(row).end));
        }
        for (i, row) in rows.enumerate() {
            let out = x.out.part(x.heads.query(row, kv_head));
            for head in 0..group {
                let query = i * group + head;
                let [max, sum] = [norm.read()[2 * query], norm.read()[2 * query + 1]];
                let out = out.rows(head..head + 1, dim);
                scaled(level, acc.rows(query..query + 1, dim), 1.0 / sum, out);
                if let Some(lse) = x.lse {
                    let at = row * x.heads.heads + kv_head * group + head;
                    lse.part(at..at + 1).write()[0] = max + sum.ln();
                }
            }
        }
    }
}
