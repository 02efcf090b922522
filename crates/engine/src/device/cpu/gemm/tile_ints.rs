//! The innermost loop of products of weights of 8 or 4 bits in tiles.
//!
//! A group's products are summed in one element of a tile, exactly; the sum becomes a single, is multiplied by the scales
//! of both, and added, group after group. So the order of the roundings depends on the number of terms alone.
#![allow(unsafe_code)] // Raw pointers into matrices; tiles.

use lathe_plan::QUANT_GROUP as GROUP;

use super::ahead::Ahead;
use super::chunks;
use super::quantized::{Rows, quantize_groups};
use super::tile_sums::{First, Place, add_turned};
use crate::device::cpu::cells::Cells;
use crate::device::cpu::simd::{Block, Pairs, Simd, TILE, Tiles, tile_kernel};

/// Bytes of a tile's rows.
const TILE_BYTES: usize = 4 * TILE;
/// Tiles of a group's codes.
const HALVES: usize = GROUP / TILE_BYTES;

/// Sixteen rows of activations, then the next sixteen, each in groups: what the tiles of weights meet.
#[derive(Clone, Copy)]
pub(super) struct IntPanel {
    /// For each group [`HALVES`] tiles in which a column is a row of activations.
    pub codes: *mut Block,
    /// For each group those of the rows.
    pub scales: *mut [f32; TILE],
    /// For each group what the rows' sums begin with, since weights come with their bias.
    pub begins: *mut [i32; TILE],
}

impl IntPanel {
    /// So many groups of sixteen rows each in a thread's scratch.
    ///
    /// # Panics
    /// The scratch is too small: a mistake of the plan.
    pub(super) fn within(scratch: Cells<f32>, groups: usize) -> IntPanel {
        let codes = scratch.part(0..groups * HALVES * TILE * TILE);
        let scales = scratch.part(codes.len()..codes.len() + groups * TILE);
        let begins = scratch.part(codes.len() + scales.len()..codes.len() + scales.len() + groups * TILE);
        IntPanel {
            codes: codes.ptr_mut().cast(),
            scales: scales.ptr_mut().cast(),
            begins: begins.ptr_mut().cast(),
        }
    }

    /// The same from a group on.
    pub(super) fn from(self, group: usize) -> IntPanel {
        IntPanel {
            codes: self.codes.wrapping_add(group * HALVES),
            scales: self.scales.wrapping_add(group),
            begins: self.begins.wrapping_add(group),
        }
    }
}

tile_kernel! {
    /// Quantizes `terms` terms of up to sixteen rows, and packs them. Zeros beyond the terms and the rows.
    ///
    /// # Safety
    /// The rows, `x_row` apart, and the panel's groups exist; those are nobody else's.
    pub(super) pack_ints = pack_groups(
        x: *const f32,
        x_row: usize,
        rows: usize,
        terms: usize,
        bias: i32,
        to: IntPanel,
    )
}

#[inline(always)]
unsafe fn pack_groups<T: Tiles>(
    x: *const f32,
    x_row: usize,
    rows: usize,
    terms: usize,
    bias: i32,
    to: IntPanel,
) {
    for (group, k) in (0..terms).step_by(GROUP).enumerate() {
        let mut codes = [[0_i8; GROUP]; TILE];
        let (mut scales, mut sums) = ([0.0; TILE], [0; TILE]);
        // SAFETY: the caller's.
        unsafe {
            for i in 0..rows {
                let to = Rows { codes: codes[i].as_mut_ptr(), scales: &mut scales[i], sums: &mut sums[i] };
                quantize_groups::<T::S>(x.add(i * x_row + k), terms - k, to, 1);
            }
            let to = to.from(group);
            for half in 0..HALVES {
                let from = codes.as_ptr().cast::<u32>().add(half * TILE);
                T::S::transpose(from, GROUP / 4, &mut *to.codes.add(half));
            }
            *to.scales = scales;
            *to.begins = sums.map(|sum| -bias * sum);
        }
    }
}

/// `y[i, j] = first[i, j] + sum over k of x[i, k] w[j, k]`.
#[derive(Clone, Copy)]
pub(super) struct IntTileDots {
    pub groups: usize,
    /// So many are summed apart.
    pub block: usize,
    /// Codes of weights and their scales.
    pub w: *const u8,
    pub w_row: usize,
    pub w_scales: *const f32,
    pub w_scales_row: usize,
    pub x: IntPanel,
    pub to: Place,
}

tile_kernel! {
    /// [`IntTileDots`] with weights of 8 bits.
    ///
    /// # Safety
    /// All operands exist, `y` is nobody else's.
    pub(super) tile_int8 = int8_tiles(rows: usize, outputs: usize, t: IntTileDots)
}

#[inline(always)]
unsafe fn int8_tiles<T: Tiles>(rows: usize, outputs: usize, t: IntTileDots) {
    // SAFETY: the caller's.
    unsafe { int_tiles::<T, 8>(rows, outputs, t) }
}

tile_kernel! {
    /// [`IntTileDots`] with weights of 4 bits.
    ///
    /// # Safety
    /// As [`tile_int8`].
    pub(super) tile_int4 = int4_tiles(rows: usize, outputs: usize, t: IntTileDots)
}

#[inline(always)]
unsafe fn int4_tiles<T: Tiles>(rows: usize, outputs: usize, t: IntTileDots) {
    // SAFETY: the caller's.
    unsafe { int_tiles::<T, 4>(rows, outputs, t) }
}

#[inline(always)]
unsafe fn int_tiles<T: Tiles, const BITS: usize>(rows: usize, outputs: usize, t: IntTileDots) {
    // SAFETY: the caller's; a block's rows, outputs and groups are some of all.
    unsafe {
        let mut tiles = T::begin();
        for some in chunks(0..outputs, TILE) {
            for groups in chunks(0..t.groups, t.block) {
                let first = if groups.start == 0 { t.to.first } else { First::There };
                for here in chunks(0..rows, 2 * TILE) {
                    let at = IntTileDots {
                        groups: groups.len(),
                        w: t.w.add(some.start * t.w_row + groups.start * GROUP * BITS / 8),
                        w_scales: t.w_scales.add(some.start * t.w_scales_row + groups.start),
                        x: t.x.from(here.start / TILE * t.groups + groups.start),
                        to: Place { first, ..t.to }.from(here.start, some.start),
                        ..t
                    };
                    // Only the first rows wait for memory.
                    let next = if here.start == 0 { (outputs - some.end).min(TILE) } else { 0 };
                    int_block::<T, BITS>(&mut tiles, here.len(), some.len(), at, t.groups, next);
                }
            }
        }
    }
}

/// One tile of outputs by up to two of rows. Sums of groups are in tiles 0 and 1; 4 is weights, 6 and 7 are rows.
#[inline(always)]
unsafe fn int_block<T: Tiles, const BITS: usize>(
    tiles: &mut T,
    rows: usize,
    outputs: usize,
    t: IntTileDots,
    x_groups: usize,
    next: usize,
) {
    let two = rows > TILE;
    let bytes = GROUP * BITS / 8;
    // SAFETY: the caller's.
    unsafe {
        let (row, lines) = (t.w.wrapping_add(outputs * t.w_row), outputs * bytes / TILE_BYTES);
        let mut ahead = Ahead::of(row, t.w_row, t.groups * bytes, next, lines);
        // A vector has a lane for each row.
        let mut acc = [[T::S::splat(0.0); TILE]; 2];
        for group in 0..t.groups {
            let (x, x_next) = (t.x.from(group), t.x.from(x_groups + group));
            let w = t.w.add(group * bytes);
            ahead.lines();
            tiles.load::<0>(x.begins.cast(), 0);
            if two {
                tiles.load::<1>(x_next.begins.cast(), 0);
            }
            for half in 0..HALVES {
                load_codes::<T, BITS>(tiles, w, t.w_row, outputs, half);
                tiles.load::<6>(x.codes.add(half).cast(), TILE_BYTES);
                tiles.dot_bytes::<0, 4, 6>();
                if two {
                    tiles.load::<7>(x_next.codes.add(half).cast(), TILE_BYTES);
                    tiles.dot_bytes::<1, 4, 7>();
                }
            }
            let mut sums = [[0; TILE]; TILE];
            let scales = t.w_scales.add(group);
            tiles.store::<0>(&mut sums);
            add_scaled::<T>(&mut acc[0], &sums, outputs, scales, t.w_scales_row, &*x.scales);
            if two {
                tiles.store::<1>(&mut sums);
                add_scaled::<T>(&mut acc[1], &sums, outputs, scales, t.w_scales_row, &*x_next.scales);
            }
        }
        for (first, acc) in (0..rows).step_by(TILE).zip(acc) {
            let mut sums = [[0; TILE]; TILE];
            for (to, acc) in sums.iter_mut().zip(acc) {
                T::S::store(to.as_mut_ptr().cast(), acc);
            }
            add_turned::<T>(&sums, (rows - first).min(TILE), outputs, t.to.from(first, 0));
        }
    }
}

/// `acc[j][i] += sums[j][i] * (scales[j] * x_scales[i])`, the sums being integers.
#[inline(always)]
unsafe fn add_scaled<T: Tiles>(
    acc: &mut [<T::S as Simd>::V; TILE],
    sums: &Block,
    outputs: usize,
    scales: *const f32,
    scales_row: usize,
    x_scales: &[f32; TILE],
) {
    // SAFETY: there are scales of all outputs, and sixteen elements in a row.
    unsafe {
        let x_scales = T::S::load(x_scales.as_ptr());
        for (j, (acc, sums)) in acc.iter_mut().zip(sums).enumerate().take(outputs) {
            let scale = T::S::mul(T::S::splat(*scales.add(j * scales_row)), x_scales);
            // Not fused, which no emulation without such an instruction would match in bits.
            *acc = T::S::add(*acc, T::S::mul(T::S::singles(sums), scale));
        }
    }
}

/// Loads one half of a group's codes of up to sixteen outputs into tile 4.
#[inline(always)]
unsafe fn load_codes<T: Tiles, const BITS: usize>(
    tiles: &mut T,
    w: *const u8,
    w_row: usize,
    outputs: usize,
    half: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        if BITS == 8 && outputs == TILE {
            return tiles.load::<4>(w.add(half * TILE_BYTES), w_row);
        }
        let mut codes = [[0_u8; TILE_BYTES]; TILE];
        for (j, to) in codes.iter_mut().enumerate().take(outputs) {
            let row = w.add(j * w_row);
            *to = if BITS == 8 {
                row.add(half * TILE_BYTES).cast::<[u8; TILE_BYTES]>().read()
            } else {
                // The first half of the terms lies in the lower halves.
                T::S::halves(&*row.cast::<[u8; TILE_BYTES]>(), half == 1)
            };
        }
        tiles.load::<4>(codes.as_ptr().cast(), TILE_BYTES);
    }
}
