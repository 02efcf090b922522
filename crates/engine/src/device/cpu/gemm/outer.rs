//! The innermost loop of products of one operand that is a number for each row and one that is a vector of columns
//! (`dx = dy w`, `dw = dy^T x`).
//!
//! Each element is one chain of multiply-adds that begins with what the result holds, so neither the block's shape nor
//! which rows come together changes a bit.
#![allow(unsafe_code)] // Raw pointers into matrices; registers must not spill to bounds checks.

use super::terms::{BF16Pairs, Singles, Terms};
use crate::device::cpu::simd::{MOST_LANES, Pairs, Simd, kernel, pair_kernel};

/// Columns of a block, at most.
pub(super) const OUTER_COLUMNS: usize = 2 * MOST_LANES;
/// A multiple of the rows of every level's block.
pub(super) const OUTER_ROWS: usize = 12;

/// `C[i, j] += sum over k of A[i, k] B[k, j]`, `A[i, k]` at `a + i * a_row + k * a_k`, `B[k, j]` at `b + k * b_row + j`.
#[derive(Clone, Copy)]
pub(in super::super) struct Outer<A, B> {
    pub k: usize,
    pub a: *const A,
    pub a_row: usize,
    pub a_k: usize,
    pub b: *const B,
    pub b_row: usize,
    pub c: *mut f32,
    pub c_row: usize,
}

/// One block of `R` rows and two vectors of columns.
#[inline(always)]
unsafe fn outer_block<S: Simd, K: Terms<S>, const R: usize>(t: Outer<K::A, K::B>) {
    // SAFETY: the caller of `outer` vouches for all operands.
    unsafe {
        let mut acc: [[S::V; 2]; R] = std::array::from_fn(|i| {
            let c = t.c.add(i * t.c_row);
            [S::load(c), S::load(c.add(S::LANES))]
        });
        for k in 0..t.k {
            let b = t.b.add(k * t.b_row);
            let b = [K::load_b(b), K::load_b(b.add(S::LANES))];
            for (i, [low, high]) in acc.iter_mut().enumerate() {
                let a = K::splat_a(*t.a.add(i * t.a_row + k * t.a_k));
                *low = K::add_product(a, b[0], *low);
                *high = K::add_product(a, b[1], *high);
            }
        }
        for (i, [low, high]) in acc.into_iter().enumerate() {
            let c = t.c.add(i * t.c_row);
            S::store(c, low);
            S::store(c.add(S::LANES), high);
        }
    }
}

/// One block of `R` rows and one vector of which the first `columns` exist.
#[inline(always)]
unsafe fn outer_edge<S: Simd, K: Terms<S>, const R: usize>(columns: usize, t: Outer<K::A, K::B>) {
    // SAFETY: the caller's; only existing columns are touched.
    unsafe {
        let mut acc: [S::V; R] = std::array::from_fn(|i| S::load_first(t.c.add(i * t.c_row), columns));
        for k in 0..t.k {
            let b = K::load_b_first(t.b.add(k * t.b_row), columns);
            for (i, sum) in acc.iter_mut().enumerate() {
                *sum = K::add_product(K::splat_a(*t.a.add(i * t.a_row + k * t.a_k)), b, *sum);
            }
        }
        for (i, sum) in acc.into_iter().enumerate() {
            S::store_first(t.c.add(i * t.c_row), columns, sum);
        }
    }
}

kernel! {
    /// [`Outer`].
    ///
    /// # Safety
    /// All operands exist, `C` is nobody else's.
    pub(in super::super) outer = outer_f32(rows: usize, columns: usize, t: Outer<f32, f32>)
}

#[inline(always)]
unsafe fn outer_f32<S: Simd>(rows: usize, columns: usize, t: Outer<f32, f32>) {
    // SAFETY: the caller's.
    unsafe { outer_all::<S, Singles<f32>>(rows, columns, t) }
}

pair_kernel! {
    /// [`Outer`] of pairs of bf16 numbers; `k` counts pairs.
    ///
    /// # Safety
    /// As [`outer`].
    pub(super) outer_pairs = outer_of_pairs(rows: usize, columns: usize, t: Outer<u32, u32>)
}

#[inline(always)]
unsafe fn outer_of_pairs<S: Pairs>(rows: usize, columns: usize, t: Outer<u32, u32>) {
    // SAFETY: the caller's.
    unsafe { outer_all::<S, BF16Pairs>(rows, columns, t) }
}

/// All rows and columns.
#[inline(always)]
unsafe fn outer_all<S: Simd, K: Terms<S>>(rows: usize, columns: usize, t: Outer<K::A, K::B>) {
    let mut first = 0;
    while first < columns {
        let width =
            if columns - first >= 2 * S::LANES { 2 * S::LANES } else { S::LANES.min(columns - first) };
        let mut row = 0;
        while row < rows {
            let left = rows - row;
            // SAFETY: the caller's; rows `row..` and columns `first..first + width` exist.
            unsafe {
                let (a, b) = (t.a.add(row * t.a_row), t.b.add(first));
                let here = Outer { a, b, c: t.c.add(row * t.c_row + first), ..t };
                row += match (width == 2 * S::LANES, left) {
                    (true, 12..) if S::MANY_REGISTERS => {
                        outer_block::<S, K, 12>(here);
                        12
                    }
                    (true, 6..) => {
                        outer_block::<S, K, 6>(here);
                        6
                    }
                    (true, 2..) => {
                        outer_block::<S, K, 2>(here);
                        2
                    }
                    (true, _) => {
                        outer_block::<S, K, 1>(here);
                        1
                    }
                    (false, 6..) => {
                        outer_edge::<S, K, 6>(width, here);
                        6
                    }
                    (false, _) => {
                        outer_edge::<S, K, 1>(width, here);
                        1
                    }
                };
            }
        }
        first += width;
    }
}
