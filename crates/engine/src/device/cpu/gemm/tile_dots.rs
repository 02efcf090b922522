//! The innermost loops of products of bf16 numbers in tiles.
//!
//! A tile of weights is the first operand, loaded where the weights lie; the rows that meet them are packed once
//! ([`super::tile_pack`]). Each element of a result is a chain of tile products that begins at zero, over a block of terms.
//! So the order depends on the number of terms alone: neither the block's shape nor which rows come together
//! changes a bit.
//!
//! A tile is loaded as fast as it is multiplied only from the first-level cache. With many rows a part of a chain is taken for
//! all of them before the next part, while the weights of that part lie there, copied side by side; the sums wait in the
//! second-level cache.
#![allow(unsafe_code)] // Raw pointers into matrices; tiles.

use super::ahead::{Ahead, LINE};
use super::chunks;
use super::tile_pack::TILE_TERMS;
use super::tile_sums::{First, Place, add_turned};
use crate::device::cpu::simd::{Block, TILE, Tiles, prefetch_near, tile_kernel};

/// Tiles along the sum that are taken for all rows together: two rows of them, 24 KiB, stay in the first-level cache beside
/// what streams by.
const PART: usize = 12;

/// Tiles along the sum that weights are read ahead: some hundred nanoseconds.
const AHEAD: usize = 8;

/// Tiles of a thread's own that [`tile_dots`] needs for so many rows.
pub(super) const fn near_tiles(rows: usize) -> usize {
    2 * PART + 4 * rows.div_ceil(2 * TILE)
}

/// `y[i, j] = first[i, j] + sum over k of x[i, k] w[j, k]`.
#[derive(Clone, Copy)]
pub(super) struct TileDots {
    pub terms: usize,
    /// So many are summed apart; a multiple of [`TILE_TERMS`].
    pub block: usize,
    pub w: *const u16,
    pub w_row: usize,
    /// As [`super::tile_pack::pack_pairs`] leaves them: for sixteen rows a tile for every [`TILE_TERMS`] terms, then the next sixteen.
    pub x: *const Block,
    pub to: Place,
    /// [`near_tiles`] of them.
    pub near: *mut Block,
}

tile_kernel! {
    /// [`TileDots`]; the weights are read once, in the order of memory as far as a tile has rows.
    ///
    /// # Safety
    /// All operands exist, `y` and `near` are nobody else's.
    pub(super) tile_dots = dot_tiles(rows: usize, outputs: usize, t: TileDots)
}

#[inline(always)]
unsafe fn dot_tiles<T: Tiles>(rows: usize, outputs: usize, t: TileDots) {
    // SAFETY: the caller's; a block's rows, outputs and terms are some of all.
    unsafe {
        let mut tiles = T::begin();
        let x_tiles = t.terms.div_ceil(TILE_TERMS);
        for some in chunks(0..outputs, 2 * TILE) {
            let next = (outputs - some.end).min(2 * TILE);
            for k in chunks(0..t.terms, t.block) {
                let first = if k.start == 0 { t.to.first } else { First::There };
                let w = t.w.add(some.start * t.w_row + k.start);
                let to = Place { first, ..t.to }.from(0, some.start);
                let b = DotBlock {
                    rows,
                    outputs: some.len(),
                    next,
                    skip: some.len(),
                    terms: k.len(),
                    w: [w, w.wrapping_add(TILE * t.w_row)],
                    w_row: t.w_row,
                    done: k.start,
                    left: t.terms - k.start,
                    x: t.x.add(k.start / TILE_TERMS),
                    x_tiles,
                    to,
                    result: (to.y, to.y_row, some.len()),
                };
                if rows <= 2 * TILE {
                    b.begin(&mut tiles, None);
                    b.multiply::<T, true, false>(&mut tiles, 0, std::ptr::null_mut(), Ahead::nothing());
                    b.end(&mut tiles, 0);
                } else {
                    b.parts(&mut tiles, t.near);
                }
            }
        }
    }
}

/// All rows with up to two tiles of outputs. The sums of up to two tiles of rows are in tiles 0 to 3; 4 and 5 are weights, 6
/// and 7 rows.
#[derive(Clone, Copy)]
pub(super) struct DotBlock {
    pub rows: usize,
    pub outputs: usize,
    /// Outputs that come next, and rows of weights from each tile's to theirs.
    pub next: usize,
    pub skip: usize,
    pub terms: usize,
    /// Where each tile's weights begin.
    pub w: [*const u16; 2],
    pub w_row: usize,
    /// Terms of the outputs' rows before and from `w` on.
    pub done: usize,
    pub left: usize,
    pub x: *const Block,
    pub x_tiles: usize,
    pub to: Place,
    /// What waits for the sums, in memory: its first row, the distance to the next one, and numbers of each.
    pub result: (*const f32, usize, usize),
}

impl DotBlock {
    /// Part by part of the chain, for all rows each.
    #[inline(always)]
    pub(super) unsafe fn parts<T: Tiles>(self, tiles: &mut T, near: *mut Block) {
        let steps = self.terms.div_ceil(TILE_TERMS);
        let part = steps.div_ceil(steps.div_ceil(PART)) * TILE_TERMS;
        // SAFETY: the caller's, as in all below.
        unsafe {
            let waiting = near.add(2 * PART);
            for k in chunks(0..self.terms, part) {
                let x = self.x.add(k.start / TILE_TERMS);
                let (done, left) = (self.done + k.start, self.left - k.start);
                let w = [self.w[0].wrapping_add(k.start), self.w[1].wrapping_add(k.start)];
                let b = DotBlock { terms: k.len(), w, done, left, x, ..self };
                for first in (0..self.rows).step_by(2 * TILE) {
                    let sums = waiting.add(4 * (first / (2 * TILE)));
                    b.begin(tiles, (k.start > 0).then_some(sums.cast_const()));
                    let last = k.end == self.terms;
                    if first == 0 {
                        b.multiply::<T, true, true>(tiles, first, near, Ahead::nothing());
                    } else {
                        b.multiply::<T, false, false>(tiles, first, near, b.result_ahead(first, last));
                    }
                    if last {
                        b.end(tiles, first);
                    } else {
                        tiles.store::<0>(&mut *sums);
                        tiles.store::<1>(&mut *sums.add(1));
                        tiles.store::<2>(&mut *sums.add(2));
                        tiles.store::<3>(&mut *sums.add(3));
                    }
                }
            }
        }
    }

    /// Reads a line of each output's row ahead, [`AHEAD`] tiles from term `k`: processors follow a row of weights for themselves,
    /// but not sixteen at a time, nor to the outputs that come next.
    #[inline(always)]
    fn read_ahead(self, k: usize) {
        let at = k + AHEAD * TILE_TERMS;
        let (from, rows) = match at.checked_sub(self.left) {
            None => (at, self.outputs),
            Some(over) => ((self.skip * self.w_row + over).wrapping_sub(self.done), self.next),
        };
        let [first, second] = self.w;
        for row in 0..rows.min(TILE) {
            prefetch_near(first.wrapping_add(from).wrapping_add(row * self.w_row));
        }
        for row in 0..rows.saturating_sub(TILE) {
            prefetch_near(second.wrapping_add(from).wrapping_add(row * self.w_row));
        }
    }

    /// The result of the rows from `first` on, where sums meet it `soon`: a line or two of each of its rows, which no processor
    /// foresees.
    #[inline(always)]
    fn result_ahead(self, first: usize, soon: bool) -> Ahead {
        let rows = if soon { (self.rows - first).min(2 * TILE) } else { 0 };
        let (row, stride, numbers) = self.result;
        let row = row.wrapping_add(first * stride).cast();
        Ahead::of(row, 4 * stride, 4 * numbers, rows, 4 * TILE / PART + 1)
    }

    /// The sums as they stand; zeros where nothing is given.
    #[inline(always)]
    unsafe fn begin<T: Tiles>(self, tiles: &mut T, sums: Option<*const Block>) {
        let Some(sums) = sums else {
            tiles.zero::<0>();
            tiles.zero::<1>();
            tiles.zero::<2>();
            tiles.zero::<3>();
            return;
        };
        // SAFETY: the caller's.
        unsafe {
            tiles.load::<0>(sums.cast(), LINE);
            tiles.load::<1>(sums.add(1).cast(), LINE);
            tiles.load::<2>(sums.add(2).cast(), LINE);
            tiles.load::<3>(sums.add(3).cast(), LINE);
        }
    }

    /// Adds the products of the rows from `first` on. Weights come from where they lie (`FAR`), and are left in `near`
    /// (`KEEP`), or from `near`.
    #[inline(always)]
    unsafe fn multiply<T: Tiles, const FAR: bool, const KEEP: bool>(
        self,
        tiles: &mut T,
        first: usize,
        near: *mut Block,
        mut ahead: Ahead,
    ) {
        let DotBlock { outputs, w, w_row, .. } = self;
        let (two_outputs, two_rows) = (outputs > TILE, self.rows - first > TILE);
        // SAFETY: the caller's.
        unsafe {
            let x = self.x.add(first / TILE * self.x_tiles);
            for (step, k) in (0..self.terms).step_by(TILE_TERMS).enumerate() {
                let terms = (self.terms - k).min(TILE_TERMS);
                ahead.lines();
                if FAR {
                    self.read_ahead(k);
                    load_rows::<T, 4>(tiles, w[0].add(k), w_row, outputs, terms);
                } else {
                    tiles.load::<4>(near.add(2 * step).cast(), LINE);
                }
                if KEEP {
                    tiles.store::<4>(&mut *near.add(2 * step));
                }
                tiles.load::<6>(x.add(step).cast(), LINE);
                tiles.dot_pairs::<0, 4, 6>();
                if two_rows {
                    tiles.load::<7>(x.add(self.x_tiles + step).cast(), LINE);
                    tiles.dot_pairs::<1, 4, 7>();
                }
                if two_outputs {
                    if FAR {
                        load_rows::<T, 5>(tiles, w[1].add(k), w_row, outputs - TILE, terms);
                    } else {
                        tiles.load::<5>(near.add(2 * step + 1).cast(), LINE);
                    }
                    if KEEP {
                        tiles.store::<5>(&mut *near.add(2 * step + 1));
                    }
                    tiles.dot_pairs::<2, 5, 6>();
                    if two_rows {
                        tiles.dot_pairs::<3, 5, 7>();
                    }
                }
            }
        }
    }

    /// Adds the sums of the rows from `first` on to what the result begins with.
    #[inline(always)]
    unsafe fn end<T: Tiles>(self, tiles: &mut T, first: usize) {
        let (rows, outputs) = (self.rows - first, self.outputs);
        let to = |row: usize, output: usize| self.to.from(first + row, output);
        let mut sums = [[0; TILE]; TILE];
        // SAFETY: the caller's.
        unsafe {
            tiles.store::<0>(&mut sums);
            add_turned::<T>(&sums, rows.min(TILE), outputs.min(TILE), to(0, 0));
            if rows > TILE {
                tiles.store::<1>(&mut sums);
                add_turned::<T>(&sums, (rows - TILE).min(TILE), outputs.min(TILE), to(TILE, 0));
            }
            if outputs > TILE {
                tiles.store::<2>(&mut sums);
                add_turned::<T>(&sums, rows.min(TILE), outputs - TILE, to(0, TILE));
                if rows > TILE {
                    tiles.store::<3>(&mut sums);
                    add_turned::<T>(&sums, (rows - TILE).min(TILE), outputs - TILE, to(TILE, TILE));
                }
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
