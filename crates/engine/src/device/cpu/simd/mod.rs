//! Vectors of singles, so that each kernel is written once and compiled for each level.
//!
//! A kernel is an `#[inline(always)]` function generic over [`Simd`]; [`kernel!`] makes a function of it that picks
//! the level at run time.
#![allow(unsafe_code)] // Instructions that only some machines have.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bytes;
mod pairs;
mod portable;
mod tiles;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
#[cfg(target_arch = "x86_64")]
pub(super) use bytes::Vnni;
pub(super) use bytes::{Bytes, byte_kernel};
pub(super) use pairs::{Pairs, pair_kernel};
pub(super) use portable::{Lanes, Portable};
#[cfg(target_arch = "x86_64")]
pub(super) use tiles::{Amx, available as tiles_available};
pub(super) use tiles::{Block, Emulated, TILE, Tiles, tile_kernel};

/// Singles in the widest vector.
pub(super) const MOST_LANES: usize = 16;

/// Lets the processor read the cache line of `from`, which need not exist, ahead into the second-level cache.
#[inline(always)]
pub(super) fn prefetch<T>(from: *const T) {
    hint::<2, T>(from);
}

/// As [`prefetch`], into the first-level cache.
#[inline(always)]
pub(super) fn prefetch_near<T>(from: *const T) {
    hint::<3, T>(from);
}

/// `HINT` as x86 numbers them: `_MM_HINT_T1` is 2, `_MM_HINT_T0` is 3.
#[inline(always)]
fn hint<const HINT: i32, T>(from: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; no address faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<HINT>(from.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = from;
}

/// A vector of singles.
pub(super) trait Simd: Copy {
    /// Singles in it.
    const LANES: usize;
    /// Whether there are 32 registers; else 16.
    const MANY_REGISTERS: bool;
    type V: Copy;

    fn splat(x: f32) -> Self::V;
    /// # Safety
    /// `from` is valid for reading all lanes.
    unsafe fn load(from: *const f32) -> Self::V;
    /// # Safety
    /// `from` is valid for reading a bf16 number for each lane.
    unsafe fn load_bf16(from: *const u16) -> Self::V;
    /// # Safety
    /// `to` is valid for writing all lanes.
    unsafe fn store(to: *mut f32, v: Self::V);
    fn add(a: Self::V, b: Self::V) -> Self::V;
    fn sub(a: Self::V, b: Self::V) -> Self::V;
    fn mul(a: Self::V, b: Self::V) -> Self::V;
    fn div(a: Self::V, b: Self::V) -> Self::V;
    fn max(a: Self::V, b: Self::V) -> Self::V;
    fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the machine can.
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn round(a: Self::V) -> Self::V;
    /// `2^n` for whole `n` in -126..=127.
    fn exp2i(n: Self::V) -> Self::V;
    /// The sums of four vectors: halves are added until eight lanes are left, then neighbours, then the two fours.
    fn sum4(v: [Self::V; 4]) -> [f32; 4];

    /// The sum of the lanes, in the order of [`Simd::sum4`].
    #[inline(always)]
    fn sum(v: Self::V) -> f32 {
        let zero = Self::splat(0.0);
        Self::sum4([v, zero, zero, zero])[0]
    }

    /// The first `count` lanes, zeros beyond.
    ///
    /// # Safety
    /// `from` is valid for reading `count` singles, which are at most the lanes.
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self::V {
        let mut all = [0.0; MOST_LANES];
        // SAFETY: the caller's.
        unsafe {
            std::ptr::copy_nonoverlapping(from, all.as_mut_ptr(), count);
            Self::load(all.as_ptr())
        }
    }

    /// As [`Simd::load_first`], of bf16 numbers.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn load_bf16_first(from: *const u16, count: usize) -> Self::V {
        let mut all = [0; MOST_LANES];
        // SAFETY: the caller's.
        unsafe {
            std::ptr::copy_nonoverlapping(from, all.as_mut_ptr(), count);
            Self::load_bf16(all.as_ptr())
        }
    }

    /// Stores the first `count` lanes.
    ///
    /// # Safety
    /// `to` is valid for writing `count` singles, which are at most the lanes.
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, count: usize, v: Self::V) {
        let mut all = [0.0; MOST_LANES];
        // SAFETY: the caller's.
        unsafe {
            Self::store(all.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(all.as_ptr(), to, count);
        }
    }

    /// `e^x` to about 2 units in the last place (Cephes' polynomial); below -87.3 it stays at `e^-87.3`.
    #[inline(always)]
    fn exp(x: Self::V) -> Self::V {
        let x = Self::min(Self::max(x, Self::splat(-87.336_54)), Self::splat(88.376_26));
        let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
        let r = Self::fma(n, Self::splat(-0.693_359_4), x);
        let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
        let mut p = Self::splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = Self::fma(p, r, Self::splat(c));
        }
        let p = Self::fma(Self::mul(r, r), p, Self::add(r, Self::splat(1.0)));
        Self::mul(p, Self::exp2i(Self::min(Self::max(n, Self::splat(-126.0)), Self::splat(127.0))))
    }

    /// `tanh x` to a few units in the last place: Eigen's quotient of two polynomials, beyond 7.9 that of 7.9.
    #[inline(always)]
    fn tanh(x: Self::V) -> Self::V {
        let x = Self::min(Self::max(x, Self::splat(-7.905_311)), Self::splat(7.905_311));
        let x2 = Self::mul(x, x);
        let mut p = Self::splat(-2.760_768_5e-16);
        for c in [2.000_188e-13, -8.604_672e-11, 5.122_297e-8, 1.485_722_4e-5, 6.372_619e-4, 4.893_524_6e-3] {
            p = Self::fma(p, x2, Self::splat(c));
        }
        let mut q = Self::splat(1.198_258_4e-6);
        for c in [1.185_347_1e-4, 2.268_434_6e-3, 4.893_525e-3] {
            q = Self::fma(q, x2, Self::splat(c));
        }
        Self::div(Self::mul(x, p), q)
    }
}

/// Makes `$name(level, args..)`, which runs the `#[inline(always)]` generic `$generic::<S>(args..)` compiled for
/// the level.
macro_rules! kernel {
    ($(#[$meta:meta])* $vis:vis $name:ident = $generic:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis unsafe fn $name(level: $crate::device::cpu::Level, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the caller's.
                unsafe { $generic::<$crate::device::cpu::simd::Avx2>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the caller's.
                unsafe { $generic::<$crate::device::cpu::simd::Avx512>($($arg),*) }
            }
            match level {
                // SAFETY: a `Cpu` has a level only on a machine that has its instructions; the rest is the caller's.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::Level::Avx512
                | $crate::device::cpu::Level::Avx512Bf16
                | $crate::device::cpu::Level::Amx => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: the caller's.
                _ => unsafe { $generic::<$crate::device::cpu::simd::Portable>($($arg),*) },
            }
        }
    };
}
pub(super) use kernel;
