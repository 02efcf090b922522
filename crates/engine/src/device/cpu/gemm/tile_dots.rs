//! The innermost loops of products of bf16 numbers in tiles.
//!
//! A tile of weights is the first operand, loaded where the weights lie; the rows that meet them are packed once
//! ([`pack_pairs`]). Each element of a result is a chain of tile products that begins at zero, over a block of terms.
//! So the order depends on the number of terms alone: neither the block's shape nor which rows come together
//! changes a bit.
#![allow(unsafe_code)] // Raw pointers into matrices; tiles.

use super::chunks;
use super::terms::narrow_to_bf16;
use crate::device::cpu::simd::{Block, Pairs, Simd, TILE, Tiles, prefetch, tile_kernel};

/// Terms of a tile: bf16 numbers in its rows.
pub(super) const TILE_TERMS: usize = 2 * TILE;
/// Bytes of a cache line: a tile's row.
const LINE: usize = 4 * TILE;

/// `y[i, j] += sum over k of x[i, k] w[j, k]`.
#[derive(Clone, Copy)]
pub(super) struct TileDots {
    pub terms: usize,
    /// So many are summed apart; a multiple of [`TILE_TERMS`].
    pub block: usize,
    pub w: *const u16,
    pub w_row: usize,
    /// As [`pack_pairs`] leaves them: for sixteen rows a tile for every [`TILE_TERMS`] terms, then the next sixteen.
    pub x: *const Block,
    pub y: *mut f32,
    pub y_row: usize,
}

tile_kernel! {
    /// [`TileDots`]; the weights are read once, in the order of memory as far as a tile has rows.
    ///
    /// # Safety
    /// All operands exist, `y` is nobody else's.
    pub(super) tile_dots = dot_tiles(rows: usize, outputs: usize, t: TileDots)
}

#[inline(always)]
unsafe fn dot_tiles<T: Tiles>(rows: usize, outputs: usize, t: TileDots) {
    // SAFETY: the caller's; a block's rows, outputs and terms are some of all.
    unsafe {
        let mut tiles = T::begin();
        let x_tiles = t.terms.div_ceil(TILE_TERMS);
        for some in chunks(0..outputs, 2 * TILE) {
            for k in chunks(0..t.terms, t.block) {
                for here in chunks(0..rows, 2 * TILE) {
                    let at = TileDots {
                        terms: k.len(),
                        w: t.w.add(some.start * t.w_row + k.start),
                        x: t.x.add(here.start / TILE * x_tiles + k.start / TILE_TERMS),
                        y: t.y.add(here.start * t.y_row + some.start),
                        ..t
                    };
                    // Only the first rows wait for memory.
                    let ahead = here.start == 0;
                    dot_block(&mut tiles, here.len(), some.len(), at, x_tiles, ahead);
                }
            }
        }
    }
}

/// Up to two tiles of outputs by two of rows, whose sums stay in tiles 0 to 3. Tiles 4 and 5 are weights, 6 and 7 rows.
#[inline(always)]
unsafe fn dot_block<T: Tiles>(
    tiles: &mut T,
    rows: usize,
    outputs: usize,
    t: TileDots,
    x_tiles: usize,
    ahead: bool,
) {
    let (two_outputs, two_rows) = (outputs > TILE, rows > TILE);
    tiles.zero::<0>();
    tiles.zero::<1>();
    tiles.zero::<2>();
    tiles.zero::<3>();
    // SAFETY: the caller's.
    unsafe {
        let next = t.w.wrapping_add(outputs * t.w_row);
        let mut next = Ahead::of(next.cast(), 2 * t.w_row, 2 * t.terms);
        for (step, k) in (0..t.terms).step_by(TILE_TERMS).enumerate() {
            if ahead {
                next.lines(outputs);
            }
            let terms = (t.terms - k).min(TILE_TERMS);
            load_rows::<T, 4>(tiles, t.w.add(k), t.w_row, outputs, terms);
            tiles.load::<6>(t.x.add(step).cast(), 4 * TILE);
            tiles.dot_pairs::<0, 4, 6>();
            if two_rows {
                tiles.load::<7>(t.x.add(x_tiles + step).cast(), 4 * TILE);
                tiles.dot_pairs::<1, 4, 7>();
            }
            if two_outputs {
                load_rows::<T, 5>(tiles, t.w.add(TILE * t.w_row + k), t.w_row, outputs - TILE, terms);
                tiles.dot_pairs::<2, 5, 6>();
                if two_rows {
                    tiles.dot_pairs::<3, 5, 7>();
                }
            }
        }
        let mut sums = [[0; TILE]; TILE];
        let y = |row: usize, output: usize| t.y.wrapping_add(row * t.y_row + output);
        tiles.store::<0>(&mut sums);
        add_turned::<T>(&sums, rows.min(TILE), outputs.min(TILE), y(0, 0), t.y_row);
        if two_rows {
            tiles.store::<1>(&mut sums);
            add_turned::<T>(&sums, rows - TILE, outputs.min(TILE), y(TILE, 0), t.y_row);
        }
        if two_outputs {
            tiles.store::<2>(&mut sums);
            add_turned::<T>(&sums, rows.min(TILE), outputs - TILE, y(0, TILE), t.y_row);
            if two_rows {
                tiles.store::<3>(&mut sums);
                add_turned::<T>(&sums, rows - TILE, outputs - TILE, y(TILE, TILE), t.y_row);
            }
        }
    }
}

/// Reads the rows of weights that come next ahead, one after the other: processors foresee the order of memory, but not
/// that of tiles, a line of each of sixteen rows.
pub(super) struct Ahead {
    row: *const u8,
    row_stride: usize,
    at: usize,
    bytes: usize,
}

impl Ahead {
    /// Rows of so many bytes each.
    pub(super) fn of(row: *const u8, row_stride: usize, bytes: usize) -> Ahead {
        Ahead { row, row_stride, at: 0, bytes }
    }

    /// So many lines more. After the last rows of a matrix it reads on, where a hint does no harm.
    #[inline(always)]
    pub(super) fn lines(&mut self, count: usize) {
        for _ in 0..count {
            prefetch(self.row.wrapping_add(self.at));
            self.at += LINE;
            if self.at >= self.bytes {
                (self.at, self.row) = (0, self.row.wrapping_add(self.row_stride));
            }
        }
    }
}

/// Loads the first `terms` terms of `rows` rows, at most a tile of both; zeros beyond.
///
/// # Safety
/// They exist.
#[inline(always)]
unsafe fn load_rows<T: Tiles, const A: u8>(
    tiles: &mut T,
    from: *const u16,
    row: usize,
    rows: usize,
    terms: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        if rows >= TILE && terms == TILE_TERMS {
            return tiles.load::<A>(from.cast(), 2 * row);
        }
        let mut block = [[0_u16; TILE_TERMS]; TILE];
        for (i, to) in block.iter_mut().enumerate().take(rows) {
            std::ptr::copy_nonoverlapping(from.add(i * row), to.as_mut_ptr(), terms);
        }
        tiles.load::<A>(block.as_ptr().cast(), 4 * TILE);
    }
}

/// `y[i, j] += sums[j][i]`.
///
/// # Safety
/// `y` has these rows and outputs, at most a tile of both, and is nobody else's.
#[inline(always)]
pub(super) unsafe fn add_turned<T: Tiles>(
    sums: &Block,
    rows: usize,
    outputs: usize,
    y: *mut f32,
    y_row: usize,
) {
    let mut turned = [[0; TILE]; TILE];
    // SAFETY: a block has sixteen rows; the rest is the caller's.
    unsafe {
        T::S::transpose(sums.as_ptr().cast(), TILE, &mut turned);
        add::<T>(&turned, rows, outputs, y, y_row);
    }
}

/// `y[i, j] += sums[i][j]`.
///
/// # Safety
/// As [`add_turned`].
#[inline(always)]
unsafe fn add<T: Tiles>(sums: &Block, rows: usize, columns: usize, y: *mut f32, y_row: usize) {
    for (i, sums) in sums.iter().enumerate().take(rows) {
        // SAFETY: the caller's.
        unsafe {
            let (sums, y) = (T::S::load(sums.as_ptr().cast()), y.add(i * y_row));
            if columns == TILE {
                T::S::store(y, T::S::add(T::S::load(y), sums));
            } else {
                T::S::store_first(y, columns, T::S::add(T::S::load_first(y, columns), sums));
            }
        }
    }
}

tile_kernel! {
    /// Rounds up to sixteen rows to bf16 and packs them: a tile for every [`TILE_TERMS`] terms, in which a column is a row
    /// of `x`. Zeros beyond the terms and the rows.
    ///
    /// # Safety
    /// The rows, `x_row` apart, and the tiles exist; the tiles are nobody else's.
    pub(super) pack_pairs = pack_rows(x: *const f32, x_row: usize, rows: usize, terms: usize, to: *mut Block)
}

#[inline(always)]
unsafe fn pack_rows<T: Tiles>(x: *const f32, x_row: usize, rows: usize, terms: usize, to: *mut Block) {
    for (step, k) in (0..terms).step_by(TILE_TERMS).enumerate() {
        let mut pairs = [[0_u32; TILE]; TILE];
        // SAFETY: the caller's; rows of the block hold a tile's terms.
        unsafe {
            for (i, pairs) in pairs.iter_mut().enumerate().take(rows) {
                let count = (terms - k).min(TILE_TERMS);
                narrow_to_bf16::<T::S>(x.add(i * x_row + k), pairs.as_mut_ptr().cast(), count);
            }
            T::S::transpose(pairs.as_ptr().cast(), TILE, &mut *to.add(step));
        }
    }
}

/// `c[i, j] += sum over k of a[i, k] b[k, j]`.
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
    pub c: *mut f32,
    pub c_row: usize,
}

tile_kernel! {
    /// [`TileOuter`], up to two tiles of columns.
    ///
    /// # Safety
    /// All operands exist, `c` is nobody else's.
    pub(super) tile_outer = outer_tiles(rows: usize, columns: usize, t: TileOuter)
}

#[inline(always)]
unsafe fn outer_tiles<T: Tiles>(rows: usize, columns: usize, t: TileOuter) {
    // SAFETY: the caller's.
    unsafe {
        let mut tiles = T::begin();
        for here in chunks(0..rows, 2 * TILE) {
            let (a, c) = (t.a.add(here.start * t.a_row), t.c.add(here.start * t.c_row));
            outer_block(&mut tiles, here.len(), columns, TileOuter { a, c, ..t });
        }
    }
}

/// Up to two tiles of rows by two of columns; tiles are numbered as in [`dot_block`].
#[inline(always)]
unsafe fn outer_block<T: Tiles>(tiles: &mut T, rows: usize, columns: usize, t: TileOuter) {
    let (two_rows, two_columns) = (rows > TILE, columns > TILE);
    let (a_stride, b_stride) = (4 * t.a_row, 4 * t.b_row);
    tiles.zero::<0>();
    tiles.zero::<1>();
    tiles.zero::<2>();
    tiles.zero::<3>();
    // SAFETY: the caller's.
    unsafe {
        for k in (0..t.k).step_by(TILE) {
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
        let c = |row: usize, column: usize| t.c.wrapping_add(row * t.c_row + column);
        tiles.store::<0>(&mut sums);
        add::<T>(&sums, rows.min(TILE), columns.min(TILE), c(0, 0), t.c_row);
        if two_columns {
            tiles.store::<1>(&mut sums);
            add::<T>(&sums, rows.min(TILE), columns - TILE, c(0, TILE), t.c_row);
        }
        if two_rows {
            tiles.store::<2>(&mut sums);
            add::<T>(&sums, rows - TILE, columns.min(TILE), c(TILE, 0), t.c_row);
            if two_columns {
                tiles.store::<3>(&mut sums);
                add::<T>(&sums, rows - TILE, columns - TILE, c(TILE, TILE), t.c_row);
            }
        }
    }
}
