//! What happens to the sums of tiles: they are added to what a result begins with.
#![allow(unsafe_code)] // Raw pointers into matrices.

use crate::device::cpu::simd::{Block, Pairs, Simd, TILE, Tiles};

/// Where sums go.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub y: *mut f32,
    pub y_row: usize,
    pub first: First,
}

/// What sums are added to.
#[derive(Clone, Copy)]
pub(super) enum First {
    Zero,
    /// What is there.
    There,
    /// Rows so far apart; the same row where that is 0.
    Of(*const f32, usize),
}

impl Place {
    /// The same from this row and output on.
    pub(super) fn from(self, row: usize, output: usize) -> Place {
        let first = match self.first {
            First::Of(from, stride) => First::Of(from.wrapping_add(row * stride + output), stride),
            other => other,
        };
        Place { y: self.y.wrapping_add(row * self.y_row + output), first, ..self }
    }
}

/// `to[i, j] = first[i, j] + sums[j][i]`.
///
/// # Safety
/// The place has these rows and outputs, at most a tile of both, and is nobody else's.
#[inline(always)]
pub(super) unsafe fn add_turned<T: Tiles>(sums: &Block, rows: usize, outputs: usize, to: Place) {
    let mut turned = [[0; TILE]; TILE];
    // SAFETY: a block has sixteen rows; the rest is the caller's.
    unsafe {
        T::S::transpose(sums.as_ptr().cast(), TILE, &mut turned);
        add_rows::<T>(&turned, rows, outputs, to);
    }
}

/// `to[i, j] = first[i, j] + sums[i][j]`.
///
/// # Safety
/// As [`add_turned`].
#[inline(always)]
pub(super) unsafe fn add_rows<T: Tiles>(sums: &Block, rows: usize, columns: usize, to: Place) {
    for (i, sums) in sums.iter().enumerate().take(rows) {
        let Place { y, first, .. } = to.from(i, 0);
        // SAFETY: the caller's.
        unsafe {
            let sums = T::S::load(sums.as_ptr().cast());
            let load = |from: *const f32| match columns {
                TILE => T::S::load(from),
                _ => T::S::load_first(from, columns),
            };
            let first = match first {
                First::Zero => T::S::splat(0.0),
                First::There => load(y),
                First::Of(from, _) => load(from),
            };
            let sums = T::S::add(first, sums);
            if columns == TILE { T::S::store(y, sums) } else { T::S::store_first(y, columns, sums) }
        }
    }
}
