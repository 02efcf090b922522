//! Tiles of AMX: a register of sixteen rows of 64 bytes, and products of two of them.
//!
//! `C[m, n] += sum over k of A[m, k] B[k, n]`: a row of `A` runs along the sum, as rows of weights lie in memory; a row
//! of `B` holds, for each column, the terms that make one element of 32 bits (two of bf16, four bytes). Instructions
//! and arithmetic: Intel's Software Developer's Manual, volume 2, TDPBF16PS, TDPBUSD, LDTILECFG.
#![allow(unsafe_code)] // Instructions that only some machines have.

#[cfg(target_arch = "x86_64")]
use std::arch::asm;

use super::{Lanes, Pairs};

/// Rows of a tile, and elements of 32 bits in a row.
pub(in super::super) const TILE: usize = 16;

/// A tile in memory.
pub(in super::super) type Block = [[u32; TILE]; TILE];

/// The eight tiles of a thread, by number.
pub(in super::super) trait Tiles {
    /// The vectors that work beside the tiles.
    type S: Pairs;

    /// The tiles, with anything in them, until the value is dropped.
    ///
    /// # Safety
    /// The machine has the instructions, and no other value lives in this thread.
    unsafe fn begin() -> Self;
    fn zero<const T: u8>(&mut self);
    /// Loads the sixteen rows that begin `stride` bytes apart (0: all are the same).
    ///
    /// # Safety
    /// Each is valid for reading 64 bytes.
    unsafe fn load<const T: u8>(&mut self, from: *const u8, stride: usize);
    /// Stores the sixteen rows, which begin `stride` bytes apart.
    ///
    /// # Safety
    /// Each is valid for writing 64 bytes, and nobody else's.
    unsafe fn store_rows<const T: u8>(&self, to: *mut u8, stride: usize);
    #[inline(always)]
    fn store<const T: u8>(&self, to: &mut Block) {
        // SAFETY: a block is sixteen such rows.
        unsafe { self.store_rows::<T>(to.as_mut_ptr().cast(), 4 * TILE) };
    }
    /// `C += A B` of pairs of bf16 numbers, sums in f32. Sums of the lower and of the upper numbers begin at zero, are
    /// kept apart, each product added with one rounding, and meet before they are added to `C`. Numbers below the normal
    /// range are zeros.
    fn dot_pairs<const C: u8, const A: u8, const B: u8>(&mut self);
    /// `C += A B` of bytes, `A`'s without sign, `B`'s with; sums in integers of 32 bits, which wrap.
    fn dot_bytes<const C: u8, const A: u8, const B: u8>(&mut self);
}

/// The processor's.
#[cfg(target_arch = "x86_64")]
pub(in super::super) struct Amx(());

/// The operand of LDTILECFG.
#[cfg(target_arch = "x86_64")]
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

// SAFETY of all instructions below: a `Cpu` is only at the level that calls `begin` where `available` said yes. It configures all eight tiles
// as sixteen full rows; the compiler knows of no tile, so it keeps none of its own there.
#[cfg(target_arch = "x86_64")]
impl Tiles for Amx {
    type S = super::Avx512;

    #[inline(always)]
    unsafe fn begin() -> Amx {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        row_bytes[..8].fill(64);
        rows[..8].fill(TILE as u8);
        let all = Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const all, options(nostack, preserves_flags, readonly))
        };
        Amx(())
    }
    #[inline(always)]
    fn zero<const T: u8>(&mut self) {
        unsafe { asm!("tilezero tmm{}", const T, options(nostack, preserves_flags, nomem)) };
    }
    #[inline(always)]
    unsafe fn load<const T: u8>(&mut self, from: *const u8, stride: usize) {
        unsafe {
            asm!("tileloadd tmm{}, [{} + {}*1]", const T, in(reg) from, in(reg) stride,
                options(nostack, preserves_flags, readonly));
        }
    }
    #[inline(always)]
    unsafe fn store_rows<const T: u8>(&self, to: *mut u8, stride: usize) {
        unsafe {
            asm!("tilestored [{} + {}*1], tmm{}", in(reg) to, in(reg) stride, const T,
                options(nostack, preserves_flags));
        }
    }
    #[inline(always)]
    fn dot_pairs<const C: u8, const A: u8, const B: u8>(&mut self) {
        unsafe {
            asm!("tdpbf16ps tmm{}, tmm{}, tmm{}", const C, const A, const B,
                options(nostack, preserves_flags, nomem));
        }
    }
    #[inline(always)]
    fn dot_bytes<const C: u8, const A: u8, const B: u8>(&mut self) {
        unsafe {
            asm!("tdpbusd tmm{}, tmm{}, tmm{}", const C, const A, const B,
                options(nostack, preserves_flags, nomem));
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Amx {
    /// Without contents a thread is switched as fast as one that never had tiles.
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
    }
}

/// Whether the processor has tiles of bf16 and of bytes, and the kernel lets this process use them: it sets aside 8 KiB
/// for them in each thread that does, and wants to be asked first.
#[cfg(target_arch = "x86_64")]
pub(in super::super) fn available() -> bool {
    #[cfg(target_os = "linux")]
    fn asked() -> bool {
        use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
        /// CPUID leaf 7, EDX: AMX-BF16, AMX-TILE, AMX-INT8.
        const TILES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        /// CPUID leaf 1, ECX: the kernel has enabled XGETBV.
        const OSXSAVE: u32 = 1 << 27;
        /// XCR0: the kernel saves tiles and their configuration.
        const SAVED: u64 = 1 << 17 | 1 << 18;
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        #[target_feature(enable = "xsave")]
        fn saved() -> u64 {
            // SAFETY: XGETBV is enabled, as its caller saw.
            unsafe { _xgetbv(0) }
        }
        let has =
            __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & TILES == TILES && __cpuid(1).ecx & OSXSAVE != 0;
        // SAFETY: XGETBV is enabled; the system call takes two numbers and touches no memory of ours.
        has && unsafe {
            saved() & SAVED == SAVED
                && libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0
        }
    }
    #[cfg(not(target_os = "linux"))]
    fn asked() -> bool {
        false
    }
    static ANSWER: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *ANSWER.get_or_init(asked)
}

/// The same, one by one, on any machine: what the instructions are held to.
pub(in super::super) struct Emulated([Block; 8]);

impl Tiles for Emulated {
    type S = Lanes<16>;

    #[inline(always)]
    unsafe fn begin() -> Emulated {
        // No kernel may count on what is in a tile before it loads it.
        Emulated([[[0xffff_ffff; TILE]; TILE]; 8])
    }
    fn zero<const T: u8>(&mut self) {
        self.0[T as usize] = [[0; TILE]; TILE];
    }
    unsafe fn load<const T: u8>(&mut self, from: *const u8, stride: usize) {
        for (i, row) in self.0[T as usize].iter_mut().enumerate() {
            // SAFETY: the caller's.
            *row = unsafe { from.add(i * stride).cast::<[u32; TILE]>().read_unaligned() };
        }
    }
    unsafe fn store_rows<const T: u8>(&self, to: *mut u8, stride: usize) {
        for (i, row) in self.0[T as usize].iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { to.add(i * stride).cast::<[u32; TILE]>().write_unaligned(*row) };
        }
    }
    fn dot_pairs<const C: u8, const A: u8, const B: u8>(&mut self) {
        let (a, b) = (self.0[A as usize], self.0[B as usize]);
        let low = |bits: u32| f32::from_bits(bits << 16);
        let high = |bits: u32| f32::from_bits(bits & 0xffff_0000);
        for (c, a) in self.0[C as usize].iter_mut().zip(a) {
            let mut sums = [[0.0_f32; 2]; TILE];
            for (a, b) in a.into_iter().zip(b) {
                for ([lows, highs], b) in sums.iter_mut().zip(b) {
                    *lows = rounded_once(low(a), low(b), *lows);
                    *highs = rounded_once(high(a), high(b), *highs);
                }
            }
            for (c, [lows, highs]) in c.iter_mut().zip(sums) {
                let both = rounded_once(lows, 1.0, highs);
                *c = rounded_once(both, 1.0, f32::from_bits(*c)).to_bits();
            }
        }
    }
    fn dot_bytes<const C: u8, const A: u8, const B: u8>(&mut self) {
        let (a, b) = (self.0[A as usize], self.0[B as usize]);
        for (c, a) in self.0[C as usize].iter_mut().zip(a) {
            for (a, b) in a.into_iter().zip(b) {
                for (c, b) in c.iter_mut().zip(b) {
                    let products = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
                    let sum: i32 = products.map(|(a, b)| i32::from(a) * i32::from(b as i8)).sum();
                    *c = c.wrapping_add_signed(sum);
                }
            }
        }
    }
}

/// `a * b + c` rounded to nearest, ties to even, where `a` has at most sixteen significant bits or `b` is one; numbers below
/// the normal range count as zeros, and so does such a result. Through f64: the product is exact there, and more than
/// twice the bits of f32 make the second rounding harmless.
fn rounded_once(a: f32, b: f32, c: f32) -> f32 {
    let flushed = |x: f32| if x.abs() < f32::MIN_POSITIVE { x * 0.0 } else { x };
    let exact = f64::from(flushed(a)) * f64::from(flushed(b)) + f64::from(flushed(c));
    // What rounds to the least normal number is not below the range.
    const LEAST: f64 = f32::MIN_POSITIVE as f64 * (1.0 - 1.0 / (1u64 << 25) as f64);
    (if exact.abs() < LEAST { exact * 0.0 } else { exact }) as f32
}

/// Makes `$name(level, args..)` as [`super::kernel!`] does, of a generic over [`Tiles`]: with the instructions at their
/// level, one by one at any other.
macro_rules! tile_kernel {
    ($(#[$meta:meta])* $vis:vis $name:ident = $generic:ident($($arg:ident: $ty:ty),* $(,)?)) => {
        $(#[$meta])*
        $vis unsafe fn $name(level: $crate::device::cpu::Level, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
            unsafe fn amx($($arg: $ty),*) {
                // SAFETY: the caller's.
                unsafe { $generic::<$crate::device::cpu::simd::Amx>($($arg),*) }
            }
            match level {
                // SAFETY: a `Cpu` has a level only on a machine that has its instructions; the rest is the caller's.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::Level::Amx => unsafe { amx($($arg),*) },
                // SAFETY: the caller's.
                _ => unsafe { $generic::<$crate::device::cpu::simd::Emulated>($($arg),*) },
            }
        }
    };
}
pub(in super::super) use tile_kernel;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Level;

    tile_kernel! { products = products_of(a: &Block, b: &Block, pairs: &mut Block, bytes: &mut Block) }

    #[inline(always)]
    unsafe fn products_of<T: Tiles>(a: &Block, b: &Block, pairs: &mut Block, bytes: &mut Block) {
        // SAFETY: blocks are tiles; the test runs a level that is there.
        unsafe {
            let mut tiles = T::begin();
            tiles.load::<4>(a.as_ptr().cast(), 64);
            tiles.load::<6>(b.as_ptr().cast(), 64);
            tiles.load::<0>(pairs.as_ptr().cast(), 64);
            tiles.load::<3>(bytes.as_ptr().cast(), 64);
            tiles.dot_pairs::<0, 4, 6>();
            tiles.dot_bytes::<3, 4, 6>();
            tiles.store::<0>(pairs);
            tiles.store::<3>(bytes);
        }
    }

    fn run(level: Level, [a, b, mut pairs, mut bytes]: [Block; 4]) -> [Block; 2] {
        // SAFETY: the level is there.
        unsafe { products(level, &a, &b, &mut pairs, &mut bytes) };
        // Which of several NaNs comes out is not said.
        let number = |bits: u32| if f32::from_bits(bits).is_nan() { f32::NAN.to_bits() } else { bits };
        [pairs.map(|row| row.map(number)), bytes]
    }

    /// Bits of every kind: below the normal range, infinite, not a number, huge, ordinary; `key / 4` rounds of each tile.
    fn blocks(key: u64) -> [Block; 4] {
        let element = |which: usize, row: usize, column: usize| {
            let random = crate::random::bits(key, (which * 256 + row * 16 + column) as u64);
            let low = random as u32;
            match random >> 58 {
                0 => low & 0x807f_807f,
                1 if key.is_multiple_of(4) => low | 0x7f80_7f80,
                2..16 if key % 4 < 2 => low,
                _ => low & 0xbfff_bfff | 0x3800_3800,
            }
        };
        std::array::from_fn(|which| {
            std::array::from_fn(|row| std::array::from_fn(|column| element(which, row, column)))
        })
    }

    #[test]
    fn the_instructions_do_what_one_by_one_does() {
        if !Level::here().any(|here| here == Level::Amx) {
            return eprintln!("skipped: this machine lacks {}", Level::Amx.name());
        }
        for key in 0..4_000 {
            let blocks = blocks(key);
            assert_eq!(run(Level::Amx, blocks), run(Level::AmxEmulated, blocks), "{blocks:?}");
        }
    }

    fn pair(low: f32, high: f32) -> u32 {
        low.to_bits() >> 16 | high.to_bits() & 0xffff_0000
    }

    /// One element of `C` from `C` and the pairs of its row and its column.
    fn element(begin: f32, a: &[(f32, f32)], b: &[(f32, f32)]) -> f32 {
        let mut blocks = [[[0; TILE]; TILE]; 4];
        blocks[2][5][9] = begin.to_bits();
        for (k, (&a, &b)) in a.iter().zip(b).enumerate() {
            blocks[0][5][k] = pair(a.0, a.1);
            blocks[1][k][9] = pair(b.0, b.1);
        }
        f32::from_bits(run(Level::AmxEmulated, blocks)[0][5][9])
    }

    /// The manual's arithmetic, in cases that other orders and roundings get wrong.
    #[test]
    fn pairs_are_summed_as_the_manual_says() {
        let (big, one) = (16_777_216.0, 1.0);
        let ones = [(1.0, 1.0); 3];
        // Lower and upper numbers have sums of their own: 2^24 + 1 is no f32, but the upper sum is 2 before they meet.
        assert_eq!(element(0.0, &[(big, one), (0.0, one)], &ones), big + 2.0);
        assert_eq!(element(0.0, &[(big, 0.0), (one, 0.0), (one, 0.0)], &ones), big);
        // They begin at zero, not at C.
        assert_eq!(element(big, &[(one, one)], &ones), big + 2.0);
        // One rounding, ties to even.
        assert_eq!(element(0.0, &[(big, 0.0), (3.0, 0.0)], &ones), big + 4.0);
        // Below the normal range: operands, what C holds, and sums.
        let least = f32::MIN_POSITIVE;
        assert_eq!(element(0.0, &[(least / 2.0, one)], &[(big, one)]), 1.0);
        assert_eq!(element(least / 2.0, &[(0.0, 0.0)], &ones).to_bits(), 0);
        assert_eq!(element(0.0, &[(least, 0.0)], &[(-0.5, 0.0)]), 0.0);
        assert_eq!(element(0.0, &[(least * 1.5, -least)], &ones), 0.0);
        assert_eq!(element(0.0, &[(least, 0.0)], &ones), least);
        // A product beyond f32 stays exact until it is added.
        let huge = 2.0_f32.powi(127);
        assert_eq!(element(0.0, &[(-huge, 0.0), (huge, 0.0)], &[(1.0, 0.0), (2.0, 0.0)]), huge);
        assert!(element(0.0, &[(f32::INFINITY, 0.0)], &[(0.0, 0.0)]).is_nan());
    }

    #[test]
    fn bytes_are_summed_exactly_and_wrap() {
        let mut blocks = [[[0; TILE]; TILE]; 4];
        blocks[0][2] = [0xff_80_01_ff; TILE];
        (0..TILE).for_each(|k| blocks[1][k][7] = 0x80_7f_ff_80);
        let each = 255 * -128 + -1 + 128 * 127 + 255 * -128;
        assert_eq!(run(Level::AmxEmulated, blocks)[1][2][7] as i32, 16 * each);
        blocks[3][2][7] = i32::MIN as u32;
        assert_eq!(run(Level::AmxEmulated, blocks)[1][2][7] as i32, i32::MIN.wrapping_add(16 * each));
    }
}
