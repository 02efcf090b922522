//! What the terms of a sum are: the numbers that a kernel reads from its two operands, and how they are multiplied.
#![allow(unsafe_code)] // Raw pointers into matrices.

use std::marker::PhantomData;

use crate::device::cpu::simd::{Pairs, Simd, kernel, pair_kernel};

/// A vector of terms at a time.
pub(super) trait Terms<S: Simd> {
    /// A term's part in the first operand.
    type A: Copy;
    /// A term's part in the second.
    type B: Copy;

    /// # Safety
    /// `from` is valid for reading `S::LANES` elements.
    unsafe fn load_a(from: *const Self::A) -> S::V;
    /// # Safety
    /// `from` is valid for reading `count` elements, at most `S::LANES`.
    unsafe fn load_a_first(from: *const Self::A, count: usize) -> S::V;
    /// # Safety
    /// As [`Terms::load_a`].
    unsafe fn load_b(from: *const Self::B) -> S::V;
    /// # Safety
    /// As [`Terms::load_a_first`].
    unsafe fn load_b_first(from: *const Self::B, count: usize) -> S::V;
    /// One element in all lanes.
    fn splat_a(a: Self::A) -> S::V;
    /// `sum + a * b` in each lane.
    fn add_product(a: S::V, b: S::V, sum: S::V) -> S::V;
}

/// A number that is read as a single: f32, or bf16 (as bits), which is widened.
pub(super) trait Number: Copy {
    /// # Safety
    /// `from` is valid for reading `S::LANES` elements.
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
    /// # Safety
    /// `from` is valid for reading `count` elements, at most `S::LANES`.
    unsafe fn load_first<S: Simd>(from: *const Self, count: usize) -> S::V;
}

impl Number for f32 {
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

impl Number for u16 {
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

/// Singles by numbers that are read as such.
pub(super) struct Singles<B>(PhantomData<B>);

impl<S: Simd, B: Number> Terms<S> for Singles<B> {
    type A = f32;
    type B = B;
    #[inline(always)]
    unsafe fn load_a(from: *const f32) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load(from) }
    }
    #[inline(always)]
    unsafe fn load_a_first(from: *const f32, count: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_first(from, count) }
    }
    #[inline(always)]
    unsafe fn load_b(from: *const B) -> S::V {
        // SAFETY: the caller's.
        unsafe { B::load::<S>(from) }
    }
    #[inline(always)]
    unsafe fn load_b_first(from: *const B, count: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { B::load_first::<S>(from, count) }
    }
    #[inline(always)]
    fn splat_a(a: f32) -> S::V {
        S::splat(a)
    }
    #[inline(always)]
    fn add_product(a: S::V, b: S::V, sum: S::V) -> S::V {
        S::fma(a, b, sum)
    }
}

/// Pairs of bf16 numbers.
pub(super) struct BF16Pairs;

impl<S: Pairs> Terms<S> for BF16Pairs {
    type A = u32;
    type B = u32;
    #[inline(always)]
    unsafe fn load_a(from: *const u32) -> S::V {
        // SAFETY: the caller's; a single's bits may be any.
        unsafe { S::load(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_a_first(from: *const u32, count: usize) -> S::V {
        // SAFETY: as above.
        unsafe { S::load_first(from.cast(), count) }
    }
    #[inline(always)]
    unsafe fn load_b(from: *const u32) -> S::V {
        // SAFETY: as above.
        unsafe { S::load(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_b_first(from: *const u32, count: usize) -> S::V {
        // SAFETY: as above.
        unsafe { S::load_first(from.cast(), count) }
    }
    #[inline(always)]
    fn splat_a(a: u32) -> S::V {
        S::splat(f32::from_bits(a))
    }
    #[inline(always)]
    fn add_product(a: S::V, b: S::V, sum: S::V) -> S::V {
        S::dot_pairs(a, b, sum)
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

pair_kernel! {
    /// `to[..len] = from[..len]`, rounded to bf16.
    ///
    /// # Safety
    /// Both are valid for `len` elements.
    pub(super) narrow = narrow_to_bf16(from: *const f32, to: *mut u16, len: usize)
}

/// [`narrow`], inside of a kernel.
#[inline(always)]
pub(super) unsafe fn narrow_to_bf16<S: Pairs>(from: *const f32, to: *mut u16, len: usize) {
    let whole = len / S::LANES * S::LANES;
    // SAFETY: the caller's.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            S::store_bf16(to.add(i), S::load(from.add(i)));
        }
        if whole < len {
            let mut rest = [0; 16];
            S::store_bf16(rest.as_mut_ptr(), S::load_first(from.add(whole), len - whole));
            std::ptr::copy_nonoverlapping(rest.as_ptr(), to.add(whole), len - whole);
        }
    }
}

pair_kernel! {
    /// `to[..len] = (low[..len], high[..len])` as pairs.
    ///
    /// # Safety
    /// All are valid for `len` elements.
    pub(super) interleave = interleave_rows(low: *const u16, high: *const u16, to: *mut u32, len: usize)
}

#[inline(always)]
unsafe fn interleave_rows<S: Pairs>(low: *const u16, high: *const u16, to: *mut u32, len: usize) {
    let whole = len / S::LANES * S::LANES;
    // SAFETY: the caller's.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            S::store(to.add(i).cast(), S::interleave(low.add(i), high.add(i)));
        }
        for i in whole..len {
            *to.add(i) = u32::from(*low.add(i)) | u32::from(*high.add(i)) << 16;
        }
    }
}
