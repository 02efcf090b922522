//! Rows as tiles of bf16 numbers meet them.
#![allow(unsafe_code)] // Raw pointers into matrices.

use super::terms::narrow_to_bf16;
use crate::device::cpu::simd::{Block, Pairs, TILE, Tiles, tile_kernel};

/// Terms of a tile: bf16 numbers in its rows.
pub(in super::super) const TILE_TERMS: usize = 2 * TILE;

tile_kernel! {
    /// Rounds up to sixteen rows to bf16 and packs them: a tile for every [`TILE_TERMS`] terms, in which a column is a row
    /// of `x`. Zeros beyond the terms and the rows.
    ///
    /// # Safety
    /// The rows, `x_row` apart, and the tiles exist; the tiles are nobody else's.
    pub(in super::super) pack_pairs = pack_rows(x: *const f32, x_row: usize, rows: usize, terms: usize, to: *mut Block)
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
