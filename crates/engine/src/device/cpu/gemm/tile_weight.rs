//! The innermost loops of `dw += dy^T x` in tiles.
//!
//! A step of the sum is up to 32 rows of one sequence. An element is a chain of tile products that begins with what `dw` holds,
//! a product a step. So the order depends on the rows' positions alone.
#![allow(unsafe_code)] // Raw pointers into matrices; tiles.

use super::ahead::{Ahead, LINE};
use super::chunks;
use crate::device::cpu::simd::{Block, Pairs, TILE, Tiles, pair_kernel, tile_kernel};

/// Steps that are taken for all outputs together: two tiles of inputs for each, 24 KiB, stay in the first-level cache.
const PART: usize = 12;

/// `c[i, j] += sum over steps of a[i] b[j]`.
#[derive(Clone, Copy)]
pub(super) struct TileWeight {
    pub steps: usize,
    /// For 32 outputs two tiles for every step, then the next 32: outputs by pairs of rows.
    pub a: *const Block,
    /// For up to 32 inputs two tiles for every step: pairs of rows by inputs.
    pub b: *const Block,
    pub c: *mut f32,
    pub c_row: usize,
}

tile_kernel! {
    /// [`TileWeight`], up to two tiles of inputs.
    ///
    /// # Safety
    /// All operands exist, `c` is nobody else's.
    pub(super) tile_weight = weight_tiles(outputs: usize, inputs: usize, t: TileWeight)
}

#[inline(always)]
unsafe fn weight_tiles<T: Tiles>(outputs: usize, inputs: usize, t: TileWeight) {
    // SAFETY: the caller's; a block's outputs and steps are some of all.
    unsafe {
        let mut tiles = T::begin();
        for part in chunks(0..t.steps, PART) {
            for some in chunks(0..outputs, 2 * TILE) {
                let c = t.c.add(some.start * t.c_row);
                // What sums meet next: later parts find it in the second-level cache.
                let next = if part.start == 0 { (outputs - some.end).min(2 * TILE) } else { 0 };
                let row = c.wrapping_add(2 * TILE * t.c_row).cast_const().cast();
                let ahead = Ahead::of(row, 4 * t.c_row, 4 * inputs, next, 4 * TILE / part.len() + 1);
                let a = t.a.add(some.start / TILE * t.steps + 2 * part.start);
                let here = TileWeight { steps: part.len(), a, b: t.b.add(2 * part.start), c, ..t };
                weight_block(&mut tiles, some.len(), inputs, here, ahead);
            }
        }
    }
}

/// Up to two tiles of outputs by two of inputs; tiles 0 to 3 are sums, 4 and 5 `a`, 6 and 7 `b`.
#[inline(always)]
unsafe fn weight_block<T: Tiles>(
    tiles: &mut T,
    outputs: usize,
    inputs: usize,
    t: TileWeight,
    mut ahead: Ahead,
) {
    let (two_outputs, two_inputs) = (outputs > TILE, inputs > TILE);
    let (first, second) = (outputs.min(TILE), outputs.saturating_sub(TILE));
    let (left, right) = (inputs.min(TILE), inputs.saturating_sub(TILE));
    // SAFETY: the caller's.
    unsafe {
        let below = t.c.wrapping_add(TILE * t.c_row);
        load_sums::<T, 0>(tiles, t.c, t.c_row, first, left);
        load_sums::<T, 1>(tiles, t.c.wrapping_add(TILE), t.c_row, first, right);
        load_sums::<T, 2>(tiles, below, t.c_row, second, left);
        load_sums::<T, 3>(tiles, below.wrapping_add(TILE), t.c_row, second, right);
        for step in 0..t.steps {
            ahead.lines();
            let (a, b) = (t.a.add(2 * step), t.b.add(2 * step));
            tiles.load::<4>(a.cast(), LINE);
            tiles.load::<6>(b.cast(), LINE);
            tiles.dot_pairs::<0, 4, 6>();
            if two_inputs {
                tiles.load::<7>(b.add(1).cast(), LINE);
                tiles.dot_pairs::<1, 4, 7>();
            }
            if two_outputs {
                tiles.load::<5>(a.add(1).cast(), LINE);
                tiles.dot_pairs::<2, 5, 6>();
                if two_inputs {
                    tiles.dot_pairs::<3, 5, 7>();
                }
            }
        }
        store_sums::<T, 0>(tiles, t.c, t.c_row, first, left);
        store_sums::<T, 1>(tiles, t.c.wrapping_add(TILE), t.c_row, first, right);
        store_sums::<T, 2>(tiles, below, t.c_row, second, left);
        store_sums::<T, 3>(tiles, below.wrapping_add(TILE), t.c_row, second, right);
    }
}

/// Loads up to a tile of `c`; zeros beyond.
///
/// # Safety
/// It exists.
#[inline(always)]
unsafe fn load_sums<T: Tiles, const C: u8>(
    tiles: &mut T,
    c: *const f32,
    row: usize,
    rows: usize,
    columns: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        if rows == TILE && columns == TILE {
            return tiles.load::<C>(c.cast(), 4 * row);
        }
        if rows == 0 || columns == 0 {
            return;
        }
        let mut block = [[0; TILE]; TILE];
        for (i, to) in block.iter_mut().enumerate().take(rows) {
            std::ptr::copy_nonoverlapping(c.add(i * row).cast(), to.as_mut_ptr(), columns);
        }
        tiles.load::<C>(block.as_ptr().cast(), LINE);
    }
}

/// Stores what [`load_sums`] loaded.
///
/// # Safety
/// It exists and is nobody else's.
#[inline(always)]
unsafe fn store_sums<T: Tiles, const C: u8>(tiles: &T, c: *mut f32, row: usize, rows: usize, columns: usize) {
    // SAFETY: the caller's.
    unsafe {
        if rows == TILE && columns == TILE {
            return tiles.store_rows::<C>(c.cast(), 4 * row);
        }
        if rows == 0 || columns == 0 {
            return;
        }
        let mut block = [[0; TILE]; TILE];
        tiles.store::<C>(&mut block);
        for (i, from) in block.iter().enumerate().take(rows) {
            std::ptr::copy_nonoverlapping(from.as_ptr(), c.add(i * row).cast(), columns);
        }
    }
}

/// Up to 32 rows by up to 32 columns, which become two tiles.
#[derive(Clone, Copy)]
pub(super) struct StepRows {
    pub x: *const f32,
    pub x_row: usize,
    pub rows: usize,
    pub columns: usize,
    pub to: *mut Block,
}

pair_kernel! {
    /// Rounds them to bf16 as pairs of rows by columns, zeros beyond.
    ///
    /// # Safety
    /// The rows and the tiles exist; the tiles are nobody else's.
    pub(super) pair_rows = pair_rows_of(t: StepRows)
}

#[inline(always)]
unsafe fn pair_rows_of<S: Pairs>(t: StepRows) {
    for half in 0..2 {
        // SAFETY: the caller's.
        unsafe { pair_half::<S>(t, half, &mut *t.to.add(half)) };
    }
}

pair_kernel! {
    /// Rounds them to bf16 as columns by pairs of rows, zeros beyond.
    ///
    /// # Safety
    /// As [`pair_rows`].
    pub(super) turn_rows = turn_rows_of(t: StepRows)
}

#[inline(always)]
unsafe fn turn_rows_of<S: Pairs>(t: StepRows) {
    for half in 0..2 {
        let mut pairs = [[0; TILE]; TILE];
        // SAFETY: the caller's.
        unsafe {
            pair_half::<S>(t, half, &mut pairs);
            S::transpose(pairs.as_ptr().cast(), TILE, &mut *t.to.add(half));
        }
    }
}

/// Pairs of rows of the first or of the last sixteen columns.
#[inline(always)]
unsafe fn pair_half<S: Pairs>(t: StepRows, half: usize, to: &mut Block) {
    let columns = t.columns.saturating_sub(half * TILE).min(TILE);
    for (i, to) in to.iter_mut().enumerate() {
        // SAFETY: the caller's; only what exists is read.
        unsafe {
            let row = |row: usize| {
                let from = t.x.wrapping_add(row * t.x_row + half * TILE);
                match columns {
                    _ if row >= t.rows => S::splat(0.0),
                    TILE => S::load(from),
                    0 => S::splat(0.0),
                    some => S::load_first(from, some),
                }
            };
            S::store(to.as_mut_ptr().cast(), S::pair(row(2 * i), row(2 * i + 1)));
        }
    }
}
