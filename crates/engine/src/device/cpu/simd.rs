//! Eight singles at a time, on AVX2 or in plain Rust. Kernels are written once over [`Simd`] and compiled for
//! each level by [`kernel!`]. Within a level each element's result depends on its operands alone, never on the
//! lane it was computed in.
#![allow(unsafe_code)] // Vector intrinsics and unaligned loads from raw pointers.

/// Singles in a vector.
pub(super) const LANES: usize = 8;

/// Eight singles.
pub(super) trait Simd: Copy {
    type V: Copy;

    fn splat(x: f32) -> Self::V;
    /// # Safety
    /// `from` is valid for reading 8 singles.
    unsafe fn load(from: *const f32) -> Self::V;
    /// # Safety
    /// `from` is valid for reading 8 bf16 numbers.
    unsafe fn load_bf16(from: *const u16) -> Self::V;
    /// # Safety
    /// `to` is valid for writing 8 singles.
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
    fn lanes(v: Self::V) -> [f32; LANES];
    /// Rows become columns.
    fn transpose(rows: [Self::V; LANES]) -> [Self::V; LANES];

    /// The sum of the lanes, in pairs: (0+4, 1+5, 2+6, 3+7), and so on.
    #[inline(always)]
    fn sum(v: Self::V) -> f32 {
        let l = Self::lanes(v);
        ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
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
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type V = [f32; LANES];

    #[inline(always)]
    fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the caller's.
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::V {
        // SAFETY: the caller's.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        each(|i| f32::from_bits(u32::from(bits[i]) << 16))
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn round(a: Self::V) -> Self::V {
        each(|i| a[i].round_ties_even())
    }
    #[inline(always)]
    fn exp2i(n: Self::V) -> Self::V {
        each(|i| f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn lanes(v: Self::V) -> [f32; LANES] {
        v
    }
    #[inline(always)]
    fn transpose(rows: [Self::V; LANES]) -> [Self::V; LANES] {
        std::array::from_fn(|i| each(|j| rows[j][i]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::Avx2;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Simd};

    /// AVX2 and FMA. Used only behind [`super::kernel!`], which enables the features after detection.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2;

    // SAFETY of all intrinsics below: `kernel!` reaches this type only after AVX2 and FMA were detected.
    impl Simd for Avx2 {
        type V = __m256;

        #[inline(always)]
        fn splat(x: f32) -> __m256 {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> __m256 {
            unsafe {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, v: __m256) {
            unsafe { _mm256_storeu_ps(to, v) }
        }
        #[inline(always)]
        fn add(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        fn sub(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        fn div(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_div_ps(a, b) }
        }
        #[inline(always)]
        fn max(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        fn min(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_min_ps(a, b) }
        }
        #[inline(always)]
        fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn round(a: __m256) -> __m256 {
            unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
        }
        #[inline(always)]
        fn exp2i(n: __m256) -> __m256 {
            unsafe {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            }
        }
        #[inline(always)]
        fn lanes(v: __m256) -> [f32; LANES] {
            let mut out = [0.0; LANES];
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), v) };
            out
        }
        /// The pairs of [`Simd::sum`], in registers.
        #[inline(always)]
        fn sum(v: __m256) -> f32 {
            unsafe {
                let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<0x55>(two, two)))
            }
        }
        #[inline(always)]
        fn transpose(r: [__m256; LANES]) -> [__m256; LANES] {
            unsafe {
                let lo = |i: usize| _mm256_unpacklo_ps(r[i], r[i + 1]);
                let hi = |i: usize| _mm256_unpackhi_ps(r[i], r[i + 1]);
                let [a, b, c, d] = [lo(0), lo(2), lo(4), lo(6)];
                let [e, f, g, h] = [hi(0), hi(2), hi(4), hi(6)];
                // Columns 0..4 of rows 0..4 and 4..8 in each half.
                let [p0, p1] = [_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b)];
                let [p2, p3] = [_mm256_shuffle_ps::<0x44>(e, f), _mm256_shuffle_ps::<0xee>(e, f)];
                let [q0, q1] = [_mm256_shuffle_ps::<0x44>(c, d), _mm256_shuffle_ps::<0xee>(c, d)];
                let [q2, q3] = [_mm256_shuffle_ps::<0x44>(g, h), _mm256_shuffle_ps::<0xee>(g, h)];
                [
                    _mm256_permute2f128_ps::<0x20>(p0, q0),
                    _mm256_permute2f128_ps::<0x20>(p1, q1),
                    _mm256_permute2f128_ps::<0x20>(p2, q2),
                    _mm256_permute2f128_ps::<0x20>(p3, q3),
                    _mm256_permute2f128_ps::<0x31>(p0, q0),
                    _mm256_permute2f128_ps::<0x31>(p1, q1),
                    _mm256_permute2f128_ps::<0x31>(p2, q2),
                    _mm256_permute2f128_ps::<0x31>(p3, q3),
                ]
            }
        }
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
            match level {
                // SAFETY: a `Cpu` has this level only on a machine that has AVX2 and FMA; the rest is the caller's.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: the caller's.
                _ => unsafe { $generic::<$crate::device::cpu::simd::Portable>($($arg),*) },
            }
        }
    };
}
pub(super) use kernel;
