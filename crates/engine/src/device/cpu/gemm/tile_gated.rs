//! The innermost loop of a gated layer: sixteen outputs of the gate and the same of what it lets through are a block's two tiles,
//! so that both sums meet in the second-level cache and only their product goes to memory.
#![allow(unsafe_code)] // Raw pointers into matrices; tiles.

use super::chunks;
use super::tile_dots::{DotBlock, TileDots};
use super::tile_pack::TILE_TERMS;
use super::tile_sums::{First, Place};
use crate::device::Activation;
use crate::device::cpu::glu::gated;
use crate::device::cpu::simd::{Simd, TILE, Tiles, tile_kernel};

/// Numbers of a row of sums: the gate's, then the others.
pub(super) const SUMS: usize = 2 * TILE;

/// `out[i, j] = activation(x[i] gate[j]) * (x[i] up[j])`.
#[derive(Clone, Copy)]
pub(super) struct TileGated {
    /// The gate's products; their place has [`SUMS`] numbers for each row.
    pub gate: TileDots,
    pub up: *const u16,
    pub activation: Activation,
    pub out: *mut f32,
    pub out_row: usize,
}

tile_kernel! {
    /// [`TileGated`], for whole tiles of outputs.
    ///
    /// # Safety
    /// All operands exist, `out`, the sums and `near` are nobody else's.
    pub(super) tile_gated = gate_tiles(rows: usize, outputs: usize, t: TileGated)
}

#[inline(always)]
unsafe fn gate_tiles<T: Tiles>(rows: usize, outputs: usize, t: TileGated) {
    let TileGated { gate, up, activation, out, out_row } = t;
    let x_tiles = gate.terms.div_ceil(TILE_TERMS);
    // SAFETY: the caller's; a block's outputs and terms are some of all.
    unsafe {
        let mut tiles = T::begin();
        for output in (0..outputs).step_by(TILE) {
            let out = out.add(output);
            for k in chunks(0..gate.terms, gate.block) {
                let first = if k.start == 0 { First::Zero } else { First::There };
                let at = output * gate.w_row + k.start;
                let b = DotBlock {
                    rows,
                    outputs: 2 * TILE,
                    next: if output + TILE < outputs { 2 * TILE } else { 0 },
                    skip: TILE,
                    terms: k.len(),
                    w: [gate.w.add(at), up.add(at)],
                    w_row: gate.w_row,
                    done: k.start,
                    left: gate.terms - k.start,
                    x: gate.x.add(k.start / TILE_TERMS),
                    x_tiles,
                    to: Place { first, ..gate.to },
                    result: (out, out_row, TILE),
                };
                b.parts(&mut tiles, gate.near);
            }
            for row in 0..rows {
                let sums = gate.to.y.add(row * gate.to.y_row);
                let both = gated::<T::S>(activation, T::S::load(sums), T::S::load(sums.add(TILE)));
                T::S::store(out.add(row * out_row), both);
            }
        }
    }
}
