//! The innermost loop of products whose operands both run along the sum (`y = x w^T`).
//!
//! Each lane keeps a sum of its own; they are added at the end of a block of terms (`sum_block` of `forward`). So the
//! order depends on the number of terms alone: neither the block's shape nor which rows come together changes a bit.
#![allow(unsafe_code)] // Raw pointers into matrices; registers must not spill to bounds checks.

use std::mem::MaybeUninit;

use super::terms::{BF16Pairs, Singles, Terms};
use crate::device::cpu::simd::{MOST_LANES, Pairs, Simd, kernel, pair_kernel, prefetch};

/// Weights' rows that are given at a time where there are many rows.
pub(super) const DOT_COLUMNS: usize = 20;

/// `C[i, j] += sum over k of A[i, k] B[j, k]`; rows of all three are `*_row` apart.
#[derive(Clone, Copy)]
pub(in super::super) struct Dots<A, B> {
    pub k: usize,
    /// So many terms have lanes of their own; their sum is added to `C` before the next ones.
    pub block: usize,
    pub a: *const A,
    pub a_row: usize,
    pub b: *const B,
    pub b_row: usize,
    pub c: *mut f32,
    pub c_row: usize,
}

/// One block of `R` rows and `C` columns. A single column reads `B` ahead by so many elements.
#[inline(always)]
unsafe fn dot_block<S: Simd, K: Terms<S>, const R: usize, const C: usize>(t: Dots<K::A, K::B>, ahead: usize) {
    // SAFETY: the caller of `dots` vouches for all operands.
    unsafe {
        let mut acc = [[S::splat(0.0); R]; C];
        let whole = t.k / S::LANES * S::LANES;
        for k in (0..whole).step_by(S::LANES) {
            let a = |i: usize| K::load_a(t.a.add(i * t.a_row + k));
            let b = |j: usize| {
                let at = t.b.wrapping_add(j * t.b_row + k);
                if R > 1 && C == 1 {
                    prefetch(at.wrapping_add(ahead));
                }
                K::load_b(at)
            };
            add_products::<S, K, R, C>(&mut acc, a, b);
        }
        if whole < t.k {
            let rest = t.k - whole;
            let a = |i: usize| K::load_a_first(t.a.add(i * t.a_row + whole), rest);
            let b = |j: usize| K::load_b_first(t.b.add(j * t.b_row + whole), rest);
            add_products::<S, K, R, C>(&mut acc, a, b);
        }
        add_sums::<S, R, C>(&acc, t.c, t.c_row);
    }
}

/// How many columns ahead few rows let weights be read, of so many bytes each: some 8 KiB.
#[inline(always)]
pub(super) fn columns_ahead(bytes: usize) -> usize {
    (8192 / bytes.max(1)).max(1)
}

/// `acc[j][i] += a[i] b[j]`. The fewer operands stay in registers.
#[inline(always)]
fn add_products<S: Simd, K: Terms<S>, const R: usize, const C: usize>(
    acc: &mut [[S::V; R]; C],
    a: impl Fn(usize) -> S::V,
    b: impl Fn(usize) -> S::V,
) {
    if R <= C {
        let a: [S::V; R] = std::array::from_fn(a);
        for (j, column) in acc.iter_mut().enumerate() {
            let b = b(j);
            for (sum, a) in column.iter_mut().zip(a) {
                *sum = K::add_product(a, b, *sum);
            }
        }
    } else {
        let b: [S::V; C] = std::array::from_fn(b);
        for i in 0..R {
            let a = a(i);
            for (column, b) in acc.iter_mut().zip(b) {
                column[i] = K::add_product(a, b, column[i]);
            }
        }
    }
}

/// `C[i, j] += ` the sum of the lanes of `acc[j][i]`.
///
/// # Safety
/// `C` has these rows and columns, and is nobody else's.
#[inline(always)]
pub(super) unsafe fn add_sums<S: Simd, const R: usize, const C: usize>(
    acc: &[[S::V; R]; C],
    c: *mut f32,
    c_row: usize,
) {
    // Through memory: registers cannot be indexed by the loop over sums.
    let mut lanes = MaybeUninit::<[[f32; MOST_LANES]; 32]>::uninit();
    let lanes = lanes.as_mut_ptr().cast::<[f32; MOST_LANES]>();
    // SAFETY: there are at most 32 sums; the rest is the caller's.
    unsafe {
        for (j, column) in acc.iter().enumerate() {
            for (i, sum) in column.iter().enumerate() {
                S::store(lanes.add(j * R + i).cast(), *sum);
            }
        }
        for first in (0..R * C).step_by(4) {
            let of = |n| if n < R * C { S::load(lanes.add(n).cast()) } else { S::splat(0.0) };
            let four = std::array::from_fn(|n| of(first + n));
            for (n, sum) in S::sum4(four).into_iter().enumerate().take(R * C - first) {
                let (j, i) = ((first + n) / R, (first + n) % R);
                *c.add(i * c_row + j) += sum;
            }
        }
    }
}

/// `R` rows and any number of columns: blocks of `C` and what is left one by one. Returns the rows.
#[inline(always)]
unsafe fn dot_rows<S: Simd, K: Terms<S>, const R: usize, const C: usize>(
    columns: usize,
    t: Dots<K::A, K::B>,
) -> usize {
    let mut j = 0;
    let ahead = columns_ahead(t.k * size_of::<K::B>()) * t.b_row;
    // SAFETY: the caller's; columns `j..` exist up to `columns`.
    unsafe {
        while j < columns {
            let wide = columns - j >= C;
            let mut first = 0;
            while first < t.k {
                let (k, a, b) = (t.block.min(t.k - first), t.a.add(first), t.b.add(j * t.b_row + first));
                let here = Dots { k, a, b, c: t.c.add(j), ..t };
                if wide {
                    dot_block::<S, K, R, C>(here, ahead);
                } else {
                    dot_block::<S, K, R, 1>(here, ahead);
                }
                first += t.block;
            }
            j += if wide { C } else { 1 };
        }
    }
    R
}

/// All rows and columns. Many rows get blocks as large as the registers allow. Few rows get one column at a time, so that
/// the second operand is read from memory in its order, which processors foresee.
#[inline(always)]
unsafe fn dot_all<S: Simd, K: Terms<S>>(rows: usize, columns: usize, t: Dots<K::A, K::B>) {
    let mut row = 0;
    while row < rows {
        // SAFETY: the caller's; rows `row..` exist up to `rows`.
        unsafe {
            let here = Dots { a: t.a.add(row * t.a_row), c: t.c.add(row * t.c_row), ..t };
            row += match (S::MANY_REGISTERS, rows - row) {
                (_, 1) => dot_rows::<S, K, 1, 1>(columns, here),
                (true, 2) => dot_rows::<S, K, 2, 1>(columns, here),
                (true, 3) => dot_rows::<S, K, 3, 1>(columns, here),
                (true, 4) => dot_rows::<S, K, 4, 1>(columns, here),
                (true, 5) => dot_rows::<S, K, 5, 1>(columns, here),
                (true, 6) => dot_rows::<S, K, 6, 1>(columns, here),
                (true, 7) => dot_rows::<S, K, 7, 1>(columns, here),
                (true, 8) => dot_rows::<S, K, 8, 1>(columns, here),
                (true, _) => dot_rows::<S, K, 5, 5>(columns, here),
                (false, 2) if rows == 2 => dot_rows::<S, K, 2, 1>(columns, here),
                (false, 2) => dot_rows::<S, K, 2, 6>(columns, here),
                (false, _) => dot_rows::<S, K, 3, 4>(columns, here),
            };
        }
    }
}

kernel! {
    /// [`Dots`] with an f32 weight.
    ///
    /// # Safety
    /// All operands exist, `C` is nobody else's.
    pub(in super::super) dots = dots_f32(rows: usize, columns: usize, t: Dots<f32, f32>)
}

#[inline(always)]
unsafe fn dots_f32<S: Simd>(rows: usize, columns: usize, t: Dots<f32, f32>) {
    // SAFETY: the caller's.
    unsafe { dot_all::<S, Singles<f32>>(rows, columns, t) }
}

kernel! {
    /// [`Dots`] with a bf16 weight.
    ///
    /// # Safety
    /// As [`dots`].
    pub(super) dots_bf16 = dots_narrow(rows: usize, columns: usize, t: Dots<f32, u16>)
}

#[inline(always)]
unsafe fn dots_narrow<S: Simd>(rows: usize, columns: usize, t: Dots<f32, u16>) {
    // SAFETY: the caller's.
    unsafe { dot_all::<S, Singles<u16>>(rows, columns, t) }
}

pair_kernel! {
    /// [`Dots`] of pairs of bf16 numbers; `k` counts pairs.
    ///
    /// # Safety
    /// As [`dots`].
    pub(super) dots_pairs = dots_of_pairs(rows: usize, columns: usize, t: Dots<u32, u32>)
}

#[inline(always)]
unsafe fn dots_of_pairs<S: Pairs>(rows: usize, columns: usize, t: Dots<u32, u32>) {
    // SAFETY: the caller's.
    unsafe { dot_all::<S, BF16Pairs>(rows, columns, t) }
}
