//! The innermost loop of products with weights of 8 or 4 bits.
//!
//! A group's products are summed in integers, four to a lane; the lanes become singles, are multiplied by the scales
//! of both, and added. So the order of the roundings depends on the number of terms alone.
#![allow(unsafe_code)] // Raw pointers into matrices; registers must not spill to bounds checks.

use lathe_plan::QUANT_GROUP as GROUP;

use super::dots::add_sums;
use crate::device::cpu::simd::{Bytes, Simd, byte_kernel};

/// `C[i, j] += sum over k of A[i, k] B[j, k]`, for some groups of both.
#[derive(Clone, Copy)]
pub(super) struct IntDots {
    pub groups: usize,
    /// Codes of rows; the next row's are `a_row` bytes on, its scales and sums `groups` on.
    pub a: *const i8,
    pub a_scales: *const f32,
    pub a_sums: *const i32,
    pub a_row: usize,
    /// Codes of weights and their scales.
    pub b: *const u8,
    pub b_row: usize,
    pub b_scales: *const f32,
    pub b_scales_row: usize,
    pub c: *mut f32,
    pub c_row: usize,
}

/// One block of `R` rows and `C` columns.
#[inline(always)]
unsafe fn int_block<T: Bytes, const BITS: usize, const R: usize, const C: usize>(t: IntDots) {
    let step = 4 * T::S::LANES;
    let bias = if BITS == 4 { 8 } else { T::WIDE_BIAS };
    // SAFETY: the caller of `int_dots` vouches for all operands.
    unsafe {
        let mut acc = [[T::S::splat(0.0); R]; C];
        for group in 0..t.groups {
            let scales: [_; R] = std::array::from_fn(|i| T::S::splat(*t.a_scales.add(i * t.groups + group)));
            let begins: [i32; R] = std::array::from_fn(|i| -bias * *t.a_sums.add(i * t.groups + group));
            let x = |i: usize, term: usize| T::load(t.a.add(i * t.a_row + group * GROUP + term).cast());
            for (j, column) in acc.iter_mut().enumerate() {
                let w = t.b.add(j * t.b_row + group * GROUP * BITS / 8);
                let mut sums: [T::I; R] = std::array::from_fn(|i| T::begin(begins[i]));
                for at in (0..GROUP * BITS / 8).step_by(step) {
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

/// `R` rows and any number of columns.
#[inline(always)]
unsafe fn int_rows<T: Bytes, const BITS: usize, const R: usize>(columns: usize, t: IntDots) {
    let mut j = 0;
    while j < columns {
        // SAFETY: the caller's; columns `j..` exist up to `columns`.
        unsafe {
            let (b, b_scales) = (t.b.add(j * t.b_row), t.b_scales.add(j * t.b_scales_row));
            let here = IntDots { b, b_scales, c: t.c.add(j), ..t };
            if T::S::MANY_REGISTERS && columns - j >= 4 {
                int_block::<T, BITS, R, 4>(here);
                j += 4;
            } else {
                int_block::<T, BITS, R, 1>(here);
                j += 1;
            }
        }
    }
}

#[inline(always)]
unsafe fn int_all<T: Bytes, const BITS: usize>(rows: usize, columns: usize, t: IntDots) {
    let mut row = 0;
    while row < rows {
        // SAFETY: the caller's; rows `row..` exist up to `rows`.
        unsafe {
            let (a, c) = (t.a.add(row * t.a_row), t.c.add(row * t.c_row));
            let (a_scales, a_sums) = (t.a_scales.add(row * t.groups), t.a_sums.add(row * t.groups));
            let here = IntDots { a, a_scales, a_sums, c, ..t };
            row += match rows - row {
                4.. => {
                    int_rows::<T, BITS, 4>(columns, here);
                    4
                }
                2.. => {
                    int_rows::<T, BITS, 2>(columns, here);
                    2
                }
                _ => {
                    int_rows::<T, BITS, 1>(columns, here);
                    1
                }
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
