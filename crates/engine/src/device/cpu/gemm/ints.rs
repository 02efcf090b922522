//! The innermost loop of products with weights of 8 or 4 bits.
//!
//! A group's products are summed in integers, four to a lane; the lanes become singles, are multiplied by the scales
//! of both, and added. So the order of the roundings depends on the number of terms alone.
#![allow(unsafe_code)] // Raw pointers into matrices; registers must not spill to bounds checks.

use lathe_plan::QUANT_GROUP as GROUP;

use super::dots::{add_sums, columns_ahead};
use super::quantized::Rows;
use crate::device::cpu::simd::{Bytes, Simd, byte_kernel, prefetch};

/// `C[i, j] += sum over k of A[i, k] B[j, k]`, for some groups of both.
#[derive(Clone, Copy)]
pub(super) struct IntDots {
    pub groups: usize,
    /// So many groups have lanes of their own; their sum is added to `C` before the next ones.
    pub block: usize,
    /// Of each row `a_groups` groups lie there, of which these are some.
    pub a: Rows,
    pub a_groups: usize,
    /// Codes of weights and their scales.
    pub b: *const u8,
    pub b_row: usize,
    pub b_scales: *const f32,
    pub b_scales_row: usize,
    pub c: *mut f32,
    pub c_row: usize,
}

/// One block of `R` rows and `C` columns. A single column reads `B` ahead by so many bytes.
#[inline(always)]
unsafe fn int_block<T: Bytes, const BITS: usize, const R: usize, const C: usize>(t: IntDots, ahead: usize) {
    let step = 4 * T::S::LANES;
    let bias = if BITS == 4 { 8 } else { T::WIDE_BIAS };
    // SAFETY: the caller of `int_dots` vouches for all operands.
    unsafe {
        let mut acc = [[T::S::splat(0.0); R]; C];
        for group in 0..t.groups {
            let scales: [_; R] =
                std::array::from_fn(|i| T::S::splat(*t.a.scales.add(i * t.a_groups + group)));
            let begins: [i32; R] = std::array::from_fn(|i| -bias * *t.a.sums.add(i * t.a_groups + group));
            let x = |i: usize, term: usize| {
                T::load(t.a.codes.add((i * t.a_groups + group) * GROUP + term).cast())
            };
            for (j, column) in acc.iter_mut().enumerate() {
                let w = t.b.add(j * t.b_row + group * GROUP * BITS / 8);
                let mut sums: [T::I; R] = std::array::from_fn(|i| T::begin(begins[i]));
                for at in (0..GROUP * BITS / 8).step_by(step) {
                    if R > 1 && C == 1 {
                        prefetch(w.wrapping_add(ahead + at));
                    }
                    let u = T::load(w.add(at));
                    for (i, sum) in sums.iter_mut().enumerate() {
                        if BITS == 4 {
                            *sum = T::add_narrow(T::low(u), x(i, at), *sum);
                            *sum = T::add_narrow(T::high(u), x(i, at + GROUP / 2), *sum);
                        } else {
                            *sum = T::add_wide(u, x(i, at), *sum);
                        }
                    }
                }
                let scale = T::S::splat(*t.b_scales.add(j * t.b_scales_row + group));
                for ((acc, sum), a_scale) in column.iter_mut().zip(sums).zip(scales) {
                    *acc = T::S::fma(T::singles(sum), T::S::mul(scale, a_scale), *acc);
                }
            }
        }
        add_sums::<T::S, R, C>(&acc, t.c, t.c_row);
    }
}

/// `R` rows and any number of columns: blocks of `C` and what is left one by one. Returns the rows.
#[inline(always)]
unsafe fn int_rows<T: Bytes, const BITS: usize, const R: usize, const C: usize>(
    columns: usize,
    t: IntDots,
) -> usize {
    let mut j = 0;
    let ahead = columns_ahead(t.groups * GROUP * BITS / 8) * t.b_row;
    while j < columns {
        // SAFETY: the caller's; columns `j..` exist up to `columns`.
        unsafe {
            let wide = columns - j >= C;
            let mut first = 0;
            while first < t.groups {
                let b = t.b.add(j * t.b_row + first * GROUP * BITS / 8);
                let b_scales = t.b_scales.add(j * t.b_scales_row + first);
                let groups = t.block.min(t.groups - first);
                let here = IntDots { groups, a: t.a.from(first), b, b_scales, c: t.c.add(j), ..t };
                if wide {
                    int_block::<T, BITS, R, C>(here, ahead);
                } else {
                    int_block::<T, BITS, R, 1>(here, ahead);
                }
                first += t.block;
            }
            j += if wide { C } else { 1 };
        }
    }
    R
}

/// All rows and columns; few rows get one column at a time, as in [`super::dots`].
#[inline(always)]
unsafe fn int_all<T: Bytes, const BITS: usize>(rows: usize, columns: usize, t: IntDots) {
    let mut row = 0;
    while row < rows {
        // SAFETY: the caller's; rows `row..` exist up to `rows`.
        unsafe {
            let here = IntDots { a: t.a.row(row, t.a_groups), c: t.c.add(row * t.c_row), ..t };
            row += match (T::S::MANY_REGISTERS, rows - row) {
                (_, 1) => int_rows::<T, BITS, 1, 1>(columns, here),
                (_, 2 | 3) => int_rows::<T, BITS, 2, 1>(columns, here),
                (true, 8) if rows == 8 => int_rows::<T, BITS, 8, 1>(columns, here),
                (true, 9..) => int_rows::<T, BITS, 4, 4>(columns, here),
                (_, _) => int_rows::<T, BITS, 4, 1>(columns, here),
            };
        }
    }
}

byte_kernel! {
    /// [`IntDots`] with weights of 8 bits.
    ///
    /// # Safety
    /// All operands exist, `C` is nobody else's.
    pub(super) dots_int8 = int8_dots(rows: usize, columns: usize, t: IntDots)
}

#[inline(always)]
unsafe fn int8_dots<T: Bytes>(rows: usize, columns: usize, t: IntDots) {
    // SAFETY: the caller's.
    unsafe { int_all::<T, 8>(rows, columns, t) }
}

byte_kernel! {
    /// [`IntDots`] with weights of 4 bits.
    ///
    /// # Safety
    /// As [`dots_int8`].
    pub(super) dots_int4 = int4_dots(rows: usize, columns: usize, t: IntDots)
}

#[inline(always)]
unsafe fn int4_dots<T: Bytes>(rows: usize, columns: usize, t: IntDots) {
    // SAFETY: the caller's.
    unsafe { int_all::<T, 4>(rows, columns, t) }
}
