//! Causal attention of a ragged batch, forward and backward.
//!
//! A query row looks at the pages of its sequence from position 0 on, one row and one key head at a time, so its
//! sums depend on its position alone: prefill in any chunks, decoding and training give the same bits.
#![allow(unsafe_code)] // Threads write disjoint rows and heads.

use std::ops::Range;

use lathe_plan::BLOCK;

use super::Cpu;
use super::cells::Cells;
use super::pointwise::{load, store};
use super::simd::{MOST_LANES, Simd, kernel};
use crate::device::Attention;

/// The keys or values of one head: rows `stride` apart, `width` wide.
#[derive(Clone, Copy)]
struct Head {
    start: *const f32,
    stride: usize,
    width: usize,
}

/// Where the positions of one sequence lie.
#[derive(Clone, Copy)]
struct Pages {
    table: *const u32,
    count: usize,
}

impl Head {
    fn of(x: Cells<f32>, heads: usize, head: usize, width: usize) -> Head {
        // SAFETY: the head is below `heads`, so the column exists in each row.
        Head { start: unsafe { x.ptr().add(head * width) }, stride: heads * width, width }
    }

    /// # Safety
    /// The row exists.
    #[inline(always)]
    unsafe fn row(self, row: usize) -> *const f32 {
        // SAFETY: the caller's.
        unsafe { self.start.add(row * self.stride) }
    }
}

impl Pages {
    /// The pages' rows, each a run of up to [`BLOCK`] consecutive ones.
    #[inline(always)]
    fn runs(self) -> impl Iterator<Item = Range<usize>> + Clone {
        (0..self.count.div_ceil(BLOCK)).map(move |page| {
            // SAFETY: the table has a page for each position below `count`.
            let first = unsafe { *self.table.add(page) } as usize;
            first..first + BLOCK.min(self.count - page * BLOCK)
        })
    }
}

/// See [`Attention`].
pub(super) fn forward(cpu: &Cpu, a: &Attention) {
    let (q, k, v, out) = (cpu.f32(a.q), cpu.f32(a.k), cpu.f32(a.v), cpu.f32(a.out));
    let lse = a.lse.map(|lse| cpu.f32(lse).part(0..a.rows * a.heads));
    // SAFETY: nobody writes the batch's numbers while an operation runs.
    let (starts, positions, tables, table_starts) = unsafe {
        (
            cpu.u32(a.starts).part(0..a.sequences + 1).read(),
            cpu.u32(a.positions).part(0..a.rows).read(),
            cpu.u32(a.tables).read(),
            cpu.u32(a.table_starts).part(0..a.sequences).read(),
        )
    };
    let (group, width) = (a.heads / a.kv_heads, a.head_dim);
    let slots = k.len() / (a.kv_heads * width);
    assert!(v.len() >= slots * a.kv_heads * width);
    cpu.run(a.rows * a.kv_heads, |level, task, scratch| {
        let (row, kv_head) = (task / a.kv_heads, task % a.kv_heads);
        let sequence = starts.partition_point(|&start| start as usize <= row) - 1;
        let count = positions[row] as usize + 1;
        let first = table_starts[sequence] as usize;
        let table = &tables[first..first + count.div_ceil(BLOCK)];
        let pages = Pages { table: table.as_ptr(), count };
        assert!(pages.runs().all(|run| run.end <= slots), "a page outside the cache");
        let scores = scratch.part(0..count.next_multiple_of(MOST_LANES));
        for head in kv_head * group..(kv_head + 1) * group {
            let at = |x: Cells<f32>| x.rows(row * a.heads + head..row * a.heads + head + 1, width);
            // SAFETY: this task owns these heads of this row of `out` and `lse`; the pages were checked.
            unsafe {
                let (k, v) =
                    (Head::of(k, a.kv_heads, kv_head, width), Head::of(v, a.kv_heads, kv_head, width));
                let norm = attend(level, at(q).ptr(), k, v, pages, scores, at(out).ptr_mut());
                if let Some(lse) = lse {
                    lse.part(row * a.heads + head..row * a.heads + head + 1).write()[0] = norm;
                }
            }
        }
    });
}

kernel! {
    attend = attend_row(
        q: *const f32, k: Head, v: Head, pages: Pages, scores: Cells<f32>, out: *mut f32
    ) -> f32
}

/// One query against all its keys: scores, softmax, the weighted sum of values; returns the log of the sum.
#[inline(always)]
unsafe fn attend_row<S: Simd>(
    q: *const f32,
    k: Head,
    v: Head,
    pages: Pages,
    scores: Cells<f32>,
    out: *mut f32,
) -> f32 {
    // SAFETY: the caller checked pages; `scores` has room for all of them.
    unsafe {
        let scale = 1.0 / (k.width as f32).sqrt();
        let s = scores.ptr_mut();
        let mut max = f32::NEG_INFINITY;
        let mut at = 0;
        for run in pages.runs() {
            for row in run {
                let x = dot::<S>(q, k.row(row), k.width) * scale;
                *s.add(at) = x;
                max = if x > max { x } else { max };
                at += 1;
            }
        }
        let sum = exp_in_place::<S>(scores, at, max);
        weighted_sum::<S>(scores.ptr(), v, pages.runs(), 1.0 / sum, out);
        max + sum.ln()
    }
}

/// The product of two rows: a sum for each lane, then what is left.
#[inline(always)]
unsafe fn dot<S: Simd>(a: *const f32, b: *const f32, len: usize) -> f32 {
    // SAFETY: the caller gives `len` elements each.
    unsafe {
        let whole = len / S::LANES * S::LANES;
        let mut sum = S::splat(0.0);
        for i in (0..whole).step_by(S::LANES) {
            sum = S::fma(S::load(a.add(i)), S::load(b.add(i)), sum);
        }
        let mut total = S::sum(sum);
        for i in whole..len {
            total += *a.add(i) * *b.add(i);
        }
        total
    }
}

/// `x = exp(x - max)` for the first `len` elements, 0 up to the next whole vector; returns the sum.
#[inline(always)]
unsafe fn exp_in_place<S: Simd>(x: Cells<f32>, len: usize, max: f32) -> f32 {
    // SAFETY: `x` is as long as `len` rounded up to whole vectors.
    unsafe {
        let mut sum = S::splat(0.0);
        for i in (0..len).step_by(S::LANES) {
            let at = x.ptr_mut().add(i);
            let e = S::exp(S::sub(load::<S>(x, i, len), S::splat(max)));
            S::store(at, e);
            for rest in len.min(i + S::LANES)..i + S::LANES {
                *x.ptr_mut().add(rest) = 0.0;
            }
            sum = S::add(sum, S::load(at));
        }
        S::sum(sum)
    }
}

/// `out = by * sum of weights[i] x[i]` over the rows of `runs`, each column one chain in their order.
#[inline(always)]
unsafe fn weighted_sum<S: Simd>(
    weights: *const f32,
    x: Head,
    runs: impl Iterator<Item = Range<usize>> + Clone,
    by: f32,
    out: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut column = 0;
        while column + 4 * S::LANES <= x.width {
            columns::<S, 4>(weights, x, runs.clone(), by, out, column);
            column += 4 * S::LANES;
        }
        while column + S::LANES <= x.width {
            columns::<S, 1>(weights, x, runs.clone(), by, out, column);
            column += S::LANES;
        }
        for column in column..x.width {
            let (mut sum, mut at) = (0.0, 0);
            for row in runs.clone().flatten() {
                sum += *weights.add(at) * *x.row(row).add(column);
                at += 1;
            }
            *out.add(column) = sum * by;
        }
    }
}

#[inline(always)]
unsafe fn columns<S: Simd, const N: usize>(
    weights: *const f32,
    x: Head,
    runs: impl Iterator<Item = Range<usize>>,
    by: f32,
    out: *mut f32,
    column: usize,
) {
    // SAFETY: the caller's; `N` vectors from `column` exist.
    unsafe {
        let mut sums = [S::splat(0.0); N];
        let mut at = 0;
        for run in runs {
            for row in run {
                let weight = S::splat(*weights.add(at));
                let from = x.row(row).add(column);
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = S::fma(weight, S::load(from.add(i * S::LANES)), *sum);
                }
                at += 1;
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            S::store(out.add(column + i * S::LANES), S::mul(sum, S::splat(by)));
        }
    }
}

/// `dq`, `dk`, `dv`: threads split sequences and key heads, so that each sum runs in the order of rows. Keys and
/// values are the batch's own rows.
pub(super) fn backward(
    cpu: &Cpu,
    a: &Attention,
    dout: Cells<f32>,
    dq: Cells<f32>,
    dk: Cells<f32>,
    dv: Cells<f32>,
) {
    let (q, k, v, out) = (cpu.f32(a.q), cpu.f32(a.k), cpu.f32(a.v), cpu.f32(a.out));
    let Some(lse) = a.lse.map(|lse| cpu.f32(lse)) else { panic!("the forward pass kept no lse") };
    let (group, width) = (a.heads / a.kv_heads, a.head_dim);
    let (q_dim, kv_dim) = (a.heads * width, a.kv_heads * width);
    assert!([q, out, dout, dq].iter().all(|x| x.len() >= a.rows * q_dim));
    assert!([k, v, dk, dv].iter().all(|x| x.len() >= a.rows * kv_dim));
    // SAFETY: nobody writes the batch's numbers while an operation runs.
    let starts = unsafe { cpu.u32(a.starts).part(0..a.sequences + 1).read() };
    cpu.run(a.sequences * a.kv_heads, |level, task, scratch| {
        let (sequence, kv_head) = (task / a.kv_heads, task % a.kv_heads);
        let rows = starts[sequence] as usize..starts[sequence + 1] as usize;
        let len = rows.len().next_multiple_of(MOST_LANES);
        let room = Room { p: scratch.part(0..len), ds: scratch.part(len..2 * len) };
        let kv = |x: Cells<f32>| Head::of(x.rows(rows.clone(), kv_dim), a.kv_heads, kv_head, width);
        for i in 0..rows.len() {
            for j in [kv(dk), kv(dv)] {
                // SAFETY: this task owns this head of these rows of dk and dv.
                unsafe { std::slice::from_raw_parts_mut(j.row(i).cast_mut(), width).fill(0.0) };
            }
        }
        for (i, row) in rows.clone().enumerate() {
            for head in kv_head * group..(kv_head + 1) * group {
                let at = |x: Cells<f32>| x.rows(row * a.heads + head..row * a.heads + head + 1, width);
                let query = Query {
                    q: at(q).ptr(),
                    out: at(out).ptr(),
                    dout: at(dout).ptr(),
                    dq: at(dq).ptr_mut(),
                    // SAFETY: only read while the operation runs.
                    lse: unsafe { lse.read()[row * a.heads + head] },
                    count: i + 1,
                };
                // SAFETY: this task owns this head of dk and dv in its sequence and these heads of dq.
                unsafe { attend_grad(level, query, kv(k), kv(v), kv(dk), kv(dv), room) };
            }
        }
    });
}

#[derive(Clone, Copy)]
struct Query {
    q: *const f32,
    out: *const f32,
    dout: *const f32,
    dq: *mut f32,
    lse: f32,
    count: usize,
}

#[derive(Clone, Copy)]
struct Room {
    p: Cells<f32>,
    ds: Cells<f32>,
}

kernel! { attend_grad = attend_grad_row(query: Query, k: Head, v: Head, dk: Head, dv: Head, room: Room) }

/// With `p = exp(q k / sqrt(d) - lse)`: `dv += p dout`, `ds = p (dout v - dout out) / sqrt(d)`, `dq = ds k`,
/// `dk += ds q`.
#[inline(always)]
unsafe fn attend_grad_row<S: Simd>(query: Query, k: Head, v: Head, dk: Head, dv: Head, room: Room) {
    let Query { q, out, dout, dq, lse, count } = query;
    let width = k.width;
    let scale = 1.0 / (width as f32).sqrt();
    // SAFETY: the caller owns what is written; rows `0..count` of the heads exist; `room` holds `count`.
    unsafe {
        let delta = dot::<S>(dout, out, width);
        let (p, ds) = (room.p.ptr_mut(), room.ds.ptr_mut());
        for j in 0..count {
            *p.add(j) = dot::<S>(q, k.row(j), width) * scale;
            *ds.add(j) = dot::<S>(dout, v.row(j), width);
        }
        exp_in_place::<S>(room.p, count, lse);
        for j in 0..count {
            *ds.add(j) = *p.add(j) * (*ds.add(j) - delta) * scale;
            add_times::<S>(dv.row(j).cast_mut(), dout, *p.add(j), width);
            add_times::<S>(dk.row(j).cast_mut(), q, *ds.add(j), width);
        }
        weighted_sum::<S>(ds, k, std::iter::once(0..count), 1.0, dq);
    }
}

/// `to += by x`.
#[inline(always)]
unsafe fn add_times<S: Simd>(to: *mut f32, x: *const f32, by: f32, len: usize) {
    // SAFETY: the caller gives `len` elements each and owns `to`.
    unsafe {
        let (to, x) = (Cells::new(to, len), Cells::new(x.cast_mut(), len));
        for i in (0..len).step_by(S::LANES) {
            let sum = S::fma(S::splat(by), load::<S>(x, i, len), load::<S>(to, i, len));
            store::<S>(to, i, len, sum);
        }
    }
}
