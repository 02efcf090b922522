//! The backward pass, in training: keys and values are the batch's own rows.
#![allow(unsafe_code)] // Threads write disjoint heads of sequences.

use std::ops::Range;

use super::softmax::{capped, harden, product, scaled};
use super::{Heads, KEYS, QUERIES, Scratch, on_tiles, within};
use crate::device::Attention;
use crate::device::cpu::cells::Cells;
use crate::device::cpu::gemm::{Dots, Outer, dots, outer};
use crate::device::cpu::{Cpu, Level};

#[derive(Clone, Copy)]
struct Rows<'a> {
    q: Cells<f32>,
    k: Cells<f32>,
    v: Cells<f32>,
    out: Cells<f32>,
    lse: Cells<f32>,
    dout: Cells<f32>,
    dq: Cells<f32>,
    dk: Cells<f32>,
    dv: Cells<f32>,
    heads: Heads,
    a: &'a Attention,
    /// The forward pass rounded queries and keys.
    rounded: bool,
}

/// `dq`, `dk`, `dv`: threads split sequences and key heads, so that each sum runs in the order of rows.
pub(in super::super) fn backward(
    cpu: &Cpu,
    a: &Attention,
    dout: Cells<f32>,
    dq: Cells<f32>,
    dk: Cells<f32>,
    dv: Cells<f32>,
) {
    let heads = Heads { heads: a.heads, kv_heads: a.kv_heads, dim: a.head_dim };
    let (q, k, v, out) = (cpu.f32(a.q), cpu.f32(a.k), cpu.f32(a.v), cpu.f32(a.out));
    let Some(lse) = a.lse.map(|lse| cpu.f32(lse)) else { panic!("the forward pass kept no lse") };
    let (q_dim, kv_dim) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
    assert!([q, out, dout, dq].iter().all(|x| x.len() >= a.rows * q_dim));
    assert!([k, v, dk, dv].iter().all(|x| x.len() >= a.rows * kv_dim));
    // SAFETY: nobody writes the batch's numbers while an operation runs.
    let starts = unsafe { cpu.u32(a.starts).part(0..a.sequences + 1).read() };
    let rounded = on_tiles(cpu, a);
    let x = Rows { q, k, v, out, lse, dout, dq, dk, dv, heads, a, rounded };
    cpu.run(a.sequences * a.kv_heads, |level, task, scratch| {
        let (sequence, kv_head) = (task / a.kv_heads, task % a.kv_heads);
        let rows = starts[sequence] as usize..starts[sequence + 1] as usize;
        for row in rows.clone() {
            for d in [dk, dv] {
                let at = row * kv_dim + kv_head * a.head_dim;
                // SAFETY: this task owns this head of these rows of dk and dv.
                unsafe { d.part(at..at + a.head_dim).write().fill(0.0) };
            }
        }
        for first in rows.clone().step_by(heads.rows(QUERIES)) {
            let block = first..(first + heads.rows(QUERIES)).min(rows.end);
            // SAFETY: as above, and these heads of the block's rows of dq.
            unsafe { attend_back(level, x, rows.start, block, kv_head, scratch) };
        }
    });
}

/// With `p = exp(cap(scale q k') - lse)`: `dv += p' dout`, `ds = p (dout v' - dout out) cap'`, `dq = scale ds k`,
/// `dk += scale ds' q`, for some rows of the sequence that begins at row `first`.
///
/// # Safety
/// Nobody else writes this head of the sequence in dk and dv, and of the rows in dq.
unsafe fn attend_back(
    level: Level,
    x: Rows<'_>,
    first: usize,
    rows: Range<usize>,
    kv_head: usize,
    scratch: Cells<f32>,
) {
    let Heads { heads, kv_heads, dim } = x.heads;
    let (group, stride) = (x.heads.group(), kv_heads * dim);
    let queries = rows.len() * group;
    let mut scratch = Scratch { rest: scratch };
    let (q, dout, dq) =
        (scratch.take(queries * dim), scratch.take(queries * dim), scratch.take(queries * dim));
    let (scores, grads) = (scratch.take(queries * KEYS), scratch.take(queries * KEYS));
    let deltas = scratch.take(queries);
    let near = scratch.take(if x.rounded { KEYS * dim } else { 0 });
    x.heads.gather(x.q, rows.clone(), kv_head, x.a.scale, q);
    x.heads.gather(x.dout, rows.clone(), kv_head, 1.0, dout);
    // SAFETY: scratch is this thread's; all rows of the sequence up to the block's last exist; the rest is the caller's.
    unsafe {
        dq.write().fill(0.0);
        if x.rounded {
            round(q.write());
        }
        for query in 0..queries {
            let out = x.out.part(x.heads.query(rows.start + query / group, kv_head));
            let (dout, out) =
                (dout.rows(query..query + 1, dim), out.rows(query % group..query % group + 1, dim));
            deltas.write()[query] = product(level, dout, out);
        }
        let lse_of = |query: usize| {
            x.lse.read()[(rows.start + query / group) * heads + kv_head * group + query % group]
        };
        let seen = |row: usize| x.a.seen(row - first);
        let count = rows.end - first;
        for start in (seen(rows.start).start..count).step_by(KEYS) {
            let keys = KEYS.min(count - start);
            let at = (first + start) * stride + kv_head * dim;
            // `lse` is of the scores as they were: of other ones `p` would not add up to 1, and what all keys have in common
            // would not cancel out in `dq`.
            let (k, k_row) = match x.rounded {
                true => {
                    for key in 0..keys {
                        let to = near.part(key * dim..(key + 1) * dim).write();
                        to.copy_from_slice(x.k.part(at + key * stride..at + key * stride + dim).read());
                    }
                    round(near.part(0..keys * dim).write());
                    (near.ptr(), dim)
                }
                false => (x.k.ptr().add(at), stride),
            };
            for (a, b, b_row, c) in [(q, k, k_row, scores), (dout, x.v.ptr().add(at), stride, grads)] {
                c.write().fill(0.0);
                let (a, c) = (a.ptr(), c.ptr_mut());
                let t = Dots { k: dim, block: dim, a, a_row: dim, b, b_row, c, c_row: KEYS };
                dots(level, queries, keys, t);
            }
            for query in 0..queries {
                let row = |x: Cells<f32>| x.rows(query..query + 1, KEYS);
                if let Some(cap) = x.a.soft_cap {
                    capped(level, row(scores).part(0..keys), cap);
                }
                let seen = within(seen(rows.start + query / group), &(start..start + keys));
                let cap = x.a.soft_cap.unwrap_or(f32::INFINITY);
                harden(level, row(scores), row(grads), seen, lse_of(query), deltas.read()[query], cap);
            }
            for (a, b, c) in [(scores, dout, x.dv), (grads, q, x.dk)] {
                let (a, b, c) = (a.ptr(), b.ptr(), c.ptr_mut().add(at));
                let t = Outer { k: queries, a, a_row: 1, a_k: KEYS, b, b_row: dim, c, c_row: stride };
                outer(level, keys, dim, t);
            }
            let (a, c) = (grads.ptr(), dq.ptr_mut());
            let t = Outer { k: keys, a, a_row: KEYS, a_k: 1, b: k, b_row: k_row, c, c_row: dim };
            outer(level, queries, dim, t);
        }
        for (i, row) in rows.enumerate() {
            let to = x.dq.part(x.heads.query(row, kv_head));
            scaled(level, dq.part(i * group * dim..(i + 1) * group * dim), x.a.scale, to);
        }
    }
}

/// Rounds to bf16, to the nearest and of two to the even one, as tiles take their operands.
fn round(x: &mut [f32]) {
    for x in x {
        let bits = x.to_bits();
        let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
        // No number stays none.
        *x = if x.is_nan() { *x } else { f32::from_bits(nearest) };
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::round;

    #[test]
    fn rounding_is_that_of_bf16() {
        let bits = (0..=u32::MAX).step_by(4099);
        for mut x in bits.map(f32::from_bits) {
            let expected = bf16::from_f32(x).to_f32();
            round(std::slice::from_mut(&mut x));
            assert!(x == expected || x.is_nan() && expected.is_nan(), "{x} {expected}");
        }
    }
}
