//! The forward pass on tiles: queries, keys, weights and values are rounded to bf16, sums and the softmax are f32.
//!
//! Scores lie as `[key][query]`, sixteen queries wide: keys are the first operand as they lie, a softmax goes down its column
//! without sums across a vector, and the weights are paired by key as the second operand of `V' P'` wants them. Only
//! values are turned, once for all queries of a task.
#![allow(unsafe_code)] // Raw scratch; threads write disjoint rows and heads.

use std::ops::Range;

use super::forward::Rows;
use super::tile_softmax::{Columns, STEP, Step, finish, meet, pack_step};
use super::{Heads, KEYS, Scratch, within};
use crate::device::cpu::Level;
use crate::device::cpu::cells::Cells;
use crate::device::cpu::gemm::{TILE_TERMS, pack_pairs};
use crate::device::cpu::simd::{Block, TILE};
use lathe_plan::BLOCK;

const _: () = assert!(KEYS.is_multiple_of(STEP));

/// As `forward::attend`.
///
/// # Safety
/// As there.
pub(super) unsafe fn attend(
    level: Level,
    x: Rows<'_>,
    table: &[u32],
    positions: &[u32],
    rows: Range<usize>,
    kv_head: usize,
    scratch: Cells<f32>,
) {
    let Heads { heads, kv_heads, dim } = x.heads;
    let (group, stride) = (x.heads.group(), kv_heads * dim);
    let queries = rows.len() * group;
    let columns = queries.next_multiple_of(2 * TILE);
    let (steps, tall) = (dim.div_ceil(TILE_TERMS), dim.div_ceil(TILE));
    let mut scratch = Scratch { rest: scratch };
    let mut blocks = |count: usize| scratch.take(count * TILE * TILE).cast::<Block>();
    let (q, acc) = (blocks(columns / TILE * steps), blocks(columns / TILE * tall));
    let (k, v) = (blocks(KEYS / TILE * steps), blocks(KEYS / STEP * tall));
    let (scores, weights) = (blocks(2 * KEYS / TILE), blocks(2 * KEYS / STEP));
    let [max, sum, first, end] = [(); 4].map(|()| scratch.take(columns));
    // SAFETY: scratch is this thread's; the rest is the caller's.
    unsafe {
        let gathered = acc.cast::<f32>().part(0..queries * dim);
        x.heads.gather(x.q, rows.clone(), kv_head, x.a.scale, gathered);
        for query in (0..columns).step_by(TILE) {
            let some = queries.saturating_sub(query).min(TILE);
            let from = gathered.part((query * dim).min(queries * dim)..queries * dim).ptr();
            pack_pairs(level, from, dim, some, dim, q.part(query / TILE * steps..q.len()).ptr_mut());
        }
        acc.cast::<f32>().write().fill(0.0);
        // Finite, so that nothing less it is 0 and not no number.
        max.write().fill(f32::MIN);
        sum.write().fill(0.0);

        let keys = |query: usize| x.a.seen(positions[query.min(queries - 1) / group] as usize);
        let (lowest, count) = (keys(0).start, keys(queries - 1).end);
        for start in (lowest / KEYS * KEYS..count).step_by(KEYS) {
            let chunk = start..(start + KEYS).min(count);
            let step_of = |key: usize| key / STEP * STEP;
            let rows_of = |step: usize| -> [Option<usize>; STEP] {
                std::array::from_fn(|i| {
                    let at = step + i;
                    let there = (lowest..count).contains(&at);
                    there.then(|| (table[at / BLOCK] as usize + at % BLOCK) * stride + kv_head * dim)
                })
            };
            let mut rows = rows_of(step_of(start.max(lowest)));
            for step in (step_of(start.max(lowest))..chunk.end).step_by(STEP) {
                let next = rows_of(step + STEP);
                let at = (step - start) / STEP;
                let k_to = k.part(2 * at * steps..2 * (at + 1) * steps).ptr_mut();
                let v_to = v.part(at * tall..(at + 1) * tall).ptr_mut();
                let (k, v) = (x.k.ptr(), x.v.ptr());
                pack_step(level, &Step { k, v, rows, next, dim, k_to, v_to });
                rows = next;
            }
            for query in 0..columns {
                let seen = within(keys(query), &chunk);
                (first.write()[query], end.write()[query]) = (seen.start as f32, seen.end as f32);
            }
            for query in (0..queries).step_by(2 * TILE) {
                let last = (query + 2 * TILE).min(queries) - 1;
                let [low, high] = [query, last].map(|query| within(keys(query), &chunk));
                if low.start >= high.end {
                    continue;
                }
                let tile = query / TILE;
                let t = Columns {
                    two: queries - query > TILE,
                    keys: step_of(low.start)..high.end.next_multiple_of(STEP),
                    all: high.start..low.end,
                    first: first.part(query..columns).ptr(),
                    end: end.part(query..columns).ptr(),
                    steps,
                    tall,
                    q: q.part(tile * steps..q.len()).ptr(),
                    k: k.ptr(),
                    v: v.ptr(),
                    acc: acc.part(tile * tall..acc.len()).ptr_mut(),
                    max: max.part(query..columns).ptr_mut(),
                    sum: sum.part(query..columns).ptr_mut(),
                    scores: scores.ptr_mut(),
                    weights: weights.ptr_mut(),
                    soft_cap: x.a.soft_cap,
                };
                meet(level, &t);
            }
        }
        for query in (0..queries).step_by(TILE) {
            let to = |i: usize| {
                let query = query + i;
                let out = x.out.part(x.heads.query(rows.start + query / group, kv_head));
                out.rows(query % group..query % group + 1, dim).ptr_mut()
            };
            let some = (queries - query).min(TILE);
            let to: [_; TILE] = std::array::from_fn(|i| to(i.min(some - 1)));
            let tile = query / TILE * tall;
            finish(level, acc.part(tile..tile + tall).ptr(), sum.part(query..columns).ptr(), &to, some, dim);
        }
        if let Some(lse) = x.lse {
            for query in 0..queries {
                let at = (rows.start + query / group) * heads + kv_head * group + query % group;
                lse.part(at..at + 1).write()[0] = max.read()[query] + sum.read()[query].ln();
            }
        }
    }
}
