//! The innermost loop of products of pairs of bf16 numbers in tiles, where both operands are packed.
#![allow(unsafe_code)] // Raw pointers into matrices; tiles.

use super::ahead::Ahead;
use super::chunks;
use super::tile_sums::{Place, add_rows};
use crate::device::cpu::simd::{TILE, Tiles, tile_kernel};

/// `to[i, j] = first[i, j] + sum over k of a[i, k] b[k, j]`.
#[derive(Clone, Copy)]
pub(super) struct TileOuter {
    /// Of pairs; a multiple of [`TILE`].
    pub k: usize,
    /// Pairs; rows up to a multiple of [`TILE`] can be read.
    pub a: *const u32,
    pub a_row: usize,
    /// Pairs; columns up to a multiple of [`TILE`] can be read.
    pub b: *const u32,
    pub b_row: usize,
    pub to: Place,
}

tile_kernel! {
    /// [`TileOuter`], up to two tiles of columns.
    ///
    /// # Safety
    /// All operands exist, the place is nobody else's.
    pub(super) tile_outer = outer_tiles(rows: usize, columns: usize, t: TileOuter)
}

#[inline(always)]
unsafe fn outer_tiles<T: Tiles>(rows: usize, columns: usize, t: TileOuter) {
    // SAFETY: the caller's.
    unsafe {
        let mut tiles = T::begin();
        for here in chunks(0..rows, 2 * TILE) {
            let (a, to) = (t.a.add(here.start * t.a_row), t.to.from(here.start, 0));
            outer_block(&mut tiles, here.len(), columns, TileOuter { a, to, ..t });
        }
    }
}

/// Up to two tiles of rows by two of columns; tiles 0 to 3 are sums, 4 and 5 `a`, 6 and 7 `b`.
#[inline(always)]
unsafe fn outer_block<T: Tiles>(tiles: &mut T, rows: usize, columns: usize, t: TileOuter) {
    let (two_rows, two_columns) = (rows > TILE, columns > TILE);
    let (a_stride, b_stride) = (4 * t.a_row, 4 * t.b_row);
    tiles.zero::<0>();
    tiles.zero::<1>();
    tiles.zero::<2>();
    tiles.zero::<3>();
    // A line or two of each row, which no processor foresees.
    let (lines, row) = (4 * TILE / (t.k / TILE).max(1) + 1, t.to.y.cast_const().cast());
    let mut result = Ahead::of(row, 4 * t.to.y_row, 4 * columns, rows, lines);
    // SAFETY: the caller's.
    unsafe {
        for k in (0..t.k).step_by(TILE) {
            result.lines();
            let (a, b) = (t.a.add(k), t.b.add(k * t.b_row));
            tiles.load::<4>(a.cast(), a_stride);
            tiles.load::<6>(b.cast(), b_stride);
            tiles.dot_pairs::<0, 4, 6>();
            if two_columns {
                tiles.load::<7>(b.add(TILE).cast(), b_stride);
                tiles.dot_pairs::<1, 4, 7>();
            }
            if two_rows {
                tiles.load::<5>(a.add(TILE * t.a_row).cast(), a_stride);
                tiles.dot_pairs::<2, 5, 6>();
                if two_columns {
                    tiles.dot_pairs::<3, 5, 7>();
                }
            }
        }
        let mut sums = [[0; TILE]; TILE];
        let at = |row: usize, column: usize| t.to.from(row, column);
        tiles.store::<0>(&mut sums);
        add_rows::<T>(&sums, rows.min(TILE), columns.min(TILE), at(0, 0));
        if two_columns {
            tiles.store::<1>(&mut sums);
            add_rows::<T>(&sums, rows.min(TILE), columns - TILE, at(0, TILE));
        }
        if two_rows {
            tiles.store::<2>(&mut sums);
            add_rows::<T>(&sums, rows - TILE, columns.min(TILE), at(TILE, 0));
            if two_columns {
                tiles.store::<3>(&mut sums);
                add_rows::<T>(&sums, rows - TILE, columns - TILE, at(TILE, TILE));
            }
        }
    }
}
