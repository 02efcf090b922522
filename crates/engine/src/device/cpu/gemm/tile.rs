//! The innermost loops of all products: blocks of the result, held in registers while they run along the sum.
//!
//! - [`dots`]: both operands run along the sum (`y = x w^T`). Each lane keeps a sum of its own; they are added
//!   at the end of a block of [`super::sum_block`] terms. So the order depends on the number of terms alone.
//! - [`outer`]: one operand is a number for each row, the other a vector of columns (`dx = dy w`, `dw = dy^T x`).
//!   Each element is one chain of multiply-adds that begins with what the result holds.
//!
//! In both neither the block's shape nor which rows come together changes a bit.
#![allow(unsafe_code)] // Raw pointers into matrices; registers must not spill to bounds checks.

use std::mem::MaybeUninit;

use crate::device::cpu::simd::{MOST_LANES, Simd, kernel};

/// Rows of the largest block of [`dots`].
pub(super) const DOT_ROWS: usize = 5;
/// Weights' rows that [`dots`] is given at a time where there are many rows.
pub(super) const DOT_COLUMNS: usize = 20;
/// Columns of a block of [`outer`], at most.
pub(super) const OUTER_COLUMNS: usize = 2 * MOST_LANES;
/// A multiple of the rows of every level's block of [`outer`].
pub(super) const OUTER_ROWS: usize = 12;

/// An element of a weight: f32, or bf16 (as bits) widened on load.
pub(super) trait Weight: Copy + Send + Sync {
    /// # Safety
    /// `from` is valid for reading `S::LANES` elements.
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
    /// # Safety
    /// `from` is valid for reading `count` elements, at most `S::LANES`.
    unsafe fn load_first<S: Simd>(from: *const Self, count: usize) -> S::V;
}

impl Weight for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f32) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load(from) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(from: *const f32, count: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_first(from, count) }
    }
}

impl Weight for u16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u16) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_bf16(from) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(from: *const u16, count: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_bf16_first(from, count) }
    }
}

/// `C[i, j] += sum over k of A[i, k] B[j, k]`; rows of all three are `*_row` apart.
#[derive(Clone, Copy)]
pub(in super::super) struct Dots<W> {
    pub k: usize,
    pub a: *const f32,
    pub a_row: usize,
    pub b: *const W,
    pub b_row: usize,
    pub c: *mut f32,
    pub c_row: usize,
}

/// One block of `R` rows and `C` columns.
#[inline(always)]
unsafe fn dot_block<S: Simd, W: Weight, const R: usize, const C: usize>(t: Dots<W>) {
    // SAFETY: the caller of `dots` vouches for all operands.
    unsafe {
        let mut acc = [[S::splat(0.0); R]; C];
        let whole = t.k / S::LANES * S::LANES;
        for k in (0..whole).step_by(S::LANES) {
            let a: [S::V; R] = std::array::from_fn(|i| S::load(t.a.add(i * t.a_row + k)));
            for (j, column) in acc.iter_mut().enumerate() {
                let b = W::load::<S>(t.b.add(j * t.b_row + k));
                for (sum, a) in column.iter_mut().zip(a) {
                    *sum = S::fma(a, b, *sum);
                }
            }
        }
        if whole < t.k {
            let rest = t.k - whole;
            let a: [S::V; R] = std::array::from_fn(|i| S::load_first(t.a.add(i * t.a_row + whole), rest));
            for (j, column) in acc.iter_mut().enumerate() {
                let b = W::load_first::<S>(t.b.add(j * t.b_row + whole), rest);
                for (sum, a) in column.iter_mut().zip(a) {
                    *sum = S::fma(a, b, *sum);
                }
            }
        }
        // Through memory: registers cannot be indexed by the loop over sums.
        let mut lanes = MaybeUninit::<[[f32; MOST_LANES]; 32]>::uninit();
        let lanes = lanes.as_mut_ptr().cast::<[f32; MOST_LANES]>();
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
                *t.c.add(i * t.c_row + j) += sum;
            }
        }
    }
}

/// `R` rows and any number of columns: blocks of `C` and what is left one by one.
#[inline(always)]
unsafe fn dot_rows<S: Simd, W: Weight, const R: usize, const C: usize>(columns: usize, t: Dots<W>) {
    let mut j = 0;
    // SAFETY: the caller's; columns `j..` exist up to `columns`.
    unsafe {
        while j < columns {
            let here = Dots { b: t.b.add(j * t.b_row), c: t.c.add(j), ..t };
            if columns - j >= C {
                dot_block::<S, W, R, C>(here);
                j += C;
            } else {
                dot_block::<S, W, R, 1>(here);
                j += 1;
            }
        }
    }
}

/// All rows and columns. Blocks are as large as the registers allow, and few rows get many columns, so that enough
/// sums are in flight to hide the latency of an addition.
#[inline(always)]
unsafe fn dot_all<S: Simd, W: Weight>(rows: usize, columns: usize, t: Dots<W>) {
    let most = if S::MANY_REGISTERS { DOT_ROWS } else { 3 };
    let mut row = 0;
    while row < rows {
        let count = (rows - row).min(most);
        // SAFETY: the caller's; rows `row..row + count` exist.
        unsafe {
            let here = Dots { a: t.a.add(row * t.a_row), c: t.c.add(row * t.c_row), ..t };
            match (S::MANY_REGISTERS, count) {
                (_, 1) => dot_rows::<S, W, 1, 8>(columns, here),
                (true, 2) => dot_rows::<S, W, 2, 8>(columns, here),
                (true, 3) => dot_rows::<S, W, 3, 8>(columns, here),
                (true, 4) => dot_rows::<S, W, 4, 6>(columns, here),
                (true, _) => dot_rows::<S, W, 5, 5>(columns, here),
                (false, 2) => dot_rows::<S, W, 2, 6>(columns, here),
                (false, _) => dot_rows::<S, W, 3, 4>(columns, here),
            }
        }
        row += count;
    }
}

kernel! {
    /// [`Dots`] with an f32 weight.
    ///
    /// # Safety
    /// All operands exist, `C` is nobody else's.
    pub(in super::super) dots = dots_f32(rows: usize, columns: usize, t: Dots<f32>)
}

#[inline(always)]
unsafe fn dots_f32<S: Simd>(rows: usize, columns: usize, t: Dots<f32>) {
    // SAFETY: the caller's.
    unsafe { dot_all::<S, f32>(rows, columns, t) }
}

kernel! {
    /// [`Dots`] with a bf16 weight.
    ///
    /// # Safety
    /// As [`dots`].
    pub(super) dots_bf16 = dots_narrow(rows: usize, columns: usize, t: Dots<u16>)
}

#[inline(always)]
unsafe fn dots_narrow<S: Simd>(rows: usize, columns: usize, t: Dots<u16>) {
    // SAFETY: the caller's.
    unsafe { dot_all::<S, u16>(rows, columns, t) }
}

/// `C[i, j] += sum over k of A[i, k] B[k, j]`, `A[i, k]` at `a + i * a_row + k * a_k`, `B[k, j]` at `b + k * b_row + j`.
#[derive(Clone, Copy)]
pub(in super::super) struct Outer {
    pub k: usize,
    pub a: *const f32,
    pub a_row: usize,
    pub a_k: usize,
    pub b: *const f32,
    pub b_row: usize,
    pub c: *mut f32,
    pub c_row: usize,
}

/// One block of `R` rows and two vectors of columns.
#[inline(always)]
unsafe fn outer_block<S: Simd, const R: usize>(t: Outer) {
    // SAFETY: the caller of `outer` vouches for all operands.
    unsafe {
        let mut acc: [[S::V; 2]; R] = std::array::from_fn(|i| {
            let c = t.c.add(i * t.c_row);
            [S::load(c), S::load(c.add(S::LANES))]
        });
        for k in 0..t.k {
            let b = t.b.add(k * t.b_row);
            let b = [S::load(b), S::load(b.add(S::LANES))];
            for (i, [low, high]) in acc.iter_mut().enumerate() {
                let a = S::splat(*t.a.add(i * t.a_row + k * t.a_k));
                *low = S::fma(a, b[0], *low);
                *high = S::fma(a, b[1], *high);
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
unsafe fn outer_edge<S: Simd, const R: usize>(columns: usize, t: Outer) {
    // SAFETY: the caller's; only existing columns are touched.
    unsafe {
        let mut acc: [S::V; R] = std::array::from_fn(|i| S::load_first(t.c.add(i * t.c_row), columns));
        for k in 0..t.k {
            let b = S::load_first(t.b.add(k * t.b_row), columns);
            for (i, sum) in acc.iter_mut().enumerate() {
                *sum = S::fma(S::splat(*t.a.add(i * t.a_row + k * t.a_k)), b, *sum);
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
    pub(in super::super) outer = outer_all(rows: usize, columns: usize, t: Outer)
}

#[inline(always)]
unsafe fn outer_all<S: Simd>(rows: usize, columns: usize, t: Outer) {
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
                        outer_block::<S, 12>(here);
                        12
                    }
                    (true, 6..) => {
                        outer_block::<S, 6>(here);
                        6
                    }
                    (true, 2..) => {
                        outer_block::<S, 2>(here);
                        2
                    }
                    (true, _) => {
                        outer_block::<S, 1>(here);
                        1
                    }
                    (false, 6..) => {
                        outer_edge::<S, 6>(width, here);
                        6
                    }
                    (false, _) => {
                        outer_edge::<S, 1>(width, here);
                        1
                    }
                };
            }
        }
        first += width;
    }
}

kernel! {
    /// `to[..len] = from[..len]`, widened.
    ///
    /// # Safety
    /// Both are valid for `len` elements.
    pub(in super::super) widen = widen_bf16(from: *const u16, to: *mut f32, len: usize)
}

#[inline(always)]
unsafe fn widen_bf16<S: Simd>(from: *const u16, to: *mut f32, len: usize) {
    let whole = len / S::LANES * S::LANES;
    // SAFETY: the caller's.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            S::store(to.add(i), S::load_bf16(from.add(i)));
        }
        if whole < len {
            S::store_first(to.add(whole), len - whole, S::load_bf16_first(from.add(whole), len - whole));
        }
    }
}
