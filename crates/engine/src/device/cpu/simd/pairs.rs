//! Products of pairs of bf16 numbers: twice the terms of a multiply-add of singles.
//!
//! A pair lies in 32 bits, the number of the lower index in the lower half, so a vector of pairs is loaded, broadcast
//! and indexed like one of singles.
#![allow(unsafe_code)] // Instructions that only some machines have.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Block, Lanes, Simd};

/// Sixteen sums of products of pairs. A multiplication takes numbers below the normal range for zeros, and so does
/// the sum, as AVX512_BF16 has it.
pub(in super::super) trait Pairs: Simd {
    /// `sum + a.1 * b.1`, rounded, `+ a.0 * b.0`, rounded; the operands are bits of pairs.
    fn dot_pairs(a: Self::V, b: Self::V, sum: Self::V) -> Self::V;
    /// Writes the lanes rounded to bf16 (to nearest, ties to even; numbers below the normal range to zero).
    ///
    /// # Safety
    /// `to` is valid for writing a bf16 number for each lane.
    unsafe fn store_bf16(to: *mut u16, v: Self::V);
    /// Pairs of the lanes of two rows of bf16 numbers, the first row's in the lower halves.
    ///
    /// # Safety
    /// Both are valid for reading a bf16 number for each lane.
    unsafe fn interleave(low: *const u16, high: *const u16) -> Self::V;
    /// Pairs of the lanes of two vectors, rounded as by [`Pairs::store_bf16`]; the first's in the lower halves.
    fn pair(low: Self::V, high: Self::V) -> Self::V;
    /// Writes sixteen rows of sixteen pairs, `from_row` pairs apart, as columns: `to[j][i] = from[i][j]`.
    ///
    /// # Safety
    /// All are there.
    unsafe fn transpose(from: *const u32, from_row: usize, to: &mut Block);
    /// Sixteen integers with a sign as singles.
    fn singles(from: &[u32; 16]) -> Self::V;
    /// The lower halves of 64 bytes, or the upper ones.
    fn halves(both: &[u8; 64], upper: bool) -> [u8; 64];
}

// SAFETY of all intrinsics below: `pair_kernel!` reaches this type only after these features were detected.
#[cfg(target_arch = "x86_64")]
impl Pairs for super::Avx512 {
    #[inline(always)]
    fn dot_pairs(a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: a vector's bits are pairs of any value.
        unsafe {
            let pairs = |v: __m512| std::mem::transmute::<__m512, __m512bh>(v);
            _mm512_dpbf16_ps(sum, pairs(a), pairs(b))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, v: __m512) {
        // SAFETY: 32 bytes of any value.
        unsafe {
            let bits = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
            _mm256_storeu_si256(to.cast(), bits);
        }
    }
    #[inline(always)]
    unsafe fn interleave(low: *const u16, high: *const u16) -> __m512 {
        unsafe {
            let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(low.cast()));
            let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(high.cast()));
            _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32::<16>(high)))
        }
    }
    #[inline(always)]
    fn pair(low: __m512, high: __m512) -> __m512 {
        // Lane `i` of the lower half, then of the upper one.
        const TURNS: [u16; 32] = {
            let mut turns = [0; 32];
            let mut i = 0;
            while i < 32 {
                turns[i] = (i / 2 + i % 2 * 16) as u16;
                i += 1;
            }
            turns
        };
        unsafe {
            let bits = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            let turns = _mm512_loadu_si512(TURNS.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(turns, bits))
        }
    }
    #[inline(always)]
    fn singles(from: &[u32; 16]) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_loadu_si512(from.as_ptr().cast())) }
    }
    #[inline(always)]
    fn halves(both: &[u8; 64], upper: bool) -> [u8; 64] {
        let mut codes = [0; 64];
        unsafe {
            let both = _mm512_loadu_si512(both.as_ptr().cast());
            let these = if upper { _mm512_srli_epi16::<4>(both) } else { both };
            let these = _mm512_and_si512(these, _mm512_set1_epi8(15));
            _mm512_storeu_si512(codes.as_mut_ptr().cast(), these);
        }
        codes
    }
    /// Halves of vectors change places four times: neighbours, then pairs, fours and eights of them. No closures: the compiler
    /// makes calls of those, through memory, and products are half as fast.
    #[inline(always)]
    unsafe fn transpose(from: *const u32, from_row: usize, to: &mut Block) {
        unsafe {
            let mut rows = [_mm512_setzero_si512(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm512_loadu_si512(from.add(i * from_row).cast());
            }
            let mut twos = rows;
            for i in (0..16).step_by(2) {
                twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
                twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
            }
            // `fours[4 * n + j]`: in each quarter `q`, column `4 * q + j` of rows `4 * n..4 * n + 4`.
            let mut fours = rows;
            for i in (0..16).step_by(4) {
                fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
                fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
                fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
                fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
            }
            const EVEN: i32 = 0b10_00_10_00;
            const ODD: i32 = 0b11_01_11_01;
            for j in 0..4 {
                let (a, b, c, d) = (fours[j], fours[4 + j], fours[8 + j], fours[12 + j]);
                let (even, evens) = (_mm512_shuffle_i32x4::<EVEN>(a, b), _mm512_shuffle_i32x4::<EVEN>(c, d));
                let (odd, odds) = (_mm512_shuffle_i32x4::<ODD>(a, b), _mm512_shuffle_i32x4::<ODD>(c, d));
                let columns = [
                    _mm512_shuffle_i32x4::<EVEN>(even, evens),
                    _mm512_shuffle_i32x4::<EVEN>(odd, odds),
                    _mm512_shuffle_i32x4::<ODD>(even, evens),
                    _mm512_shuffle_i32x4::<ODD>(odd, odds),
                ];
                for (quarter, column) in columns.into_iter().enumerate() {
                    _mm512_storeu_si512(to[4 * quarter + j].as_mut_ptr().cast(), column);
                }
            }
        }
    }
}

/// The same, one by one, on any machine: what the instructions are held to.
impl Pairs for Lanes<16> {
    #[inline(always)]
    fn dot_pairs(a: [f32; 16], b: [f32; 16], sum: [f32; 16]) -> [f32; 16] {
        let high = |x: f32| flushed(f32::from_bits(x.to_bits() & 0xffff_0000));
        let low = |x: f32| flushed(f32::from_bits(x.to_bits() << 16));
        std::array::from_fn(|i| {
            let with_high = flushed(high(a[i]).mul_add(high(b[i]), flushed(sum[i])));
            flushed(low(a[i]).mul_add(low(b[i]), with_high))
        })
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, v: [f32; 16]) {
        let bits = v.map(|x| half::bf16::from_f32(flushed(x)).to_bits());
        // SAFETY: the caller's.
        unsafe { to.cast::<[u16; 16]>().write_unaligned(bits) }
    }
    #[inline(always)]
    unsafe fn interleave(low: *const u16, high: *const u16) -> [f32; 16] {
        // SAFETY: the caller's.
        let [low, high] = unsafe { [low, high].map(|p| p.cast::<[u16; 16]>().read_unaligned()) };
        std::array::from_fn(|i| f32::from_bits(u32::from(low[i]) | u32::from(high[i]) << 16))
    }
    #[inline(always)]
    fn pair(low: [f32; 16], high: [f32; 16]) -> [f32; 16] {
        let bits = |x: f32| u32::from(half::bf16::from_f32(flushed(x)).to_bits());
        std::array::from_fn(|i| f32::from_bits(bits(low[i]) | bits(high[i]) << 16))
    }
    fn singles(from: &[u32; 16]) -> Self::V {
        from.map(|x| x as i32 as f32)
    }
    fn halves(both: &[u8; 64], upper: bool) -> [u8; 64] {
        both.map(|both| if upper { both >> 4 } else { both & 15 })
    }
    #[inline(always)]
    unsafe fn transpose(from: *const u32, from_row: usize, to: &mut Block) {
        for (j, row) in to.iter_mut().enumerate() {
            for (i, to) in row.iter_mut().enumerate() {
                // SAFETY: the caller's.
                *to = unsafe { *from.add(i * from_row + j) };
            }
        }
    }
}

/// Zero of the same sign for what is below the normal range.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { x * 0.0 } else { x }
}

/// Makes `$name(level, args..)` as [`super::kernel!`] does, of a generic over [`Pairs`]: with the instructions at their
/// level, one by one at any other.
macro_rules! pair_kernel {
    ($(#[$meta:meta])* $vis:vis $name:ident = $generic:ident($($arg:ident: $ty:ty),* $(,)?)) => {
        $(#[$meta])*
        $vis unsafe fn $name(level: $crate::device::cpu::Level, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
            unsafe fn avx512_bf16($($arg: $ty),*) {
                // SAFETY: the caller's.
                unsafe { $generic::<$crate::device::cpu::simd::Avx512>($($arg),*) }
            }
            match level {
                // SAFETY: a `Cpu` has a level only on a machine that has its instructions; the rest is the caller's.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::Level::Avx512Bf16 | $crate::device::cpu::Level::Amx => unsafe {
                    avx512_bf16($($arg),*)
                },
                // SAFETY: the caller's.
                _ => unsafe { $generic::<$crate::device::cpu::simd::Lanes<16>>($($arg),*) },
            }
        }
    };
}
pub(in super::super) use pair_kernel;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Level;

    pair_kernel! { products = products_of(a: *const f32, b: *const f32, sum: *mut f32, bf16: *mut u16) }

    #[inline(always)]
    unsafe fn products_of<S: Pairs>(a: *const f32, b: *const f32, sum: *mut f32, bf16: *mut u16) {
        // SAFETY: the test's arrays are sixteen long.
        unsafe {
            S::store(sum, S::dot_pairs(S::load(a), S::load(b), S::load(sum)));
            S::store_bf16(bf16, S::load(sum));
        }
    }

    pair_kernel! { transpose = transpose_of(from: *const u32, from_row: usize, to: &mut Block) }

    #[inline(always)]
    unsafe fn transpose_of<S: Pairs>(from: *const u32, from_row: usize, to: &mut Block) {
        // SAFETY: the test's array has these rows.
        unsafe { S::transpose(from, from_row, to) }
    }

    pair_kernel! { pair = pair_of(low: *const f32, high: *const f32, to: *mut f32) }

    #[inline(always)]
    unsafe fn pair_of<S: Pairs>(low: *const f32, high: *const f32, to: *mut f32) {
        // SAFETY: the test's arrays are sixteen long.
        unsafe { S::store(to, S::pair(S::load(low), S::load(high))) }
    }

    #[test]
    fn pairs_are_made_of_two_vectors() {
        let [low, high]: [[f32; 16]; 2] =
            [1.001, -3.003].map(|by| std::array::from_fn(|i| by * (i as f32 + 1.0)));
        let short = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
        let expected: [u32; 16] = std::array::from_fn(|i| short(low[i]) | short(high[i]) << 16);
        for level in [Level::Portable, Level::Avx512Bf16] {
            if !Level::here().any(|here| here == level) {
                eprintln!("skipped: this machine lacks {}", level.name());
                continue;
            }
            let mut to = [0.0; 16];
            // SAFETY: all are sixteen long; the level is there.
            unsafe { pair(level, low.as_ptr(), high.as_ptr(), to.as_mut_ptr()) };
            assert_eq!(to.map(f32::to_bits), expected, "{}", level.name());
        }
    }

    #[test]
    fn rows_become_columns() {
        let from: [u32; 16 * 20] = std::array::from_fn(|i| i as u32);
        let expected: Block = std::array::from_fn(|j| std::array::from_fn(|i| (i * 20 + j) as u32));
        for level in [Level::Portable, Level::Avx512Bf16] {
            if !Level::here().any(|here| here == level) {
                eprintln!("skipped: this machine lacks {}", level.name());
                continue;
            }
            let mut to = [[0; 16]; 16];
            // SAFETY: there are sixteen rows; the level is there.
            unsafe { transpose(level, from.as_ptr(), 20, &mut to) };
            assert_eq!(to, expected, "{}", level.name());
        }
    }

    /// Bits of every kind: below the normal range, infinite, not a number, huge, ordinary.
    fn bits(key: u64) -> u32 {
        let random = crate::random::bits(1, key);
        let low = random as u32;
        match random >> 61 {
            0 => low & 0x807f_007f,
            1 => low | 0x7f80_0000,
            2 => low & 0x3fff_3fff | 0x3f00_3f00,
            _ => low,
        }
    }

    #[test]
    fn the_instructions_do_what_one_by_one_does() {
        if !Level::here().any(|here| here == Level::Avx512Bf16) {
            return eprintln!("skipped: this machine lacks {}", Level::Avx512Bf16.name());
        }
        for round in 0..20_000 {
            let of = |which: u64| -> [f32; 16] {
                std::array::from_fn(|i| f32::from_bits(bits(round * 64 + which * 16 + i as u64)))
            };
            let (a, b, sum) = (of(0), of(1), of(2));
            let run = |level| {
                let (mut sum, mut bf16) = (sum, [0; 16]);
                // SAFETY: all are sixteen long; the level is there.
                unsafe { products(level, a.as_ptr(), b.as_ptr(), sum.as_mut_ptr(), bf16.as_mut_ptr()) };
                // Which of several NaNs comes out is not said.
                (
                    sum.map(|x| if x.is_nan() { 0 } else { x.to_bits() }),
                    bf16.map(|x| if x & 0x7fff > 0x7f80 { 0 } else { x }),
                )
            };
            assert_eq!(run(Level::Avx512Bf16), run(Level::Portable), "{a:?} {b:?} {sum:?}");
        }
    }
}
