//! The innermost loops of attention on tiles: up to 32 queries meet a chunk of keys.
//!
//! An element of a score is a chain of tile products over the head's width, an element of a result one over the keys in
//! steps of [`STEP`] from the chunk's first; a key that is not seen has weight 0 and adds nothing. So a query's bits depend
//! neither on its column nor on the queries beside it.
#![allow(unsafe_code)] // Raw pointers into scratch; tiles.

use std::ops::Range;

use super::KEYS;
use crate::device::cpu::gemm::TILE_TERMS;
use crate::device::cpu::simd::{Block, Pairs, TILE, Tiles, pair_kernel, prefetch_near, tile_kernel};

/// Keys of one tile product.
pub(super) const STEP: usize = 2 * TILE;

/// Bytes of a tile's row.
const ROW: usize = 4 * TILE;

/// Up to two tiles of queries and a chunk of keys, which are counted from its first.
pub(super) struct Columns {
    /// Whether there is a second tile of queries.
    pub two: bool,
    /// Those that any query sees, widened to whole steps.
    pub keys: Range<usize>,
    /// Those that all queries see; may be reversed where there are none.
    pub all: Range<usize>,
    /// For each query the first key that it sees, and the one after the last.
    pub first: *const f32,
    pub end: *const f32,
    /// Tiles along a head, and across.
    pub steps: usize,
    pub tall: usize,
    /// For sixteen queries a tile for every [`TILE_TERMS`] of the head.
    pub q: *const Block,
    /// For sixteen keys a tile for every [`TILE_TERMS`] of the head.
    pub k: *const Block,
    /// For [`STEP`] keys a tile for every [`TILE`] of the head.
    pub v: *const Block,
    /// For sixteen queries a tile for every [`TILE`] of the head: the weighted sums of values so far.
    pub acc: *mut Block,
    /// For each query the largest score so far and the sum of exponentials.
    pub max: *mut f32,
    pub sum: *mut f32,
    /// A chunk of scores for each of two tiles, and one of weights in pairs.
    pub scores: *mut Block,
    pub weights: *mut Block,
    pub soft_cap: Option<f32>,
}

tile_kernel! {
    /// Takes the chunk into the queries' softmax.
    ///
    /// # Safety
    /// All that is pointed to exists, and what is written is nobody else's.
    pub(super) meet = meet_chunk(t: &Columns)
}

#[inline(always)]
unsafe fn meet_chunk<T: Tiles>(t: &Columns) {
    // SAFETY: the caller's.
    unsafe {
        let mut tiles = T::begin();
        t.score(&mut tiles);
        t.soften::<T::S>(0);
        if t.two {
            t.soften::<T::S>(1);
        }
        t.add_values(&mut tiles);
    }
}

impl Columns {
    /// `scores = K Q'`.
    #[inline(always)]
    unsafe fn score<T: Tiles>(&self, tiles: &mut T) {
        let (q, steps) = (self.q, self.steps);
        // SAFETY: the caller's.
        unsafe {
            for key in self.keys.clone().step_by(STEP) {
                let k = self.k.add(key / TILE * steps);
                tiles.zero::<0>();
                tiles.zero::<1>();
                tiles.zero::<2>();
                tiles.zero::<3>();
                for step in 0..steps {
                    tiles.load::<4>(k.add(step).cast(), ROW);
                    tiles.load::<5>(k.add(steps + step).cast(), ROW);
                    tiles.load::<6>(q.add(step).cast(), ROW);
                    tiles.dot_pairs::<0, 4, 6>();
                    tiles.dot_pairs::<1, 5, 6>();
                    if self.two {
                        tiles.load::<7>(q.add(steps + step).cast(), ROW);
                        tiles.dot_pairs::<2, 4, 7>();
                        tiles.dot_pairs::<3, 5, 7>();
                    }
                }
                let to = self.scores.add(key / TILE);
                tiles.store::<0>(&mut *to);
                tiles.store::<1>(&mut *to.add(1));
                if self.two {
                    tiles.store::<2>(&mut *to.add(KEYS / TILE));
                    tiles.store::<3>(&mut *to.add(KEYS / TILE + 1));
                }
            }
        }
    }

    /// With the new largest score `m'` the weights become `e^(s - m')`, and the sums so far are brought from `m` to `m'`.
    #[inline(always)]
    unsafe fn soften<S: Pairs>(&self, tile: usize) {
        let keys = self.keys.clone();
        // Whole fours that all queries see.
        let from = self.all.start.next_multiple_of(4).clamp(keys.start, keys.end);
        let all = from..(self.all.end / 4 * 4).clamp(from, keys.end);
        // SAFETY: the caller's; a chunk has `KEYS` scores for each of sixteen queries.
        unsafe {
            let scores = self.scores.add(tile * (KEYS / TILE)).cast::<f32>();
            let weights = self.weights.add(tile * (KEYS / STEP)).cast::<f32>();
            if let Some(cap) = self.soft_cap {
                let cap = S::splat(cap);
                for key in keys.clone() {
                    let at = scores.add(key * TILE);
                    S::store(at, S::mul(S::tanh(S::div(S::load(at), cap)), cap));
                }
            }
            let (max, sum) = (self.max.add(tile * TILE), self.sum.add(tile * TILE));
            let old = S::load(max);
            let column = Column::<S> {
                scores,
                weights,
                first: S::load(self.first.add(tile * TILE)),
                end: S::load(self.end.add(tile * TILE)),
            };
            let mut new = column.largest_seen(keys.start..all.start, old);
            new = column.largest(all.clone(), new);
            new = column.largest_seen(all.end..keys.end, new);

            let mut sums = (S::splat(0.0), S::splat(0.0));
            sums = column.weigh::<true>(keys.start..all.start, new, sums);
            sums = column.weigh::<false>(all.clone(), new, sums);
            sums = column.weigh::<true>(all.end..keys.end, new, sums);

            let by = S::exp(S::sub(old, new));
            S::store(max, new);
            S::store(sum, S::add(S::mul(S::load(sum), by), S::add(sums.0, sums.1)));
            let acc = self.acc.add(tile * self.tall).cast::<f32>();
            for row in 0..self.tall * TILE {
                let at = acc.add(row * TILE);
                S::store(at, S::mul(S::load(at), by));
            }
        }
    }

    /// `acc += V' P'`.
    #[inline(always)]
    unsafe fn add_values<T: Tiles>(&self, tiles: &mut T) {
        let tall = self.tall;
        // SAFETY: the caller's.
        unsafe {
            for across in (0..tall).step_by(2) {
                let two_across = tall - across > 1;
                let (acc, next) = (self.acc.add(across), self.acc.add(tall + across));
                tiles.load::<0>(acc.cast(), ROW);
                if two_across {
                    tiles.load::<1>(acc.add(1).cast(), ROW);
                }
                if self.two {
                    tiles.load::<2>(next.cast(), ROW);
                    if two_across {
                        tiles.load::<3>(next.add(1).cast(), ROW);
                    }
                }
                for step in self.keys.start / STEP..self.keys.end / STEP {
                    let (v, p) = (self.v.add(step * tall + across), self.weights.add(step));
                    tiles.load::<4>(v.cast(), ROW);
                    tiles.load::<6>(p.cast(), ROW);
                    tiles.dot_pairs::<0, 4, 6>();
                    if two_across {
                        tiles.load::<5>(v.add(1).cast(), ROW);
                        tiles.dot_pairs::<1, 5, 6>();
                    }
                    if self.two {
                        tiles.load::<7>(p.add(KEYS / STEP).cast(), ROW);
                        tiles.dot_pairs::<2, 4, 7>();
                        if two_across {
                            tiles.dot_pairs::<3, 5, 7>();
                        }
                    }
                }
                tiles.store::<0>(&mut *acc);
                if two_across {
                    tiles.store::<1>(&mut *acc.add(1));
                }
                if self.two {
                    tiles.store::<2>(&mut *next);
                    if two_across {
                        tiles.store::<3>(&mut *next.add(1));
                    }
                }
            }
        }
    }
}

/// The scores and weights of sixteen queries. No closures: those would be calls, through memory.
struct Column<S: Pairs> {
    scores: *const f32,
    weights: *mut f32,
    first: S::V,
    end: S::V,
}

impl<S: Pairs> Column<S> {
    #[inline(always)]
    unsafe fn score(&self, key: usize) -> S::V {
        // SAFETY: the caller's, as in all below.
        unsafe { S::load(self.scores.add(key * TILE)) }
    }

    /// 1 where a query sees the key, 0 where it does not.
    #[inline(always)]
    fn seen(&self, key: usize) -> S::V {
        let (zero, one, key) = (S::splat(0.0), S::splat(1.0), S::splat(key as f32));
        let before_end = S::min(S::max(S::sub(self.end, key), zero), one);
        S::mul(before_end, S::min(S::max(S::add(S::sub(key, self.first), one), zero), one))
    }

    /// The largest of `most` and the scores that queries see.
    #[inline(always)]
    unsafe fn largest_seen(&self, keys: Range<usize>, mut most: S::V) -> S::V {
        for key in keys {
            let seen = self.seen(key);
            let bound = S::mul(S::sub(S::add(seen, seen), S::splat(1.0)), S::splat(f32::INFINITY));
            // The order of operands passes over what is no number, as [`Column::largest`] does.
            // SAFETY: the caller's.
            most = S::max(S::min(bound, unsafe { self.score(key) }), most);
        }
        most
    }

    /// As [`Column::largest_seen`] of whole fours of keys that all queries see.
    #[inline(always)]
    unsafe fn largest(&self, keys: Range<usize>, most: S::V) -> S::V {
        let (mut a, mut b, mut c, mut d) = (most, most, most, most);
        for key in keys.step_by(4) {
            // SAFETY: the caller's.
            unsafe {
                a = S::max(self.score(key), a);
                b = S::max(self.score(key + 1), b);
                c = S::max(self.score(key + 2), c);
                d = S::max(self.score(key + 3), d);
            }
        }
        S::max(S::max(a, b), S::max(c, d))
    }

    /// Weights of an even number of keys; adds them to the sums of even and of odd ones.
    #[inline(always)]
    unsafe fn weigh<const SOME: bool>(
        &self,
        keys: Range<usize>,
        max: S::V,
        mut sums: (S::V, S::V),
    ) -> (S::V, S::V) {
        for key in keys.step_by(2) {
            // SAFETY: the caller's.
            unsafe {
                let mut even = S::exp(S::sub(self.score(key), max));
                let mut odd = S::exp(S::sub(self.score(key + 1), max));
                if SOME {
                    even = S::mul(even, self.seen(key));
                    odd = S::mul(odd, self.seen(key + 1));
                }
                S::store(self.weights.add(key / 2 * TILE), S::pair(even, odd));
                sums = (S::add(sums.0, even), S::add(sums.1, odd));
            }
        }
        sums
    }
}

/// [`STEP`] keys and values, and where they go.
pub(super) struct Step {
    pub k: *const f32,
    pub v: *const f32,
    /// Where each begins; zeros where there is none.
    pub rows: [Option<usize>; STEP],
    /// Those that come next, which are read ahead: with few queries memory is what takes time.
    pub next: [Option<usize>; STEP],
    /// Width of each.
    pub dim: usize,
    pub k_to: *mut Block,
    pub v_to: *mut Block,
}

pair_kernel! {
    /// Rounds keys and values and packs them: keys as they lie, values turned.
    ///
    /// # Safety
    /// The rows exist; there is room for two rows of tiles of keys and one of values, which are nobody else's.
    pub(super) pack_step = pack_keys_and_values(t: &Step)
}

#[inline(always)]
unsafe fn pack_keys_and_values<S: Pairs>(t: &Step) {
    let Step { k, v, rows, next, dim, k_to, v_to } = *t;
    let steps = dim.div_ceil(TILE_TERMS);
    // SAFETY: the caller's.
    unsafe {
        for (i, &row) in rows.iter().enumerate() {
            if let Some(next) = next[i] {
                for column in (0..dim).step_by(TILE) {
                    prefetch_near(k.wrapping_add(next + column));
                    prefetch_near(v.wrapping_add(next + column));
                }
            }
            for step in 0..steps {
                let tile = &mut *k_to.add(i / TILE * steps + step);
                let to = tile[i % TILE].as_mut_ptr().cast::<u16>();
                let column = step * TILE_TERMS;
                S::store_bf16(to, load::<S>(k, row, column, dim));
                let rest =
                    if column + TILE < dim { load::<S>(k, row, column + TILE, dim) } else { S::splat(0.0) };
                S::store_bf16(to.add(TILE), rest);
            }
        }
        for (across, column) in (0..dim).step_by(TILE).enumerate() {
            let mut pairs = [[0_u32; TILE]; TILE];
            for (i, pairs) in pairs.iter_mut().enumerate() {
                let pair = S::pair(
                    load::<S>(v, rows[2 * i], column, dim),
                    load::<S>(v, rows[2 * i + 1], column, dim),
                );
                S::store(pairs.as_mut_ptr().cast(), pair);
            }
            S::transpose(pairs.as_ptr().cast(), TILE, &mut *v_to.add(across));
        }
    }
}

/// Up to sixteen numbers of a row from this column on, zeros beyond; zeros where there is no row.
#[inline(always)]
unsafe fn load<S: Pairs>(from: *const f32, row: Option<usize>, column: usize, dim: usize) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        match row {
            Some(row) if dim - column >= TILE => S::load(from.add(row + column)),
            Some(row) => S::load_first(from.add(row + column), dim - column),
            None => S::splat(0.0),
        }
    }
}

pair_kernel! {
    /// Up to sixteen queries' sums of values, divided by the sums of their weights, to where they go.
    ///
    /// # Safety
    /// All exist, and the rows are nobody else's.
    pub(super) finish = finish_tile(
        acc: *const Block, sum: *const f32, to: &[*mut f32; TILE], queries: usize, dim: usize
    )
}

#[inline(always)]
unsafe fn finish_tile<S: Pairs>(
    acc: *const Block,
    sum: *const f32,
    to: &[*mut f32; TILE],
    queries: usize,
    dim: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let by = S::div(S::splat(1.0), S::load(sum));
        for (across, column) in (0..dim).step_by(TILE).enumerate() {
            let (mut scaled, mut turned) = ([[0_u32; TILE]; TILE], [[0_u32; TILE]; TILE]);
            for (row, to) in (*acc.add(across)).iter().zip(&mut scaled) {
                S::store(to.as_mut_ptr().cast(), S::mul(S::load(row.as_ptr().cast()), by));
            }
            S::transpose(scaled.as_ptr().cast(), TILE, &mut turned);
            for (row, to) in turned.iter().zip(to).take(queries) {
                let row = S::load(row.as_ptr().cast());
                let to = to.add(column);
                if dim - column >= TILE { S::store(to, row) } else { S::store_first(to, dim - column, row) }
            }
        }
    }
}
