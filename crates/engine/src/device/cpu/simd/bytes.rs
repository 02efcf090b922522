//! Products of bytes, summed in 32-bit integers: exact, so every level's sums are equal.
#![allow(unsafe_code)] // Instructions that only some machines have.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Lanes, Simd};

/// Vectors of bytes, four to a lane of a [`Simd`].
pub(in super::super) trait Bytes: Copy {
    /// Sums become its singles.
    type S: Simd;
    /// `4 * S::LANES` bytes.
    type B: Copy;
    /// `S::LANES` sums.
    type I: Copy;
    /// What each byte of `u` in [`Bytes::add_wide`] counts too much.
    const WIDE_BIAS: i32;

    /// # Safety
    /// `from` is valid for reading all bytes.
    unsafe fn load(from: *const u8) -> Self::B;
    /// The lower four bits of each byte.
    fn low(v: Self::B) -> Self::B;
    /// The upper four bits of each byte.
    fn high(v: Self::B) -> Self::B;
    /// A sum that begins with `first` in one lane.
    fn begin(first: i32) -> Self::I;
    /// Adds `u * x` of the four bytes of each lane; `u` without sign, at most 15.
    fn add_narrow(u: Self::B, x: Self::B, sum: Self::I) -> Self::I;
    /// Adds `(u - 128 + WIDE_BIAS) * x` of the four bytes of each lane; `u` without sign, at least 1, `x` at least -127.
    fn add_wide(u: Self::B, x: Self::B, sum: Self::I) -> Self::I;
    /// The sums as singles.
    fn singles(sum: Self::I) -> <Self::S as Simd>::V;
}

/// AVX-512 with VNNI.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(in super::super) struct Vnni;

// SAFETY of all intrinsics below: `byte_kernel!` reaches these types only after their features were detected.
#[cfg(target_arch = "x86_64")]
impl Bytes for Vnni {
    type S = super::Avx512;
    type B = __m512i;
    type I = __m512i;
    const WIDE_BIAS: i32 = 128;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    fn low(v: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(v, _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    fn high(v: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(v), _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    fn begin(first: i32) -> __m512i {
        unsafe { _mm512_maskz_set1_epi32(1, first) }
    }
    #[inline(always)]
    fn add_narrow(u: __m512i, x: __m512i, sum: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, u, x) }
    }
    #[inline(always)]
    fn add_wide(u: __m512i, x: __m512i, sum: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, u, x) }
    }
    #[inline(always)]
    fn singles(sum: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(sum) }
    }
}

/// AVX-512 (BW): each lane is that of [`Vnni`], and so are the results.
#[cfg(target_arch = "x86_64")]
impl Bytes for super::Avx512 {
    type S = super::Avx512;
    type B = __m512i;
    type I = __m512i;
    const WIDE_BIAS: i32 = 128;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512i {
        // SAFETY: the caller's.
        unsafe { Vnni::load(from) }
    }
    #[inline(always)]
    fn low(v: __m512i) -> __m512i {
        Vnni::low(v)
    }
    #[inline(always)]
    fn high(v: __m512i) -> __m512i {
        Vnni::high(v)
    }
    #[inline(always)]
    fn begin(first: i32) -> __m512i {
        Vnni::begin(first)
    }
    #[inline(always)]
    fn add_narrow(u: __m512i, x: __m512i, sum: __m512i) -> __m512i {
        unsafe {
            let twos = _mm512_maddubs_epi16(u, x);
            _mm512_add_epi32(sum, _mm512_madd_epi16(twos, _mm512_set1_epi16(1)))
        }
    }
    /// Sums of two products of numbers within +-127 fit into 16 bits; so `u` is taken without its bias, whose part is added
    /// by itself.
    #[inline(always)]
    fn add_wide(u: __m512i, x: __m512i, sum: __m512i) -> __m512i {
        unsafe {
            let bias = _mm512_maddubs_epi16(_mm512_set1_epi8(1), x);
            let sum = _mm512_add_epi32(sum, _mm512_madd_epi16(bias, _mm512_set1_epi16(128)));
            let w = _mm512_xor_si512(u, _mm512_set1_epi8(-128));
            let x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
            Self::add_narrow(_mm512_abs_epi8(w), x, sum)
        }
    }
    #[inline(always)]
    fn singles(sum: __m512i) -> __m512 {
        Vnni::singles(sum)
    }
}

#[cfg(target_arch = "x86_64")]
impl Bytes for super::Avx2 {
    type S = super::Avx2;
    type B = __m256i;
    type I = __m256i;
    const WIDE_BIAS: i32 = 0;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m256i {
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    #[inline(always)]
    fn low(v: __m256i) -> __m256i {
        unsafe { _mm256_and_si256(v, _mm256_set1_epi8(15)) }
    }
    #[inline(always)]
    fn high(v: __m256i) -> __m256i {
        unsafe { _mm256_and_si256(_mm256_srli_epi16::<4>(v), _mm256_set1_epi8(15)) }
    }
    #[inline(always)]
    fn begin(first: i32) -> __m256i {
        unsafe { _mm256_zextsi128_si256(_mm_cvtsi32_si128(first)) }
    }
    #[inline(always)]
    fn add_narrow(u: __m256i, x: __m256i, sum: __m256i) -> __m256i {
        unsafe {
            let twos = _mm256_maddubs_epi16(u, x);
            _mm256_add_epi32(sum, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)))
        }
    }
    /// As at AVX-512: within +-127 nothing saturates.
    #[inline(always)]
    fn add_wide(u: __m256i, x: __m256i, sum: __m256i) -> __m256i {
        unsafe {
            let w = _mm256_xor_si256(u, _mm256_set1_epi8(-128));
            Self::add_narrow(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w), sum)
        }
    }
    #[inline(always)]
    fn singles(sum: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(sum) }
    }
}

/// One by one.
impl Bytes for Lanes<8> {
    type S = Lanes<8>;
    type B = [u8; 32];
    type I = [i32; 8];
    const WIDE_BIAS: i32 = 0;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> [u8; 32] {
        // SAFETY: the caller's.
        unsafe { from.cast::<[u8; 32]>().read_unaligned() }
    }
    #[inline(always)]
    fn low(v: [u8; 32]) -> [u8; 32] {
        v.map(|b| b & 15)
    }
    #[inline(always)]
    fn high(v: [u8; 32]) -> [u8; 32] {
        v.map(|b| b >> 4)
    }
    #[inline(always)]
    fn begin(first: i32) -> [i32; 8] {
        [first, 0, 0, 0, 0, 0, 0, 0]
    }
    #[inline(always)]
    fn add_narrow(u: [u8; 32], x: [u8; 32], sum: [i32; 8]) -> [i32; 8] {
        let product = |i: usize| i32::from(u[i]) * i32::from(x[i] as i8);
        std::array::from_fn(|l| sum[l] + (4 * l..4 * l + 4).map(product).sum::<i32>())
    }
    #[inline(always)]
    fn add_wide(u: [u8; 32], x: [u8; 32], sum: [i32; 8]) -> [i32; 8] {
        let product = |i: usize| (i32::from(u[i]) - 128) * i32::from(x[i] as i8);
        std::array::from_fn(|l| sum[l] + (4 * l..4 * l + 4).map(product).sum::<i32>())
    }
    #[inline(always)]
    fn singles(sum: [i32; 8]) -> [f32; 8] {
        sum.map(|x| x as f32)
    }
}

/// Makes `$name(level, args..)` as [`super::kernel!`] does, of a generic over [`Bytes`].
macro_rules! byte_kernel {
    ($(#[$meta:meta])* $vis:vis $name:ident = $generic:ident($($arg:ident: $ty:ty),* $(,)?)) => {
        $(#[$meta])*
        $vis unsafe fn $name(level: $crate::device::cpu::Level, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
            unsafe fn vnni($($arg: $ty),*) {
                // SAFETY: the caller's.
                unsafe { $generic::<$crate::device::cpu::simd::Vnni>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            unsafe fn avx512($($arg: $ty),*) {
                // SAFETY: the caller's.
                unsafe { $generic::<$crate::device::cpu::simd::Avx512>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($arg: $ty),*) {
                // SAFETY: the caller's.
                unsafe { $generic::<$crate::device::cpu::simd::Avx2>($($arg),*) }
            }
            use $crate::device::cpu::Level;
            match level {
                // SAFETY: VNNI was detected; the rest is the caller's.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 | Level::Avx512Bf16 | Level::Amx if is_x86_feature_detected!("avx512vnni") => unsafe {
                    vnni($($arg),*)
                },
                // SAFETY: a `Cpu` has a level only on a machine that has its instructions; the rest is the caller's.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 | Level::Avx512Bf16 | Level::Amx => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: the caller's.
                _ => unsafe { $generic::<$crate::device::cpu::simd::Portable>($($arg),*) },
            }
        }
    };
}
pub(in super::super) use byte_kernel;

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;
    use crate::random::bits;

    /// Sums of the lanes of both kinds of products over 64 bytes of weights and of a row, and the lanes of the second.
    unsafe fn sums<T: Bytes>(w: &[u8; 64], x: &[u8; 64]) -> ([f32; 2], [f32; 16]) {
        let lanes = T::S::LANES;
        let [mut narrow, mut wide] = [T::begin(0); 2];
        let mut bias = 0;
        for at in (0..64).step_by(4 * lanes) {
            // SAFETY: inside both; the caller saw the features.
            let (u, row) = unsafe { (T::load(w.as_ptr().add(at)), T::load(x.as_ptr().add(at))) };
            narrow = T::add_narrow(T::low(u), row, narrow);
            narrow = T::add_narrow(T::high(u), row, narrow);
            wide = T::add_wide(u, row, wide);
            bias += x[at..at + 4 * lanes].iter().map(|&x| i32::from(x as i8)).sum::<i32>() * T::WIDE_BIAS;
        }
        let sums = [narrow, wide].map(|sum| T::S::sum(T::singles(sum)));
        let mut lanes = [0.0; 16];
        // SAFETY: there are at most 16.
        unsafe { T::S::store(lanes.as_mut_ptr(), T::singles(wide)) };
        ([sums[0], sums[1] - bias as f32], lanes)
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2(w: &[u8; 64], x: &[u8; 64]) -> ([f32; 2], [f32; 16]) {
        // SAFETY: the caller's.
        unsafe { sums::<super::super::Avx2>(w, x) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn avx512(w: &[u8; 64], x: &[u8; 64]) -> ([f32; 2], [f32; 16]) {
        // SAFETY: the caller's.
        unsafe { sums::<super::super::Avx512>(w, x) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
    unsafe fn vnni(w: &[u8; 64], x: &[u8; 64]) -> ([f32; 2], [f32; 16]) {
        // SAFETY: the caller's.
        unsafe { sums::<Vnni>(w, x) }
    }

    #[test]
    fn all_instructions_have_the_same_sums() {
        let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let has_avx512 = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl");
        let has_vnni = has_avx512 && is_x86_feature_detected!("avx512vnni");
        eprintln!("avx2 {has_avx2}, avx512 {has_avx512}, vnni {has_vnni}; a missing one is skipped");
        for round in 0..2000 {
            let extreme = round < 4;
            let w: [u8; 64] = std::array::from_fn(|i| match extreme {
                true => [1, 255][(round as usize + i) % 2],
                false => (bits(round, i as u64) % 255) as u8 + 1,
            });
            let x: [u8; 64] = std::array::from_fn(|i| match extreme {
                true => [127i8, -127][(round as usize / 2 + i) % 2] as u8,
                false => ((bits(round, 64 + i as u64) % 255) as i8).wrapping_add(-127).max(-127) as u8,
            });
            // SAFETY: one by one needs nothing; the others were detected.
            unsafe {
                let (expected, _) = sums::<Lanes<8>>(&w, &x);
                assert!(!has_avx2 || avx2(&w, &x).0 == expected);
                assert!(!has_avx512 || avx512(&w, &x).0 == expected);
                // One level: also lane by lane, since each is rounded by itself.
                assert!(!has_vnni || vnni(&w, &x) == avx512(&w, &x));
                assert!(!has_vnni || vnni(&w, &x).0 == expected);
            }
        }
    }
}
